"""The call that runs a chunk: where its inputs and its state come in, and where they come out.

Shapes: B sequences, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_props.state import leaves, map_tensors, value_of
from tbptt_props.subject import Subject, resolve

Original = Callable[..., Any]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a forward: inputs (B, K, I), state, and whatever follows."""

    x: Any
    state: Any
    has_state: bool  # one was handed over, be it None
    others: tuple[tuple[Any, ...], Mapping[str, Any]]


class Forward:
    """A subject's forward. Its state comes in by arguments, or is kept in the module's attributes.

    By default it is the second argument, and the second of the pair that is returned.
    """

    def __init__(self, subject: Subject) -> None:
        """Find out which call runs a chunk of `subject`, and how its state travels."""
        self.module = subject.module
        self.name = subject.forward
        self.outputs = subject.outputs
        self.owner, self.attribute = _owner_of(self.module, subject.forward)
        self.parameters = _parameter_names(getattr(self.owner, self.attribute))
        self.kept = tuple(n for n in subject.state if n not in self.parameters)
        self.handed = tuple(n for n in subject.state if n in self.parameters)
        if not subject.state:
            self.handed = tuple(self.parameters[1:2])

    @contextlib.contextmanager
    def replaced(self, replacement: Callable[[Original, Any, Any], Any]) -> Iterator[None]:
        """Have `replacement(original, args, kwargs)` called in its place within the block."""
        original = getattr(self.owner, self.attribute)
        own = self.attribute in vars(self.owner)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return replacement(original, args, kwargs)

        object.__setattr__(self.owner, self.attribute, forward)
        try:
            yield
        finally:
            if own:
                object.__setattr__(self.owner, self.attribute, original)
            else:
                vars(self.owner).pop(self.attribute, None)

    def arguments(self, args: Any, kwargs: Mapping[str, Any]) -> Arguments:
        """Tell which argument is which: inputs come first, the others go by their names."""
        positional = [*args] or [kwargs.get(next(iter(self.parameters), ""))]
        x, *others = positional
        named = {n: value for n, value in kwargs.items() if args or n != self.parameters[0]}
        named |= dict(zip(self.parameters[1:], others, strict=False))
        rest = tuple(others[max(0, len(self.parameters) - 1) :])
        if self.kept:
            return Arguments(x, self._read(), True, (rest, named))
        if not self.parameters and rest:  # nothing is known of what it takes
            return Arguments(x, rest[0], True, (rest[1:], named))
        found = [named.pop(name) for name in self.handed if name in named]
        state = tuple(found) if len(self.handed) > 1 else next(iter(found), None)
        return Arguments(x, state, bool(found), (rest, named))

    def put(self, arguments: Arguments, state: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put another state in the place of the one that came in; return what to call with."""
        rest, named = arguments.others
        if self.kept:
            self._write(state)
            return self._arranged(arguments.x, dict(named), rest)
        if not self.handed:
            return (arguments.x, state, *rest), dict(named)
        states = state if len(self.handed) > 1 and isinstance(state, tuple) else (state,)
        handed = dict(zip(self.handed, states, strict=False))
        return self._arranged(arguments.x, {**named, **handed}, rest)

    def _arranged(
        self, x: Any, named: dict[str, Any], rest: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand over by position what can be: some take nothing by name."""
        positional = [x]
        for name in self.parameters[1:]:
            if name not in named:
                break
            positional.append(named.pop(name))
        return (*positional, *rest), named

    def came_out(self, returned: Any) -> tuple[Tensor, Any] | None:
        """Return (prediction, state) of what a call returned; None where it is of another kind."""
        if self.outputs is not None:
            returned = self.outputs(returned)
        several = isinstance(returned, (tuple, list))
        prediction = returned[0] if several and returned else returned
        if not isinstance(prediction, Tensor):
            return None
        if self.kept:
            return prediction, self._read()
        if not several or len(returned) != 1 + max(1, len(self.handed)):
            return None
        return prediction, tuple(returned[1:]) if len(self.handed) > 1 else returned[1]

    def again(self, arguments: Arguments, state: Any) -> tuple[Tensor, Any]:
        """Call it once more, from this state if one came in.

        Raises:
            TypeError: it returns something else than it did.
        """
        if arguments.has_state:
            args, kwargs = self.put(arguments, state)
        else:
            rest, named = arguments.others
            args, kwargs = self._arranged(arguments.x, dict(named), rest)
        found = self.came_out(getattr(self.owner, self.attribute)(*args, **kwargs))
        if found is None:
            raise TypeError("forward returns no pair (prediction, state) here")
        # What is kept is written over when the module is made ready for another call.
        return (found[0], map_tensors(torch.clone, found[1])) if self.kept else found

    def _read(self) -> dict[str, Any]:
        found = {name: resolve(self.module, name) for name in self.kept}
        return {name: value for name, value in found.items() if value is not None}

    def _write(self, state: Mapping[str, Any]) -> None:
        for name in self.kept:
            head, _, tail = name.rpartition(".")
            owner = resolve(self.module, head) if head else self.module
            setattr(owner, tail, map_tensors(_no_leaf, state.get(name)))

    # Finding out where the state is ---------------------------------------------------------

    def candidates(self) -> dict[str, Any]:
        """Copy the attributes in which the module may keep a state."""
        return {
            name: value_of(value)
            for name, value in _attributes(self.module)
            if leaves(value) and not isinstance(value, nn.Parameter)
        }

    def guess(
        self, before: Mapping[str, Any], arguments: Arguments, returned: Any
    ) -> tuple[str, ...]:
        """Guess where the state is from one call: which further arguments, or which attributes.

        The attributes are tried out, by calling it again: do not train on with this module.
        """
        if isinstance(returned, (tuple, list)) and len(returned) > 2 and not self.kept:
            names = tuple(self.parameters[1 : len(returned)])
            return names if len(names) == len(returned) - 1 else ()
        if not isinstance(returned, (Tensor, tuple, list)):
            return ()
        after = self.candidates()
        changed = [name for name in after if not _alike(after[name], before.get(name))]
        with torch.no_grad():
            return tuple(name for name in changed if self._depends_on(name, after, arguments))

    def _depends_on(self, name: str, values: Mapping[str, Any], arguments: Arguments) -> bool:
        """Tell whether what it returns depends on what an attribute held before."""
        outcomes = []
        for change in (torch.clone, _moved):
            torch.manual_seed(0)
            for other, value in values.items():
                changed = map_tensors(change if other == name else torch.clone, value)
                head, _, tail = other.rpartition(".")
                setattr(resolve(self.module, head) if head else self.module, tail, changed)
            rest, named = arguments.others
            args, kwargs = (
                self.put(arguments, arguments.state)
                if arguments.has_state
                else self._arranged(arguments.x, dict(named), rest)
            )
            try:
                returned = getattr(self.owner, self.attribute)(*args, **kwargs)
            except Exception:  # it can't be called again: then nothing is known of it
                return False
            outcomes.append(value_of(leaves(returned)))
        return not _alike(*outcomes)


def _no_leaf(tensor: Tensor) -> Tensor:
    """Return a tensor of the same value that may be written in place, as attributes are."""
    return tensor * 1 if tensor.is_leaf and tensor.requires_grad else tensor


def _moved(tensor: Tensor) -> Tensor:
    return tensor + 0.5 if tensor.is_floating_point() else tensor.clone()


def _alike(one: Any, other: Any) -> bool:
    ones, others = leaves(one), leaves(other)
    return ones.keys() == others.keys() and all(map(torch.equal, ones.values(), others.values()))


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes and buffers of a module and its parts, but for those of torch's own."""
    inherited = vars(nn.Module()).keys()
    for path, part in module.named_modules():
        if type(part).__module__.startswith("torch.nn."):
            continue
        prefix = f"{path}." if path else ""
        kinds = (Tensor, tuple, list, dict)
        for name, value in vars(part).items():
            plain = isinstance(value, kinds) or hasattr(value, "__dataclass_fields__")
            if plain and name not in inherited:
                yield prefix + name, value
        for name, buffer in part.named_buffers(recurse=False):
            yield prefix + name, buffer


def _parameter_names(forward: Original) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in kinds]


def _owner_of(module: nn.Module, name: str) -> tuple[Any, str]:
    """Return the object and the attribute that a call of `name` on `module` ends in."""
    found = resolve(module, name)
    if isinstance(found, nn.Module):
        return found, "forward"
    head, _, tail = name.rpartition(".")
    return (resolve(module, head) if head else module), tail
