"""A loop for Hugging Face's Accelerate, judged: `python -m examples.peers_accelerate`.

`loader=True` has Accelerate prepare a DataLoader too, which reads one batch ahead of the loop.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import tbptt_props as tb
from examples.peers_model import Net, chunks, detached, tell

try:
    from accelerate import Accelerator
except ModuleNotFoundError as missing:
    raise SystemExit("This example needs Accelerate: pip install accelerate") from missing


def train(module: nn.Module, batches: Sequence[Any], *, chunk: int, loader: bool) -> None:
    """Train for one epoch."""
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(module, optim.Adam(module.parameters(), lr=1e-2))
    prepared: Any = batches
    if loader:
        whole: Any = batches  # a sequence of batches is a data set whose items are not put together
        prepared = accelerator.prepare(DataLoader(whole, batch_size=None))
    for batch in prepared:
        state: Tensor | None = None
        for x, y in chunks(batch, chunk):
            prediction, state = model(x, state)
            optimizer.zero_grad()
            accelerator.backward(mse_loss(prediction, y))
            optimizer.step()
            state = detached(state)


def build(case: tb.Case, *, loader: bool = False) -> tb.Subject:
    """Make the subject that is judged."""
    loop = partial(train, chunk=case.chunk, loader=loader)
    return tb.Subject(Net(case), loss=mse_loss, train=loop)


def build_with_loader(case: tb.Case) -> tb.Subject:
    """Make the subject whose DataLoader Accelerate prepares."""
    return build(case, loader=True)


if __name__ == "__main__":
    tell(build)
    tell(build_with_loader)
