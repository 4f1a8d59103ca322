"""A batch as a loop gets it, and which parts of it are inputs and targets.

Shapes: B sequences, T time steps, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbptt_props.state import leaves, map_tensors

Parts = Callable[[Any], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Batch:
    """Whatever a loop is handed, and in it inputs (B, T, ...) and targets, with sequences first.

    Targets are (B, T, ...), or of another shape where there is one for each sequence, or None.
    """

    whole: Any
    inputs: Tensor
    targets: Tensor | None
    parts: Parts

    @classmethod
    def of(cls, whole: Any, parts: Parts | None) -> Batch:
        """Take a batch apart: by `parts`, or inputs are its first tensor and targets its second.

        Raises:
            ValueError: it has no such parts; the message says what was found.
        """
        take = parts or first_two
        inputs, targets = _checked(take(whole))
        return cls(whole, inputs, targets, take)

    @property
    def by_step(self) -> bool:
        """Whether there is a target for each time step."""
        return self.targets is not None and self.targets.shape[:2] == self.inputs.shape[:2]

    def copied(self) -> Batch:
        """Return a copy that shares no memory with it, but within itself as it does."""
        return Batch.of(copy.deepcopy(self.whole), self.parts)

    def converted(self, dtype: torch.dtype) -> Batch:
        """Return it with its floating-point tensors in `dtype`."""
        if all(t.dtype == dtype or not t.is_floating_point() for t in leaves(self.whole).values()):
            return self
        changed = map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, self.whole)
        return Batch.of(changed, self.parts)

    def cut(
        self,
        start: int,
        change: Callable[[Tensor], Tensor] = lambda cut: cut,
        *,
        stop: int | None = None,
    ) -> Batch | None:
        """Return it from time step `start` up to `stop`; None where it is unclear how to cut it."""
        sequences, steps = self.inputs.shape[:2]
        left_out = 0 if stop is None else steps - stop
        first = self.inputs.stride(0) >= self.inputs.stride(1)  # sequences lie first in memory

        def cut(tensor: Tensor) -> Tensor:
            if tensor is self.targets and not self.by_step:
                return tensor
            for dim in (1, 0) if first else (0, 1):
                if _runs_along(tensor, dim, sequences, steps):
                    return change(tensor.narrow(dim, start, tensor.shape[dim] - start - left_out))
            return tensor

        try:
            rest = Batch.of(map_tensors(cut, self.whole), self.parts)
        except ValueError:
            return None
        due = (sequences, steps - start - left_out)
        alike = rest.targets is not None and rest.targets.shape[:2] == due
        return rest if rest.inputs.shape[:2] == due and alike == self.by_step else None


def first_two(whole: Any) -> tuple[Tensor, Tensor | None]:
    """Take a batch's first two tensors for its inputs and its targets.

    Raises:
        ValueError: it holds none, or the second may be something else.
    """
    tensors = list(leaves(whole).values())
    if not tensors:
        raise ValueError("holds no tensor")
    inputs, targets, *others = [*tensors, None][: max(2, len(tensors))]
    assert inputs is not None
    by_step = [t is not None and t.shape[:2] == inputs.shape[:2] for t in (targets, *others)]
    if any(by_step) and not by_step[0]:  # lengths, say, and targets behind them
        raise ValueError(
            "must have its targets right behind its inputs, got "
            f"{' '.join(str(tuple(t.shape)) for t in tensors)}: say which parts of it they are "
            "with Subject(..., parts=...)"
        )
    return inputs, targets


def _checked(parts: Any) -> tuple[Tensor, Tensor | None]:
    if not isinstance(parts, tuple) or len(parts) != 2 or not isinstance(parts[0], Tensor):
        raise ValueError("parts must return a pair of tensors (inputs, targets)")
    inputs, targets = parts
    if targets is not None and not isinstance(targets, Tensor):
        raise ValueError("parts must return a pair of tensors (inputs, targets)")
    if inputs.dim() < 2:
        raise ValueError(f"must have inputs (B, T, ...), got {tuple(inputs.shape)}")
    return inputs, targets


def _runs_along(tensor: Tensor, dim: int, sequences: int, steps: int) -> bool:
    """Tell whether time runs along a dimension, be it with one more step for shifted targets."""
    if tensor.dim() < 2:
        return False
    return tensor.shape[1 - dim] == sequences and tensor.shape[dim] in (steps, steps + 1)
