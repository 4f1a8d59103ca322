"""What came of the conformance tests of a session, to be told in its summary and in its reports."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

PREFIX = "tbptt_"  # of what stands in a JUnit report
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """What came of one item: one property of one test."""

    name: str
    status: str = "not judged"  # or `holds`, `vacuous`, `broken`, `known`, `preview`
    cases: int = 0  # on which it was judged
    smallest: str = ""  # the case that breaks it
    cause: str = ""  # the likeliest
    proved_by: str = ""  # the first mistake put in on purpose that broke it

    def properties(self) -> list[tuple[str, object]]:
        """Return what an item's report carries, and JUnit's XML with it."""
        told = {
            "property": self.name,
            "status": self.status,
            "cases": self.cases,
            "smallest_case": self.smallest,
            "cause": self.cause,
            "proved_by": self.proved_by,
        }
        return [(PREFIX + key, value) for key, value in told.items() if value != ""]


@dataclass
class Tally:
    """What came of one conformance test so far."""

    statuses: dict[str, str] = field(default_factory=dict)  # by property
    chunks: dict[str, int] = field(default_factory=dict)  # in a batch, at most, by case
    seconds: float = 0.0
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # a verdict as data, by property

    def add(self, other: Tally) -> None:
        """Take in what came of other items of the same test."""
        self.statuses |= other.statuses
        self.chunks |= other.chunks
        self.told |= other.told
        self.seconds += other.seconds


class Ledger:
    """What came of each conformance test of a session."""

    def __init__(self) -> None:
        self.tests: dict[str, Tally] = {}

    def add(self, test: str, tally: Tally) -> None:
        """Note what came of items of a test."""
        self.tests.setdefault(test, Tally()).add(tally)

    def data(self) -> dict[str, dict[str, Any]]:
        """Return it as plain values, as one process hands them to another."""
        return {test: vars(tally) for test, tally in self.tests.items()}

    def merge(self, data: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in what another process found."""
        for test, values in data.items():
            self.add(test, Tally(**values))

    def lines(self) -> Iterator[str]:
        """Yield a line for each test, and below it what holds vacuously."""
        for test, tally in sorted(self.tests.items()):
            yield f"{test}: {_told(tally)}"
            vacuous = [name for name, status in tally.statuses.items() if status == "vacuous"]
            if vacuous:
                names = f"nothing put in on purpose broke {', '.join(vacuous)}"
                yield from textwrap.wrap(
                    names,
                    WIDTH,
                    initial_indent="  vacuous: ",
                    subsequent_indent=" " * 11,
                )


def _told(tally: Tally) -> str:
    of = {
        status: list(tally.statuses.values()).count(status)
        for status in ("holds", "vacuous", "broken", "known", "preview", "not judged")
    }
    held, broken = of["holds"] + of["vacuous"], of["broken"] + of["known"]
    vacuously = f" ({of['vacuous']} vacuously)" if of["vacuous"] else ""
    known = f" ({of['known']} known)" if of["known"] else ""
    previews = f", {of['preview']} previewed" if of["preview"] else ""
    bounded = sum(chunks > 2 for chunks in tally.chunks.values())
    cases = f"{len(tally.chunks)} case{'' if len(tally.chunks) == 1 else 's'}"
    return (
        f"{held + broken} judged, {held} held{vacuously}, {broken} broken{known}, "
        f"{of['not judged']} not judged{previews}; {cases}, {bounded} with 2 boundaries or more; "
        f"{tally.seconds:.1f} s"
    )


NOTED: pytest.StashKey[Ledger] = pytest.StashKey()
