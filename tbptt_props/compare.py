"""How two tensors are compared: bitwise, or within a tolerance that is named for its reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypedDict

import torch
from torch import Tensor

from tbptt_props.precision import unit
from tbptt_props.trace import Difference, Tensors, told_apart


class Tolerance(TypedDict):
    """What two numbers may differ by: `atol + rtol * |due|`."""

    rtol: float
    atol: float


# The same operations on the same numbers; only the order of a sum may differ. Both are small
# against 1, for the numbers are grown standard normal.
EXACT: dict[torch.dtype, Tolerance] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
}
ROUNDINGS = 8  # on the way through one time step, there and back

# By what share of its largest entry a tensor may differ that products were rounded for.
_ROUNDED: ContextVar[float] = ContextVar("rounded", default=0.0)


@contextmanager
def rounded_to(dtype: torch.dtype | None, steps: int) -> Iterator[None]:
    """Allow for products rounded to `dtype` within the block, along so many time steps.

    Roundings add up as a random walk does: n of them make the unit times the root of n. What comes
    of a chunk is a sum whose terms may cancel out, so this is a share of the largest entry.
    """
    share = 0.0 if dtype is None else unit(dtype) * math.sqrt(ROUNDINGS * max(1, steps))
    token = _ROUNDED.set(share)
    try:
        yield
    finally:
        _ROUNDED.reset(token)


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are bitwise equal, NaN for NaN."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    other = other.to(one.device)  # Lightning takes a module back to the CPU when it is done
    if torch.equal(one, other):
        return True
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def same_leaves(ones: Tensors, others: Tensors) -> bool:
    """Compare leaf by leaf, in order and bit for bit: a pair may travel as a list."""
    pairs = zip(ones.values(), others.values(), strict=False)
    return len(ones) == len(others) and all(same(one, other) for one, other in pairs)


def rows_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the rows of tensors: of a state, each is of a sequence, or a layer's part of it."""
    return [row for t in tensors if t.dim() and t.numel() for row in t.reshape(-1, t.shape[-1])]


def close(found: Tensor, due: Tensor, *, rounded: bool = True) -> bool:
    """Tell whether `found` is what was due, but for the order of sums.

    What products come to may be `rounded`; what is added up in full precision is not.
    """
    if found.shape != due.shape:
        return False
    due = due.to(found.device)
    if found.dtype == due.dtype and torch.equal(found, due):  # by far the commonest, and cheap
        return True
    allowed = _tolerance(found)
    if rounded and _ROUNDED.get():
        allowed = {**allowed, "atol": allowed["atol"] + _ROUNDED.get() * _largest(due)}
    wide = torch.promote_types(found.dtype, due.dtype)  # one may have been cast, as by autocast
    return torch.allclose(found.to(wide), due.to(wide), **allowed, equal_nan=True)


def _exact(found: Tensor, due: Tensor) -> bool:
    return close(found, due, rounded=False)


def _largest(tensor: Tensor) -> float:
    finite = tensor.detach().abs().nan_to_num(0.0, 0.0)
    return float(finite.max()) if tensor.numel() else 0.0


def near(found: float, due: float, *, dtype: torch.dtype = torch.float64) -> bool:
    """Tell whether one number is what was due, but for the order of sums."""
    return close(torch.tensor(found, dtype=dtype), torch.tensor(due, dtype=dtype))


def near_slope(one: float, other: float) -> bool:
    """Tell whether two slopes of a loss are the same, but for what differencing its values costs.

    Rounding leaves about 1e-16 / NUDGE = 1e-11 of a loss near 1, and truncation NUDGE² = 1e-10.
    """
    return abs(one - other) <= 1e-8 + 1e-6 * max(abs(one), abs(other))


def _tolerance(tensor: Tensor) -> Tolerance:
    return EXACT.get(tensor.dtype, EXACT[torch.float32])


def difference(name: str, found: Tensor, due: Tensor) -> Difference:
    """Return the entry in which two tensors differ most: a NaN that is not due first.

    Where their shapes differ, or nothing but their dtypes, these are told.
    """
    if found.shape != due.shape:
        return _of_another_kind(name, f"shape {tuple(found.shape)}", f"shape {tuple(due.shape)}")
    with torch.no_grad():
        one, other = _comparable(found), _comparable(due.to(found.device))
        gap = (one - other).abs().nan_to_num(torch.inf)
        gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, gap)
    if found.dtype != due.dtype and not gap.any():
        return _of_another_kind(name, str(found.dtype), str(due.dtype))
    index = tuple(int(i) for i in torch.unravel_index(gap.argmax().cpu(), gap.shape))
    return _entry(name, index, one[index], other[index])


def _of_another_kind(name: str, found: str, due: str) -> Difference:
    return Difference(name, (), torch.nan, torch.nan, instead=(found, due))


def _entry(name: str, index: tuple[int, ...], found: Tensor, due: Tensor) -> Difference:
    if not (found.is_complex() or due.is_complex()):
        return Difference(name, index, float(found), float(due))
    told = told_apart(found.item(), due.item())
    return Difference(name, index, float(found.abs()), float(due.abs()), instead=told)


def _comparable(tensor: Tensor) -> Tensor:
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(wide)


def worst(
    found: Tensors, due: Tensors, *, bitwise: bool = False, rounded: bool = True
) -> Iterator[Difference]:
    """Yield, for each name, the entry that differs most, where two sets of tensors differ."""
    for name in due:
        one, other = found.get(name), due[name]
        if one is None:
            one = torch.zeros_like(other)
        if not (same(one, other) if bitwise else close(one, other, rounded=rounded)):
            yield difference(name, one, other)


def is_clipped(gradients: Tensors, handed: Tensors) -> bool:
    """Tell whether gradients were shrunk as clipping does.

    Each tensor, or each of its rows, by one factor; or at one height; or all by one factor and then
    at one height.

    False where they were not changed at all, nor where they were cleared.
    """
    changed = {n: g for n, g in handed.items() if n in gradients and not same(g, gradients[n])}
    if not changed or not any(bool(g.any()) for g in handed.values()):
        return False
    height = max(float(g.abs().max()) for g in changed.values() if g.numel())
    factor = _largest_factor(
        [(gradients[name], g) for name, g in handed.items() if name in gradients]
    )
    return height > 0 and all(
        _scaled_down(gradients[name], g)
        or _exact(g, gradients[name].clamp(-height, height))
        or (factor < 1 and _exact(g, (gradients[name] * factor).clamp(-height, height)))
        or _rows_scaled_down(gradients[name], g)
        for name, g in changed.items()
    )


def _largest_factor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the largest factor by which an entry was multiplied."""
    factors = [
        float((after / before)[before != 0].abs().max()) for before, after in pairs if before.any()
    ]
    return max(factors, default=1.0)


def _rows_scaled_down(before: Tensor, after: Tensor) -> bool:
    """Tell whether each unit's weights were shrunk by a factor of their own, or left."""
    if before.dim() < 2 or not before.numel():
        return False
    rows, shrunk = (tensor.reshape(len(tensor), -1) for tensor in (before, after))
    norms = rows.norm(dim=1, keepdim=True)
    factors = torch.where(norms > 0, shrunk.norm(dim=1, keepdim=True) / norms, 1.0)
    return bool(((factors > 0) & (factors <= 1 + 1e-9)).all()) and _exact(shrunk, rows * factors)


def _scaled_down(before: Tensor, after: Tensor) -> bool:
    factor = after.norm() / before.norm()
    return bool(0 < factor < 1) and _exact(after, before * factor)


UNSCALED = (1.0, 0.0)


def scaling(gradients: Tensors, handed: Tensors) -> tuple[float, float]:
    """Return the one factor by which all gradients were shrunk, and their joint norm after it.

    The factor is 1 where there is no one such factor, or where there are no gradients.
    """
    changed = [n for n, g in handed.items() if n in gradients and not same(g, gradients[n])]
    if not changed:
        return UNSCALED
    after = torch.cat([handed[name].flatten() for name in handed if name in gradients])
    before = torch.cat([gradients[name].flatten() for name in handed if name in gradients])
    if not bool(before.any()) or not _scaled_down(before, after):
        return UNSCALED
    return float(after.norm() / before.norm()), float(after.norm())


def scalings(gradients: Tensors, handed: Tensors) -> dict[str, tuple[float, float]]:
    """Return of each gradient that was shrunk by one factor which it was, and its norm after it."""
    alone = {n: scaling({n: gradients[n]}, {n: g}) for n, g in handed.items() if n in gradients}
    return {name: found for name, found in alone.items() if found != UNSCALED}


def scaled_alike(
    shrunk: Mapping[str, tuple[float, float]], before: Mapping[str, tuple[float, float]]
) -> str | None:
    """Name a gradient that was shrunk by one factor twice, from norms that differ.

    Clipping shrinks by what the norm asks for.
    """
    for name, (factor, norm) in shrunk.items():
        other_factor, other_norm = before.get(name, (1.0, norm))
        if abs(factor - other_factor) < 1e-6 * factor and abs(norm - other_norm) > 1e-3 * norm:
            return name
    return None


def clipped(
    gradients: Tensors, *, norm: float | None, value: float | None, met: Tensors | None = None
) -> Tensors:
    """Return gradients clipped by their joint norm, or entry by entry; or as they are.

    Where those that an update met are as well clipped by the very norm, these are due.
    """
    if value is not None:
        return {name: g.clamp(-value, value) for name, g in gradients.items()}
    if norm is None or not gradients:
        return gradients
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    # torch divides by the norm plus 1e-6, so as not to divide by zero; others don't.
    by_torch, by_hand = (
        {name: g * (norm / (total + more)).clamp(max=1.0) for name, g in gradients.items()}
        for more in (1e-6, 0.0)
    )
    exactly = met is not None and bool(total) and not any(worst(met, by_hand))
    return by_hand if exactly else by_torch
