"""Holds what a loop does on one device against the same on another.

Each chunk that one device came to is worked out anew on the other, from what that chunk was given.
So no difference adds up over chunks, and the tolerance is that of a single one. Nor is a state to
make its way through the host's memory while a loop trains on a device that has its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tbptt_props.case import Case
from tbptt_props.compare import near, rounded_to, same, worst
from tbptt_props.copies import Returned, copies_noted
from tbptt_props.device import has_memory_of_its_own
from tbptt_props.observation import made_ready, observe, observing
from tbptt_props.precision import dtype_of, rounding
from tbptt_props.rederivation import rederive
from tbptt_props.report import Report, Verdict
from tbptt_props.search import Bench
from tbptt_props.state import leaves, map_tensors
from tbptt_props.strategies import cases
from tbptt_props.subject import Subject
from tbptt_props.trace import (
    Cause,
    Chunk,
    Expected,
    Finding,
    NotJudged,
    Trace,
    Violation,
    spanned,
    told_apart,
)

Build = Callable[[Case], Subject]
Again = Sequence[Expected]  # each chunk of a trace, worked out on the other device


def verify_devices(
    build: Build,
    *,
    devices: tuple[str, str] = ("cpu", "cuda"),
    max_examples: int = 20,
    seed: int | None = None,
    **fixed: int,
) -> Report:
    """Search for a case on which what `build(case)` returns trains otherwise on one device.

    On the second one, no state is to come back from the host in every chunk, either.

    Args:
        build: makes a fresh subject for a case.
        devices: the two that are held against each other.
        max_examples: how many cases to try.
        seed: makes the search repeatable; drawn anew if it is not given.
        fixed: sizes of a case that the subject can't vary, by name.

    Raises:
        ObservationError: a subject can't be described, or there is no such device here.
        TypeError: `build` does not return a subject.
        ValueError: `max_examples` is below 1, or a size has no such name or value.
    """
    if max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got max_examples={max_examples}")
    bench = _Both(build, devices)
    number = random.SystemRandom().getrandbits(64) if seed is None else seed
    examples = bench.search(cases(**fixed), number, max_examples, None)
    verdicts = tuple(
        bench.shrunk(verdict, fixed, number, max_examples) if verdict.violations else verdict
        for verdict in bench.summed().verdicts
    )
    return Report(bench.name, verdicts, examples=examples)


def devices_train_alike(
    traces: tuple[Trace, Trace], devices: tuple[str, str], again: Again
) -> Iterator[Finding]:
    """On each device the same chunks come to the same losses, gradients and states."""
    halts = [trace.halt.error if trace.halt else "" for trace in traces]
    if any(halts) and not all(halts):
        which = int(bool(halts[1]))
        where = f"training on {devices[which]}"
        yield Violation(where, f"raised {halts[which]}", f"as on {devices[1 - which]}")
    cuts = [[(chunk.batch, chunk.span) for chunk in trace.chunks] for trace in traces]
    if not any(halts) and cuts[0] != cuts[1]:
        found, due = (" ".join(spanned(span) for _, span in cut) for cut in cuts[::-1])
        yield Violation(f"chunks on {devices[1]}", found, f"{due}, as on {devices[0]}")
    judged = 0
    for chunk, due_ in zip(traces[1].chunks, again, strict=True):
        if not due_.missing and not (due_.draws and len({*devices}) > 1):
            judged += 1
            yield from _differences(chunk, due_, devices)
    if not judged:
        yield NotJudged("a forward that draws no random numbers, and that can be repeated")


def the_state_stays_on_its_device(
    trace: Trace, device: str, notes: Sequence[Returned]
) -> Iterator[Finding]:
    """Where chunk follows chunk, the state does not make its way through the host's memory."""
    going_on = [chunk for chunk in trace.chunks if not chunk.starts_batch]
    if not has_memory_of_its_own(device) or not going_on:
        yield NotJudged("a device with memory of its own, and a case of at least two chunks")
        return
    back = [(chunk, _came_back(chunk, notes)) for chunk in going_on]
    # What is done now and then, for a checkpoint or a picture, may well be meant.
    if all(paths for _, paths in back):
        for chunk, paths in back:
            where = f"{chunk} on {device}, incoming {paths[0]}"
            yield Violation(where, "a copy that went to the host and back", f"left on {device}")


def the_state_is_sent_to_the_host(found: Sequence[Finding]) -> bool:
    """The state is sent to the host between chunks, and from there back to the device.

    Try: state.detach() alone on the way to the next chunk, with no cpu(), numpy() or tolist(); what
    is to be logged or kept of it may be copied besides
    """
    return any(isinstance(one, Violation) for one in found)


def _came_back(chunk: Chunk, notes: Sequence[Returned]) -> tuple[str, ...]:
    """Return the leaves of the state that a chunk got from the host."""
    assert chunk.given is not None
    x = chunk.given.calls[0].x
    return next((note.paths for note in notes if same(note.x, x)), ())


def _differences(chunk: Chunk, due: Expected, devices: tuple[str, str]) -> Iterator[Finding]:
    outcome = chunk.outcome
    assert outcome is not None
    where, other = f"{chunk} on {devices[1]}", f"on {devices[0]}"
    if due.loss is not None and outcome.complete and not near(outcome.loss, due.loss):
        found, told = told_apart(outcome.loss, due.loss)
        yield Violation(f"{where}, loss", found, f"{told} {other}")
    found_ = {name: g for name, g in outcome.gradients.items() if name in due.gradients}
    states = leaves(outcome.states[-1]) if outcome.states else {}
    for what, one, expected in (
        ("gradient of ", found_, {name: due.gradients[name] for name in found_}),
        ("outgoing ", states, leaves(due.state)),
    ):
        for wrong in worst(one, expected):
            value, told = wrong.told
            yield Violation(f"{where}, {what}{wrong.entry}", value, f"{told} {other}")


_STAYS = frozenset({the_state_stays_on_its_device.__name__})
_CAUSES = (Cause.told_by(the_state_is_sent_to_the_host, _STAYS),)
OF_DEVICES = (devices_train_alike.__name__, the_state_stays_on_its_device.__name__)


class _Both(Bench):
    """Judges by what comes of a case on two devices."""

    def __init__(self, build: Build, devices: tuple[str, str]) -> None:
        super().__init__(build, properties=())
        self.devices = devices

    def judge(self, case: Case) -> Report:
        """Return the report on `case`, training only the first time."""
        if case not in self.reports:
            self.reports[case] = self._judged(case)
        return self.reports[case]

    def summed(self) -> Report:
        """Sum up all cases judged so far: broken on one is broken."""
        return Report(self.name, tuple(self._summed(name) for name in OF_DEVICES))

    def _judged(self, case: Case) -> Report:
        with observing(case):
            subject = self.fresh(case)
        both = tuple(replace(subject, device=device) for device in self.devices)
        notes: list[Returned] = []
        first, second = observe(both[0], case), observe(_noting(both[1], notes), case)
        with observing(case, dtype_of(subject.precision), self.devices[0]):
            twin = made_ready(both[0].copied)
            moved = [_moved(chunk, both[0].device) for chunk in second.chunks]
            again = [rederive(twin, chunk, slope=False, mixing=False) for chunk in moved]
            longest = max((stop - start for plan in second.plan for start, stop in plan), default=1)
            autocast = next((c.given.autocast for c in second.chunks if c.given), None)
            with rounded_to(rounding(autocast), longest):
                alike = list(devices_train_alike((first, second), self.devices, again))
        stays = list(the_state_stays_on_its_device(second, self.devices[1], notes))
        verdicts = (
            Verdict.of(devices_train_alike, alike, case),
            replace(
                Verdict.of(the_state_stays_on_its_device, stays, case),
                causes=_CAUSES if the_state_is_sent_to_the_host(stays) else (),
            ),
        )
        return Report(self.name, verdicts)


def _noting(subject: Subject, notes: list[Returned]) -> Subject:
    """Have it noted what comes back from the host; on the host itself, nothing costs anything."""
    if subject.around is not None or not has_memory_of_its_own(subject.device):
        return subject
    return replace(subject, around=lambda trained: copies_noted(trained, notes))


def _moved(chunk: Chunk, device: str) -> Chunk:
    """Return a chunk with what it was given on another device, and nothing of what came of it."""
    given, outcome = chunk.given, chunk.outcome
    assert given is not None
    assert outcome is not None

    def moved(tree: Any) -> Any:
        return map_tensors(lambda tensor: tensor.to(device), tree)

    calls = tuple(
        replace(c, x=moved(c.x), state=moved(c.state), others=moved(c.others)) for c in given.calls
    )
    return replace(
        chunk,
        given=replace(
            given,
            calls=calls,
            parameters=moved(given.parameters),
            buffers=moved(given.buffers),
            attributes=moved(given.attributes),
            target=moved(given.target),
        ),
        outcome=replace(outcome, cotangents=(), rules=(), gradients={}),
    )
