"""What a report says to a program: its layout, and that the page in docs tells of all of it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.__main__ import main
from tbptt_props.record import SCHEMA, of_case, of_cases, versions
from tbptt_ref.faults import FAULTS
from tbptt_ref.module import TruncatedRNN

PAGE = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
FAULT = {fault.name: fault for fault in FAULTS}
CASE = tb.Case(steps=5, chunk=2)
LEAKS = "graph_crosses_no_boundary"
HERE = f"{__name__}:leaking"


def leaking(case: tb.Case) -> tb.Subject:
    return tb.Subject(FAULT["DetachesOnlyH"].build(case), loss=mse_loss)


def right(case: tb.Case) -> tb.Subject:
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)


def found(report: dict[str, Any], name: str) -> dict[str, Any]:
    (verdict,) = (verdict for verdict in report["properties"] if verdict["name"] == name)
    return verdict  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return tb.check(leaking(CASE), CASE).as_dict()


def test_a_report_is_plain_data(data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_a_report_says_what_was_judged_and_what_came_of_it(data: dict[str, Any]) -> None:
    assert (data["schema"], data["status"]) == (SCHEMA, "broken")
    assert data["subject"] == "DetachesOnlyH"
    assert data["cases"]["tried"] == 1
    assert data["cases"]["sizes"]["steps"] == [5, 5]
    assert data["cases"]["kinds"]["two chunks or more"] == 1
    assert data["cases"]["kinds"]["no tail"] == 0
    assert [v["name"] for v in data["properties"]] == [p.__name__ for p in tb.PROPERTIES]


def test_a_broken_property_says_all_that_its_failure_does(data: dict[str, Any]) -> None:
    verdict = found(data, LEAKS)

    assert verdict["status"] == "broken"
    assert verdict["smallest_case"] == of_case(CASE)
    (violation,) = verdict["violations"]
    assert violation["line"].endswith("prediction, (h, c) = self(x, state)")
    assert {**violation, "line": ""} == {
        "where": "time steps 2-3, incoming state[1]",
        "found": "attached to the graph of time steps 0-1",
        "due": "detached",
        "line": "",
    }
    assert verdict["causes"][0]["try"] == "state = tuple(s.detach() for s in state)"


def test_the_chunks_of_the_smallest_case_are_told_one_by_one(data: dict[str, Any]) -> None:
    first, second = found(data, LEAKS)["chunks"]

    assert (first["batch"], first["steps"]) == (0, [0, 1])
    assert first["plan"] == [[0, 1], [2, 3], [4, 4]]
    assert first["broken"] == []
    assert second["reach"] == {
        "due": [[0, 2], [0, 3]],
        "found": [[0, 0], [0, 1], [0, 2], [0, 3]],
    }
    assert LEAKS in second["broken"]
    assert "forward" in second["events"]


def test_what_is_not_judged_says_what_it_needs_and_has_no_case(data: dict[str, Any]) -> None:
    verdict = found(data, "each_chunk_draws_its_own_randomness")

    assert verdict["status"] == "not judged"
    assert verdict["needs"] == "a forward that draws random numbers, and two chunks"
    assert (verdict["smallest_case"], verdict["chunks"]) == (None, [])


def test_what_was_broken_on_purpose_is_told_where_that_was_tried() -> None:
    search = {"max_examples": 4, "seed": 0, "batch": 1, "steps": 3, "chunk": 1}

    plain = tb.verify(right, **search).as_dict()  # type: ignore[arg-type]
    tried = tb.verify(right, sensitivity=True, **search).as_dict()  # type: ignore[arg-type]

    assert found(plain, LEAKS)["broken_on_purpose_by"] is None
    assert found(tried, LEAKS)["broken_on_purpose_by"]


def test_a_report_of_no_cases_has_no_sizes() -> None:
    assert of_cases([]) == {}
    assert tb.Report("nothing", ()).as_dict()["status"] == "not judged"


def test_versions_are_those_of_what_is_installed() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
    assert re.fullmatch(r"3\.\d+\.\d+\S*", versions()["python"])


# The page ------------------------------------------------------------------------------------


def entries(section: str) -> set[str]:
    return {
        name for line in section.splitlines() for name in re.findall(r"^\| `([\w.]+)` \|", line)
    }


def test_the_page_tells_of_every_entry_and_of_no_other(data: dict[str, Any]) -> None:
    whole, properties, chunks = re.split(r"Of each property:|Of each chunk:", PAGE)

    top = {f"cases.{name}" for name in data["cases"]} | data.keys() - {"cases"}
    assert entries(whole) == top
    assert entries(properties) == found(data, LEAKS).keys()
    assert entries(chunks) == found(data, LEAKS)["chunks"][0].keys()
    assert f"`schema` is {SCHEMA}." in PAGE


# The command ---------------------------------------------------------------------------------


def test_the_command_writes_the_report_to_a_file_and_ends_as_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"

    ended = main(["check", HERE, "--max-examples", "3", "--seed", "0", "--json", str(file)])

    data = json.loads(file.read_text(encoding="utf-8"))
    assert ended == 1
    assert data["subject"] == HERE
    case = found(data, LEAKS)["smallest_case"]["text"]
    assert f"smallest case     {case}" in capsys.readouterr().out


def test_a_file_that_can_not_be_written_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "no" / "report.json", tmp_path):
        assert main(["check", HERE, "--json", str(file)]) == 2

        told = capsys.readouterr()
        assert told.out == ""
        assert f"--json must be a file in a folder that is there, got {file}" in told.err
