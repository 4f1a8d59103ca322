"""The optimizers that train a module: which there are, what each owns, and what it remembers."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from tbptt_props.parameters import Parameters
from tbptt_props.state import value_of
from tbptt_props.trace import Rule


@dataclass
class Step:
    """A call of an optimizer's `step` that is under way."""

    optimizer: Optimizer
    token: object = field(default_factory=object)  # to know it by, where nothing may live by it
    rules: list[Rule] = field(default_factory=list)  # what it went by so far, closures' last


class Optimizers:
    """All optimizers that own any parameter of a module, as far as they are known."""

    def __init__(self, parameters: Parameters) -> None:
        """Know of none yet that own any of `parameters`."""
        self.parameters = parameters
        self.told: Sequence[Optimizer] = ()  # by whoever trains
        self.made: list[weakref.ref[Optimizer]] = []  # while training
        self.steps: list[Step] = []  # under way, one inside the other
        self._inner: list[Optimizer] = []  # those by which they are made
        self._met = False
        self._memory: dict[int, tuple[type, Mapping[str, Any]]] = {}  # by parameter's id

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice, within the block, each optimizer that is made."""
        kind: Any = Optimizer
        original = kind.__init__

        @functools.wraps(original)
        def made(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            self._met = self._met or bool(self.owned(optimizer))
            self.made.append(weakref.ref(optimizer))

        kind.__init__ = made
        try:
            yield
        finally:
            kind.__init__ = original

    # Which there are ------------------------------------------------------------------------

    @property
    def any_known(self) -> bool:
        """Whether any optimizer of torch's is known to train the module."""
        return self._met or any(map(self.owned, self.told))

    @property
    def alive(self) -> Sequence[Optimizer]:
        """Those that are known to train the module, or that training itself has made."""
        made = (ref() for ref in self.made)
        return self.told or [optimizer for optimizer in made if optimizer is not None]

    def owned(self, optimizer: Optimizer) -> list[str]:
        """Name the module's parameters that an optimizer owns."""
        names = self.parameters.names
        return [
            names[id(p)]
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in names
        ]

    def each_owned(self, trainable: frozenset[str]) -> tuple[frozenset[str], ...]:
        """Return what each optimizer owns, of those that train any of the parameters."""
        owned = [frozenset(self.owned(optimizer)) for optimizer in self.alive]
        return tuple(names for names in owned if names & trainable)

    def owners(self, names: Iterable[str]) -> list[Optimizer]:
        """Return the optimizers that own any of the parameters."""
        return [o for o in self.alive if not {*self.owned(o)}.isdisjoint(names)]

    def trains(self, name: str) -> bool:
        """Tell whether an optimizer reads a parameter, as far as optimizers are known.

        It may own one that never wants a gradient: an average of others, which the loop keeps.
        """
        owned = {n for optimizer in self.told for n in self.owned(optimizer)}
        return name in self.parameters.ever_trainable and (not owned or name in owned)

    # Their steps ----------------------------------------------------------------------------

    def enter(self, optimizer: Optimizer) -> Step | None:
        """Note that a step begins; None if it is one by which another makes its update.

        So it is where an optimizer wraps another, or inherits: a step that calls the one it
        overrides comes here twice, if torch has patched both.
        """
        owned = {*self.owned(optimizer)}
        if any(owned <= {*self.owned(step.optimizer)} for step in self.steps):
            self._inner.append(optimizer)
            return None
        self._met = True
        self.steps.append(Step(optimizer))
        return self.steps[-1]

    def leave(self, optimizer: Optimizer) -> Step | None:
        """Note that a step is over; None if it was not one of those that `enter` returned."""
        if self._inner and self._inner[-1] is optimizer:
            self._inner.pop()
            return None
        if not self.steps or self.steps[-1].optimizer is not optimizer:
            return None
        return self.steps.pop()

    @property
    def token(self) -> object | None:
        """The token of the innermost step that is under way."""
        return self.steps[-1].token if self.steps else None

    @property
    def moving(self) -> bool:
        """Whether an update has begun that may be moving parameters."""
        return bool(self.steps) and bool(self.steps[-1].rules)

    # What they go by ------------------------------------------------------------------------

    def groups(self, optimizer: Optimizer) -> tuple[dict[str, Any], ...]:
        """Return an optimizer's groups, with parameters by name; '' for one of another module."""
        names = self.parameters.names
        return tuple(
            {**group, "params": [names.get(id(p), "") for p in group["params"]]}
            for group in optimizer.param_groups
        )

    def memory(self, optimizer: Optimizer) -> dict[str, Mapping[str, Any]]:
        """Return what the update before left in the optimizer's memory, or what is there now."""
        found = {}
        for p in _parameters_of(optimizer):
            kind, memory = self._memory.get(id(p), (None, None))
            if kind is not type(optimizer) or memory is None:
                memory = value_of(dict(optimizer.state.get(p, {})))
            found[self.parameters.names.get(id(p), "")] = memory
        return found

    def remember(self, optimizer: Optimizer) -> None:
        """Note what an update has left in the optimizer's memory."""
        for p in _parameters_of(optimizer):
            memory = value_of(dict(optimizer.state.get(p, {})))
            self._memory[id(p)] = (type(optimizer), memory)


def rates_of(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each of an optimizer's groups."""
    return [float(group.get("lr", 0.0)) for group in optimizer.param_groups]


def _parameters_of(optimizer: Optimizer) -> Iterator[Any]:
    return (p for group in optimizer.param_groups for p in group["params"])
