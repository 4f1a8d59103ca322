"""Follows rows of a batch through what a loop makes of them, until they come to forward.

A loop may embed or scale its inputs, add noise or other features to them, or cast them, and hand
forward what comes of it: other numbers in other memory. Operations that make each row of one row
are followed, all others end the trail, and then nothing is claimed of where such inputs are from.

Shapes: B sequences, K time steps, I inputs, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tbptt_props.places import by_memory

Find = Callable[[Tensor], Tensor | None]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations whose first dimensions are those of their first argument, row by row.
OF_THE_FIRST = _words(
    "alpha_dropout bfloat16 clone contiguous detach double dropout embedding feature_dropout float "
    "half int layer_norm linear log_softmax long matmul normalize one_hot rms_norm softmax to type "
    "type_as"
)
# Operations entry by entry, whichever of their arguments is known.
BY_ENTRY = _words(
    "abs add addcdiv addcmul atan clamp clamp_max clamp_min clip cos div elu erf exp expm1 gelu "
    "hardtanh leaky_relu lerp log log1p logsigmoid masked_fill maximum minimum mish mul multiply "
    "nan_to_num neg pow reciprocal relu relu6 rsqrt rsub selu sigmoid sign silu sin softplus "
    "softsign sqrt square sub subtract tanh true_divide where"
)
SIDE_BY_SIDE = _words("cat concat concatenate")


class Lineage(TorchFunctionMode):
    """Knows of tensors that were made of a batch's rows which place each of their rows is from."""

    def __init__(self, find: Find, busy: Callable[[], bool]) -> None:
        """Begin with what `find` tells of, and look away while `busy`."""
        super().__init__()
        self.find = find
        self.busy = busy
        self.made: list[tuple[Tensor, Tensor]] = []  # without its graph, and its places

    def forget(self) -> None:
        """Forget what was made of the batch before."""
        self.made = []

    def places(self, x: Tensor) -> Tensor | None:
        """Return the places of the rows of `x`, (..., 2), if it was made of the batch, or None."""
        for made, places in reversed(self.made):
            found = by_memory(x, made)
            if found is not None:
                return places[found[..., 0], found[..., 1]]
        return None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch's; note what it makes of rows that are known."""
        result = func(*args, **(kwargs or {}))
        if not self.busy() and isinstance(result, Tensor):
            self._note(_name(func), result, args, kwargs or {})
        return result

    def _note(
        self, name: str, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
    ) -> None:
        if result.dim() < 2 or self._known(result) is not None:  # a view, or changed in place
            return
        known = [
            places for places in map(self._known, _rows_of(name, args, named)) if _lead(places)
        ]
        alike = [p for p in known if p is not None and p.shape[:-1] == result.shape[:2]]
        if alike and len(alike) == len(known) and all(torch.equal(p, alike[0]) for p in alike):
            self.made.append((result.detach(), alike[0]))

    def _known(self, tensor: Tensor) -> Tensor | None:
        found = self.find(tensor)
        return self.places(tensor) if found is None else found


def _lead(places: Tensor | None) -> bool:
    return places is not None and places.dim() == 3


def _name(func: Any) -> str:
    """Return the name of an operation, however it is written: `x + 1`, `1 + x`, `x.add_(1)`."""
    name = getattr(func, "__name__", "").strip("_")
    for written in (name, name[1:]):  # __radd__, __iadd__
        if written in OF_THE_FIRST | BY_ENTRY | SIDE_BY_SIDE:
            return written
    return {"truediv": "div", "rtruediv": "div"}.get(name, name)


def _rows_of(name: str, args: Sequence[Any], named: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield the arguments of an operation of whose rows its result may be made."""
    given = [*args, *named.values()]
    if name in OF_THE_FIRST:
        given = given[:1]
    elif name in SIDE_BY_SIDE:
        dim = named.get("dim", named.get("axis", args[1] if len(args) > 1 else 0))
        given = list(given[0]) if _is_last(dim, given[0]) else []
    elif name not in BY_ENTRY:
        return
    yield from (item for item in given if isinstance(item, Tensor))


def _is_last(dim: Any, tensors: Any) -> bool:
    first = next(iter(tensors), None)
    return isinstance(first, Tensor) and dim in (-1, first.dim() - 1) and first.dim() > 2
