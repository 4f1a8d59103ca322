"""Surrogate gradients: a forward that takes one value, and another value's gradient.

That is written `b + (a - b).detach()`, or `a - b.detach() + b`: of the sum, `a` is left as its
value, and the gradient of `b`. It is told from memory, in which a tensor and what is detached of it
lie together; so it does not matter by which call the gradient was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Place = tuple[Any, ...]  # where in memory a tensor lies, and how
Term = tuple[Place, bool]  # and whether a gradient goes to it
_ATEN = torch.ops.aten
SIGNS: Mapping[Any, tuple[int, ...]] = {  # with which an operation adds its arguments up
    _ATEN.add: (1, 1),
    _ATEN.add_: (1, 1),
    _ATEN.sub: (1, -1),
    _ATEN.sub_: (1, -1),
    _ATEN.neg: (-1,),
}


def takes_anothers_gradient(run: Callable[[], Any]) -> bool:
    """Tell whether `run` adds a value to what cancels it, and lets no gradient through."""
    sums = _Sums()
    try:
        with torch.enable_grad(), sums:
            run()
    except Exception:  # tensors of a kind that no such mode can look at
        return False
    return sums.cancelled


class _Sums(TorchDispatchMode):
    """Notes of which tensors each sum is made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sums: dict[Place, dict[Term, int]] = {}
        self.kept: list[Any] = []  # so that no memory is taken for two
        self.cancelled = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and note what it adds up."""
        signs = SIGNS.get(func.overloadpacket, ()) if not kwargs else ()  # none with an alpha
        terms: dict[Term, int] = {}
        for sign, arg in zip(signs, args, strict=False):
            for term, factor in self._terms(arg).items():
                terms[term] = terms.get(term, 0) + sign * factor
        made = func(*args, **(kwargs or {}))
        if signs:
            self.cancelled = self.cancelled or any(_cancels(term, terms) for term in terms)
            self.sums[_place(made)] = terms
            self.kept += [made, *args]
        elif func._schema.is_mutable:
            self._written(args)
        return made

    def _terms(self, arg: Any) -> dict[Term, int]:
        if not isinstance(arg, Tensor):
            return {}
        place, live = _place(arg), arg.requires_grad
        sums = self.sums.get(place, {(place, True): 1})
        return {(term, live and reached): factor for (term, reached), factor in sums.items()}

    def _written(self, args: tuple[Any, ...]) -> None:
        """Take what is written over for another tensor than it was."""
        for arg in args[:1]:
            if isinstance(arg, Tensor):
                place = _place(arg)
                self.sums[place] = {((len(self.kept), *place), True): 1}
                self.kept.append(arg)


def _cancels(term: Term, terms: Mapping[Term, int]) -> bool:
    place, reached = term
    return reached and terms[term] * terms.get((place, False), 0) < 0


def _place(tensor: Tensor) -> Place:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
