"""Reports as text, for a person in the minute when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from tbptt_props.judge import Report, Verdict

MOST_VIOLATIONS = 4  # the first says it; the rest are the same in other words
WIDTH = 100


def as_text(report: Report) -> str:
    """Return one line per property, then each failure, then a summary."""
    lines = [f"{report.subject}: {_counted(report.examples, 'case')}"]
    lines += [line_of(verdict) for verdict in report.verdicts]
    for verdict in report.broken:
        lines += ["", failure_text(report, verdict)]
    return "\n".join([*lines, "", summary(report)])


def line_of(verdict: Verdict) -> str:
    """Return the verdict on one property in one line."""
    mark = {"holds": "holds     ", "broken": "BROKEN    ", "not judged": "not judged"}
    note = f"  needs {verdict.missing}" if verdict.status == "not judged" else ""
    return f"  {mark[verdict.status]}  {verdict.name}{note}"


def summary(report: Report) -> str:
    """Return how many properties hold, are broken and were not judged."""
    return (
        f"{len(report.holds)} hold, {len(report.broken)} broken, "
        f"{len(report.not_judged)} not judged"
    )


def failure_text(report: Report, verdict: Verdict) -> str:
    """Return one broken property: the claim, where, what was found and due, the smallest case."""
    return "\n".join(_failure_lines(report, verdict))


def _failure_lines(report: Report, verdict: Verdict) -> Iterator[str]:
    yield f"{verdict.name}{f'broken for {report.subject}':>{max(1, WIDTH - len(verdict.name))}}"
    yield f"  {verdict.claim}"
    yield ""
    for violation in verdict.violations[:MOST_VIOLATIONS]:
        yield f"  {violation}"
    more = len(verdict.violations) - MOST_VIOLATIONS
    if more > 0:
        yield f"  and {more} more of the kind"
    yield ""
    yield f"  smallest case     {verdict.case!r}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
