"""Which (sequence, time step) of a batch a tensor holds, told from memory or from the numbers.

Shapes: B sequences, T time steps, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbptt_props.trace import Span


def locate(x: Tensor, live: Any, pristine: Tensor) -> Tensor | None:
    """Return the place of each row of `x`, (..., 2), or None where none of them is the batch's.

    A row before or behind the batch's own, padding say, has the place (-1, -1). Where a row within
    them was made into something else, nothing is claimed of any: a loop may hand forward what it
    makes of its inputs, and the first of sums over time is the first row itself.

    `x` is (..., I), any part of `pristine` (B, T, I) in any layout that leaves the features last;
    for tokens `x` is any part of a batch (B, T). `live` is the batch as the loop had it: a view of
    it is found by its memory, also where its numbers are not unique or have been changed.
    """
    if isinstance(live, Tensor) and live.shape == pristine.shape:
        if live.dim() == 2 and x.dim() == 3 and x.shape[-1] == 1:  # numbers made a single feature
            x = x.squeeze(-1)
        places = by_memory(x, live)
        if places is not None:
            return places
    places = _by_value(x, pristine)
    return None if places is None else places.cpu()  # wherever the batch is, these are only indices


def by_memory(x: Tensor, live: Tensor) -> Tensor | None:
    """Return which row of `live` (B, T, ...) each row of `x` is, (..., 2), if they share memory."""
    if (x.dtype, x.device) != (live.dtype, live.device):
        return None
    if x.untyped_storage().data_ptr() != live.untyped_storage().data_ptr():
        return None
    features = live.dim() - 2
    rows = x.dim() - features
    if rows < 0 or x.shape[rows:] != live.shape[2:] or not _lie_alike(x, live, features):
        return None
    offset = torch.tensor(x.storage_offset() - live.storage_offset())
    for dim in range(rows):
        steps = torch.arange(x.shape[dim]) * x.stride(dim)
        offset = offset.unsqueeze(-1) + steps
    return _unflattened(offset, live)


def _lie_alike(x: Tensor, live: Tensor, features: int) -> bool:
    """Tell whether the last dimensions, the features, lie in memory as the batch's do."""
    own = zip(x.shape[x.dim() - features :], x.stride()[x.dim() - features :], strict=True)
    return all(
        stride == due
        for (size, stride), due in zip(own, live.stride()[2:], strict=True)
        if size > 1
    )


def _unflattened(offset: Tensor, live: Tensor) -> Tensor | None:
    """Return (sequence, time step) of each row from where it lies behind the batch's first."""
    strides = [live.stride(dim) if live.shape[dim] > 1 else 0 for dim in (0, 1)]
    far = 0 if strides[0] >= strides[1] else 1
    found = [torch.zeros_like(offset), torch.zeros_like(offset)]
    for dim in (far, 1 - far):
        if strides[dim]:
            found[dim] = torch.div(offset, strides[dim], rounding_mode="floor")
            offset = offset - found[dim] * strides[dim]
    outside = [(n < 0) | (n >= size) for n, size in zip(found, live.shape, strict=False)]
    if bool((offset != 0).any() or outside[0].any() or outside[1].any()):
        return None
    return torch.stack(found, dim=-1)


def _by_value(x: Tensor, pristine: Tensor) -> Tensor | None:
    """Look the rows up by their first number, which no two places share."""
    features = pristine.dim() - 2
    if features < 1 or not pristine.is_floating_point() or x.dim() < features:
        return None
    if x.shape[x.dim() - features :] != pristine.shape[2:] or not pristine.numel():
        return None
    x = x.detach().to(pristine).flatten(x.dim() - features)
    pristine = pristine.flatten(2)
    keys, order = pristine[..., 0].flatten().sort()
    if len(keys) > 1 and bool((keys[1:] == keys[:-1]).any()):
        return None
    at = torch.searchsorted(keys, x[..., 0].contiguous()).clamp(max=len(keys) - 1)
    row = order[at]
    places = torch.stack((row // pristine.shape[1], row % pristine.shape[1]), dim=-1)
    its_own = (pristine[places[..., 0], places[..., 1]] == x).all(dim=-1)
    if not bool(its_own.any()):
        return None
    places = torch.where(its_own.unsqueeze(-1), places, -1)
    if bool(its_own.all()):
        return places
    others = x[~its_own]
    filled = bool((others == others[0]).all() and (len(others) > 1 or not others.any()))
    return places if _only_beside(places, pristine.shape, filled=filled) else None


def _only_beside(places: Tensor, sizes: Sequence[int], *, filled: bool) -> bool:
    """Tell whether the rows without a place, of (B, K, 2) or (K, B, 2), lie outside a batch (B, T).

    They do if counting on from the rows that have one leads there; or if they fill a sequence more,
    all with the same numbers: others may be copies of the batch's, with noise.
    """
    if places.dim() != 3:
        return False
    for lines in (places, places.transpose(0, 1)):
        known = lines[..., 1] >= 0
        counted = torch.arange(lines.shape[1], device=places.device)
        begins = (lines[..., 1] - counted)[known]
        if bool((begins == begins[0]).all()):
            counted = counted + begins[0]
            outside = (counted < 0) | (counted >= sizes[1])
            more = ~known.any(dim=1, keepdim=True) & (filled and len(lines) > sizes[0])
            return bool((known | outside | more).all())
    return False


def time_first(places: Tensor) -> bool:
    """Tell whether inputs at these places, (K, B, 2), have time before sequences."""
    if places.dim() != 3:
        return False
    one_time_step_a_row = bool((places[:, :, 1] == places[:, :1, 1]).all())
    one_sequence_a_row = bool((places[:, :, 0] == places[:, :1, 0]).all())
    return (one_time_step_a_row and not one_sequence_a_row) or (
        one_sequence_a_row
        and one_time_step_a_row
        and places.shape[0] > 1
        and bool((places[1:, 0, 1] != places[:1, 0, 1]).any())
    )


def span_of(places: Tensor | None) -> Span | None:
    """Return the time steps from the first to behind the last of these places."""
    if places is None or not places.numel():
        return None
    steps = places[..., 1]
    steps = steps[steps >= 0]
    return int(steps.min()), int(steps.max()) + 1


def lanes_of(places: Tensor | None) -> tuple[int, ...]:
    """Return the sequence in each row; () where rows are not of one sequence each."""
    if places is None or places.dim() != 3:
        return ()
    rows = places.transpose(0, 1) if time_first(places) else places
    if bool((rows[:, :, 0] != rows[:, :1, 0]).any()):
        return ()
    return tuple(int(sequence) for sequence in rows[:, 0, 0])
