"""Counterexamples kept as small files: people read and commit them; searches try them first.

A file is TOML, one for each property that a subject breaks. Its `case` is what is tried again; all
else is told to whoever reads it.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tbptt_props.case import Case, case_of

HEAD = (
    "# A case that broke a property of truncated backpropagation through time. tbptt-props tries\n"
    "# it before it searches for others; `tbptt-props show` makes a script of it.\n"
)
TEXTS = ("property", "subject", "build", "case", "found", "cause")  # in the order they are written


@dataclass(frozen=True)
class Kept:
    """A case that broke a property of a subject.

    Args:
        name: of the property that it broke.
        subject: what was judged: `module.path:build`, or a test's id.
        case: the smallest that was found.
        build: where what was judged is made, `module.path:build` or `tests/test_rnn.py:test_rnn`.
        found: the first violation.
        cause: the likeliest.
        versions: of what it was found with.
    """

    name: str
    subject: str
    case: Case
    build: str = ""
    found: str = ""
    cause: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """The name of its file: a later find for the same property takes its place."""
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', self.subject)}.{self.name}.toml"

    def as_text(self) -> str:
        """Write it as a person reads it."""
        told = {**vars(self), "property": self.name, "case": repr(self.case)}
        lines = [f"{key} = {_quoted(told[key])}" for key in TEXTS if told[key]]
        versions = [f"{_key(name)} = {_quoted(value)}" for name, value in self.versions.items()]
        return "\n".join([HEAD, *lines, "", "[versions]", *versions, ""])


def keep(folder: Path, found: Iterable[Kept]) -> None:
    """Write each into a file of its own in the folder, which is made if need be."""
    for one in found:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{one.file_name}.{os.getpid()}"
        unfinished.write_text(one.as_text(), encoding="utf-8")
        unfinished.replace(folder / one.file_name)  # another process reads all of it or none


def all_kept(folder: Path) -> list[Kept]:
    """Return what is kept in a folder, which need not be there, in the order of its names.

    Raises:
        ValueError: a file can't be read, or is none of ours; the message names it.
    """
    return [kept_in(path) for path in sorted(folder.glob("*.toml"))]


def cases_of(kept: Iterable[Kept], subject: str) -> list[Case]:
    """Return the cases kept for a subject, each once."""
    return list(dict.fromkeys(one.case for one in kept if one.subject == subject))


def kept_in(path: Path) -> Kept:
    """Read one file.

    Raises:
        ValueError: it can't be read, or is none of ours; the message names it.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        texts = {key: _text(told[key], key) for key in TEXTS if key in told}
        name, case = texts.pop("property"), case_of(texts.pop("case"))
        return Kept(name=name, case=case, versions=told.get("versions", {}), **texts)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no kept case: it has no property, subject and case") from error


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, got {value!r}")
    return value


def _quoted(text: str) -> str:
    return json.dumps(" ".join(text.split()), ensure_ascii=False)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)
