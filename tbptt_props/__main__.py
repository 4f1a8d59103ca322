"""The command line, `tbptt-props check module.path:build`; or `python -m tbptt_props`."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HOLDS, BROKEN, MISUSED = 0, 1, 2


class Misused(Exception):
    """The command cannot do what it was asked for; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if the properties hold, 1 if one is broken, 2 if misused."""
    options = _parser().parse_args(arguments)
    try:
        return {"check": _check, "replay": _replay, "faults": _faults}[options.command](options)
    except Misused as error:
        print(f"tbptt-props: {error}", file=sys.stderr)
        return MISUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tbptt-props",
        description="Judge a loop of truncated backpropagation through time.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check",
        help="search for cases that break a property",
        description="Search for cases that break a property of the subject; exit code 0 if all "
        "that could be judged hold, 1 if one is broken, 2 if the subject can't be judged.",
    )
    check.add_argument("subject", metavar="module.path:build", help="a function of a Case")
    check.add_argument("--max-examples", type=int, metavar="N", help="cases to try (100)")
    check.add_argument("--seed", type=int, metavar="N", help="repeat the search of this seed")
    check.add_argument(
        "--sensitivity",
        action="store_true",
        help="break the loop on purpose, in memory, and tell which properties could have failed",
    )
    check.add_argument("--device", choices=["cpu", "cuda"], help="where to train; cpu by default")
    check.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="train in so many processes together, and judge what they share (10 cases by default)",
    )
    for size in _sizes():
        check.add_argument(f"--{size}", type=int, metavar="N", help=f"fix {size} of every case")
    replay = commands.add_parser(
        "replay",
        help="judge one case again",
        description="Judge the subject on one case, as a failure names it; exit code 0 if no "
        "property is broken on it any more, 1 if one is, 2 if the subject can't be judged on it.",
    )
    replay.add_argument("subject", metavar="module.path:build", help="a function of a Case")
    replay.add_argument("case", metavar="CASE", help="as in 'Case(steps=5, chunk=2)'")
    faults = commands.add_parser(
        "faults",
        help="measure the properties on loops that are broken on purpose",
        description="Search for each fault of tbptt_ref.faults, and tell which properties it "
        "breaks, after how many cases it is found, in how small a case, and the cause that is "
        "named; exit code 0 if all are found from all seeds, 1 if not.",
    )
    faults.add_argument("names", nargs="*", metavar="NAME", help="which faults; all by default")
    faults.add_argument("--seeds", type=int, default=20, metavar="N", help="searches for each")
    faults.add_argument("--markdown", action="store_true", help="print a page with a table")
    return parser


def _sizes() -> list[str]:
    from tbptt_props.case import SIZES

    return [size for size in SIZES if size != "seed"]


def _check(options: argparse.Namespace) -> int:
    build = _load(options.subject)
    from tbptt_props.judge import verify
    from tbptt_props.report import as_text
    from tbptt_props.subject import ObservationError

    fixed = {size: value for size in _sizes() if (value := getattr(options, size)) is not None}
    if options.processes != 1:
        return _check_processes(options, build, fixed)
    most = 100 if options.max_examples is None else options.max_examples
    progress = _Progress(most)
    try:
        report = verify(
            build,
            max_examples=most,
            seed=options.seed,
            on_case=progress.show,
            sensitivity=options.sensitivity,
            device=options.device,
            **fixed,
        )
    except (ObservationError, ValueError, TypeError) as error:
        progress.clear()
        raise _misused(options.subject, error) from error
    progress.clear()
    command = f"tbptt-props replay {shlex.quote(options.subject)}"
    print(as_text(report, replay=lambda broken: f"{command} {shlex.quote(repr(broken.case))}"))
    if not report.holds and not report.broken:
        raise Misused(f"{options.subject}: nothing could be judged")
    return BROKEN if report.broken else HOLDS


def _check_processes(
    options: argparse.Namespace, build: Callable[..., Any], fixed: dict[str, int]
) -> int:
    from tbptt_props.ddp import verify_ddp
    from tbptt_props.subject import ObservationError

    if options.sensitivity:
        raise Misused("--sensitivity breaks a loop in one process: leave out --processes")
    if options.device == "cuda":
        raise Misused("several processes train on the CPU: leave out --device")
    most = 10 if options.max_examples is None else options.max_examples
    try:
        report = verify_ddp(
            build,
            processes=options.processes,
            max_examples=most,
            seed=options.seed,
            timeout=10.0,
            uneven=False,
            strategy="ddp",
            **fixed,
        )
    except (ObservationError, ValueError, TypeError) as error:
        raise _misused(options.subject, error) from error
    print(report.as_text())
    return BROKEN if report.broken else HOLDS


def _replay(options: argparse.Namespace) -> int:
    build = _load(options.subject)
    from tbptt_props.case import case_of
    from tbptt_props.judge import replay
    from tbptt_props.report import failure_text, summary
    from tbptt_props.subject import ObservationError

    try:
        case = case_of(options.case)
        report = replay(build, case)
    except (ObservationError, ValueError, TypeError) as error:
        raise _misused(options.subject, error) from error
    if not report.holds and not report.broken:
        raise Misused(f"{options.subject}: nothing could be judged on {case}")
    print(f"{'still broken' if report.broken else 'fixed'} on {case}: {summary(report)}")
    for verdict in report.broken:
        print(f"\n{failure_text(report, verdict)}")
    return BROKEN if report.broken else HOLDS


def _misused(subject: str, error: Exception) -> Misused:
    text = str(error)
    return Misused(text if text.startswith(subject) else f"{subject}: {text}")


def _faults(options: argparse.Namespace) -> int:
    from tbptt_props import catalogue

    if options.seeds < 1:
        raise Misused(f"seeds must be at least 1, got seeds={options.seeds}")
    # By its name: what is judged with does not know what it is tried on.
    faults = importlib.import_module("tbptt_ref.faults").FAULTS
    known = {fault.name: fault for fault in faults}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise Misused(f"no fault {unknown[0]!r}; there are {', '.join(known)}")
    rows = []
    for name in options.names or known:
        rows.append(catalogue.measured(known[name], options.seeds))
        if not options.markdown:
            print(*catalogue.as_text(rows[-1]), sep="\n", flush=True)
    if options.markdown:
        command = f"tbptt-props faults --seeds {options.seeds} --markdown"
        print(*catalogue.as_markdown(rows, " ".join([command, *options.names])), sep="\n")
    else:
        print(f"\n{catalogue.summary(rows)}")
    return HOLDS if all(row.found for row in rows) else BROKEN


def _load(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise Misused(f"subject must be module.path:build, got {path!r}")
    here = str(Path.cwd())
    if here not in sys.path:  # a command's sys.path lacks what `python -m` has
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises, its loop is not to blame
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise Misused(f"{module_name} can't be imported ({kind}{error})") from error
    build = getattr(module, name, None)
    if not callable(build):
        functions = sorted(n for n, f in vars(module).items() if callable(f) and n[0] != "_")
        raise Misused(f"{module_name} has no function {name!r}; it has {', '.join(functions)}")
    return build  # type: ignore[no-any-return]


class _Progress:
    """Says how far the search has come, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.begun = time.monotonic()
        self.wanted = sys.stderr.isatty()
        self.broken: set[str] = set()

    def show(self, number: int, report: Any) -> None:
        """Tell of one more case."""
        self.broken.update(verdict.name for verdict in report.broken)
        if self.wanted:
            seconds = time.monotonic() - self.begun
            found = f", {len(self.broken)} broken so far" if self.broken else ""
            print(
                f"\r\033[K{number} of {self.total} cases, {seconds:.0f} s{found}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def clear(self) -> None:
        """Take the line away."""
        if self.wanted:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
