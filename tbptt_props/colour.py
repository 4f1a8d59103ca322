"""Colour for a failure, where there is a terminal that shows it; the text says it all without."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TextIO

Paint = Callable[[str, str], str]  # of a text and the style it is due

STYLES = {"broken": "1;31", "label": "1", "found": "31", "due": "32", "fix": "36"}
LABELS = ("at", "smallest case", "likely cause", "replay")
_RULES: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"^(\w+)( +)(broken for .*)$"), ("broken", "", "broken")),
    (re.compile(r"^(  BROKEN)(      .*)$"), ("broken", "")),
    (re.compile(rf"^(  (?:{'|'.join(LABELS)}) {{2,}})(.*)$"), ("label", "")),
    (re.compile(r"^(  try {2,})(.*)$"), ("label", "fix")),
    (re.compile(r"^(.*)(but should be )(.*)$"), ("", "", "due")),
)
_REACH = re.compile(r"^(  the loss of \S+ +)([-#! ]+)$")
_MARKS = {"#": "due", "!": "found", "-": "found"}


def coloured(text: str, paint: Paint) -> str:
    """Return the text of a failure with its parts painted."""
    return "\n".join(_line(line, paint) for line in text.split("\n"))


def _line(line: str, paint: Paint) -> str:
    reach = _REACH.match(line)
    if reach:
        runs = re.findall(r"#+|!+|-+| +", reach[2])
        marks = (paint(run, _MARKS[run[0]]) if run[0] in _MARKS else run for run in runs)
        return reach[1] + "".join(marks)
    for pattern, styles in _RULES:
        found = pattern.match(line)
        if found:
            parts = zip(found.groups(), styles, strict=True)
            return "".join(paint(part, style) if style else part for part, style in parts)
    return line


def ansi(text: str, style: str) -> str:
    """Paint a text as most terminals understand it."""
    return f"\033[{STYLES[style]}m{text}\033[0m"


def is_wanted(stream: TextIO) -> bool:
    """Tell whether a stream ends at a terminal that shows colour, and nobody asked for none."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()
