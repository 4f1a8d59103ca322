"""In which precision a loop trains: the dtype of its numbers, and to what its products are rounded.

Under autocast, parameters and gradients stay in float32, but each product is rounded to a dtype
that is coarser.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from tbptt_props.trace import Chunk

Precision = Literal["64-true", "32-true", "bf16-mixed", "16-mixed"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
SKIPPED = "gradients that float16 can hold: a scaler skips the update"


def dtype_of(precision: str | None) -> torch.dtype:
    """Return the dtype of parameters and batches; where nothing is asked for, it is float64."""
    return torch.float64 if precision in (None, "64-true") else torch.float32


def rounding(autocast: torch.dtype | None) -> torch.dtype:
    """Return what products are rounded to where autocast is in force; it spares float64."""
    dtype = torch.get_default_dtype()
    return dtype if autocast is None or dtype == torch.float64 else autocast


def autocast_in_force(device: str = "cpu") -> torch.dtype | None:
    """Return the dtype to which products are rounded at the moment; None where none is."""
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def keeps_casts(device: str = "cpu") -> bool:
    """Tell whether weights are cast once, and what they were cast to is kept."""
    return torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled()


def autocasting(dtype: torch.dtype | None, device: str = "cpu") -> AbstractContextManager[object]:
    """Round products to `dtype` within the block, or none, whatever is in force around it.

    What was cast is cast anew each time: parameters may be changed in between.
    """
    if dtype is None:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


def overflowed(chunk: Chunk) -> bool:
    """Tell whether gradients were too large for float16: then a scaler skips the update."""
    given, outcome = chunk.given, chunk.outcome
    if given is None or outcome is None or given.autocast != torch.float16 or outcome.rules:
        return False
    return not all(bool(g.isfinite().all()) for g in outcome.gradients.values())


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff: by which share of itself rounding changes a number at most."""
    return torch.finfo(dtype).eps / 2
