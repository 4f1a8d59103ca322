"""Editions: from which on a property counts, so that an upgrade turns nothing red by itself.

A project says which edition it wants. A property that came later is a preview: it is judged and
told of, and fails nothing. A project that says nothing has the first edition.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

EDITIONS = ("0.1",)  # in order; a release that adds properties adds one
FIRST = EDITIONS[0]
SINCE: dict[str, str] = {}  # the edition of each property that was not in the first


def preview_of(name: str, edition: str) -> str:
    """Return the edition from which on a property counts, if that is later than the one given.

    Raises:
        ValueError: there is no such edition.
    """
    since = SINCE.get(name, FIRST)
    return since if EDITIONS.index(since) > EDITIONS.index(known(edition)) else ""


def known(edition: str) -> str:
    """Return an edition that there is.

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    if edition not in EDITIONS:
        raise ValueError(f"no edition {edition!r}: there are {', '.join(EDITIONS)}")
    return edition


def edition_in(folder: Path) -> str:
    """Return the edition that the pyproject.toml in a folder asks for; the first, if none.

    Raises:
        ValueError: the file can't be read, or there is no such edition.
    """
    path = folder / "pyproject.toml"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "tbptt_props" not in text:
        return FIRST
    try:
        asked = tomllib.loads(text).get("tool", {}).get("tbptt_props", {}).get("edition", FIRST)
        return known(asked)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
