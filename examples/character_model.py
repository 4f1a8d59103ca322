"""A language model that learns Python's own help texts character by character, chunk by chunk.

This is what a user's module looks like: the loop is written by hand inside `training_step`, and
nothing in it knows that it will be judged. `python -m examples.character_model` trains it.

Shapes: B sequences, T time steps, K time steps in a chunk, H hidden units, V characters. A time
step is one character; a batch is one-hot characters (B, T, V) and their successors (B, T, V).

Source: Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks" (2015), whose
min-char-rnn this is in Lightning, with a GRU and Adam.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import tbptt_props as tb


def bits_per_character(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross entropy of (B, K, V) logits and (B, K, V) probabilities, in bits."""
    return cross_entropy(prediction.flatten(0, 1), target.flatten(0, 1)) / math.log(2)


class CharacterModel(LightningModule):
    """A GRU that predicts the next character, trained on chunks of K time steps.

    Args:
        inputs: the size of the alphabet it reads, V.
        hidden: H.
        outputs: the size of the alphabet it writes, here the same V.
        chunk: K, the time steps trained on together; a passage's last chunk may be shorter.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, chunk: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chunk = chunk
        self.gru = nn.GRU(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read (B, K, V) characters on from `state`; return (B, K, V) logits and the new state."""
        features, state = self.gru(x, state)
        return self.readout(features), state

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Learn from (B, T, V) characters and their successors, with one update for every chunk."""
        x, y = batch
        optimizer: Any = self.optimizers()
        state = None
        bits = x.new_zeros(())
        for start in range(0, x.shape[1], self.chunk):
            chunk = slice(start, start + self.chunk)
            prediction, state = self(x[:, chunk], state)
            loss = bits_per_character(prediction, y[:, chunk])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            state = state.detach()
            bits += loss.detach() * prediction.shape[1]
        self.log("bits_per_character", bits / x.shape[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    model = CharacterModel(case.inputs, case.hidden, case.outputs, chunk=case.chunk)
    return tb.Subject(model, loss=bits_per_character)


def help_texts() -> str:
    """Return the texts that come with Python and that `help("for")` and the like show."""
    return "\n".join(topics.values())


def alphabet_of(text: str) -> str:
    """Return the V different characters of the text, in order."""
    return "".join(sorted(set(text)))


def encoded(text: str, alphabet: str) -> Tensor:
    """Return where in the alphabet each character of the text stands."""
    place = {character: i for i, character in enumerate(alphabet)}
    return torch.tensor([place[character] for character in text])


@dataclass(frozen=True)
class Passages:
    """Batches of B = `batch` passages of T = `steps` characters, each from a random place."""

    text: str
    alphabet: str
    batch: int = 32
    steps: int = 100
    batches: int = 100
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one-hot characters (B, T, V) and their successors (B, T, V)."""
        generator = torch.Generator().manual_seed(self.seed)
        codes = encoded(self.text, self.alphabet)
        offsets = torch.arange(self.steps + 1)
        for _ in range(self.batches):
            starts = torch.randint(len(codes) - self.steps, (self.batch, 1), generator=generator)
            hot = one_hot(codes[starts + offsets], len(self.alphabet)).to(self.dtype)
            yield hot[:, :-1], hot[:, 1:]


class Progress(Callback):
    """Keeps the loss of every batch, and says now and then how far it has fallen."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.bits: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note the loss of the batch that was just learnt from."""
        self.bits.append(trainer.callback_metrics["bits_per_character"].item())
        if len(self.bits) % self.every == 0:
            mean = sum(self.bits[-self.every :]) / self.every
            print(f"after {len(self.bits):4} batches: {mean:.2f} bits per character", flush=True)


def learn(model: CharacterModel, passages: Passages, *, every: int = 50) -> list[float]:
    """Train on every batch of passages once; return each batch's loss in bits per character."""
    progress = Progress(every)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[progress],
    )
    with warnings.catch_warnings():
        # Lightning 2.6 still asks for a class that torch 2.13 has deprecated.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        trainer.fit(model, passages)
    return progress.bits


@torch.no_grad()
def measure(model: CharacterModel, passages: Passages) -> float:
    """Return the mean loss over passages that are read whole and not learnt from."""
    bits = [bits_per_character(model(x)[0], y).item() for x, y in passages]
    return sum(bits) / len(bits)


@torch.no_grad()
def sample(model: CharacterModel, alphabet: str, start: str, length: int, *, seed: int = 0) -> str:
    """Write on from `start`, `length` characters drawn one by one from the model's prediction."""
    generator = torch.Generator().manual_seed(seed)
    written, unread, state = start, start, None
    for _ in range(length):
        hot = one_hot(encoded(unread, alphabet), len(alphabet)).to(model.readout.weight)
        logits, state = model(hot[None], state)
        drawn = torch.multinomial(logits[0, -1].softmax(dim=0), 1, generator=generator)
        unread = alphabet[int(drawn)]
        written += unread
    return written


def main(*, batches: int = 400) -> None:
    """Train on the first nine tenths of the texts, for half a minute; measure on the last."""
    text = help_texts()
    alphabet = alphabet_of(text)
    seen, unseen = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CharacterModel(len(alphabet), 128, len(alphabet), chunk=25)
    print(f"Python's help texts: {len(text)} characters, {len(alphabet)} different ones.")
    print(f"Guessing blindly costs {math.log2(len(alphabet)):.2f} bits per character.")
    learn(model, Passages(seen, alphabet, batches=batches))
    bits = measure(model, Passages(unseen, alphabet, batches=20, seed=1))
    print(f"On text it has never seen: {bits:.2f} bits per character. It now writes:\n")
    print(sample(model, alphabet, "The ", 400))


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # a second one gains little at these sizes
    main()
