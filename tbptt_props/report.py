"""Verdicts, and what they say to a person in the minute when something is wrong."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tbptt_props import record
from tbptt_props.case import Case
from tbptt_props.editions import preview_of
from tbptt_props.kept import Kept
from tbptt_props.story import Scene, reach_map
from tbptt_props.strategies import coverage
from tbptt_props.subject import ObservationError
from tbptt_props.trace import Cause, Finding, NotJudged, Trace, Violation, counted

MOST_VIOLATIONS = 4  # the first says it; the rest are the same in other words
MOST_BESIDE_A_MAP = 2  # which shows all of them
WIDTH = 100
MOST_CAUSES = 3
MOST_LINES = 8  # of one violation: an error of somebody else's may be as long as it likes

# What a map of where gradients went says more about than words.
OF_REACH = {
    "training_reaches_the_end",
    "graph_crosses_no_boundary",
    "gradients_are_the_chunks_own",
    "gradients_span_the_whole_chunk",
}


class BrokenProperty(AssertionError):
    """The subject breaks a property; the message says where, and what was due."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one property: it holds, is broken, or could not be judged."""

    name: str
    claim: str
    violations: tuple[Violation, ...] = ()
    case: Case | None = None  # the smallest one that breaks it
    missing: str = ""  # why it was not judged
    judged: int = 0  # cases on which it was
    proved_by: tuple[str, ...] | None = None  # mistakes put in on purpose that broke it, if tried
    causes: tuple[Cause, ...] = ()  # the mistakes that would break it so; several where all fit
    story: tuple[Scene, ...] = field(default=(), repr=False)  # of the case, if it is broken
    preview: str = ""  # the edition from which on it counts, if a later one was asked for

    @classmethod
    def of(cls, judged: Callable[..., Any], findings: Sequence[Finding], case: Case) -> Verdict:
        """Return the verdict of a property on one case, from all that it found there."""
        violations = tuple(found for found in findings if isinstance(found, Violation))
        missing = next((found.missing for found in findings if isinstance(found, NotJudged)), "")
        unjudged = bool(missing) and not violations
        return cls(
            name=judged.__name__,
            claim=(judged.__doc__ or "").splitlines()[0],
            violations=violations,
            case=case if violations else None,
            missing=missing if unjudged else "",
            judged=int(not unjudged),
        )

    @property
    def status(self) -> str:
        """One of `broken`, `holds` and `not judged`; or `preview`: broken, but not counted yet."""
        if self.violations:
            return "preview" if self.preview else "broken"
        return "holds" if self.judged else "not judged"

    def as_dict(self, replay: str = "") -> dict[str, Any]:
        """Return it as plain data; docs/json.md says what is in it."""
        return {
            "name": self.name,
            "claim": self.claim,
            "status": self.status,
            "preview": self.preview,
            "cases": self.judged,
            "needs": self.missing if self.status == "not judged" else "",
            "smallest_case": record.of_case(self.case),
            "violations": [record.of_violation(violation) for violation in self.violations],
            "causes": [record.of_cause(cause) for cause in self.causes],
            "broken_on_purpose_by": None if self.proved_by is None else list(self.proved_by),
            "chunks": [record.of_scene(scene) for scene in self.story],
            "replay": replay if self.case else "",
        }


Replay = Callable[[Verdict], str]


@dataclass(frozen=True)
class Report:
    """One verdict per property."""

    subject: str
    verdicts: tuple[Verdict, ...]
    examples: int = 1
    trace: Trace | None = field(default=None, repr=False)
    cases: tuple[Case, ...] = field(default=(), repr=False)  # on which it was judged

    @property
    def holds(self) -> tuple[Verdict, ...]:
        """The properties that were judged and hold."""
        return self._of("holds")

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The properties that are broken, each with its violations and its smallest case."""
        return self._of("broken")

    @property
    def not_judged(self) -> tuple[Verdict, ...]:
        """The properties of which nothing can be said, each with what is missing."""
        return self._of("not judged")

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The causes that are named for what is broken, each once."""
        found = (cause for verdict in self.broken for cause in verdict.causes)
        return tuple(dict.fromkeys(found))

    @property
    def previews(self) -> tuple[Verdict, ...]:
        """The properties that are broken, but came with a later edition than is asked for."""
        return self._of("preview")

    def of_edition(self, edition: str) -> Report:
        """Return the report as it is in an edition: what came later fails nothing.

        Raises:
            ValueError: there is no such edition.
        """
        verdicts = (replace(v, preview=preview_of(v.name, edition)) for v in self.verdicts)
        return replace(self, verdicts=tuple(verdicts))

    @property
    def vacuous(self) -> tuple[Verdict, ...]:
        """The properties that hold, and that no mistake put in on purpose could break."""
        return tuple(verdict for verdict in self.holds if verdict.proved_by == ())

    def _of(self, status: str) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.status == status)

    def __bool__(self) -> bool:
        """Refuse to be one of two things: there are three verdicts."""
        raise TypeError(
            "a report is neither true nor false: look at .broken, .holds and .not_judged"
        )

    def __getitem__(self, name: str) -> Verdict:
        """Return the verdict on the property of that name."""
        for verdict in self.verdicts:
            if verdict.name == name:
                return verdict
        raise KeyError(f"no property {name!r}: {', '.join(v.name for v in self.verdicts)}")

    def as_text(self) -> str:
        """Say it to a person: one line per property, then each failure."""
        return as_text(self)

    def as_dict(self, *, replay: Replay = lambda verdict: "") -> dict[str, Any]:
        """Return it as plain data, which `json` can write; docs/json.md says what is in it.

        Args:
            replay: returns the command that judges a broken verdict's case again, if there is one.
        """
        told = [verdict.as_dict(replay(verdict)) for verdict in self.verdicts]
        return data_of(self.subject, told, self.cases)

    @property
    def status(self) -> str:
        """One of `broken`, `holds` and `not judged`."""
        return "broken" if self.broken else "holds" if self.holds else "not judged"

    def kept(self, build: str = "") -> list[Kept]:
        """Return the smallest case of each broken property, as it is kept in a file.

        Args:
            build: where what was judged is made; by default the subject's name.
        """
        versions = record.versions()
        return [
            Kept(
                verdict.name,
                self.subject,
                verdict.case,
                build=build or self.subject,
                found=str(verdict.violations[0]),
                cause="".join(cause.sentence for cause in verdict.causes[:1]),
                versions=versions,
            )
            for verdict in self.broken
            if verdict.case is not None
        ]

    def raise_if_broken(self) -> None:
        """Raise for the first broken property, if there is one.

        Raises:
            BrokenProperty: a property is broken.
            ObservationError: nothing could be judged.
        """
        if self.broken:
            raise BrokenProperty("\n\n".join(failure_text(self, v) for v in self.broken))
        if not self.holds and not self.previews:
            reasons = sorted({verdict.missing for verdict in self.not_judged})
            raise ObservationError(f"nothing could be judged: {'; '.join(reasons)}")


def data_of(
    subject: str, verdicts: Sequence[dict[str, Any]], tried: Sequence[Case]
) -> dict[str, Any]:
    """Return a report as plain data, of verdicts that are that already."""
    found = {verdict["status"] for verdict in verdicts}
    return {
        "schema": record.SCHEMA,
        "subject": subject,
        "status": next((s for s in ("broken", "holds") if s in found), "not judged"),
        "versions": record.versions(),
        "cases": {
            "tried": len(tried),
            "sizes": record.of_cases(tried),
            "kinds": coverage(tried),
        },
        "properties": list(verdicts),
    }


def as_text(report: Report, *, replay: Replay = lambda verdict: "") -> str:
    """Return one line per property, then each failure, then a summary.

    Args:
        report: what to say.
        replay: returns the command that judges a failure's case again.
    """
    lines = [f"{report.subject}: {counted(report.examples, 'case')}"]
    lines += [line_of(verdict) for verdict in report.verdicts]
    for verdict in report.broken:
        lines += ["", failure_text(report, verdict, replay=replay(verdict))]
    return "\n".join([*lines, "", summary(report)])


def line_of(verdict: Verdict) -> str:
    """Return the verdict on one property in one line; what there is to add may stand below."""
    mark = "BROKEN" if verdict.status == "broken" else verdict.status
    line = f"  {mark:<10}  {verdict.name}"
    need = _need_of(verdict)
    if not need:
        return line
    if len(line) + len(need) + 2 <= WIDTH:
        return f"{line}  {need}"
    return "\n".join([line, *_wrapped(need, first=" " * 14)])


def _need_of(verdict: Verdict) -> str:
    if verdict.status == "not judged":
        return _one_line(f"needs {verdict.missing}")
    if verdict.status == "preview":
        return f"broken on {verdict.case}; counts from edition {verdict.preview} on"
    if verdict.status != "holds" or verdict.proved_by is None:
        return ""
    if not verdict.proved_by:
        return "vacuous here: nothing put in on purpose broke it"
    more = f" and {len(verdict.proved_by) - 1} more" if len(verdict.proved_by) > 1 else ""
    return f"fails if {verdict.proved_by[0]}{more}"


def summary(report: Report) -> str:
    """Return how many properties hold, are broken and were not judged."""
    vacuous = f" ({len(report.vacuous)} vacuously)" if report.vacuous else ""
    previews = f", {len(report.previews)} previewed" if report.previews else ""
    return (
        f"{len(report.holds)} hold{vacuous}, {len(report.broken)} broken, "
        f"{len(report.not_judged)} not judged{previews}"
    )


def failure_text(report: Report, verdict: Verdict, *, replay: str = "") -> str:
    """Return one broken property: the claim, where, what was found and due, the smallest case.

    Args:
        report: of what it is one verdict.
        verdict: on the broken property.
        replay: the command that judges its case again, if there is one.
    """
    lines = list(_failure_lines(report, verdict))
    if replay:
        # As wide as it is: one line can be copied.
        lines.append(f"  replay            {replay}")
    return "\n".join(lines)


def _failure_lines(report: Report, verdict: Verdict) -> Iterator[str]:
    broken = f"  broken for {report.subject}"
    yield f"{verdict.name}{broken:>{max(0, WIDTH - len(verdict.name))}}"
    yield from _wrapped(verdict.claim, first="  ")
    yield ""
    reach = reach_map(verdict.story) if verdict.name in OF_REACH else []
    most = MOST_BESIDE_A_MAP if reach else MOST_VIOLATIONS
    for violation in verdict.violations[:most]:
        yield from _middle_left_out(_wrapped(str(violation), first="  "))
    more = len(verdict.violations) - most
    if more > 0:
        yield f"  and {more} more of the kind"
    yield ""
    yield from [*reach, ""] if reach else []
    at = next((violation.line for violation in verdict.violations if violation.line), "")
    if at:
        yield _one_line(f"  at                {at}")
    yield from _wrapped(repr(verdict.case), first="  smallest case     ")
    yield from _cause_lines(verdict.causes)


def _cause_lines(causes: Sequence[Cause]) -> Iterator[str]:
    if not causes:
        yield "  likely cause      none of the known ones fits"
    for cause in causes[:MOST_CAUSES]:
        yield from _wrapped(cause.sentence, first="  likely cause      ")
        yield from _wrapped(cause.fix, first="  try               ")


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text)


def _wrapped(text: str, *, first: str) -> list[str]:
    """Break text into lines no wider than a page, those behind the first indented further.

    A word that is wider than a page, as a path may be, stays whole: it can be copied.
    """
    return textwrap.wrap(
        _one_line(text),
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * (len(first) + 4),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _middle_left_out(lines: list[str]) -> list[str]:
    """Keep the start of a violation, which says where, and its end, which says what was due."""
    if len(lines) <= MOST_LINES:
        return lines
    half = MOST_LINES // 2
    return [
        *lines[: half - 1],
        f"      … ({len(lines) - MOST_LINES + 1} more lines) …",
        *lines[-half:],
    ]
