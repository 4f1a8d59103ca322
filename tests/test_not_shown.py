"""What docs/not-shown.md says is shown is shown: by a fault that is there, and by that property."""

import re
from pathlib import Path

from test_faults import BREAKS

PAGE = (Path(__file__).parents[1] / "docs" / "not-shown.md").read_text(encoding="utf-8")
SHOWN, NOT_SHOWN = PAGE.split("## Not shown")


def rows(table: str) -> list[list[str]]:
    """Return the cells of each row of the first table in a text, but for its head."""
    lines = [line.strip("| ") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines[2:]]


def test_every_fault_that_is_said_to_show_a_mistake_breaks_that_property() -> None:
    claimed = {fault: found.strip("`") for _, fault, found in rows(SHOWN)}

    assert {f: p for f, p in claimed.items() if p not in BREAKS.get(f, ())} == {}
    assert len(claimed) == len(rows(SHOWN)) > 60


def test_every_mistake_that_is_not_shown_has_a_reason() -> None:
    assert [row for row in rows(NOT_SHOWN) if len(row) != 2 or not all(row)] == []
    assert len(rows(NOT_SHOWN)) > 25


def test_no_mistake_is_told_twice() -> None:
    mistakes = [row[0] for row in [*rows(SHOWN), *rows(NOT_SHOWN)]]

    assert len(mistakes) == len(set(mistakes))


def test_the_page_names_nothing_outside_of_the_repository() -> None:
    assert re.findall(r"/\w+/\w+/\w+", PAGE) == []
