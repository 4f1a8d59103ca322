"""What a report says, to a person and to a program; no subject is run."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest

import tbptt_props as tb
from tbptt_props.judge import Property
from tbptt_props.report import MOST_CAUSES, MOST_LINES, as_text, failure_text, line_of
from tbptt_props.story import Scene
from tbptt_props.trace import Cause, Violation

CASE = tb.Case(steps=5, chunk=4)
LARGE = tb.Case(
    batch=2, steps=20, chunk=10, inputs=2, hidden=3, outputs=4, batches=2, seed=2**64 - 1
)
LEAK = Violation(
    "time steps 4-4, incoming state[1]", "attached to the graph of time steps 0-3", "detached"
)

HOLDS = tb.Verdict(
    "state_crosses_every_boundary",
    "A chunk starts from exactly the state in which the chunk before it ended.",
    judged=1,
)
CAUSE = Cause("in_part", "One part of the state is attached", "state = detached(state)")
BROKEN = tb.Verdict(
    "graph_crosses_no_boundary",
    "No path leads from a chunk's loss into the graph of an earlier chunk.",
    violations=(LEAK,),
    case=CASE,
    judged=1,
    causes=(CAUSE,),
)
UNJUDGED = tb.Verdict(
    "each_chunk_draws_its_own_randomness",
    "No chunk repeats the random numbers of the one before: dropout drops other units.",
    missing="a forward that draws random numbers, and two chunks",
)
REPORT = tb.Report("test_lit_rnn", (HOLDS, BROKEN, UNJUDGED))

FAILURE = f"""\
graph_crosses_no_boundary{"broken for test_lit_rnn":>75}
  No path leads from a chunk's loss into the graph of an earlier chunk.

  time steps 4-4, incoming state[1]: attached to the graph of time steps 0-3, but should be detached

  smallest case     {CASE!r}
  likely cause      One part of the state is attached
  try               state = detached(state)"""


def many(count: int) -> tb.Verdict:
    """Make a verdict with that many violations, one a chunk."""
    return replace(
        BROKEN,
        violations=tuple(
            replace(LEAK, where=f"time steps {n}-{n}, incoming state") for n in range(count)
        ),
    )


# To a person ---------------------------------------------------------------------------------


def test_a_failure_says_the_claim_where_what_was_found_and_due_and_the_smallest_case() -> None:
    assert failure_text(REPORT, BROKEN) == FAILURE


def test_a_failure_ends_in_the_command_that_replays_it_on_one_line() -> None:
    command = f"pytest 'tests/test_of_a_long_name.py::test_lit_rnn[{'x' * 60}]' --tbptt-case='C()'"

    assert failure_text(REPORT, BROKEN, replay=command) == (
        f"{FAILURE}\n  replay            {command}"
    )
    assert command in as_text(REPORT, replay=lambda verdict: command if verdict is BROKEN else "-")


def test_a_failure_tells_the_first_violations_and_counts_the_rest() -> None:
    text = failure_text(REPORT, many(7))

    assert text.splitlines()[3:8] == [
        *(
            f"  time steps {n}-{n}, incoming state: attached to the graph of time steps 0-3, "
            "but should be detached"
            for n in range(4)
        ),
        "  and 3 more of the kind",
    ]


def test_a_failure_counts_no_rest_where_all_violations_are_told() -> None:
    text = failure_text(REPORT, many(4))

    assert "time steps 3-3" in text
    assert "more of the kind" not in text


def test_a_report_says_one_line_a_property_then_each_failure_then_the_sum() -> None:
    assert as_text(REPORT) == (
        "test_lit_rnn: 1 case\n"
        "  holds       state_crosses_every_boundary\n"
        "  BROKEN      graph_crosses_no_boundary\n"
        "  not judged  each_chunk_draws_its_own_randomness\n"
        "              needs a forward that draws random numbers, and two chunks\n"
        "\n"
        f"{FAILURE}\n"
        "\n"
        "1 hold, 1 broken, 1 not judged"
    )


def test_a_report_of_several_failures_says_them_all_in_order() -> None:
    other = replace(BROKEN, name="loss_is_the_chunks_own", claim="Another claim.")
    report = tb.Report("test_lit_rnn", (BROKEN, other), examples=30)

    text = as_text(report)

    assert text.startswith("test_lit_rnn: 30 cases\n")
    assert text.index(failure_text(report, BROKEN)) < text.index(failure_text(report, other))
    assert text.endswith("\n\n0 hold, 2 broken, 0 not judged")


def test_a_report_without_a_failure_is_short() -> None:
    assert as_text(tb.Report("test_lit_rnn", (HOLDS,), examples=2)) == (
        "test_lit_rnn: 2 cases\n"
        "  holds       state_crosses_every_boundary\n"
        "\n"
        "1 hold, 0 broken, 0 not judged"
    )


def test_a_report_says_itself() -> None:
    assert REPORT.as_text() == as_text(REPORT)


def test_only_what_is_not_judged_needs_something() -> None:
    """A property may be judged on one case and not on another."""
    held, broken = (replace(verdict, missing="two chunks") for verdict in (HOLDS, BROKEN))

    assert line_of(held) == "  holds       state_crosses_every_boundary"
    assert line_of(broken) == "  BROKEN      graph_crosses_no_boundary"


# At most so wide and so long -----------------------------------------------------------------

WIDTH, HEIGHT = 100, 30


def widest(lines: Sequence[str]) -> str:
    return max(lines, key=len)


def test_a_failure_of_many_violations_is_no_longer_than_thirty_lines() -> None:
    assert len(failure_text(REPORT, many(1000)).splitlines()) <= HEIGHT


def test_a_failure_with_a_map_is_no_longer_than_thirty_lines_and_no_wider_than_a_page() -> None:
    plan = tuple((t, t + 1) for t in range(40))
    story = tuple(
        Scene(1, span, plan, due=frozenset({(1, span[0])}), reached=frozenset({(1, 0), (0, t)}))
        for t, span in enumerate(plan)
    )
    broken = replace(many(1000), story=story)

    lines = failure_text(REPORT, broken, replay="pytest").splitlines()

    assert any(line.startswith("  gradients reach") for line in lines)
    assert "  and 998 more of the kind" in lines
    assert len(lines) <= HEIGHT
    assert len(widest(lines)) <= WIDTH


@pytest.mark.parametrize("judged", tb.PROPERTIES, ids=lambda p: p.__name__)
def test_a_property_and_its_claim_are_no_wider_than_a_page(judged: Property) -> None:
    claim = (judged.__doc__ or "").splitlines()[0]
    verdict = replace(BROKEN, name=judged.__name__, claim=claim)

    first, second = failure_text(REPORT, verdict).splitlines()[:2]

    assert first == f"{judged.__name__}{'broken for test_lit_rnn':>{WIDTH - len(judged.__name__)}}"
    assert second == f"  {claim}"
    assert max(len(first), len(second)) <= WIDTH


def test_the_name_of_a_subject_and_of_a_property_are_apart_however_long_they_are() -> None:
    name = "test_" + "a_recurrent_model_" * 5

    first = failure_text(replace(REPORT, subject=name), BROKEN).splitlines()[0]

    assert re.fullmatch(f"graph_crosses_no_boundary +broken for {name}", first)


def test_the_smallest_case_is_no_wider_than_a_page() -> None:
    text = failure_text(REPORT, replace(BROKEN, case=LARGE))

    assert len(widest(text.splitlines())) <= WIDTH
    told = text.partition("smallest case ")[2].partition("likely cause")[0]
    assert eval(told.strip(), {"Case": tb.Case}) == LARGE


def causes_told(*causes: Cause) -> list[str]:
    text = failure_text(REPORT, replace(BROKEN, causes=causes))
    return text.partition(f"{CASE!r}\n")[2].splitlines()


def test_causes_that_fit_alike_are_told_each_with_what_to_try_but_no_more_than_a_few() -> None:
    causes = [replace(CAUSE, sentence=f"Mistake {n}", fix=f"fix {n}") for n in range(5)]

    assert causes_told(*causes) == [
        line
        for n in range(MOST_CAUSES)
        for line in (f"  likely cause      Mistake {n}", f"  try               fix {n}")
    ]


def test_a_failure_says_that_no_known_cause_fits_where_none_does() -> None:
    assert causes_told() == ["  likely cause      none of the known ones fits"]


def test_a_cause_is_no_wider_than_a_page() -> None:
    told = causes_told(replace(CAUSE, sentence="mistake " * 20, fix="fix " * 40))

    assert len(told) > 2
    assert len(widest(told)) <= WIDTH


def test_a_violation_is_no_wider_than_a_page() -> None:
    """As an error of torch is, with the line it came up in."""
    error = "RuntimeError: Trying to backward through the graph a second time (or directly access"
    violation = Violation("time steps 4-4, in backward", f"raised {error}", "trained to the end")

    lines = failure_text(REPORT, replace(BROKEN, violations=(violation,))).splitlines()

    assert len(widest(lines)) <= WIDTH
    assert " ".join(line.strip() for line in lines[3:5]) == str(violation)
    assert [len(line) - len(line.lstrip()) for line in lines[3:5]] == [2, 6]


def test_an_error_of_several_lines_is_told_as_one_sentence() -> None:
    error = "raised RuntimeError: size mismatch for\n\tweight:\n  (2, 3)"
    violation = Violation("batch 0", error, "trained to the end")

    text = failure_text(REPORT, replace(BROKEN, violations=(violation,)))

    assert text.splitlines()[3] == (
        "  batch 0: raised RuntimeError: size mismatch for weight: (2, 3), "
        "but should be trained to the end"
    )


@pytest.mark.parametrize(("words", "left_out"), [(100, False), (1000, True)])
def test_of_a_very_long_violation_the_middle_is_left_out(words: int, left_out: bool) -> None:
    error = f"raised RuntimeError: {'again ' * words}at rnn.py:41   loss.backward()"
    violation = Violation("batch 0", error, "trained to the end")

    lines = failure_text(REPORT, replace(BROKEN, violations=(violation,))).splitlines()

    assert lines[3].startswith("  batch 0: raised RuntimeError: again again")
    assert "rnn.py:41   loss.backward(), but should be trained to the end" in lines[-5]
    assert any("more lines" in line for line in lines) is left_out
    assert len(lines) <= 3 + MOST_LINES + 4
    assert len(widest(lines)) <= WIDTH


def test_a_word_that_is_wider_than_a_page_stays_whole() -> None:
    path = "/".join(["models"] * 20)
    violation = Violation("batch 0", f"raised OSError: no file {path}", "trained to the end")

    text = failure_text(REPORT, replace(BROKEN, violations=(violation,)))

    assert path in text


def test_what_a_property_needs_is_no_wider_than_a_page() -> None:
    need = "values in less than float64 are too coarse to difference"
    verdict = replace(UNJUDGED, name="gradients_span_the_whole_chunk", missing=need)

    assert line_of(verdict).splitlines() == [
        "  not judged  gradients_span_the_whole_chunk",
        f"              needs {need}",
    ]
    assert len(widest(line_of(replace(verdict, missing=f"{need}, {need}")).splitlines())) <= WIDTH


def test_what_a_property_needs_is_told_behind_its_name_where_there_is_room() -> None:
    verdict = replace(UNJUDGED, name="x" * 50, missing="y" * 28)

    assert line_of(verdict) == f"  not judged  {'x' * 50}  needs {'y' * 28}"
    assert len(line_of(verdict)) == WIDTH
    assert len(line_of(replace(verdict, missing="y" * 29)).splitlines()) == 2


# To a program --------------------------------------------------------------------------------


def test_a_verdict_is_one_of_three() -> None:
    assert [verdict.status for verdict in REPORT.verdicts] == ["holds", "broken", "not judged"]
    assert (REPORT.holds, REPORT.broken, REPORT.not_judged) == ((HOLDS,), (BROKEN,), (UNJUDGED,))


def test_a_report_is_neither_true_nor_false() -> None:
    message = "a report is neither true nor false: look at .broken, .holds and .not_judged"

    for report in (REPORT, tb.Report("test_lit_rnn", ())):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            bool(report)


def test_a_verdict_is_found_by_its_propertys_name() -> None:
    assert REPORT["graph_crosses_no_boundary"] is BROKEN


def test_an_unknown_name_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(KeyError) as refused:
        REPORT["graph_crosses_a_boundary"]

    assert refused.value.args == (
        "no property 'graph_crosses_a_boundary': state_crosses_every_boundary, "
        "graph_crosses_no_boundary, each_chunk_draws_its_own_randomness",
    )


# Raising -------------------------------------------------------------------------------------


def test_a_report_that_holds_raises_nothing() -> None:
    tb.Report("test_lit_rnn", (HOLDS, UNJUDGED)).raise_if_broken()


def test_a_broken_report_raises_the_text_of_each_failure() -> None:
    other = replace(BROKEN, name="loss_is_the_chunks_own")
    report = tb.Report("test_lit_rnn", (HOLDS, BROKEN, other))

    with pytest.raises(tb.BrokenProperty) as raised:
        report.raise_if_broken()

    assert str(raised.value) == f"{FAILURE}\n\n{failure_text(report, other)}"
    assert isinstance(raised.value, AssertionError)


def test_a_report_in_which_nothing_was_judged_raises_what_is_missing() -> None:
    other = replace(UNJUDGED, name="backward_goes_through_manual_backward", missing="a module")
    report = tb.Report("test_lit_rnn", (UNJUDGED, other, replace(other, name="yet another")))

    with pytest.raises(tb.ObservationError) as raised:
        report.raise_if_broken()

    assert str(raised.value) == (
        "nothing could be judged: a forward that draws random numbers, and two chunks; a module"
    )
