"""A case: the size of one problem, in integers; its numbers grow from the seed.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, order=True)
class Case:
    """One problem: `batches` batches of B = `batch` sequences, T = `steps` cut every K = `chunk`.

    Only integers, so the repr is the reproduction. It leaves out sizes that are the default, all
    but `steps` and `chunk`.

    An odd seed makes each batch one sequence smaller than the one before it, and a seed whose bit 1
    is set (2, 3, 6, 7, ...) makes each batch one time step shorter, down to one; if bit 2 is set
    besides (6, 7, 14, ...), the shortest batch comes first. Seed 0 makes all batches alike.

    Raises:
        ValueError: a size is below 1, the seed is below 0, or either is not an integer.
    """

    batch: int = 1
    steps: int = 2
    chunk: int = 1
    inputs: int = 1
    hidden: int = 1
    outputs: int = 1
    batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no problem has."""
        for name in SIZES:
            require_size(name, getattr(self, name))

    def __repr__(self) -> str:
        """Write the call that makes this case, without the sizes that make no difference to it."""
        told = [
            f"{size.name}={value}"
            for size in fields(self)
            if (value := getattr(self, size.name)) != size.default or size.name in CUT
        ]
        return f"{type(self).__name__}({', '.join(told)})"

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Return (B, T) of each batch, in the order they are trained on."""
        fewer, shorter, longer = (self.seed >> bit & 1 for bit in range(3))
        sequences = [max(1, self.batch - fewer * i) for i in range(self.batches)]
        steps = [max(1, self.steps - shorter * i) for i in range(self.batches)]
        return tuple(zip(sequences, steps[::-1] if longer else steps, strict=True))

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Grow the batches: float64 inputs (B, T, I) and targets (B, T, O), no number twice.

        The numbers come from a generator of the case's own; nobody's global seed is touched.
        """
        import torch

        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

        return [(normal(b, t, self.inputs), normal(b, t, self.outputs)) for b, t in self.sizes()]


SIZES = tuple(field.name for field in fields(Case))
CUT = ("steps", "chunk")  # how a sequence is cut is what a case is about: told in every repr


def require_size(name: str, value: object) -> None:
    """Refuse what is not one of a case's sizes, or not a value that it can have.

    Raises:
        ValueError: no size has that name, or its value is no integer of at least 1 (seed: 0).
    """
    if name not in SIZES:
        raise ValueError(f"a case has no size {name!r}: its sizes are {', '.join(SIZES)}")
    least = 0 if name == "seed" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {name}={value!r}")


def case_of(text: str) -> Case:
    """Read a case from how it is written, `Case(steps=5, chunk=2)`; nothing is run.

    Raises:
        ValueError: the text is no such call, or a size has no such name or value.
    """
    given = _given(text)
    if given is None:
        raise ValueError(f"a case is written as {Case(steps=5, chunk=2)!r}, got {text!r}")
    for name, value in given:
        require_size(name, value)
    return Case(**dict(given))


def _given(text: str) -> list[tuple[str, int]] | None:
    """Return the sizes that a call of Case is given, each by its name; None if it is no such."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func).split(".")[-1] != "Case":
            return None
        by_place = list(zip(SIZES, map(ast.literal_eval, call.args), strict=False))
        by_name = [(k.arg or "", ast.literal_eval(k.value)) for k in call.keywords]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    names = [name for name, _ in by_place + by_name]
    whole = len(call.args) <= len(SIZES) and len({*names}) == len(names) and "" not in names
    return by_place + by_name if whole else None
