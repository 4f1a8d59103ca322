"""The pytest plugin: its options, the summary of a session, and what workers tell of theirs.

It is loaded with every session of whoever has the package installed, and costs those nothing: what
is heavy is imported where a conformance test is.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Generator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pytest

from tbptt_props.case import case_of
from tbptt_props.colour import coloured
from tbptt_props.editions import EDITIONS, FIRST, SINCE
from tbptt_props.kept import all_kept
from tbptt_props.ledger import NOTED, PREFIX, Ledger
from tbptt_props.options import ASKED, CONFORMANCE, DEVICE, DEVICES, KEPT, NAMES, PROFILES, asked

WIDTH = 100
HANDED_OVER = "tbptt_props"  # the key, in what a worker of xdist hands over when it is done
WHOLE = ("long", "native")  # styles of a traceback in which somebody wants to see all of it
PAGE = "index.html"
MARKUP: dict[str, dict[str, bool]] = {
    "broken": {"red": True, "bold": True},
    "label": {"bold": True},
    "found": {"red": True},
    "due": {"green": True},
    "fix": {"cyan": True},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; each but the list may also stand in `[tool.tbptt_props]`."""
    group = parser.getgroup("tbptt-props", "truncated backpropagation through time (tbptt-props)")
    group.addoption(
        "--tbptt-sensitivity",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="break loops on purpose, in memory, to see which properties could have failed",
    )
    group.addoption(
        "--tbptt-strict",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="fail what could not be judged, and what holds vacuously",
    )
    group.addoption(
        "--tbptt-case",
        metavar="CASE",
        help="judge this case alone, as in 'Case(steps=5, chunk=2)'",
    )
    group.addoption(
        "--tbptt-profile",
        metavar="NAME",
        help=f"how many cases to try where a test doesn't say it: {', '.join(PROFILES)}",
    )
    group.addoption(
        "--tbptt-edition",
        metavar="NAME",
        help="properties that came later than this edition fail nothing yet: "
        f"{', '.join(EDITIONS)}",
    )
    group.addoption(
        "--tbptt-report",
        metavar="DIR",
        help="keep the smallest cases that break a property there, and try those kept there first",
    )
    group.addoption(
        "--tbptt-device",
        metavar="NAME",
        help=f"where to train: {', '.join(DEVICES)}; without it, where each subject says",
    )
    group.addoption(
        "--tbptt-list", action="store_true", help="list the properties and their claims, and end"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | None:
    """List the properties, if that is asked for."""
    if not config.getoption("tbptt_list", False):
        return None
    from tbptt_props.properties import PROPERTIES

    for judged in PROPERTIES:
        since = SINCE.get(judged.__name__, FIRST)
        print(f"{judged.__name__}{'' if since == FIRST else f' (edition {since})'}")
        claim = (judged.__doc__ or "").splitlines()[0]
        print(textwrap.fill(claim, WIDTH, initial_indent="  ", subsequent_indent="  "))
    return 0


def pytest_configure(config: pytest.Config) -> None:
    """Read what is asked for."""
    command = {name: config.getoption(f"tbptt_{name}", None) for name in NAMES}
    config.stash[ASKED] = asked(command, config.rootpath)
    config.stash[NOTED] = Ledger()
    folder = config.stash[ASKED].report
    try:
        config.stash[KEPT] = [] if folder is None else all_kept(folder)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a failure say what is broken, and not where in the kit that was noticed."""
    report = yield
    judge = sys.modules.get("tbptt_props.report")  # without which nothing was judged
    if judge is None or call.excinfo is None or not report.failed:
        return report
    whole = item.config.getoption("fulltrace") or item.config.getoption("tbstyle") in WHOLE
    if isinstance(call.excinfo.value, judge.BrokenProperty) and not whole:
        report.longrepr = Failure(str(call.excinfo.value).strip("\n"))  # type: ignore[assignment]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Give a failure back its face, of which a worker of xdist hands over the text alone."""
    if isinstance(report.longrepr, str) and (f"{PREFIX}status", "broken") in _told(report):
        report.longrepr = Failure(report.longrepr)  # type: ignore[assignment]


def _told(report: pytest.TestReport) -> list[tuple[object, ...]]:
    return [tuple(pair) for pair in report.user_properties]  # lists, once they have travelled


@dataclass(frozen=True)
class _Crash:
    """What pytest says of a failure in one line."""

    message: str

    def __str__(self) -> str:
        return self.message


class Failure:
    """What is shown of a broken property in place of a traceback."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.reprcrash = _Crash(_first_violation(text))

    def __str__(self) -> str:
        return self.text

    def toterminal(self, tw: Any) -> None:
        """Write it, coloured where the terminal is."""
        tw.line(coloured(self.text, lambda part, style: tw.markup(part, **MARKUP[style])))


def _first_violation(text: str) -> str:
    """Return the first of the violations, which are the second part of a failure."""
    _, _, violations = text.partition("\n\n")
    first, *others = violations.splitlines() or [text]
    going_on = takewhile(lambda line: line.startswith(" " * 6), others)
    return " ".join(line.strip() for line in (first, *going_on))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make an item for each device that is asked for, where a test is one of conformance."""
    device = metafunc.config.stash[ASKED].device
    if device and getattr(metafunc.function, CONFORMANCE, False):
        metafunc.fixturenames.append(DEVICE)
        metafunc.parametrize(DEVICE, DEVICES[device])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what was noted, in a worker of xdist."""
    handed_over = getattr(session.config, "workeroutput", None)
    if handed_over is not None:
        handed_over[HANDED_OVER] = session.config.stash[NOTED].data()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in what a worker noted; one that crashed hands over nothing."""
    handed_over = getattr(node, "workeroutput", None) or {}
    node.config.stash[NOTED].merge(handed_over.get(HANDED_OVER, {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tell what came of each conformance test, if there was one."""
    lines = list(config.stash[NOTED].lines())
    if lines:
        terminalreporter.section("tbptt-props")
    for line in lines:
        terminalreporter.line(line)
    folder = config.stash[ASKED].report
    if lines and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(_page(config.stash[NOTED]), encoding="utf-8")
        terminalreporter.line(f"report: {folder / PAGE}")


def _page(ledger: Ledger) -> str:
    """Make a page of all that was found in a session."""
    from tbptt_props.page import as_html
    from tbptt_props.report import data_of

    reports = [
        data_of(test, list(tally.told.values()), [case_of(text) for text in tally.chunks])
        for test, tally in sorted(ledger.tests.items())
    ]
    return as_html(reports, title="tbptt-props: what was found in this session")
