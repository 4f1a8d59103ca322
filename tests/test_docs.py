"""What the pages in `docs` say of the tests is true of the tests."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from gallery.correct import CORRECT
from gallery.other_shapes import OTHER
from gallery.strangers import RIGHT

from tbptt_props import Contract, Subject

ROOT = Path(__file__).parent.parent
HABITS = (ROOT / "docs" / "habits.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in HABITS.splitlines()
    if line.startswith("| ") and not line.startswith("| habit ")
]


def test_there_are_rows() -> None:
    assert len(ROWS) > 40
    assert {len(row) for row in ROWS} == {4}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_is_said_to_be_judged_is_shown_by_a_loop(row: list[str]) -> None:
    _, _, status, shown_by = row
    loops = re.findall(r"`(\w+)`", shown_by)
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}

    assert bool(loops) == status.startswith("judged")
    assert set(loops) <= CORRECT.keys() | OTHER.keys() | RIGHT.keys() | examples


def test_what_a_row_has_said_of_a_subject_can_be_said_of_one() -> None:
    said = {name for row in ROWS for name in re.findall(r"`(\w+)=", row[1])}

    assert said <= {field.name for kind in (Subject, Contract) for field in fields(kind)}
