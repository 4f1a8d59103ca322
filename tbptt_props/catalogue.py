"""Measures the kit on loops that are broken on purpose: how soon each is found, and what is said.

The loops come from whoever asks: nothing in here knows them but by what a `Fault` has.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.nn.functional import mse_loss

from tbptt_props.case import Case
from tbptt_props.contract import Contract
from tbptt_props.report import Report, Verdict
from tbptt_props.search import Bench, measure
from tbptt_props.strategies import cases
from tbptt_props.subject import Subject
from tbptt_props.trace import counted

MOST_CASES = 100  # in which each search has to find a fault
AT_LENGTH = 40  # cases of the one search that goes on when it has found a fault


class Fault(Protocol):
    """A loop broken in one way."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def mistake(self) -> str:
        """What it does wrong, in one sentence."""

    @property
    def clip_norm(self) -> float | None:
        """The norm to which gradients are promised to be clipped."""

    def build(self, sizes: Any) -> Any:
        """Make the module anew."""


@dataclass(frozen=True)
class Row:
    """What was measured on one fault."""

    name: str
    mistake: str
    broken: tuple[str, ...]  # properties
    tries: tuple[int | None, ...]  # cases until first found, search by search; None: not found
    smallest: Case | None
    causes: tuple[str, ...]

    @property
    def found(self) -> bool:
        """Whether every search found it."""
        return None not in self.tries

    @property
    def median(self) -> float:
        """Half of the searches found it in so many cases."""
        return statistics.median(MOST_CASES if n is None else n for n in self.tries)

    @property
    def worst(self) -> str:
        """The most cases that a search took."""
        return str(max(n for n in self.tries if n is not None)) if self.found else "not found"


class _Found(Exception):
    """Ends a search."""


def measured(fault: Fault, searches: int) -> Row:
    """Search for `fault` from so many seeds, then once at length for what it breaks and why."""
    contract = Contract(clip_norm=fault.clip_norm)

    def build(case: Case) -> Subject:
        return Subject(fault.build(case), loss=mse_loss, contract=contract)

    bench = Bench(build, name=fault.name)
    tries = tuple(_cases_until_found(bench, number) for number in range(searches))
    bench.search(cases(), 0, AT_LENGTH, None)
    report = bench.summed()
    smallest = _shrunk(bench, report)
    return Row(
        name=fault.name,
        mistake=fault.mistake,
        broken=tuple(verdict.name for verdict in report.broken),
        tries=tries,
        smallest=smallest.case if smallest else None,
        causes=tuple(cause.name for cause in smallest.causes) if smallest else (),
    )


def _cases_until_found(bench: Bench, number: int) -> int | None:
    """Return the number of the first case that breaks a property, in the search of one seed."""
    first: list[int] = []

    def stop(number: int, report: Report) -> None:
        if report.broken:
            first.append(number)
            raise _Found

    try:
        bench.search(cases(), number, MOST_CASES, stop)
    except _Found:
        return first[0]
    return None


def _shrunk(bench: Bench, report: Report) -> Verdict | None:
    """Shrink the case of one broken property: the one whose case is small already."""
    if not report.broken:
        return None
    easiest = min(report.broken, key=lambda verdict: measure(verdict.case or Case()))
    return bench.shrunk(easiest, {}, 0, AT_LENGTH)


# Telling ------------------------------------------------------------------------------------


def as_text(row: Row) -> Iterator[str]:
    """Say what was measured on one fault, to a person at a terminal."""
    yield f"{row.name}: {row.mistake}"
    yield f"  breaks          {', '.join(row.broken) or 'nothing'}"
    yield f"  found after     {counted_cases(row.median)} (median), {row.worst} (worst)"
    yield f"  smallest case   {row.smallest}"
    yield f"  likely cause    {' or '.join(row.causes) or 'none of the known ones fits'}"


def summary(rows: Sequence[Row]) -> str:
    """Say how many were found, and how soon."""
    found = sum(row.found for row in rows)
    median = statistics.median(row.median for row in rows)
    return (
        f"{found} of {counted(len(rows), 'fault')} found from each of "
        f"{counted(len(rows[0].tries), 'seed')}, within {MOST_CASES} cases; "
        f"median of the medians: {counted_cases(median)}"
    )


def counted_cases(number: float) -> str:
    """Write how many cases: `1 case`, `2.5 cases`."""
    return f"{number:g} case{'' if number == 1 else 's'}"


def as_markdown(rows: Sequence[Row], command: str) -> Iterator[str]:
    """Lay the rows out as a page with a table."""
    yield "# The faults, and what is said of each"
    yield ""
    yield f"Made by `{command}`. {summary(rows)}."
    yield ""
    yield "Median and worst are numbers of cases until a property is first found broken."
    yield ""
    yield "| fault | its mistake | properties it breaks | median | worst | smallest case | cause |"
    yield "|---|---|---|---|---|---|---|"
    yield from map(_table_row, rows)


def _table_row(row: Row) -> str:
    broken = ", ".join(f"`{name}`" for name in row.broken)
    causes = " or ".join(row.causes) or "none"
    parts = (row.name, row.mistake, broken, f"{row.median:g}", row.worst, row.smallest, causes)
    return f"| {' | '.join(map(str, parts))} |"
