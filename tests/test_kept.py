"""Counterexamples kept in files: written, read, tried first, in pytest and at the command line."""

import re
import tomllib
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import assume
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.__main__ import main
from tbptt_props.kept import Kept, all_kept, cases_of, keep, kept_in
from tbptt_ref.faults_update import CallsBackwardItself
from tbptt_ref.module import TruncatedRNN

CASE = tb.Case(steps=5, chunk=2)
KEPT = Kept(
    "graph_crosses_no_boundary",
    "tests/test_rnn.py::test_rnn[gru]",
    CASE,
    build="tests/test_rnn.py:test_rnn",
    found='time steps 2-3, incoming "state": attached, but should be detached',
    cause="The state is carried\nwith its graph",
    versions={"python": "3.11.7", "torch": "2.13.0+cpu"},
)
TEXT = """\
# A case that broke a property of truncated backpropagation through time. tbptt-props tries
# it before it searches for others; `tbptt-props show` makes a script of it.

property = "graph_crosses_no_boundary"
subject = "tests/test_rnn.py::test_rnn[gru]"
build = "tests/test_rnn.py:test_rnn"
case = "Case(steps=5, chunk=2)"
found = "time steps 2-3, incoming \\"state\\": attached, but should be detached"
cause = "The state is carried with its graph"

[versions]
python = "3.11.7"
torch = "2.13.0+cpu"
"""
LARGE = tb.Case(batch=3, steps=11, chunk=4)
built: list[tb.Case] = []


def subject(case: tb.Case, kind: type[TruncatedRNN] = TruncatedRNN) -> tb.Subject:
    built.append(case)
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    return tb.Subject(
        kind(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk), loss=mse_loss
    )


def right(case: tb.Case) -> tb.Subject:
    return subject(case)


def wrong(case: tb.Case) -> tb.Subject:
    return subject(case, CallsBackwardItself)


def picky(case: tb.Case) -> tb.Subject:
    assume(case != LARGE)
    return subject(case)


@pytest.fixture(autouse=True)
def _none_built() -> None:
    built.clear()


# The file ------------------------------------------------------------------------------------


def test_a_kept_case_is_a_file_that_people_read(tmp_path: Path) -> None:
    keep(tmp_path / "made" / "anew", [KEPT])

    (file,) = (tmp_path / "made" / "anew").iterdir()
    assert file.name == "tests-test_rnn.py-test_rnn-gru-.graph_crosses_no_boundary.toml"
    assert file.read_text(encoding="utf-8") == TEXT
    assert tomllib.loads(TEXT)["case"] == repr(CASE)


def test_the_page_shows_a_file_as_it_is() -> None:
    page = (Path(__file__).parents[1] / "docs" / "kept.md").read_text(encoding="utf-8")

    assert page.partition("<!-- kept -->\n```toml\n")[2].startswith(TEXT)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    keep(tmp_path, [KEPT])

    (read,) = all_kept(tmp_path)

    assert read == Kept(**{**vars(KEPT), "cause": "The state is carried with its graph"})


def test_a_later_find_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    keep(tmp_path, [KEPT, Kept(**{**vars(KEPT), "case": LARGE})])

    assert [one.case for one in all_kept(tmp_path)] == [LARGE]


def test_the_cases_of_a_subject_are_each_there_once() -> None:
    others = [Kept("a", "one", CASE), Kept("b", "one", CASE), Kept("c", "two", LARGE)]

    assert cases_of(others, "one") == [CASE]
    assert cases_of(others, "three") == []


def test_a_folder_that_is_not_there_keeps_nothing(tmp_path: Path) -> None:
    assert all_kept(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("case = ", "can't be read: "),
        ('subject = "x"\ncase = "Case()"\n', "is no kept case: it has no property, subject and"),
        ('property = "x"\nsubject = "x"\n', "is no kept case: it has no property, subject and"),
        ('property = "x"\nsubject = "x"\ncase = "5, 2"\n', "a case is written as Case(steps=5,"),
        ('property = 3\nsubject = "x"\ncase = "Case()"\n', "property must be a text, got 3"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_name(text: str, due: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(text)

    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}.*{re.escape(due)}"):
        kept_in(file)


def test_a_report_keeps_the_smallest_case_of_each_broken_property() -> None:
    report = tb.check(wrong(CASE), CASE)

    (kept,) = report.kept("my_project:build")

    assert (kept.name, kept.case) == ("backward_goes_through_manual_backward", CASE)
    assert (kept.subject, kept.build) == ("CallsBackwardItself", "my_project:build")
    assert kept.found.startswith("time steps 0-1, backward: called past Lightning")
    assert kept.cause.startswith("Backward is called on the loss itself")


# Tried first ---------------------------------------------------------------------------------


def test_cases_that_are_kept_are_tried_before_the_search() -> None:
    report = tb.verify(right, max_examples=2, seed=0, first=[LARGE])

    assert built[0] == LARGE
    assert LARGE in report.cases
    assert len(report.cases) > 1


def test_a_kept_case_that_is_assumed_away_or_of_another_size_is_left_out() -> None:
    tb.verify(picky, max_examples=2, seed=0, first=[LARGE])
    tb.verify(right, max_examples=2, seed=0, first=[LARGE], chunk=2)

    assert LARGE not in built


# At the command line -------------------------------------------------------------------------


def check(name: str, folder: Path) -> int:
    sizes = [f"--{size}=1" for size in ("batch", "inputs", "hidden", "outputs", "batches")]
    arguments = ["--max-examples=2", "--seed=0", "--keep", str(folder), *sizes]
    return main(["check", f"{__name__}:{name}", *arguments])


def test_the_command_keeps_what_it_finds_and_tries_it_first_the_next_time(tmp_path: Path) -> None:
    assert check("wrong", tmp_path) == 1

    (kept,) = all_kept(tmp_path)
    assert (kept.name, kept.build) == (
        "backward_goes_through_manual_backward",
        "test_kept:wrong",
    )
    keep(tmp_path, [Kept(**{**vars(kept), "case": CASE})])
    built.clear()
    assert check("wrong", tmp_path) == 1
    assert built[0] == CASE


def test_the_command_keeps_nothing_of_a_loop_that_is_right(tmp_path: Path) -> None:
    assert check("right", tmp_path / "none") == 0

    assert not (tmp_path / "none").exists()


def test_a_kept_file_that_can_not_be_read_is_misuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.toml").write_text("case = ")

    assert check("right", tmp_path) == 2
    assert "broken.toml can't be read" in capsys.readouterr().err


# In pytest -----------------------------------------------------------------------------------

LOOPS = """
    from pathlib import Path

    from torch import nn
    from torch.nn.functional import mse_loss

    import tbptt_props as tb
    from tbptt_ref.faults_update import CallsBackwardItself
    from tbptt_ref.module import TruncatedRNN

    @tb.conformance(max_examples=2)
    def test_wrong(case):
        with Path("built.txt").open("a") as built:
            print(case, file=built)
        core = nn.RNN(case.inputs, case.hidden, batch_first=True)
        module = CallsBackwardItself(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
        return tb.Subject(module, loss=mse_loss)
"""
ONE_ITEM = ("-p", "tbptt_props.plugin", "-k", "manual_backward")


@pytest.fixture
def session(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(test_mine=dedent(LOOPS))
    return pytester


def first_built(pytester: pytest.Pytester) -> str:
    file = pytester.path / "built.txt"
    first = file.read_text().splitlines()[0]
    file.unlink()
    return first


def test_pytest_keeps_what_it_finds_and_tries_it_first_the_next_time(
    session: pytest.Pytester,
) -> None:
    session.runpytest_inprocess(*ONE_ITEM, "--tbptt-report=found")
    first_built(session)

    (kept,) = all_kept(session.path / "found")
    assert (kept.subject, kept.build) == ("test_mine.py::test_wrong", "test_mine.py:test_wrong")
    keep(session.path / "found", [Kept(**{**vars(kept), "case": LARGE})])
    result = session.runpytest_inprocess(*ONE_ITEM, "--tbptt-report=found")
    assert first_built(session) == repr(LARGE)
    assert f"smallest case     {LARGE}" in result.stdout.str()


def test_the_folder_may_stand_in_pyproject_and_lies_beside_it(session: pytest.Pytester) -> None:
    session.makepyprojecttoml('[tool.tbptt_props]\nreport = "kept/here"\n')
    (session.path / "below").mkdir()

    session.runpytest_subprocess(*ONE_ITEM)

    assert len(all_kept(session.path / "kept" / "here")) == 1


def test_a_replay_and_a_known_failure_are_not_kept(session: pytest.Pytester) -> None:
    session.runpytest_inprocess(
        *ONE_ITEM, "--tbptt-report=found", "--tbptt-case=Case(steps=1, chunk=1)"
    )

    assert all_kept(session.path / "found") == []


@pytest.mark.parametrize(
    ("folder", "due"),
    [
        ("test_mine.py", "--tbptt-report must be a folder, got 'test_mine.py'"),
        ("kept", "broken.toml can't be read"),
    ],
)
def test_a_folder_that_can_not_be_read_is_a_usage_error(
    folder: str, due: str, session: pytest.Pytester
) -> None:
    (session.path / "kept").mkdir()
    (session.path / "kept" / "broken.toml").write_text("case = ")

    result = session.runpytest_subprocess(*ONE_ITEM, f"--tbptt-report={folder}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert due in result.stderr.str()
