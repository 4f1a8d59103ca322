"""What gradient scalers do while a loop trains in float16, as far as it has to be known.

A scaler multiplies the loss, so that small gradients are not lost, and divides gradients again
before the update. Optimizers with kernels of their own, fused ones, are told to divide themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from tbptt_props.graph import mark, marked
from tbptt_props.state import leaves

_SCALE = "tbptt scale"


@contextmanager
def scalers_watched(before_dividing: Callable[[Optimizer], None]) -> Iterator[None]:
    """Mark what scalers multiply within the block, and be told before they divide gradients."""
    kind: Any = GradScaler
    scale, unscale = kind.scale, kind.unscale_

    @functools.wraps(scale)
    def scaling(scaler: GradScaler, outputs: Any) -> Any:
        scaled = scale(scaler, outputs)
        for tensor in leaves(scaled).values():
            mark(tensor, _SCALE, scaler.get_scale())
        return scaled

    @functools.wraps(unscale)
    def unscaling(scaler: GradScaler, optimizer: Optimizer) -> None:
        if scaler.is_enabled():
            before_dividing(optimizer)
        unscale(scaler, optimizer)

    kind.scale, kind.unscale_ = scaling, unscaling
    try:
        yield
    finally:
        kind.scale, kind.unscale_ = scale, unscale


def scale_of(losses: Iterable[Tensor]) -> float:
    """Return by what a scaler multiplied the losses; 1 where none did."""
    return next((scale for scale in (marked(loss, _SCALE) for loss in losses) if scale), 1.0)


def divided(optimizer: Optimizer, gradient: Tensor) -> Tensor:
    """Return a gradient as an optimizer goes by it that divides by the scale itself."""
    scale = getattr(optimizer, "grad_scale", None)
    return gradient if scale is None else gradient / scale.to(gradient.device)


def is_told_to_skip(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer that divides by itself is told that gradients are infinite."""
    return bool(getattr(optimizer, "found_inf", 0.0))
