"""How soon faults are found, as a command measures and tells it, and as the docs quote it."""

import re
from pathlib import Path

import pytest
from test_causes import CAUSES
from test_faults import APART, BREAKS, RESUMED
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props import catalogue
from tbptt_props.__main__ import main
from tbptt_props.catalogue import Row, as_markdown, as_text, measured, summary
from tbptt_ref.faults import FAULTS, Fault
from tbptt_ref.faults_time import DropsTheTail
from tbptt_ref.faults_update import ClipsAfterUpdating
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
TILE = "chunks_tile_the_sequence"
ROW = Row(
    name="DropsTheTail",
    mistake="Trains on full chunks only.",
    broken=(TILE, "a_run_can_be_resumed_at_any_boundary"),
    tries=(3, 2, 5),
    smallest=tb.Case(steps=1, chunk=2),
    causes=("tail_is_dropped", "last_chunk_is_dropped"),
)
UNFOUND = Row("Nothing", "Does no harm.", (), (None, 7, None), None, ())


def test_a_fault_is_found_and_shrunk_and_its_cause_is_named() -> None:
    row = measured(Fault(DropsTheTail), 3)

    assert row.name == "DropsTheTail"
    assert (
        row.mistake == "Trains on full chunks only: the time steps after the last one are dropped."
    )
    assert TILE in row.broken
    assert row.smallest == tb.Case(steps=1, chunk=2)
    assert row.causes == ("tail_is_dropped",)


def test_a_search_counts_cases_up_to_the_first_that_breaks_something() -> None:
    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(Fault(DropsTheTail).build(case), loss=mse_loss)

    broken: list[bool] = []
    tb.verify(
        build, max_examples=30, seed=2, on_case=lambda _, report: broken.append(bool(report.broken))
    )

    assert measured(Fault(DropsTheTail), 3).tries[2] == broken.index(True) + 1


def test_a_fault_in_clipping_is_judged_by_the_clipping_that_it_promises() -> None:
    row = measured(Fault(ClipsAfterUpdating, clip_norm=0.01), 1)

    assert row.causes == ("clipping_misses_the_gradients",)


def test_what_breaks_nothing_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "MOST_CASES", 4)
    monkeypatch.setattr(catalogue, "AT_LENGTH", 4)

    row = measured(Fault(TruncatedRNN), 2)

    assert row.tries == (None, None)
    assert (row.broken, row.smallest, row.causes) == ((), None, ())


def test_a_row_is_told_in_a_few_lines() -> None:
    assert list(as_text(ROW)) == [
        "DropsTheTail: Trains on full chunks only.",
        f"  breaks          {TILE}, a_run_can_be_resumed_at_any_boundary",
        "  found after     3 cases (median), 5 (worst)",
        "  smallest case   Case(steps=1, chunk=2)",
        "  likely cause    tail_is_dropped or last_chunk_is_dropped",
    ]


def test_a_fault_that_one_search_did_not_find_is_not_found() -> None:
    assert list(as_text(UNFOUND))[1:] == [
        "  breaks          nothing",
        "  found after     100 cases (median), not found (worst)",
        "  smallest case   None",
        "  likely cause    none of the known ones fits",
    ]


def test_the_summary_counts_what_every_search_found() -> None:
    assert summary([ROW, ROW, UNFOUND]) == (
        "2 of 3 faults found from each of 3 seeds, within 100 cases; median of the medians: 3 cases"
    )


def test_a_page_has_a_row_for_each_fault() -> None:
    page = list(as_markdown([ROW, UNFOUND], "a command"))

    assert f"Made by `a command`. {summary([ROW, UNFOUND])}." in page
    assert page[-2:] == [
        f"| DropsTheTail | Trains on full chunks only. | `{TILE}`, "
        "`a_run_can_be_resumed_at_any_boundary` | 3 | 5 | Case(steps=1, chunk=2) "
        "| tail_is_dropped or last_chunk_is_dropped |",
        "| Nothing | Does no harm. |  | 100 | not found | None | none |",
    ]


# The command ------------------------------------------------------------------------------------


def test_the_command_tells_of_the_faults_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "NeverDetaches", "CallsBackwardItself", "--seeds", "2"]) == 0

    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told if line and line[0] != " "] == [
        "NeverDetaches",
        "CallsBackwardItself",
        "2 of 2 faults found from each of 2 seeds, within 100 cases; median of the medians",
    ]
    assert "  likely cause    state_is_not_detached" in told


def test_the_command_prints_a_page_that_says_which_command_made_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["faults", "NeverDetaches", "--seeds", "1", "--markdown"]) == 0

    told = capsys.readouterr().out
    assert told.startswith("# The faults")
    assert "Made by `tbptt-props faults --seeds 1 --markdown NeverDetaches`." in told


def test_the_command_ends_in_1_where_a_fault_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "measured", lambda fault, searches: UNFOUND)

    assert main(["faults", "NeverDetaches"]) == 1


@pytest.mark.parametrize(
    ("options", "due"),
    [
        (["NeverDetach"], "no fault 'NeverDetach'; there are NeverDetaches, RetainsItsPast, "),
        (["--seeds", "0"], "seeds must be at least 1, got seeds=0"),
    ],
)
def test_the_command_ends_in_2_where_it_is_misused(
    options: list[str], due: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["faults", *options]) == 2

    assert capsys.readouterr().err.startswith(f"tbptt-props: {due}")


# The page in the docs ---------------------------------------------------------------------------


def page() -> dict[str, list[str]]:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {cells[0]: cells for cells in rows[1:]}


def test_the_page_has_the_faults_that_there_are_with_their_mistakes() -> None:
    assert [(name, cells[1]) for name, cells in page().items()] == [
        (fault.name, fault.mistake) for fault in FAULTS
    ]


# What faults break besides at lengths that the few cases lack. Where B, T and K are all the same,
# sequences and time steps that change places are time-first inputs, which a core mixes.
AT_LENGTH = {"MixesBatchAndTime": {APART}}


def test_the_page_names_the_properties_that_a_fault_breaks_and_its_cause() -> None:
    for name, cells in page().items():
        broken = set(re.findall("`(.*?)`", cells[2]))
        assert broken - BREAKS[name] <= {RESUMED} | AT_LENGTH.get(name, set()), name
        assert broken >= BREAKS[name], name
        assert cells[6] == CAUSES[name]
