"""Tells a loop that is wired wrongly from one that is wrong, where the evidence is certain.

A subject that takes the first dimension for time, or that trains on another loss than was told,
breaks many properties and makes no mistake. Both are recognised by what holds once it is wired so.

Shapes: B sequences, T time steps, K time steps in a chunk, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tbptt_props.batch import first_two
from tbptt_props.compare import close
from tbptt_props.layout import explains
from tbptt_props.state import map_tensors
from tbptt_props.subject import ObservationError, Subject
from tbptt_props.trace import Link

Loss = Callable[[Any, Any], Tensor]

# What people train on, by the name in torch.nn.functional.
COMMON = (
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "cross_entropy",
    "nll_loss",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "poisson_nll_loss",
    "soft_margin_loss",
)


def time_second(subject: Subject) -> Subject:
    """Return the subject as if the first dimension of what it is handed were time."""
    take = subject.parts or first_two

    def parts(whole: Any) -> tuple[Tensor, Any]:
        inputs, targets = take(whole)
        shape = inputs.shape[:2]
        turned = map_tensors(lambda t: t.transpose(0, 1) if t.shape[:2] == shape else t, targets)
        return inputs.transpose(0, 1), turned

    return replace(subject, parts=parts)


def takes_time_first(name: str, sizes: tuple[int, int]) -> ObservationError:
    """Return what to raise for a subject of which everything holds once time is first."""
    return ObservationError(
        f"{name} takes the first dimension of a batch for time, but is handed sequences first, "
        f"(B, T, ...) = ({sizes[0]}, {sizes[1]}, ...): taken as (T, B, ...), every property holds. "
        "Hand out such batches, and say which way they lie: Subject(..., batches=lambda case: "
        "[(x.transpose(0, 1), y.transpose(0, 1)) for x, y in case.tensors()], parts=lambda batch: "
        "(batch[0].transpose(0, 1), batch[1].transpose(0, 1)))"
    )


class LossesMet:
    """Looks at losses that are not those due: whether all are one other that is common."""

    def __init__(self) -> None:
        self.pairs: set[tuple[str, str]] = set()  # of what was trained on, and what was told
        self.otherwise = False  # than by a factor

    def at(self, link: Link) -> None:
        """Look at a chunk whose loss is not the one that is due, and at its slopes."""
        outcome, due, given = link.chunk.outcome, link.expected, link.chunk.given
        assert outcome is not None
        assert given is not None
        prediction, target, share = given.calls[0].prediction, given.target, link.share
        seen = outcome.cotangents[0] if len(given.calls) == 1 else None
        whole = outcome.complete and not given.context and isinstance(target, Tensor)
        if not whole or prediction is None or seen is None or due.loss is None:
            self.pairs.add(("", ""))
            return
        found = _common(prediction, target, outcome.loss / share, seen / share)
        told = _common(prediction, target, due.loss, due.cotangents[0])
        self.pairs.add((found, told))
        factor = outcome.loss / due.loss if due.loss else math.nan
        self.otherwise |= not close(seen, _as_slopes(due.cotangents[0], like=seen) * factor)

    def require_the_one_told(self, name: str) -> None:
        """Refuse a subject that trains on another loss than it was told of.

        Raises:
            ObservationError: the losses that are not due, and their slopes, are all those of
                another common one.
        """
        if not self.otherwise or len(self.pairs) != 1:
            return
        ((found, told),) = self.pairs
        if found and told and found != told:
            raise ObservationError(
                f"{name} trains on {found}(prediction, target) of torch.nn.functional, in value "
                f"and slopes, and the loss that was told is {told}: one is not meant, so tell the "
                "other, Subject(..., loss=...), or train on it"
            )


def _as_slopes(slopes: Tensor | None, *, like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan) if slopes is None else slopes


def _common(prediction: Tensor, target: Tensor, value: float, slopes: Tensor | None) -> str:
    """Return the name of a common loss that has this value and these slopes; '' if none has."""
    if slopes is None:
        return ""
    for name in COMMON:
        loss: Loss = getattr(functional, name)
        for taken in (loss, _of_rows(loss)):
            fits = explains(taken, prediction, target, value)
            if fits and _has_slopes(taken, prediction, target, slopes):
                return name
    return ""


def _of_rows(loss: Loss) -> Loss:
    """Return a loss of (B * K, C) predictions and (B * K,) targets."""
    return lambda prediction, target: loss(prediction.flatten(0, -2), target.flatten())


def _has_slopes(loss: Loss, prediction: Tensor, target: Tensor, seen: Tensor) -> bool:
    with torch.enable_grad():
        by = prediction.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(by, target), by)
    return close(slope, seen)
