"""Gradients that add up over chunks, judged: `python -m examples.lightning_accumulates`.

A backward for every chunk, and an update per sequence (`build`) or after every second chunk
(`build_every_second`).
"""

from typing import Any

from torch import Tensor, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.lightning_model import LitNet
from examples.peers_model import chunks, detached, tell


class Accumulates(LitNet):
    """Updates after every `every` chunks, and at the end of the batch; 0: at its end alone."""

    def __init__(self, case: tb.Case, *, every: int = 0) -> None:
        super().__init__(case)
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Make a backward for every chunk."""
        optimizer: Any = self.optimizers()
        state = None
        parts = list(chunks(batch, self.chunk))
        optimizer.zero_grad()
        for number, (x, y) in enumerate(parts, start=1):
            prediction, state = self(x, state)
            self.manual_backward(mse_loss(prediction, y))
            state = detached(state)
            if number == len(parts) or (self.every and number % self.every == 0):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> optim.Optimizer:
        """Make the optimizer."""
        return optim.Adam(self.parameters(), lr=1e-2)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject with one update per sequence."""
    return tb.Subject(Accumulates(case), loss=mse_loss, contract=tb.Contract(update="batch"))


def build_every_second(case: tb.Case) -> tb.Subject:
    """Make the subject with an update after every second chunk."""
    return tb.Subject(Accumulates(case, every=2), loss=mse_loss, contract=tb.Contract(update=2))


if __name__ == "__main__":
    tell(build)
    tell(build_every_second)
