"""A property that came later than a project's edition is told of, and fails nothing."""

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props import editions, options
from tbptt_props.__main__ import main
from tbptt_props.editions import EDITIONS, FIRST, SINCE, edition_in, preview_of
from tbptt_ref.faults_update import CallsBackwardItself
from tbptt_ref.module import TruncatedRNN

LATER = "backward_goes_through_manual_backward"
CASE = tb.Case(steps=3, chunk=2)
HERE = f"{__name__}:wrong"
SMALL = [f"--{size}=1" for size in ("batch", "inputs", "hidden", "outputs", "batches")]


def wrong(case: tb.Case, kind: type[TruncatedRNN] = CallsBackwardItself) -> tb.Subject:
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    module = kind(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)


@pytest.fixture
def _a_new_edition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the property that the loop breaks be new in a second edition."""
    monkeypatch.setattr(editions, "EDITIONS", (FIRST, "0.2"))
    monkeypatch.setitem(options.VALID, "edition", (FIRST, "0.2"))
    monkeypatch.setitem(SINCE, LATER, "0.2")


def test_each_property_is_of_an_edition_that_there_is() -> None:
    assert SINCE.keys() <= {judged.__name__ for judged in tb.PROPERTIES}
    assert set(SINCE.values()) <= set(EDITIONS)
    assert all(preview_of(judged.__name__, EDITIONS[-1]) == "" for judged in tb.PROPERTIES)


def test_an_edition_that_there_is_not_is_refused() -> None:
    due = f"^no edition '9.9': there are {', '.join(EDITIONS)}$"

    with pytest.raises(ValueError, match=due):
        tb.check(wrong(CASE), CASE, edition="9.9")
    with pytest.raises(ValueError, match=due):
        tb.verify(wrong, edition="9.9")


@pytest.mark.usefixtures("_a_new_edition")
def test_a_property_of_a_later_edition_is_a_preview_until_it_is_asked_for() -> None:
    first, second = (tb.check(wrong(CASE), CASE, edition=e) for e in (FIRST, "0.2"))

    assert ([v.name for v in first.previews], first.broken) == ([LATER], ())
    assert ([v.name for v in second.broken], second.previews) == ([LATER], ())
    first.raise_if_broken()
    with pytest.raises(tb.BrokenProperty, match=LATER):
        second.raise_if_broken()


@pytest.mark.usefixtures("_a_new_edition")
def test_who_asks_for_no_edition_gets_the_first() -> None:
    report = tb.verify(wrong, max_examples=2, seed=0)

    assert [verdict.name for verdict in report.previews] == [LATER]
    assert report.broken == ()


@pytest.mark.usefixtures("_a_new_edition")
def test_a_preview_that_holds_is_told_as_any_other() -> None:
    report = tb.check(wrong(CASE, TruncatedRNN), CASE)

    assert report[LATER].status == "holds"


@pytest.mark.usefixtures("_a_new_edition")
def test_a_preview_is_told_in_one_line_and_as_data() -> None:
    report = tb.check(wrong(CASE), CASE)

    text = report.as_text()
    assert (
        f"  preview     {LATER}\n"
        "              broken on Case(steps=3, chunk=2); counts from edition 0.2 on\n"
    ) in text
    assert re.search(r"0 broken, \d+ not judged, 1 previewed$", text)
    (told,) = (v for v in report.as_dict()["properties"] if v["name"] == LATER)
    assert (told["status"], told["preview"]) == ("preview", "0.2")


# In pyproject.toml ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "due"),
    [
        (None, FIRST),
        ("", FIRST),
        ("[tool.other]\n", FIRST),
        ("[tool.tbptt_props]\nprofile = 'quick'\n", FIRST),
        ("[tool.tbptt_props]\nedition = '0.2'\n", "0.2"),
    ],
)
@pytest.mark.usefixtures("_a_new_edition")
def test_a_project_says_its_edition(written: str | None, due: str, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "pyproject.toml").write_text(written)

    assert edition_in(tmp_path) == due


@pytest.mark.parametrize("written", ["[tool.tbptt_props]\nedition = '9'\n", "tbptt_props = \n"])
def test_a_project_that_asks_for_what_there_is_not_is_refused(written: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(written)

    with pytest.raises(ValueError, match=r"^pyproject\.toml: "):
        edition_in(tmp_path)


# At the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "written", "due"),
    [([], "", 0), (["--edition=0.2"], "", 1), ([], "0.2", 1), (["--edition=0.1"], "0.2", 0)],
)
@pytest.mark.usefixtures("_a_new_edition")
def test_the_command_fails_for_what_counts(
    asked: list[str], written: str, due: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if written:
        (tmp_path / "pyproject.toml").write_text(f'[tool.tbptt_props]\nedition = "{written}"\n')

    ended = main(["check", HERE, "--max-examples=2", *SMALL, "--json=found.json", *asked])

    assert ended == due
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["status"] == ("broken" if due else "holds")


def test_the_command_refuses_an_edition_that_there_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", HERE, "--edition=9"]) == 2
    assert f"{HERE}: no edition '9': there are 0.1" in capsys.readouterr().err


# In pytest -----------------------------------------------------------------------------------

LOOPS = """
    from test_editions import wrong

    import tbptt_props as tb

    @tb.conformance(max_examples=2)
    def test_one(case):
        return wrong(case)
"""


@pytest.mark.parametrize(
    ("asked", "outcome"),
    [((), {"xfailed": 1}), (("--tbptt-edition=0.2",), {"failed": 1})],
    ids=["preview", "counted"],
)
@pytest.mark.usefixtures("_a_new_edition")
def test_an_item_of_a_preview_fails_nothing_until_it_counts(
    asked: tuple[str, ...], outcome: dict[str, int], pytester: pytest.Pytester
) -> None:
    pytester.makepyfile(test_mine=dedent(LOOPS))

    result = pytester.runpytest_inprocess(
        "-p", "tbptt_props.plugin", "-k", LATER, "-rx", "--tbptt-report=found", *asked
    )

    result.assert_outcomes(**outcome)
    told = result.stdout.str()
    previewed = "xfailed" in outcome
    assert ("a preview: counts once edition =" in told) is previewed
    assert (", 1 previewed; " in told) is previewed
    assert bool(list((pytester.path / "found").glob("*.toml"))) is not previewed


def test_pytest_refuses_an_edition_that_there_is_not(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("-p", "tbptt_props.plugin", "--tbptt-edition=9")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--tbptt-edition: no edition '9': there are 0.1"])
