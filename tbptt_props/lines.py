"""Where in the user's own source something happens: neither in a library's nor in ours."""

from __future__ import annotations

import functools
import linecache
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

Line = tuple[str, int]  # a file, and the number of a line in it

_OURS = Path(__file__).parent
_PYTHONS = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
_TRAINS = str(_OURS / "train.py")


@functools.cache
def is_the_users(file: str) -> bool:
    """Tell whether a file is neither of a library, installed or Python's own, nor of ours."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    pythons = any(path.resolve().is_relative_to(library) for library in _PYTHONS)
    ours = path.is_relative_to(_OURS)
    return not (installed or ours or pythons or file.startswith("<"))


def users_line() -> Line | None:
    """Return the line of the user's that runs now; None where it is a trainer's own doing."""
    frame = next(_users_frames(), None)
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def calls_itself() -> bool:
    """Tell whether a function of the user's that runs now was called by itself: recursion."""
    codes = [frame.f_code for frame in _users_frames()]
    return len({*codes}) < len(codes)


def _users_frames() -> Iterator[FrameType]:
    """Yield the frames of the user's that run now, the innermost first, as far as a trainer's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if is_the_users(code.co_filename):
            yield frame
        if code.co_filename == _TRAINS and code.co_name != "called":  # that one stands in between
            return
        frame = frame.f_back


def shown(line: Line, source: str | None = None) -> str:
    """Write a line as `file:number   source`, its path from the working directory if it is below.

    `source` is what it says, if that is known.
    """
    file, number = line
    path, here = Path(file), Path.cwd()
    short = path.relative_to(here) if path.is_relative_to(here) else path
    text = linecache.getline(file, number).strip() if source is None else source
    return f"{short}:{number}   {text}".rstrip()
