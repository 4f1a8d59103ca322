"""PyTorch-Ignite's own TBPTT trainer, judged: `python -m examples.peers_ignite`.

Its time dimension is the first one unless it is told otherwise. `time_first` leaves it so and hands
it batches (T, B, ...); `batch_first` has dim=1.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.peers_model import Net, tell

try:
    from ignite.contrib.engines.tbptt import create_supervised_tbptt_trainer
except ModuleNotFoundError as missing:
    raise SystemExit("This example needs PyTorch-Ignite: pip install pytorch-ignite") from missing


def train(module: nn.Module, batches: Sequence[Any], *, chunk: int, dim: int) -> None:
    """Train for one epoch as Ignite does."""
    optimizer = optim.Adam(module.parameters(), lr=1e-2)
    create_supervised_tbptt_trainer(module, optimizer, mse_loss, chunk, dim=dim).run(batches)


def batch_first(case: tb.Case) -> tb.Subject:
    """Make the subject whose batches are (B, T, ...)."""
    return tb.Subject(Net(case), loss=mse_loss, train=partial(train, chunk=case.chunk, dim=1))


def time_first(case: tb.Case) -> tb.Subject:
    """Make the subject whose batches are (T, B, ...)."""
    return tb.Subject(
        Net(case, batch_first=False),
        loss=mse_loss,
        train=partial(train, chunk=case.chunk, dim=0),
        batches=lambda case: [swapped(batch) for batch in case.tensors()],
        parts=swapped,
    )


def swapped(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Exchange sequences and time steps."""
    return batch[0].transpose(0, 1), batch[1].transpose(0, 1)


if __name__ == "__main__":
    tell(batch_first)
    tell(time_first)
