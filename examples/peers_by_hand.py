"""Loops in plain PyTorch that ask autograd for gradients: `python -m examples.peers_by_hand`.

`with_optimizer` hands them to an optimizer. `without` subtracts them from the parameters itself:
such an update is told by what it moves, and what it makes of the gradients is not judged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.peers_model import Net, chunks, detached, tell

Update = Callable[[Sequence[Tensor]], None]


def train(
    module: nn.Module,
    batches: Sequence[Any],
    *,
    chunk: int,
    updating: Callable[[list[nn.Parameter]], Update],
) -> None:
    """Train for one epoch."""
    parameters = list(module.parameters())
    update = updating(parameters)
    for batch in batches:
        state: Tensor | None = None
        for x, y in chunks(batch, chunk):
            prediction, after = module(x, state)
            update(torch.autograd.grad(mse_loss(prediction, y), parameters))
            state = detached(after)


def by_optimizer(parameters: list[nn.Parameter]) -> Update:
    """Return an update that leaves the arithmetic to an optimizer."""
    optimizer = optim.SGD(parameters, lr=0.1, momentum=0.9)

    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return update


def by_hand(parameters: list[nn.Parameter]) -> Update:
    """Return an update that is nothing but arithmetic."""

    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.1)

    return update


def with_optimizer(case: tb.Case) -> tb.Subject:
    """Make the subject whose gradients an optimizer gets."""
    loop = partial(train, chunk=case.chunk, updating=by_optimizer)
    return tb.Subject(Net(case), loss=mse_loss, train=loop)


def without(case: tb.Case) -> tb.Subject:
    """Make the subject that updates its parameters itself."""
    loop = partial(train, chunk=case.chunk, updating=by_hand)
    return tb.Subject(Net(case), loss=mse_loss, train=loop)


if __name__ == "__main__":
    tell(with_optimizer)
    tell(without)
