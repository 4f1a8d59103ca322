"""What a run showed, as far as it tells one mistake from another, without its tensors.

A closer look is taken at each link while its tensors are there; what is found is facts, and no
verdict: how often updates came, what the incoming state was, by what factor a loss is off.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tbptt_props.compare import close, same, same_leaves
from tbptt_props.state import leaves
from tbptt_props.trace import (
    Chunk,
    Expected,
    Leak,
    Link,
    Outcome,
    Rule,
    Span,
    Tensors,
    Trace,
    time_dimension,
)

NEAR = 1e-6  # two ratios are one, for all that rounding does to them


@dataclass(frozen=True)
class Look:
    """What a chunk and the one before it showed, without their tensors."""

    chunk: Chunk
    plan: tuple[Span, ...]
    calls: int  # of forward
    events: tuple[str, ...]  # calls of forward in a row are told once
    updates: int  # of one optimizer
    closes: bool  # an update is due
    dirty: frozenset[str]  # parameters whose gradient was not clear before backward
    graded: frozenset[str]  # those that have one after it
    ungraded: frozenset[str]  # those that could have one and have none
    cleared: bool  # the update met none of backward's gradients
    untouched: bool  # the update met just what backward left
    clips: bool  # clipping is promised
    scaled: float  # the factor between backward and update; 1 where there is no one factor
    leaks: tuple[Leak, ...]
    parts: int  # tensors in the incoming state
    carried: frozenset[str]  # how the incoming state differs from the one that is due
    effect: bool | None  # the incoming state has one; None: not known
    loss: float
    due: float | None
    ratio: float  # of the two, and of their slopes by the predictions; NaN if that is another
    entries: int  # of the predictions
    scored: tuple[bool, ...]  # for each time step, whether the loss depends on its prediction
    moved: bool  # something but an update moved a parameter
    through: bool | None  # backward went through Lightning
    rates: frozenset[float]  # learning rates
    another_optimizer: bool  # made the update than the one before
    remembers: bool  # the optimizer had a memory to go by
    autocast: str = ""  # the dtype to which products were rounded, if they were
    keeps_casts: bool = False  # weights are rounded once, and kept so


@dataclass(frozen=True)
class Evidence:
    """What a whole run showed."""

    trace: Trace
    looks: tuple[Look, ...]
    broken: frozenset[str]
    chunk: int  # K, as promised
    moved_at_last: bool = False  # parameters are not as the last update left them

    @property
    def error(self) -> str:
        """What training raised, if it did."""
        return self.trace.halt.error if self.trace.halt else ""

    @property
    def lacks_updates(self) -> bool:
        """Whether some update that is due was not made."""
        return any(look.closes and not look.updates for look in self.looks)

    @property
    def updates(self) -> list[int]:
        """How many updates each chunk had."""
        return [look.updates for look in self.looks]


def is_near(one: float, other: float) -> bool:
    """Tell whether two ratios are one, but for rounding."""
    return math.isclose(one, other, rel_tol=NEAR)


# Looking, while the tensors are there ---------------------------------------------------------


@dataclass
class Looking:
    """Looks at one link after the other, and keeps what fingerprints go by."""

    looks: list[Look] = field(default_factory=list)
    initial: Tensors = field(default_factory=dict)  # the state in which the run began
    ends: list[Tensors] = field(default_factory=list)  # of a batch: first, last but one, last
    optimizer: weakref.ref[Any] | None = None
    left: Tensors = field(default_factory=dict)  # parameters, where the run is of one chunk

    def at(self, link: Link, *, alone: bool) -> None:
        """Look at a link; `alone` if its chunk is the only one due."""
        outcome = link.chunk.outcome
        if outcome is None or link.chunk.given is None:
            return
        if link.chunk.starts_batch and link.contract.carry == "within":
            self.ends = []
        if not self.looks:
            self.initial = leaves(link.chunk.given.state)
        carried = _carried(link, self.ends, self.initial)
        self.looks.append(_look(link, carried, another=self._another(outcome.rules)))
        state = leaves(outcome.states[-1]) if outcome.states else {}
        self.ends = [*self.ends[:1], *self.ends[1:][-1:], state]
        self.left = _left(link) if alone else {}

    def _another(self, rules: Sequence[Rule]) -> bool:
        """Tell whether another optimizer made the update than the one before."""
        before = self.optimizer
        if rules:
            self.optimizer = weakref.ref(rules[-1].optimizer)
        return before is not None and bool(rules) and before() is not rules[-1].optimizer

    def evidence(self, trace: Trace, broken: Iterable[str], chunk: int) -> Evidence:
        """Sum up what was seen of the run."""
        end = trace.one_chunk.first
        moved = bool(self.left) and end is not None and _moved(self.left, end.parameters)
        return Evidence(trace, tuple(self.looks), frozenset(broken), chunk, moved)


def _left(link: Link) -> Tensors:
    """Return the parameters as the chunk's last update left them, or as they were without one."""
    assert link.chunk.outcome is not None
    assert link.chunk.given is not None
    rules = link.chunk.outcome.rules
    return rules[-1].after if rules else link.chunk.given.parameters


def _moved(before: Tensors, after: Tensors) -> bool:
    return any(name in after and not same(after[name], before[name]) for name in before)


def _look(link: Link, carried: frozenset[str], *, another: bool) -> Look:
    chunk, outcome, due = link.chunk, link.chunk.outcome, link.expected
    assert outcome is not None
    assert chunk.given is not None
    graded = frozenset(name for name, g in outcome.met.items() if bool(g.any()))
    owned = frozenset().union(*outcome.optimizers) or chunk.given.trainable
    predictions = [call.prediction for call in chunk.given.calls]
    return Look(
        chunk=chunk.slim(),
        plan=link.plan,
        calls=len(chunk.given.calls),
        events=_events(outcome),
        updates=max(Counter(id(rule.optimizer) for rule in outcome.rules).values(), default=0),
        closes=link.closes,
        dirty=frozenset(outcome.dirty) & owned if link.opens else frozenset(),
        graded=graded,
        ungraded=(chunk.given.trainable & owned) - graded,
        cleared=_cleared(outcome),
        untouched=all(_untouched(rule, outcome) for rule in outcome.rules),
        clips=link.contract.clips,
        scaled=outcome.scaled[-1][0] if outcome.scaled else 1.0,
        leaks=outcome.leaks,
        parts=len(leaves(chunk.given.state)),
        carried=carried,
        effect=due.state_matters,
        loss=outcome.loss,
        due=None if due.loss is None else link.share * due.loss,
        ratio=_ratio(outcome, due, link.share),
        entries=sum(p.numel() for p in predictions if p is not None),
        scored=_scored(chunk, outcome),
        moved=bool(outcome.moved),
        through=outcome.backward_through_lightning,
        rates=frozenset(float(g["lr"]) for r in outcome.rules for g in r.groups if "lr" in g),
        another_optimizer=another,
        remembers=any(memory for rule in outcome.rules for memory in rule.memory.values()),
        autocast=str(chunk.given.autocast or ""),
        keeps_casts=chunk.given.keeps_casts,
    )


def _ratio(outcome: Outcome, due: Expected, share: float) -> float:
    """Return the factor between the loss and the one that is due; 1 where none is known."""
    if not due.loss:
        return 1.0
    ratio = outcome.loss / (share * due.loss)
    slopes = zip(outcome.cotangents, due.cotangents, strict=False)
    factor = ratio * share
    alike = (one is None or other is None or close(one, other * factor) for one, other in slopes)
    return ratio if all(alike) else math.nan


def _events(outcome: Outcome) -> tuple[str, ...]:
    pairs = pairwise(("", *outcome.events))
    return tuple(event for before, event in pairs if not before == event == "forward")


def _cleared(outcome: Outcome) -> bool:
    left = any(bool(g.any()) for g in outcome.met.values())
    met = any(bool(g.any()) for rule in outcome.rules for g in rule.handed.values())
    return bool(outcome.rules) and left and not met


def _untouched(rule: Rule, outcome: Outcome) -> bool:
    return all(n in outcome.met and same(g, outcome.met[n]) for n, g in rule.handed.items())


def _scored(chunk: Chunk, outcome: Outcome) -> tuple[bool, ...]:
    """Tell of each time step whether the loss depends on its prediction; () where unknown."""
    time = time_dimension(chunk)
    cotangent = outcome.cotangents[0] if len(outcome.cotangents) == 1 else None
    if time is None or cotangent is None or cotangent.dim() <= time:
        return ()
    return tuple(bool(step.any()) for step in cotangent.unbind(time))


def _carried(link: Link, ends: Sequence[Tensors], initial: Tensors) -> frozenset[str]:
    """Say in which ways the incoming state may have come from what was due; none if it is that."""
    assert link.chunk.given is not None
    found, due = leaves(link.chunk.given.state), ends[-1] if ends else {}
    if not due or same_leaves(found, due) or _may_differ(link):
        return frozenset()
    if not found:
        return frozenset({"missing"})
    known = {"fresh": initial, **({"first": ends[0], "older": ends[-2]} if ends[1:] else {})}
    ways = {name for name, way in WAYS.items() if _fits(way, found, due)}
    ways |= {name for name, state in known.items() if same_leaves(found, state)}
    return frozenset(ways or {"otherwise"})


def _may_differ(link: Link) -> bool:
    """Tell whether rows of the state may start afresh or have changed places, as they should."""
    before = link.before.lanes if link.before else ()
    moved = bool(before and link.chunk.lanes) and before != link.chunk.lanes
    return moved or link.contract.carry == "flagged"


Pairs = Sequence[tuple[Tensor, Tensor]]  # of what was found and what was due, part by part


def _fits(way: Callable[[Pairs], bool], found: Tensors, due: Tensors) -> bool:
    if len(found) != len(due):
        return False
    pairs = list(zip(found.values(), due.values(), strict=True))
    alike = all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairs)
    return alike and all(leaf.is_floating_point() for leaf in due.values()) and way(pairs)


def _zeros(pairs: Pairs) -> bool:
    return not any(bool(found.any()) for found, _ in pairs)


def _in_part(pairs: Pairs) -> bool:
    kept = [same(found, due) for found, due in pairs]
    lost = [not bool(found.any()) for found, _ in pairs]
    return any(kept) and all(a or b for a, b in zip(kept, lost, strict=True))


def _swapped(pairs: Pairs) -> bool:
    sources = [[i for i, (_, due) in enumerate(pairs) if same(found, due)] for found, _ in pairs]
    return sorted(i for source in sources for i in source[:1]) == list(range(len(pairs)))


def _rearranged(pairs: Pairs) -> bool:
    return not _zeros(pairs) and all(
        same(found.flatten().sort().values, due.flatten().sort().values) for found, due in pairs
    )


def _rounded(pairs: Pairs) -> bool:
    return any(
        all(same(found, due.to(kind).to(due.dtype)) for found, due in pairs) for kind in NARROWER
    )


def _scaled(pairs: Pairs) -> bool:
    """Tell whether one factor leads from what was due to what was found, twice at least."""
    ratios = torch.cat([(found / due).flatten() for found, due in pairs])
    if len(ratios) < 2 or not bool(ratios.isfinite().all()):
        return False
    least, most = float(ratios.min()), float(ratios.max())
    return most - least < NEAR and least != 0 and not is_near(least, 1.0)


NARROWER = (torch.float32, torch.bfloat16, torch.float16)
WAYS: dict[str, Callable[[Pairs], bool]] = {
    "fresh": _zeros,
    "in part": _in_part,
    "swapped": _swapped,
    "rearranged": _rearranged,
    "rounded": _rounded,
    "scaled": _scaled,
}
