"""A loop in plain PyTorch, judged: `python -m examples.plain_pytorch`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.peers_model import Net, chunks, detached, tell


def train(module: nn.Module, batches: Sequence[Any], *, chunk: int) -> None:
    """Train for one epoch."""
    optimizer = optim.Adam(module.parameters(), lr=1e-2)
    for batch in batches:
        state = None
        for x, y in chunks(batch, chunk):
            prediction, state = module(x, state)
            loss: Any = mse_loss(prediction, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = detached(state)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    return tb.Subject(Net(case), loss=mse_loss, train=partial(train, chunk=case.chunk))


if __name__ == "__main__":
    tell(build)
