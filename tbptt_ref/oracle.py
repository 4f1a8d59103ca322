"""Truncated backpropagation through time in plain PyTorch: slow, and obviously right.

Nothing here knows Lightning. Every chunk is worked out from values alone: its slice of the batch,
a copy of the state without a past, and `torch.autograd.grad` of its loss.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

State = Any  # any nesting of tensors that the forward hands on; None before the first time step


@dataclass(frozen=True, eq=False)  # two tensors have no single answer to ==
class Update:
    """One update: the chunk it learned from, and what came of it."""

    batch: int
    start: int  # the chunk's first time step in its batch
    stop: int  # the time step after its last
    loss: Tensor
    gradients: dict[str, Tensor | None]  # as the update met them; None where the loss has none
    state: State  # after the chunk, from the parameters before the update
    parameters: dict[str, Tensor]  # after the update


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one chunk comes to, from the parameters as they are."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    state: State


def train(
    forward: Callable[[Tensor, State], tuple[Tensor, State]],
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
    chunk: int,
    *,
    state: State = None,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
) -> list[Update]:
    """Train `parameters` in place, one update per chunk; return every update, in order.

    Args:
        forward: runs (B, K, I) inputs on from a state, `forward(x, state) -> (prediction, state)`.
        parameters: the tensors that `forward` reads and `optimizer` moves, by name.
        loss: `loss(prediction, target)`, a scalar.
        optimizer: any torch optimizer of `parameters`, also one that evaluates a chunk repeatedly.
        batches: inputs (B, T, I) and targets (B, T, O) of each batch; B and T may vary.
        chunk: K, the time steps trained on together; the last chunk of a batch may be shorter.
        state: what every batch starts from.
        scheduler: steps after every update.
        clip_norm: the largest norm of all gradients of a chunk together, if they are to be clipped.

    Raises:
        ValueError: an argument breaks its rule; the message names argument, rule and value.

    Source: Williams and Peng (1990), with as many time steps between updates as are reached back.
    """
    _require_chunk(chunk)
    _require_batches(batches)
    _require_own(optimizer, parameters)
    updates: list[Update] = []
    for index, (x, y) in enumerate(batches):
        before = state
        for start in range(0, x.shape[1], chunk):
            stop = min(start + chunk, x.shape[1])
            piece = x[:, start:stop], y[:, start:stop]
            evaluate = partial(differentiate, forward, parameters, loss, *piece, before, clip_norm)
            outcome = move(parameters, optimizer, evaluate)
            if scheduler is not None:
                scheduler.step()
            after = {name: value_of(parameter) for name, parameter in parameters.items()}
            updates.append(
                Update(index, start, stop, outcome.loss, outcome.gradients, outcome.state, after)
            )
            before = outcome.state
    return updates


def differentiate(
    forward: Callable[[Tensor, State], tuple[Tensor, State]],
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    state: State,
    clip_norm: float | None = None,
) -> Outcome:
    """Work out one chunk, (B, K, I) inputs and (B, K, O) targets, from the value of `state`.

    Raises:
        ValueError: `forward` returns no pair, or a state it can't be seen into; `loss` no scalar.
    """
    prediction, after = _pair(forward(x, value_of(state)))
    value = _scalar(loss(prediction, y))
    reached = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(value, list(reached.values()), allow_unused=True)
    gradients = dict.fromkeys(parameters) | dict(zip(reached, found, strict=True))
    return Outcome(value.detach(), clipped(gradients, clip_norm), value_of(after))


def clipped(
    gradients: Mapping[str, Tensor | None], clip_norm: float | None
) -> dict[str, Tensor | None]:
    """Shrink all gradients alike, so that their norm taken together is at most `clip_norm`.

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`.
    """
    if clip_norm is None:
        return dict(gradients)
    norm = sum(float(g.square().sum()) for g in gradients.values() if g is not None) ** 0.5
    factor = min(1.0, clip_norm / (norm + 1e-6))
    return {name: None if g is None else g * factor for name, g in gradients.items()}


def move(
    parameters: Mapping[str, Tensor], optimizer: Optimizer, evaluate: Callable[[], Outcome]
) -> Outcome:
    """Make one update; return what `evaluate` said before it."""
    outcomes: list[Outcome] = []

    def closure() -> float:
        outcome = evaluate()
        for name, parameter in parameters.items():
            # A copy: an optimizer may write into the gradients it is given.
            parameter.grad = value_of(outcome.gradients[name])
        outcomes.append(outcome)
        return outcome.loss.item()

    optimizer.step(closure)
    return outcomes[0]


def value_of(state: State) -> State:
    """Return a copy of `state` that shares no memory and no graph with it.

    Raises:
        ValueError: something in it is neither a tensor, a container of tensors nor a plain value.
    """
    match state:
        case Tensor():
            return state.detach().clone()
        case None | int() | float() | str():
            return state
        case dict():
            copied = copy(state)
            copied.update({key: value_of(item) for key, item in state.items()})
            return copied
        case tuple() if hasattr(state, "_fields"):  # a named tuple
            return type(state)(*map(value_of, state))
        case tuple() | list():
            return type(state)(map(value_of, state))
    if is_dataclass(state) and not isinstance(state, type):
        rebuilt = copy(state)
        for field in fields(state):
            # A frozen dataclass refuses plain assignment.
            object.__setattr__(rebuilt, field.name, value_of(getattr(state, field.name)))
        return rebuilt
    raise ValueError(
        "state must be made of tensors in tuples, lists, dicts and dataclasses, "
        f"got {type(state).__name__}: {state!r}"
    )


def _require_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 time step, got chunk={chunk}")


def _require_batches(batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    if not batches:
        raise ValueError(f"batches must hold at least 1 batch, got batches={batches!r}")
    for index, (x, y) in enumerate(batches):
        sizes = tuple(x.shape[:2]), tuple(y.shape[:2])
        if len(sizes[0]) < 2 or sizes[0] != sizes[1] or sizes[0][1] < 1:
            raise ValueError(
                f"batches[{index}] must be inputs and targets of the same B and T, T at least 1, "
                f"got sizes {sizes[0]} and {sizes[1]}"
            )


def _require_own(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    own = {id(parameter) for parameter in parameters.values()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    others = [tuple(parameter.shape) for parameter in held if id(parameter) not in own]
    if others:
        raise ValueError(
            f"optimizer must hold only what parameters names ({', '.join(parameters)}), "
            f"got others of shapes {others}"
        )


def _pair(returned: Any) -> tuple[Tensor, State]:
    # A tensor of two rows would unpack as well.
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
    raise ValueError(
        f"forward must return a pair (prediction, state), got {type(returned).__name__}{size}"
    )


def _scalar(returned: Any) -> Tensor:
    if isinstance(returned, Tensor) and returned.ndim == 0:
        return returned
    shape = f" of shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else ""
    raise ValueError(f"loss must return a scalar tensor, got {type(returned).__name__}{shape}")
