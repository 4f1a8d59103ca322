"""The command line, `tbptt-props check module.path:build`; or `python -m tbptt_props`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from tbptt_props.case import SIZES, Case
from tbptt_props.colour import ansi, coloured, is_wanted
from tbptt_props.editions import edition_in
from tbptt_props.kept import all_kept, cases_of, keep, kept_in

HOLDS, BROKEN, MISUSED = 0, 1, 2


class Misused(Exception):
    """The command cannot do what it was asked for; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if the properties hold, 1 if one is broken, 2 if misused."""
    options = _parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
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
    check.add_argument(
        "--edition",
        metavar="NAME",
        help="properties that came later fail nothing yet; by default as pyproject.toml here says",
    )
    check.add_argument("--json", metavar="FILE", type=Path, help="write all that was found there")
    check.add_argument("--html", metavar="FILE", type=Path, help="write a page for a browser there")
    check.add_argument(
        "--keep",
        metavar="DIR",
        type=Path,
        help="try the cases kept there first, and keep there the smallest that break a property",
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
    init = commands.add_parser(
        "init",
        help="write a test file for a LightningModule",
        description="Find out how a LightningModule is built, fed and cut into chunks by training "
        "it, tell what was seen, and write a test file that judges it; what can't be known stands "
        "in it as a question. Exit code 0 if the file was written, 2 if not.",
    )
    init.add_argument("module", metavar="package.module:Class", help="a LightningModule")
    init.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="by default tests/test_CLASS_tbptt.py"
    )
    show = commands.add_parser(
        "show",
        help="print a kept case as a script",
        description="Print a case that was kept as a script of plain torch and Lightning, which "
        "fails as long as the loop is broken: to be pasted into an issue.",
    )
    show.add_argument("file", metavar="FILE", type=Path, help="a file made by --keep")
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
    return [size for size in SIZES if size != "seed"]


def _check(options: argparse.Namespace) -> int:
    _require_folder("--json", options.json)
    _require_folder("--html", options.html)
    build = _load(options.subject)
    from tbptt_props.search import verify
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
            first=_kept_for(options.subject, options.keep),
            edition=options.edition or edition_in(Path.cwd()),
            device=options.device,
            **fixed,
        )
    except (ObservationError, ValueError, TypeError) as error:
        progress.clear()
        raise _misused(options.subject, error) from error
    progress.clear()
    report = replace(report, subject=options.subject)
    command = f"tbptt-props replay {shlex.quote(options.subject)}"
    _hand_out(report, options, lambda broken: f"{command} {shlex.quote(repr(broken.case))}")
    if report.status == "not judged":
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
    from tbptt_props.report import failure_text, summary
    from tbptt_props.search import replay
    from tbptt_props.subject import ObservationError

    try:
        case = case_of(options.case)
        report = replay(build, case)
    except (ObservationError, ValueError, TypeError) as error:
        raise _misused(options.subject, error) from error
    if report.status == "not judged":
        raise Misused(f"{options.subject}: nothing could be judged on {case}")
    print(f"{'still broken' if report.broken else 'fixed'} on {case}: {summary(report)}")
    for verdict in report.broken:
        _say(f"\n{failure_text(report, verdict)}")
    return BROKEN if report.broken else HOLDS


def _init(options: argparse.Namespace) -> int:
    kind = _load(options.module)
    from tbptt_props import wiring
    from tbptt_props.report import WIDTH

    module = options.module.partition(":")[0]
    try:
        found = wiring.drafted(kind, module)
    except wiring.Unknown as error:
        raise Misused(f"{options.module}: {error}") from error
    file = options.output or _beside_tests(f"{found.draft.test}_tbptt.py")
    if file.exists():
        raise Misused(f"{file} exists already: name another one with --output")
    file.write_text(found.draft.source(), encoding="utf-8")
    print(options.module, *wiring.told(found), "", sep="\n")
    for question in found.draft.questions:
        print(textwrap.fill(f"question: {question}", WIDTH, subsequent_indent="  "), end="\n\n")
    print(f"Written: {file}. Read it, then run: pytest {shlex.quote(str(file))}")
    return HOLDS


def _beside_tests(name: str) -> Path:
    tests = Path("tests")
    return tests / name if tests.is_dir() else Path(name)


def _hand_out(report: Any, options: argparse.Namespace, replay: Callable[[Any], str]) -> None:
    """Write what was found to wherever it was asked for, and say it."""
    from tbptt_props.page import as_html
    from tbptt_props.report import as_text

    data = report.as_dict(replay=replay)
    if options.keep is not None:
        with _writing(options.keep):
            keep(options.keep, report.kept())
    if options.json is not None:
        _write(options.json, f"{json.dumps(data, indent=2, ensure_ascii=False)}\n")
    if options.html is not None:
        _write(options.html, as_html([data], title=f"tbptt-props: {report.subject}"))
    _say(as_text(report, replay=replay))


def _kept_for(subject: str, folder: Path | None) -> list[Case]:
    return [] if folder is None else cases_of(all_kept(folder), subject)


def _require_folder(option: str, file: Path | None) -> None:
    """Refuse a file that can't be written before the search, not after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise Misused(f"{option} must be a file in a folder that is there, got {file}")


def _write(file: Path, text: str) -> None:
    with _writing(file):
        file.write_text(text, encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Misused(f"{path} can't be written ({error})") from error


def _say(text: str) -> None:
    print(coloured(text, ansi) if is_wanted(sys.stdout) else text)


def _show(options: argparse.Namespace) -> int:
    from tbptt_props.script import script_of
    from tbptt_props.subject import ObservationError

    try:
        kept = kept_in(options.file)
        print(script_of(kept, _load(kept.build or kept.subject)), end="")
    except (ObservationError, TypeError, ValueError) as error:
        raise Misused(str(error)) from error
    return HOLDS


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
        module = _imported(module_name)
    except Exception as error:  # whatever a stranger's module raises, its loop is not to blame
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise Misused(f"{module_name} can't be imported ({kind}{error})") from error
    build = getattr(module, name, None)
    build = getattr(build, "tbptt_build", build)  # what a conformance test decorates
    if not callable(build):
        functions = sorted(n for n, f in vars(module).items() if callable(f) and n[0] != "_")
        raise Misused(f"{module_name} has no function {name!r}; it has {', '.join(functions)}")
    return build  # type: ignore[no-any-return]


def _imported(name: str) -> ModuleType:
    """Import a module by its name, or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise ImportError(f"no file {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does
    spec.loader.exec_module(module)
    return module


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


COMMANDS = {
    "check": _check,
    "replay": _replay,
    "show": _show,
    "init": _init,
    "faults": _faults,
}

if __name__ == "__main__":
    sys.exit(main())
