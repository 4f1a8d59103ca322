"""Embeddings: which of their rows have, by design, a gradient that is not the loss's slope."""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

Rows = int | EllipsisType
EVERY = ...


def off_their_slope(nodes: Iterable[Any]) -> dict[int, set[Rows]] | None:
    """Return which rows of which parameters, by id, lack the gradient of an embedding among nodes.

    A padding row has none of it, and others' may be divided by how often they come. None where it
    is no parameter itself, but made of some, that is embedded so.
    """
    found: dict[int, set[Rows]] = {}
    for node in nodes:
        rows = _rows_of(node)
        if rows is not None:
            variable = getattr(node.next_functions[0][0], "variable", None)
            if variable is None:
                return None
            found.setdefault(id(variable), set()).add(rows)
    return found


def _rows_of(node: Any) -> Rows | None:
    if getattr(node, "_saved_scale_grad_by_freq", False):
        return EVERY
    if type(node).__name__ != "EmbeddingBackward0":  # a bag leaves its padding out of its values
        return None
    row = int(node._saved_padding_idx)
    return row if row < int(node._saved_weight_sym_argsize_0) else None  # none is a huge one


def only_renormed(module: nn.Module, parameter: Tensor, before: Tensor) -> bool:
    """Tell whether all that moved a parameter is `max_norm=` of an embedding, in its forward."""
    return any(
        isinstance(part, (nn.Embedding, nn.EmbeddingBag))
        and part.max_norm is not None
        and part.weight is parameter
        and _scaled_down(parameter.detach(), before, part.max_norm, part.norm_type)
        for part in module.modules()
    )


def _scaled_down(now: Tensor, before: Tensor, longest: float, kind: float) -> bool:
    """Tell whether each row is what it was, or what it was at the greatest norm it may have."""
    norms = before.norm(kind, dim=1, keepdim=True)
    due = before * (longest / (norms + 1e-7)).clamp(max=1.0)  # as torch does it
    near = torch.isclose(now, due, rtol=64 * torch.finfo(now.dtype).eps, atol=0.0)
    return bool(((now == before) | near).all())
