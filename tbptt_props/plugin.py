"""The pytest plugin: its options, the summary of a session, and what workers tell of theirs.

It is loaded with every session of whoever has the package installed, and costs those nothing: what
is heavy is imported where a conformance test is.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

import pytest

from tbptt_props.ledger import NOTED, Ledger
from tbptt_props.options import ASKED, CONFORMANCE, DEVICE, DEVICES, NAMES, PROFILES, asked

WIDTH = 100
HANDED_OVER = "tbptt_props"  # the key, in what a worker of xdist hands over when it is done


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
        print(judged.__name__)
        claim = (judged.__doc__ or "").splitlines()[0]
        print(textwrap.fill(claim, WIDTH, initial_indent="  ", subsequent_indent="  "))
    return 0


def pytest_configure(config: pytest.Config) -> None:
    """Read what is asked for."""
    command = {name: config.getoption(f"tbptt_{name}", None) for name in NAMES}
    config.stash[ASKED] = asked(command, config.rootpath)
    config.stash[NOTED] = Ledger()


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
