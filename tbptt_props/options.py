"""What a pytest session is asked for: on its command line, or in the user's pyproject.toml."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tbptt_props.case import Case, case_of
from tbptt_props.editions import EDITIONS, FIRST
from tbptt_props.kept import Kept

CONFORMANCE = "tbptt_conformance"  # marks the function of a conformance test
DEVICE = "tbptt_device"  # the parameter of an item that is trained on a device

# How many cases each profile tries; "default" leaves it to Hypothesis' settings.
PROFILES: dict[str, int | None] = {"quick": 20, "default": None, "thorough": 500}

# On which devices each of these has everything judged.
DEVICES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda",), "all": ("cpu", "cuda")}

# The names that an option's value may be.
VALID: dict[str, Iterable[str]] = {"profile": PROFILES, "edition": EDITIONS, "device": DEVICES}


@dataclass(frozen=True)
class Options:
    """What a session is asked for.

    Args:
        sensitivity: break the loops on purpose, to see which of the properties that hold can fail.
        strict: nothing is green or skipped that shows nothing.
        case: judge this case alone, without a search.
        profile: how many cases are tried where a test doesn't say it: one of PROFILES.
        report: the folder in which cases that break a property are kept, to be tried first.
        edition: properties that came later are previews, which fail nothing.
        device: where loops are trained: one of DEVICES; where nothing is said, as subjects say.
    """

    sensitivity: bool = False
    strict: bool = False
    case: Case | None = None
    profile: str = "default"
    report: Path | None = None
    edition: str = FIRST
    device: str = ""


NAMES = tuple(field.name for field in fields(Options))
ASKED: pytest.StashKey[Options] = pytest.StashKey()
KEPT: pytest.StashKey[list[Kept]] = pytest.StashKey()  # when the session began


def asked(command: Mapping[str, Any], root: Path) -> Options:
    """Return what is asked for: the command line wins over the pyproject.toml under `root`.

    Args:
        command: the values of the command line by option; None where one isn't given.
        root: pytest's rootdir.

    Raises:
        pytest.UsageError: an option has no such name or value; the message says what it may be.
    """
    path = root / "pyproject.toml"
    chosen = {
        name: _valid(name, value, f"{path.name}, [tool.tbptt_props]: {name}")
        for name, value in _written_in(path).items()
    }
    if "report" in chosen:  # beside the file, wherever pytest is called
        chosen["report"] = root / chosen["report"]
    for name, value in command.items():
        if value is not None:
            chosen[name] = _valid(name, value, f"--tbptt-{name}")
    return Options(**chosen)


def _written_in(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "tbptt_props" not in text:  # most sessions' file is none of ours, not even if it is broken
        return {}
    try:
        table = tomllib.loads(text).get("tool", {}).get("tbptt_props", {})
    except tomllib.TOMLDecodeError as error:
        raise pytest.UsageError(f"{path.name} can't be read: {error}") from error
    for name in table:
        if name not in NAMES:
            where = f"{path.name}, [tool.tbptt_props]"
            raise pytest.UsageError(f"{where}: {unknown('option', name, NAMES)}")
    return dict(table)


def _valid(name: str, value: Any, where: str) -> Any:
    if name in ("sensitivity", "strict"):
        if not isinstance(value, bool):
            raise pytest.UsageError(f"{where} must be true or false, got {value!r}")
        return value
    if not isinstance(value, str):
        raise pytest.UsageError(f"{where} must be a text, got {value!r}")
    if name == "report":
        if not value or Path(value).is_file():
            raise pytest.UsageError(f"{where} must be a folder, got {value!r}")
        return Path(value).absolute() if where.startswith("--") else Path(value)
    if name in VALID:
        valid = list(VALID[name])
        if value not in valid:
            raise pytest.UsageError(f"{where}: {unknown(name, value, valid)}")
        return value
    try:
        return case_of(value)
    except ValueError as error:
        raise pytest.UsageError(f"{where}: {error}") from error


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """Say that nothing of a kind has this name, which one is near, and which there are."""
    names = list(valid)
    near = difflib.get_close_matches(str(name), names, n=1)
    there_are = f"here are {', '.join(names)}"
    if near:
        return f"no {kind} {name!r}: did you mean {near[0]!r}? T{there_are}"
    return f"no {kind} {name!r}: t{there_are}"
