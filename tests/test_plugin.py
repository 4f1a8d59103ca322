import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any
from xml.etree import ElementTree

import hypothesis.core
import pytest
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.ledger import Ledger, Tally
from tbptt_props.options import PROFILES, Options, asked, unknown
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
NAMES = [judged.__name__ for judged in tb.PROPERTIES]
BYPASSED = "backward_goes_through_manual_backward"
ENDS = "training_reaches_the_end"
GRAPH = "graph_crosses_no_boundary"
LOAD = ("-p", "tbptt_props.plugin")  # which is no more than once, where it is installed
LOOPS = """
    from pathlib import Path

    import torch
    from torch import nn
    from torch.nn.functional import mse_loss

    import tbptt_props as tb
    from tbptt_ref.faults_update import CallsBackwardItself
    from tbptt_ref.module import TruncatedRNN

    torch.set_num_threads(1)

    def build(case, kind=TruncatedRNN):
        with Path("built.txt").open("a") as built:
            print(case, file=built)
        core = nn.RNN(case.inputs, case.hidden, batch_first=True)
        module = kind(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
        return tb.Subject(module, loss=mse_loss)
"""
IMPORTS = """
    import pytest
    import tbptt_props as tb
    from loops import CallsBackwardItself, TruncatedRNN, build

    ONE = {name: 1 for name in ("batch", "inputs", "hidden", "outputs", "batches")}
"""
RIGHT = """
    @tb.conformance(max_examples=3)
    def test_right(case):
        return build(case)
"""
WRONG = """
    @tb.conformance(max_examples=3)
    def test_wrong(case):
        return build(case, CallsBackwardItself)
"""
# One case, of which nothing can break that takes two chunks to break.
WHOLE = """
    @tb.conformance(max_examples=1, steps=2, chunk=2, seed=0, **ONE)
    def test_whole(case):
        return build(case)
"""
# One case, of two chunks.
SMALL = """
    @tb.conformance(max_examples=1, steps=2, chunk=1, seed=0, **ONE)
    def test_small(case):
        return build(case)
"""


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    # A session inside this one forgets the modules that it is the first to import.
    tb.verify(right, max_examples=2, seed=0)


@pytest.fixture(autouse=True)
def _no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    # --hypothesis-seed sets it for the whole process.
    monkeypatch.setattr(hypothesis.core, "global_force_seed", None)


def right(case: tb.Case) -> tb.Subject:
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    readout = nn.Linear(case.hidden, case.outputs)
    return tb.Subject(TruncatedRNN(core, readout, chunk=case.chunk), loss=mse_loss)


def write(pytester: pytest.Pytester, *tests: str) -> None:
    pytester.makepyfile(
        loops=dedent(LOOPS), test_mine="\n".join(dedent(part) for part in (IMPORTS, *tests))
    )


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*LOAD, *arguments)


def built(pytester: pytest.Pytester) -> list[str]:
    """Return the cases that were built, each time one was, and forget them."""
    noted = pytester.path / "built.txt"
    cases = noted.read_text().splitlines()
    noted.unlink()
    return cases


def told_of(result: pytest.RunResult, test: str) -> str:
    """Return the line of the summary on one test, without the seconds."""
    (line,) = (line for line in result.outlines if line.startswith(f"{test}: "))
    assert re.search(r"; \d+\.\d s$", line)
    return line.removeprefix(f"{test}: ").rpartition("; ")[0]


# What a failure shows -------------------------------------------------------------------------

FOUND = "time steps 0-0, backward: called past Lightning, but should be self.manual_backward(loss)"
ONE_CASE = ("-k", f"wrong and {BYPASSED}", "--tbptt-case=Case(steps=1, chunk=1)")


def failures(result: pytest.RunResult) -> list[str]:
    """Return the lines between the head of the one failure and what follows it."""
    start = next(i for i, line in enumerate(result.outlines) if line.startswith("____"))
    rest = result.outlines[start + 1 :]
    return rest[: next(i for i, line in enumerate(rest) if line.startswith("===="))]


def test_a_failure_is_told_without_a_traceback(pytester: pytest.Pytester) -> None:
    write(pytester, WRONG)

    result = run(pytester, *ONE_CASE)

    lines = failures(result)
    assert lines[0] == f"{BYPASSED}{'broken for test_wrong':>63}"
    assert lines[3] == f"  {FOUND}"
    assert lines[-1].startswith("  replay            pytest ")
    (summed,) = (line for line in result.outlines if line.startswith("FAILED "))
    assert summed.endswith(f"[{BYPASSED}] - {FOUND}")


@pytest.mark.parametrize("style", ["--tb=long", "--tb=native", "--full-trace"])
def test_who_asks_for_the_whole_traceback_gets_it(style: str, pytester: pytest.Pytester) -> None:
    write(pytester, WRONG)

    told = "\n".join(failures(run(pytester, style, *ONE_CASE)))

    assert "BrokenProperty" in told
    assert "replay            pytest" in told


def test_a_failure_in_a_worker_looks_as_any_other(pytester: pytest.Pytester) -> None:
    write(pytester, WRONG)
    here = failures(run(pytester, *ONE_CASE))

    there = failures(pytester.runpytest_subprocess(*LOAD, "-n", "1", *ONE_CASE))

    assert [line for line in there if not line.startswith("[gw0]")] == here


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_failure_has_colour_where_pytest_has(
    workers: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    write(pytester, WRONG)

    plain, coloured = (
        pytester.runpytest_subprocess(*LOAD, *workers, f"--color={colour}", *ONE_CASE).stdout.str()
        for colour in ("no", "yes")
    )

    assert "\033" not in plain
    assert "but should be \033[32mself.manual_backward(loss)\033[0m" in coloured
    assert f"\033[31m\033[1m{BYPASSED}\033[0m" in coloured


def test_an_error_of_a_loop_that_can_not_be_described_keeps_its_traceback(
    pytester: pytest.Pytester,
) -> None:
    write(
        pytester,
        """
        @tb.conformance(max_examples=1)
        def test_wrong(case):
            raise RuntimeError("no file vocabulary.txt")
        """,
    )

    told = "\n".join(failures(run(pytester, *ONE_CASE)))

    assert 'raise RuntimeError("no file vocabulary.txt")' in told


# What it costs --------------------------------------------------------------------------------


def test_a_session_without_conformance_tests_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "def pytest_unconfigure():\n"
        "    heavy = {'torch', 'lightning', 'hypothesis', 'numpy'} & sys.modules.keys()\n"
        "    print('heavy:', sorted(heavy), 'tbptt_props.plugin' in sys.modules)\n"
    )
    (tmp_path / "test_nothing.py").write_text("def test_nothing(): pass\n")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *LOAD, "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "heavy: [] True" in done.stdout
    assert "1 passed" in done.stdout
    said = [line for line in done.stdout.splitlines() if "tbptt" in line]
    assert all(line.startswith(("plugins: ", "heavy: ")) for line in said)


def test_a_pyproject_that_is_none_of_ours_is_not_read_even_if_it_is_broken(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other\n")

    assert asked({}, tmp_path) == Options()
    assert asked({}, tmp_path / "nowhere") == Options()


# What is asked for ----------------------------------------------------------------------------


def test_the_options_are_read_from_pyproject_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.tbptt_props]\n"
        "sensitivity = true\n"
        "strict = true\n"
        "case = 'Case(steps=3, chunk=2)'\n"
        "profile = 'quick'\n"
    )
    case = tb.Case(steps=3, chunk=2)
    nothing = dict.fromkeys(("sensitivity", "strict", "case", "profile"))

    assert asked(nothing, tmp_path) == Options(True, True, case, "quick")
    command = {"sensitivity": False, "strict": None, "case": "Case()", "profile": "thorough"}
    assert asked(command, tmp_path) == Options(False, True, tb.Case(), "thorough")


@pytest.mark.parametrize(
    ("written", "due"),
    [
        (
            "sensitivty = true",
            "pyproject.toml, [tool.tbptt_props]: no option 'sensitivty': "
            "did you mean 'sensitivity'? There are sensitivity, strict, case, profile, report, "
            "edition, device",
        ),
        (
            "strict = 'yes'",
            "pyproject.toml, [tool.tbptt_props]: strict must be true or false, got 'yes'",
        ),
        ("case = 3", "pyproject.toml, [tool.tbptt_props]: case must be a text, got 3"),
        (
            "profile = 'thorogh'",
            "pyproject.toml, [tool.tbptt_props]: profile: no profile 'thorogh': "
            "did you mean 'thorough'? There are quick, default, thorough",
        ),
        ("strict = yes", "pyproject.toml can't be read: Invalid value (at line 2, column 10)"),
    ],
)
def test_what_pyproject_asks_for_must_exist(written: str, due: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.tbptt_props]\n{written}\n")

    with pytest.raises(pytest.UsageError) as refusal:
        asked({}, tmp_path)

    assert str(refusal.value) == due


@pytest.mark.parametrize(
    ("option", "due"),
    [
        (
            "--tbptt-profile=quik",
            "--tbptt-profile: no profile 'quik': did you mean 'quick'? "
            "There are quick, default, thorough",
        ),
        (
            "--tbptt-case=1,5,4,0",
            "--tbptt-case: a case is written as Case(steps=5, chunk=2), got '1,5,4,0'",
        ),
        (
            "--tbptt-case=Case(chunk=0)",
            "--tbptt-case: chunk must be an integer of at least 1, got chunk=0",
        ),
    ],
)
def test_a_misspelt_value_is_a_usage_error(
    option: str, due: str, pytester: pytest.Pytester
) -> None:
    pytester.makepyfile("def test_nothing(): pass")

    result = run(pytester, option)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in result.errlines if line] == [f"ERROR: {due}"]


def test_a_misspelt_option_in_pyproject_is_a_usage_error(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml("[tool.tbptt_props]\nstrickt = true")

    result = run(pytester)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "no option 'strickt': did you mean 'strict'?" in result.stderr.str()


def test_a_name_that_is_near_none_is_told_those_that_there_are() -> None:
    assert unknown("profile", "zzz", PROFILES) == (
        "no profile 'zzz': there are quick, default, thorough"
    )


def test_the_list_tells_each_property_and_its_claim_and_runs_nothing(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile("raise RuntimeError('collected')")

    result = run(pytester, "--tbptt-list")

    claims = [f"  {(judged.__doc__ or '').splitlines()[0]}" for judged in tb.PROPERTIES]
    due = [line for pair in zip(NAMES, claims, strict=True) for line in pair]
    assert (result.ret, result.outlines) == (0, due)


# One case -------------------------------------------------------------------------------------


def test_a_case_that_is_asked_for_is_judged_alone(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT)

    result = run(pytester, "--tbptt-case=Case(steps=5, chunk=2)", "-k", f"{GRAPH} or {ENDS}")

    result.assert_outcomes(passed=2, deselected=len(NAMES) - 2)
    assert set(built(pytester)) == {"Case(steps=5, chunk=2)"}


def test_a_failure_is_replayed_by_the_command_that_it_names(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(pytester, WRONG)
    (pytester.path / "below").mkdir()
    monkeypatch.chdir(pytester.path / "below")  # a node's id is not what is typed there
    failed = run(pytester, "..", "-k", BYPASSED)
    (line,) = set(re.findall("replay +(pytest .*)", failed.stdout.str()))  # in CI, it is said twice
    assert line == (
        f"pytest '../test_mine.py::test_wrong[{BYPASSED}]' --tbptt-case='Case(steps=2, chunk=1)'"
    )
    built_there = Path("built.txt")
    built_there.unlink()

    again = run(pytester, *shlex.split(line)[1:])

    again.assert_outcomes(failed=1)
    assert set(built_there.read_text().splitlines()) == {"Case(steps=2, chunk=1)"}
    assert line in again.stdout.str()


def test_a_case_that_a_test_can_not_have_is_an_error(pytester: pytest.Pytester) -> None:
    write(pytester, WHOLE)

    result = run(pytester, "--tbptt-case=Case(steps=5, chunk=2)", "-k", GRAPH)

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    due = "test_whole: each case has steps=2, but not Case(steps=5, chunk=2)"
    assert f"ObservationError: {due}" in result.stdout.str()


def test_a_case_that_a_test_assumes_away_is_not_green(pytester: pytest.Pytester) -> None:
    assuming = """
        from hypothesis import assume, note

        @tb.conformance(max_examples=3)
        def test_wide(case):
            note("as in any test of Hypothesis")
            assume(case.hidden > 1)
            return build(case)
    """
    write(pytester, assuming)

    result = run(pytester, "--tbptt-case=Case()", "-k", ENDS)

    result.assert_outcomes(skipped=1, deselected=len(NAMES) - 1)


# How many cases -------------------------------------------------------------------------------


def test_the_profiles_are_these() -> None:
    assert PROFILES == {"quick": 20, "default": None, "thorough": 500}


@pytest.mark.parametrize(
    ("profile", "said", "due"),
    [("quick", "", 20), ("quick", "max_examples=3, ", 3), ("default", "", 7), ("", "", 7)],
)
def test_a_profile_says_how_many_cases_are_tried_where_the_test_does_not(
    profile: str, said: str, due: int, pytester: pytest.Pytester
) -> None:
    # Hypothesis tries each value of a seed once; cases of one time step are soon trained on.
    sizes = f"""
        from hypothesis import settings
        before = settings()
        settings.register_profile("of the user", before, max_examples=7)
        settings.load_profile("of the user")

        @tb.conformance({said}steps=1, chunk=1, **ONE)
        def test_sizes(case):
            return build(case)

        settings.register_profile("as before", before)
        settings.load_profile("as before")
    """
    write(pytester, sizes)
    arguments = [f"--tbptt-profile={profile}"] if profile else []

    result = run(pytester, *arguments, "--hypothesis-show-statistics", "-k", ENDS)

    result.assert_outcomes(passed=1, deselected=len(NAMES) - 1)
    assert f"- {due} passing," in result.stdout.str()


# What shows nothing ---------------------------------------------------------------------------


def test_what_could_not_be_judged_is_skipped_but_fails_where_it_is_strict(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, WHOLE)

    run(pytester, "-k", GRAPH).assert_outcomes(skipped=1, deselected=len(NAMES) - 1)
    result = run(pytester, "-k", GRAPH, "--tbptt-strict")

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    assert (
        "not judged: needs a case of at least two chunks. Give it that, or" in result.stdout.str()
    )


def test_what_holds_vacuously_is_told_in_the_summary_and_fails_where_it_is_strict(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, WHOLE)

    only = ("-k", f"{ENDS} or chunks_tile", "--tbptt-sensitivity")
    told = run(pytester, *only)
    strict = run(pytester, *only, "--tbptt-strict")

    told.assert_outcomes(passed=2, deselected=len(NAMES) - 2)
    assert told_of(told, "test_mine.py::test_whole") == (
        "2 judged, 2 held (1 vacuously), 0 broken, 0 not judged; "
        "1 case, 0 with 2 boundaries or more"
    )
    assert f"  vacuous: nothing put in on purpose broke {ENDS}" in told.outlines
    strict.assert_outcomes(passed=1, failed=1, deselected=len(NAMES) - 2)
    assert f"{ENDS} holds vacuously: nothing put in on purpose broke it." in strict.stdout.str()


def test_nothing_is_broken_on_purpose_unless_it_is_asked_for(pytester: pytest.Pytester) -> None:
    write(pytester, WHOLE)

    result = run(pytester, "-k", ENDS, "--tbptt-strict")

    result.assert_outcomes(passed=1, deselected=len(NAMES) - 1)
    assert "vacuous" not in result.stdout.str()


def test_the_loop_is_broken_on_purpose_once_for_all_items(pytester: pytest.Pytester) -> None:
    write(pytester, SMALL)

    run(pytester, "-k", GRAPH)
    plain = len(built(pytester))
    run(pytester, "-k", GRAPH, "--tbptt-sensitivity")
    for_one = len(built(pytester))
    result = run(pytester, "--tbptt-sensitivity")

    assert "vacuous" not in result.stdout.str()
    assert for_one > 5 * plain
    assert len(built(pytester)) == for_one


# The summary ----------------------------------------------------------------------------------


def test_the_summary_tells_in_one_line_what_came_of_each_test(pytester: pytest.Pytester) -> None:
    sizes = """
        @tb.conformance(max_examples=1, steps=3, chunk=1, seed=0, **ONE)
        def test_three(case):
            return build(case)
    """
    write(pytester, SMALL, sizes, WRONG)

    result = run(pytester, "-k", f"{GRAPH} or {BYPASSED} or one_chunk")

    start = next(i for i, line in enumerate(result.outlines) if re.match("=+ tbptt-props =", line))
    named = [line.partition(": ")[0] for line in result.outlines[start + 1 : start + 4]]
    assert named == [f"test_mine.py::test_{name}" for name in ("small", "three", "wrong")]
    assert told_of(result, "test_mine.py::test_small") == (
        "2 judged, 2 held, 0 broken, 1 not judged; 1 case, 0 with 2 boundaries or more"
    )
    assert told_of(result, "test_mine.py::test_three") == (
        "2 judged, 2 held, 0 broken, 1 not judged; 1 case, 1 with 2 boundaries or more"
    )
    assert ", 1 broken, " in told_of(result, "test_mine.py::test_wrong")


def test_the_summary_tells_the_kinds_of_a_parametrized_test_apart(
    pytester: pytest.Pytester,
) -> None:
    kinds = """
        @pytest.mark.parametrize("kind", [TruncatedRNN, CallsBackwardItself])
        @tb.conformance(max_examples=1, steps=2, chunk=1, seed=0, **ONE)
        def test_kinds(case, kind):
            return build(case, kind)
    """
    write(pytester, kinds)

    result = run(pytester, "-k", BYPASSED)

    for kind, held in (("TruncatedRNN", 1), ("CallsBackwardItself", 0)):
        assert told_of(result, f"test_mine.py::test_kinds[{kind}]") == (
            f"1 judged, {held} held, {1 - held} broken, 0 not judged; "
            "1 case, 0 with 2 boundaries or more"
        )


def test_what_workers_noted_comes_together(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write(pytester, SMALL)

    result = pytester.runpytest_subprocess(
        *LOAD, "-n", "2", "-k", f"{GRAPH} or {ENDS} or one_chunk"
    )

    assert told_of(result, "test_mine.py::test_small") == (
        "2 judged, 2 held, 0 broken, 1 not judged; 1 case, 0 with 2 boundaries or more"
    )


def test_what_several_processes_found_is_summed_up_test_by_test() -> None:
    ledger = Ledger()
    ledger.add("test_a", Tally({"one": "holds"}, {"Case()": 2, "Case(hidden=2)": 2}, 1.0))
    other = Ledger()
    other.add("test_a", Tally({"two": "broken"}, {"Case()": 2, "Case(steps=3, chunk=1)": 3}, 2.0))

    ledger.merge(other.data())

    assert list(ledger.lines()) == [
        "test_a: 2 judged, 1 held, 1 broken, 0 not judged; "
        "3 cases, 1 with 2 boundaries or more; 3.0 s"
    ]


def test_a_session_without_conformance_tests_has_no_summary(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_nothing(): pass")

    result = run(pytester)

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*= tbptt-props =*")


def facts(pytester: pytest.Pytester) -> dict[str, dict[str, str]]:
    """Return what JUnit's XML says of each item."""
    tree = ElementTree.parse(pytester.path / "junit.xml")
    return {
        case.attrib["name"]: {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        for case in tree.iter("testcase")
    }


def test_the_junit_report_carries_what_was_found(pytester: pytest.Pytester) -> None:
    write(pytester, SMALL.replace("build(case)", "build(case, CallsBackwardItself)"))

    only = f"{GRAPH} or {BYPASSED} or one_chunk"
    run(pytester, "--junitxml=junit.xml", "--tbptt-sensitivity", "-k", only)

    found = facts(pytester)
    holds = found[f"test_small[{GRAPH}]"]
    assert holds.pop("tbptt_proved_by") == "the state is not detached"
    assert holds == {"tbptt_property": GRAPH, "tbptt_status": "holds", "tbptt_cases": "1"}
    broken = found[f"test_small[{BYPASSED}]"]
    assert "Backward is called on the loss itself" in broken.pop("tbptt_cause")
    assert broken == {
        "tbptt_property": BYPASSED,
        "tbptt_status": "broken",
        "tbptt_cases": "1",
        "tbptt_smallest_case": "Case(steps=2, chunk=1)",
    }
    assert found["test_small[one_chunk_is_one_ordinary_update]"] == {
        "tbptt_property": "one_chunk_is_one_ordinary_update",
        "tbptt_status": "not judged",
        "tbptt_cases": "0",
    }


def test_an_item_that_is_run_twice_is_told_of_once_and_keeps_what_a_test_recorded(
    pytester: pytest.Pytester,
) -> None:
    recorded = """
        @pytest.fixture(autouse=True)
        def _mine(record_property):
            record_property("mine", "kept")
    """
    write(pytester, SMALL, recorded)
    pytester.makeconftest("def pytest_runtest_call(item):\n    item.runtest()\n")

    reports = pytester.inline_run(*LOAD, "-k", GRAPH).getreports("pytest_runtest_logreport")

    (called,) = (report for report in reports if report.when == "call")
    names = [name for name, _ in called.user_properties]
    assert names == ["mine", "tbptt_property", "tbptt_status", "tbptt_cases"]


def test_a_test_may_have_the_request_for_itself(pytester: pytest.Pytester) -> None:
    asking = """
        @tb.conformance(max_examples=1)
        def test_asks(case, request):
            assert request.node.name.startswith("test_asks")
            return build(case)
    """
    write(pytester, asking)

    run(pytester, "-k", ENDS).assert_outcomes(passed=1, deselected=len(NAMES) - 1)


# What is known to be broken -------------------------------------------------------------------


def expecting(kind: str, name: str = BYPASSED, case: str = "tb.Case(steps=4, chunk=2)") -> str:
    return f"""
        what = tb.known("backward is called past", issue="#12", case={case})

        @tb.conformance(max_examples=3, expect={{"{name}": what}})
        def test_known(case):
            return {kind}
    """


def test_what_is_known_to_be_broken_is_an_expected_failure_on_its_case_alone(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, expecting("build(case, CallsBackwardItself)"))

    result = run(pytester, "-rx", "-k", BYPASSED)

    result.assert_outcomes(xfailed=1, deselected=len(NAMES) - 1)
    assert "backward is called past (#12)" in result.stdout.str()
    assert set(built(pytester)) == {"Case(steps=4, chunk=2)"}
    assert ", 0 held, 1 broken (1 known), " in told_of(result, "test_mine.py::test_known")


def test_what_else_it_breaks_is_judged_as_ever(pytester: pytest.Pytester) -> None:
    write(pytester, expecting("build(case, CallsBackwardItself)", GRAPH))

    result = run(pytester, "-k", f"{BYPASSED} or {GRAPH}")

    result.assert_outcomes(failed=2, deselected=len(NAMES) - 2)


def test_what_is_known_but_no_longer_broken_fails_and_is_to_be_removed(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, expecting("build(case)"))

    result = run(pytester, "-k", BYPASSED)

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    told = " ".join(result.outlines)
    assert (
        f"{BYPASSED} is no longer broken on Case(steps=4, chunk=2): remove it from expect "
        "(it was known as: backward is called past (#12))"
    ) in told


def test_what_is_known_but_can_not_be_judged_fails(pytester: pytest.Pytester) -> None:
    write(pytester, expecting("build(case)", GRAPH, "tb.Case(steps=2, chunk=2)"))

    result = run(pytester, "-k", GRAPH)

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    told = " ".join(result.outlines)
    assert (
        f"{GRAPH} can't be judged on Case(steps=2, chunk=2): it needs a case of at least two"
        in told
    )


@pytest.mark.parametrize("kind", ["build(case).module", "tb.Subject(3)", "1 / 0"])
def test_an_error_is_never_the_failure_that_is_known(kind: str, pytester: pytest.Pytester) -> None:
    write(pytester, expecting(kind))

    run(pytester, "-k", BYPASSED).assert_outcomes(failed=1, deselected=len(NAMES) - 1)


@pytest.mark.parametrize("option", ["--runxfail", "--tbptt-case=Case(steps=4, chunk=2)"])
def test_what_is_known_is_told_in_full_where_that_is_asked_for(
    option: str, pytester: pytest.Pytester
) -> None:
    write(pytester, expecting("build(case, CallsBackwardItself)"))

    result = run(pytester, option, "-k", BYPASSED)

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    assert "called past Lightning, but should be self.manual_backward(loss)" in result.stdout.str()


@pytest.mark.parametrize(
    ("make", "error", "due"),
    [
        (
            lambda: tb.conformance(expect={"graph_crosses_a_boundary": known()}),
            ValueError,
            "expect: no property 'graph_crosses_a_boundary': "
            f"did you mean 'graph_crosses_no_boundary'? There are {', '.join(NAMES)}",
        ),
        (
            lambda: tb.conformance(expect={GRAPH: "reason"}),  # type: ignore[dict-item]
            TypeError,
            f"expect['{GRAPH}'] must be made by known(), got 'reason'",
        ),
        (
            lambda: tb.conformance(expect={GRAPH: known()}, chunk=35),
            ValueError,
            f"expect['{GRAPH}']: each case has chunk=35, but not Case(steps=2, chunk=1)",
        ),
        (
            lambda: tb.known("reason", case="Case()"),  # type: ignore[arg-type]
            TypeError,
            "case must be a Case, got case='Case()'",
        ),
        (
            lambda: tb.known(3, case=tb.Case()),  # type: ignore[arg-type]
            TypeError,
            "reason must be a text, got reason=3",
        ),
        (
            lambda: tb.known(" ", case=tb.Case()),
            ValueError,
            "reason must say why the property is broken, got none",
        ),
    ],
)
def test_what_can_not_be_known_is_refused(
    make: Callable[[], Any], error: type[Exception], due: str
) -> None:
    with pytest.raises(error) as refusal:
        make()

    assert str(refusal.value) == due


def known() -> Any:
    return tb.known("reason", case=tb.Case())
