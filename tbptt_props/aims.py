"""Which targets a loss was computed against, told from its value: no call of it is seen.

Shapes: B sequences, T time steps, K time steps in a chunk, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tbptt_props.batch import Batch
from tbptt_props.layout import as_the_loss_takes, explains
from tbptt_props.places import time_first
from tbptt_props.trace import Place

FURTHEST = 3  # time steps by which targets are looked for beside their own


def targets_of(
    loss: Callable[[Tensor, Any], Tensor],
    prediction: Tensor,
    cotangent: Tensor | None,
    found: float,
    batch: Batch,
    places: Tensor,
) -> tuple[Place, ...] | None:
    """Return the (sequence, time step) of each target that explains the loss that was found.

    Tried are the chunk's own targets, then those of the time steps on which the loss depends (its
    gradient by the prediction, `cotangent`, is zero on all others), then those shifted in time.
    None where nothing explains it. `places` is (B, K, 2) or (K, B, 2).
    """
    for candidate in _candidates(cotangent, batch.inputs.shape[1], places):
        if candidate.dim() == 3 and not candidate.numel():
            continue
        its_own = prediction
        if candidate.shape != places.shape:
            its_own = prediction.index_select(_time(places), _used(cotangent, places))
        due = as_the_loss_takes(loss, its_own, batch.targets_at(candidate), found)
        if explains(loss, its_own, due, found):
            return tuple((int(b), int(t)) for b, t in candidate.reshape(-1, 2).tolist())
    return None


def _candidates(cotangent: Tensor | None, steps: int, places: Tensor) -> Iterator[Tensor]:
    yield places
    if places.dim() != 3 or cotangent is None or cotangent.shape[:2] != places.shape[:2]:
        return
    used = places.index_select(_time(places), _used(cotangent, places).cpu())
    for shift in sorted(range(-FURTHEST, FURTHEST + 1), key=abs):
        for base in (used, places):
            moved = base + torch.tensor([0, shift])
            if bool(((moved[..., 1] >= 0) & (moved[..., 1] < steps)).all()):
                yield moved
        rolled = places.roll(shift, dims=_time(places))
        yield rolled


def _time(places: Tensor) -> int:
    return 0 if time_first(places) else 1


def _used(cotangent: Tensor | None, places: Tensor) -> Tensor:
    """Return the indices, along time, of the predictions on which the loss depends."""
    assert cotangent is not None
    flat = cotangent.movedim(_time(places), 0).flatten(1)
    return flat.ne(0).any(dim=1).nonzero().flatten()
