import re
import shutil
from pathlib import Path
from textwrap import dedent
from typing import Any

import hypothesis.core
import pytest
from hypothesis import settings
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
NAMES = [judged.__name__ for judged in tb.PROPERTIES]
SMALLEST = "Case(steps=2, chunk=1)"
# What a user's tests import; `build` writes down each case it is asked for.
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
"""
RIGHT = """
    @tb.conformance(max_examples=3)
    def test_right(case):
        return build(case)
"""
WRONG = """
    @tb.conformance(max_examples=3)
    def test_wrong(case: tb.Case) -> tb.Subject:
        return build(case, CallsBackwardItself)
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


def outcomes(pytester: pytest.Pytester, *arguments: str) -> dict[str, str]:
    """Run the tests in this process; return how each of them ended."""
    reports = pytester.inline_run(*arguments).getreports("pytest_runtest_logreport")
    told = [report for report in reports if report.when == "call" or not report.passed]
    return {report.location[2]: report.outcome for report in told}


def built(pytester: pytest.Pytester) -> list[str]:
    """Return the cases that were built, each time one was, and forget them."""
    noted = pytester.path / "built.txt"
    cases = noted.read_text().splitlines()
    noted.unlink()
    return cases


def items(test: str, outcome: str = "passed", **others: str) -> dict[str, str]:
    return {f"{test}[{name}]": others.get(name, outcome) for name in NAMES}


def test_a_decorated_function_is_one_item_per_property(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT, WRONG)

    collected, _ = pytester.inline_genitems()

    assert [item.name for item in collected] == [*items("test_right"), *items("test_wrong")]


def test_each_test_of_a_file_judges_its_own_loop_and_fails_in_what_it_breaks(
    pytester: pytest.Pytester,
) -> None:
    fixed = """
        sizes = {"batch": 2, "steps": 5, "chunk": 2, "batches": 2}

        @tb.conformance(max_examples=2, **sizes)
        def test_right(case):
            return build(case)

        @tb.conformance(max_examples=2, **sizes)
        def test_wrong(case):
            return build(case, CallsBackwardItself)
    """
    write(pytester, fixed)

    found = outcomes(pytester)

    not_judged = {
        "one_chunk_is_one_ordinary_update": "skipped",
        "each_chunk_draws_its_own_randomness": "skipped",
    }
    assert found == {
        **items("test_right", **not_judged),
        **items("test_wrong", backward_goes_through_manual_backward="failed", **not_judged),
    }


def test_a_failure_says_claim_place_found_due_and_case(pytester: pytest.Pytester) -> None:
    write(pytester, WRONG)

    result = pytester.runpytest_inprocess("-k", "backward_goes_through_manual_backward")

    result.assert_outcomes(failed=1, deselected=len(NAMES) - 1)
    # Behind an E where the plugin is not installed, which otherwise shows no traceback.
    told = [line.removeprefix("E ").strip() for line in result.outlines]
    start = next(i for i, line in enumerate(told) if line.endswith("broken for test_wrong"))
    past = "backward: called past Lightning, but should be self.manual_backward(loss)"
    said = re.sub(" {2,}", "  ", "\n".join(told[start : start + 8]))
    assert re.sub(r"\nat  \S+:\d+  ", "\nat  ", said) == (
        "backward_goes_through_manual_backward  broken for test_wrong\n"
        "Every backward goes through Lightning, which scales and synchronises it where needed.\n"
        "\n"
        f"time steps 0-0, {past}\n"
        f"time steps 1-1, {past}\n"
        "\n"
        "at  loss.backward()  # type: ignore[no-untyped-call]\n"
        f"smallest case  {SMALLEST}"
    )


def test_a_mistake_that_every_case_shows_is_told_after_few_trainings(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, WRONG)

    outcomes(pytester, "-k", "backward_goes_through_manual_backward")

    assert len(built(pytester)) < 100


def test_one_property_can_be_chosen_by_name(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT)

    found = outcomes(pytester, "-k", "graph_crosses_no_boundary")

    assert found == {"test_right[graph_crosses_no_boundary]": "passed"}


def test_all_items_of_a_test_judge_the_same_cases_and_train_once_on_each(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, RIGHT)

    outcomes(pytester, "-k", "graph_crosses_no_boundary", "--hypothesis-seed=1")
    by_one_item = built(pytester)
    outcomes(pytester, "-k", "graph or state or events", "--hypothesis-seed=1")

    assert built(pytester) == by_one_item
    assert len(set(by_one_item)) == 3


def test_a_seed_draws_the_same_cases_again_and_another_one_others(
    pytester: pytest.Pytester,
) -> None:
    write(pytester, RIGHT)
    drawn = []
    for seed in ("1", "1", "2"):
        outcomes(pytester, "-k", "graph_crosses_no_boundary", f"--hypothesis-seed={seed}")
        drawn.append(built(pytester))

    assert drawn[0] == drawn[1] != drawn[2]


def test_where_nothing_is_to_be_random_all_items_still_judge_the_same_cases(
    pytester: pytest.Pytester,
) -> None:
    """Hypothesis draws by a digest of the item itself where `CI` is set."""
    write(pytester, RIGHT)
    before = settings()
    settings.register_profile("always the same", before, derandomize=True)
    settings.load_profile("always the same")
    drawn = []
    try:
        for items in ("graph_crosses_no_boundary", "graph_crosses_no_boundary", "graph or state"):
            outcomes(pytester, "-k", items)
            drawn.append(built(pytester))
        outcomes(pytester, "-k", "graph_crosses_no_boundary", "--hypothesis-seed=2")
    finally:
        settings.register_profile("as before", before)
        settings.load_profile("as before")

    assert drawn[0] == drawn[1] == drawn[2] != built(pytester)


DROPS_THE_TAIL = """
    from tbptt_ref.faults_time import DropsTheTail

    @tb.conformance()
    def test_wrong(case):
        return build(case, DropsTheTail)
"""


def test_what_one_machine_finds_broken_another_tries_first(pytester: pytest.Pytester) -> None:
    """By the snippet of docs/devices.md; the smallest case of all does not show this mistake."""
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"(?s)```python\n(# conftest.py.*?)```", page)
    conftest = shown.replace("/mnt/shared", str(pytester.path / "shared"))
    write(pytester, DROPS_THE_TAIL)
    before, found = settings(), []
    try:
        for limit in ("", "max_examples=1, "):
            pytester.makeconftest(conftest.replace("database=d", f"{limit}database=d"))
            found += [*outcomes(pytester, "-k", "chunks_tile").values()]
            shutil.rmtree(pytester.path / ".hypothesis")
    finally:
        settings.register_profile("as before", before)
        settings.load_profile("as before")

    assert found == ["failed", "failed"]


def test_a_second_session_in_the_same_process_judges_anew(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT, WRONG)

    first, second = (outcomes(pytester, "-k", "backward_goes_through") for _ in range(2))

    assert (
        first
        == second
        == {
            "test_right[backward_goes_through_manual_backward]": "passed",
            "test_wrong[backward_goes_through_manual_backward]": "failed",
        }
    )


def test_a_size_given_by_name_is_that_of_every_case(pytester: pytest.Pytester) -> None:
    fixed = """
        @tb.conformance(max_examples=3, chunk=35, inputs=2)
        def test_fixed(case):
            return build(case)
    """
    write(pytester, fixed)

    found = outcomes(pytester, "-k", "graph_crosses_no_boundary")

    assert found == {"test_fixed[graph_crosses_no_boundary]": "passed"}
    assert all(re.search(r"chunk=35, inputs=2[,)]", case) for case in built(pytester))


@pytest.mark.parametrize("scope", ["function", "module"])
def test_a_test_may_take_fixtures_beside_its_case(pytester: pytest.Pytester, scope: str) -> None:
    fixtures = f"""
        @pytest.fixture(scope="{scope}")
        def kind():
            return CallsBackwardItself

        @tb.conformance(max_examples=2)
        def test_after(case, kind):
            return build(case, kind)

        @tb.conformance(max_examples=2)
        def test_before(kind, case):
            return build(case, kind)
    """
    write(pytester, fixtures)

    found = outcomes(pytester, "-k", "backward_goes_through or graph_crosses_no_boundary")

    assert found == {
        "test_after[graph_crosses_no_boundary]": "passed",
        "test_after[backward_goes_through_manual_backward]": "failed",
        "test_before[graph_crosses_no_boundary]": "passed",
        "test_before[backward_goes_through_manual_backward]": "failed",
    }


def test_a_test_may_be_parametrized_beside_its_case(pytester: pytest.Pytester) -> None:
    parametrized = """
        @pytest.mark.parametrize("kind", [TruncatedRNN, CallsBackwardItself])
        @tb.conformance(max_examples=2)
        def test_kinds(case, kind):
            return build(case, kind)
    """
    write(pytester, parametrized)

    found = outcomes(pytester, "-k", "backward_goes_through")

    name = "test_kinds[backward_goes_through_manual_backward"
    assert found == {f"{name}-TruncatedRNN]": "passed", f"{name}-CallsBackwardItself]": "failed"}


def test_a_test_may_be_a_method(pytester: pytest.Pytester) -> None:
    in_a_class = """
        class TestLoops:
            kind = CallsBackwardItself

            @tb.conformance(max_examples=2)
            def test_method(self, case):
                return build(case, self.kind)
    """
    write(pytester, in_a_class)

    found = outcomes(pytester, "-k", "backward_goes_through or graph_crosses_no_boundary")

    assert found == {
        "TestLoops.test_method[graph_crosses_no_boundary]": "passed",
        "TestLoops.test_method[backward_goes_through_manual_backward]": "failed",
    }


def test_the_items_of_a_class_train_each_case_once(pytester: pytest.Pytester) -> None:
    in_a_class = """
        one = {name: 1 for name in ("batch", "chunk", "inputs", "hidden", "outputs", "batches")}

        class TestLoops:
            @tb.conformance(max_examples=2, steps=2, seed=0, **one)
            def test_method(self, case):
                return build(case)
    """
    write(pytester, in_a_class)

    outcomes(pytester, "-k", "chunks_tile")
    for_one = built(pytester)
    outcomes(pytester, "-k", "chunks_tile or graph_crosses")

    assert built(pytester) == for_one


def test_the_items_of_a_class_are_judged_by_what_their_own_instance_has(
    pytester: pytest.Pytester,
) -> None:
    in_a_class = """
        class TestLoops:
            @pytest.fixture(autouse=True, params=[TruncatedRNN, CallsBackwardItself])
            def _kind(self, request):
                self.kind = request.param

            @tb.conformance(max_examples=2)
            def test_method(self, case):
                return build(case, self.kind)
    """
    write(pytester, in_a_class)

    found = outcomes(pytester, "-k", "backward_goes_through or chunks_tile")

    assert sorted(found.values()) == ["failed", "passed", "passed", "passed"]


def test_a_test_may_assume_a_case_away(pytester: pytest.Pytester) -> None:
    assuming = """
        from hypothesis import assume

        @tb.conformance(max_examples=3)
        def test_wide(case):
            assume(case.hidden > 1)
            return build(case)

        @tb.conformance(max_examples=3)
        def test_none(case):
            assume(False)
            return build(case)
    """
    write(pytester, assuming)

    found = outcomes(pytester, "-k", "chunks_tile")

    name = "[chunks_tile_the_sequence]"
    assert found == {f"test_wide{name}": "passed", f"test_none{name}": "failed"}


def test_a_property_that_was_judged_on_no_case_is_not_green(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT)

    result = pytester.runpytest_inprocess("-rs", "-k", "each_chunk_draws_its_own_randomness")

    result.assert_outcomes(skipped=1, deselected=len(NAMES) - 1)
    assert "a forward that draws random numbers, and two chunks" in result.stdout.str()


def test_a_test_that_is_expected_to_break_a_property_is_no_failure_but_misuse_is(
    pytester: pytest.Pytester,
) -> None:
    expected = """
        @pytest.mark.xfail(raises=tb.BrokenProperty, strict=True)
        @tb.conformance(max_examples=2)
        def test_wrong(case):
            return build(case, CallsBackwardItself)

        @pytest.mark.xfail(raises=tb.BrokenProperty, strict=True)
        @tb.conformance(max_examples=2)
        def test_misused(case):
            return build(case).module
    """
    write(pytester, expected)

    result = pytester.runpytest_inprocess("-k", "backward_goes_through")

    result.assert_outcomes(xfailed=1, failed=1, deselected=2 * len(NAMES) - 2)
    assert "test_misused must return a Subject, got TruncatedRNN" in result.stdout.str()


def test_a_test_may_skip_itself(pytester: pytest.Pytester) -> None:
    skips = """
        @tb.conformance()
        def test_skips(case):
            pytest.skip("no data here")
    """
    write(pytester, skips)

    result = pytester.runpytest_inprocess("-rs", "-k", "graph_crosses_no_boundary")

    result.assert_outcomes(skipped=1, deselected=len(NAMES) - 1)
    assert "no data here" in result.stdout.str()


def test_statistics_tell_the_verdicts_of_each_item(pytester: pytest.Pytester) -> None:
    write(pytester, RIGHT.replace("max_examples=3", "max_examples=3, steps=3, chunk=2"))

    result = pytester.runpytest_inprocess(
        "--hypothesis-show-statistics", "-k", "training_reaches_the_end or graph_crosses"
    )

    told = result.stdout.str()
    for name in ("training_reaches_the_end", "graph_crosses_no_boundary"):
        assert f"test_mine.py::test_right[{name}]:" in told
    assert len(re.findall("- 3 passing", told)) == 2
    assert len(re.findall(r"\* 100.00%, holds", told)) == 2


def test_two_processes_share_the_items(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    write(pytester, RIGHT, WRONG)

    result = pytester.runpytest_subprocess("-n", "2", "-k", "graph or backward_goes_through")

    result.assert_outcomes(passed=5, failed=1)
    result.stdout.no_re_match_line(".*different tests were collected.*")


def test_what_takes_no_case_is_refused() -> None:
    def test_lit_rnn(example: tb.Case) -> tb.Subject:
        return right(example)

    with pytest.raises(TypeError) as refusal:
        tb.conformance()(test_lit_rnn)

    due = "test_lit_rnn must take an argument named case, the Case to build for"
    assert str(refusal.value) == due


def test_a_size_that_no_case_has_is_refused() -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- its text is compared below
        tb.conformance(window=35)

    assert str(refusal.value) == (
        "a case has no size 'window': "
        "its sizes are batch, steps, chunk, inputs, hidden, outputs, batches, seed"
    )


@pytest.mark.parametrize(
    ("sizes", "due"),
    [
        ({"chunk": 0}, "chunk must be an integer of at least 1, got chunk=0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got seed=-1"),
        ({"max_examples": 0}, "max_examples must be at least 1, got max_examples=0"),
    ],
)
def test_an_impossible_size_is_refused(sizes: dict[str, Any], due: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- its text is compared below
        tb.conformance(**sizes)

    assert str(refusal.value) == due
