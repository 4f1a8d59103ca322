"""What the kit puts in the place of a method of one object; no copy of the object has it."""

from __future__ import annotations

import contextlib
import copy
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from tbptt_props.compiling import left_alone

Original = Callable[..., Any]


class StandIn:
    """Is called in the place of an object's method, until the object is copied or pickled.

    Loops do that while they train: a teacher, a running average, a file. In the copy there is what
    would be there without the kit: the copy's own method.
    """

    def __init__(self, owner: Any, name: str, original: Original, called: Original) -> None:
        """Stand in for `original`, which is what `name` means on `owner`, by `called`."""
        functools.update_wrapper(self, original)
        self._owner = owner
        self._name = name
        self._original = original
        self._inherited = name not in vars(owner)
        self._called = called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands in."""
        return self._called(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Return what stands in for nothing: of an owner that is being copied, the copy's own."""
        if self._inherited and id(self._owner) not in memo:
            return self._original  # an owner that copies itself does not say what its copy is
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        """Have the original unpickled, with nothing of the kit's in the file."""
        if self._inherited:
            return getattr, (self._owner, self._name)
        return operator.getitem, ((self._original,), 0)


@contextlib.contextmanager
def standing_in(
    owner: Any, name: str, replacement: Callable[[Original, Any, Any], Any]
) -> Iterator[None]:
    """Have `replacement(original, args, kwargs)` called for a method within the block."""
    original = getattr(owner, name)
    own = name in vars(owner)

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, args, kwargs)

    object.__setattr__(owner, name, StandIn(owner, name, original, left_alone(called)))
    try:
        yield
    finally:
        if own:
            object.__setattr__(owner, name, original)
        else:
            vars(owner).pop(name, None)
