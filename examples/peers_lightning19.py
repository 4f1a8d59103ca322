"""Lightning 1.9's own TBPTT, judged: `python -m examples.peers_lightning19`.

It is the last one that has it: a module says `truncated_bptt_steps`, and the trainer cuts each
batch, hands `hiddens` on, and makes one update per chunk.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import tbptt_props as tb
from examples.peers_model import tell

NEEDED = "This example needs Lightning 1.9: pip install pytorch-lightning==1.9.5 'setuptools<81'"
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it uses what others have since renamed
        import pytorch_lightning as pl
except ModuleNotFoundError as missing:
    raise SystemExit(NEEDED) from missing
if not hasattr(pl.LightningModule, "truncated_bptt_steps"):
    raise SystemExit(NEEDED)


class Net(pl.LightningModule):  # type: ignore[misc]  # its types are not looked at
    """As the documentation of 1.9 has it, with a GRU."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.truncated_bptt_steps = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.rnn(x, state)
        return self.readout(features), state

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> dict[str, Any]:
        """Train on a chunk, which the trainer has cut."""
        x, y = batch
        prediction, hiddens = self(x, hiddens)
        return {"loss": mse_loss(prediction, y), "hiddens": hiddens}  # the trainer detaches them

    def configure_optimizers(self) -> optim.Optimizer:
        """Make the optimizer."""
        return optim.Adam(self.parameters(), lr=1e-2)


class Manual(Net):
    """Makes its updates itself; the trainer cuts and hands on all the same."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any) -> dict[str, Any]:
        """Train on a chunk, which the trainer has cut."""
        x, y = batch
        prediction, hiddens = self(x, hiddens)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(mse_loss(prediction, y))
        optimizer.step()
        return {"hiddens": hiddens}


def train(module: nn.Module, batches: Sequence[Any], **options: Any) -> None:
    """Train for one epoch as Lightning does."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    whole: Any = batches  # a sequence of batches is a data set whose items are not put together
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, DataLoader(whole, batch_size=None))


def build(case: tb.Case) -> tb.Subject:
    """Make the subject whose updates Lightning makes."""
    return tb.Subject(Net(case), loss=mse_loss, train=train)


def build_manual(case: tb.Case) -> tb.Subject:
    """Make the subject that makes its updates itself."""
    return tb.Subject(Manual(case), loss=mse_loss, train=train)


if __name__ == "__main__":
    tell(build)
    tell(build_manual)
