"""fastai's language-model learner, judged: `python -m examples.peers_fastai`.

The loader cuts the text, each batch is one chunk; AWD_LSTM keeps its state itself, detaches it
after each forward, and is reset before each epoch by `ModelResetter`. fastai steps its parameters
with an optimizer of its own, which is none of torch's.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import tbptt_props as tb
from examples.peers_model import tell

NEEDED = "This example needs fastai: pip install fastai==2.8.12"
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from fastai.text.all import (
            AWD_LSTM,
            CrossEntropyLossFlat,
            DataLoader,
            DataLoaders,
            Learner,
            LMDataLoader,
            get_language_model,
            rnn_cbs,
        )
except ModuleNotFoundError as missing:
    raise SystemExit(NEEDED) from missing

VOCABULARY = 11
SIZES = {"emb_sz": 4, "n_hid": 5, "n_layers": 2, "pad_token": 1}
LAYERS = {**SIZES, "tie_weights": True, "out_bias": True}
DROPS = {"output_p": 0.1, "hidden_p": 0.2, "input_p": 0.3, "embed_p": 0.1, "weight_p": 0.2}
WEIGHTS = {**dict.fromkeys(DROPS, 0.0), "weight_p": 0.2}


def text(case: tb.Case) -> list[Any]:
    """Return the batches that fastai's loader makes of a text: (B, K) tokens and what follows."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.batch * case.steps + 1
    ids = torch.randint(2, VOCABULARY, (size,), generator=generator)
    made = LMDataLoader([ids], lens=[size], bs=case.batch, seq_len=case.chunk)
    return [(torch.as_tensor(x).clone(), torch.as_tensor(y).clone()) for x, y in made]


def train(module: nn.Module, batches: Sequence[Any]) -> None:
    """Train for one epoch, as `language_model_learner` does."""
    loader = DataLoader(batches, bs=None, num_workers=0)
    learner = Learner(
        DataLoaders(loader, loader, device=torch.device("cpu")),
        module,
        loss_func=CrossEntropyLossFlat(),
        cbs=rnn_cbs(),
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=1e-2)


def build(case: tb.Case, drops: Mapping[str, float] = DROPS) -> tb.Subject:
    """Make the subject that is judged, with all of its dropouts."""
    return tb.Subject(
        get_language_model(AWD_LSTM, VOCABULARY, config={**LAYERS, **drops}),
        loss=CrossEntropyLossFlat(),
        state="0.hidden",
        batches=text,
        train=train,
        contract=tb.Contract(carry="across"),
    )


def build_plain(case: tb.Case) -> tb.Subject:
    """Make the subject of which weights alone are dropped out."""
    return build(case, WEIGHTS)


if __name__ == "__main__":
    tell(build)
    tell(build_plain)
