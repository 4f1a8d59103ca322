"""What the author of a loop promises about it, where the textbook's default is not it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tbptt_props.case import Case


@dataclass(frozen=True)
class Contract:
    """What the user promises about the loop, where the textbook's default is not it.

    Args:
        chunk: K, the time steps of each chunk; by default the case's own.
        tail: whether the last, shorter chunk of a sequence is trained on ("keep") or left out
            ("drop"). Changes what `chunks_tile_the_sequence` expects.
        clip_norm: the largest norm that the gradient of all of an optimizer's parameters has at
            an update. Changes what `gradients_are_the_chunks_own` expects there; without it,
            gradients may be clipped in any way.
        clip_value: the largest absolute value of any entry of a gradient at an update, likewise.

    Raises:
        ValueError: `chunk` is below 1, `tail` is neither word, a clipping is not positive, or both
            kinds are promised.
    """

    chunk: int | None = None
    tail: Literal["keep", "drop"] = "keep"
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        """Refuse promises nobody can keep."""
        if self.chunk is not None:
            _require_steps(self.chunk)
        if self.tail not in ("keep", "drop"):
            raise ValueError(f"tail must be 'keep' or 'drop', got tail={self.tail!r}")
        for name in ("clip_norm", "clip_value"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, got {name}={limit}")
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError(
                "only one of clip_norm and clip_value can be promised, got "
                f"clip_norm={self.clip_norm} and clip_value={self.clip_value}"
            )

    @property
    def clips(self) -> bool:
        """Whether gradients are promised to be clipped."""
        return self.clip_norm is not None or self.clip_value is not None

    def plan(self, case: Case, steps: int) -> tuple[tuple[int, int], ...]:
        """Return (start, stop) of each chunk due for a sequence of T = `steps` time steps."""
        chunk = self.chunk or case.chunk
        spans = tuple((t, min(t + chunk, steps)) for t in range(0, steps, chunk))
        whole = tuple((start, stop) for start, stop in spans if stop - start == chunk)
        return spans if self.tail == "keep" else whole


def _require_steps(chunk: object) -> None:
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be at least 1 time step, got chunk={chunk!r}")
