"""Somebody's own property is judged beside the kit's, in a search, on a case, and in pytest."""

from collections.abc import Iterator
from textwrap import dedent

import pytest
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.trace import Finding
from tbptt_ref.module import TruncatedRNN


def right(case: tb.Case) -> tb.Subject:
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)


def no_chunk_is_long(link: tb.Link) -> Iterator[Finding]:
    """No chunk has more than two time steps."""
    assert link.chunk.span is not None
    steps = link.chunk.span[1] - link.chunk.span[0]
    if steps > 2:
        yield tb.Violation(f"{link.chunk}", f"{steps} time steps", "2 at most")


def there_are_few_chunks(trace: tb.Trace) -> Iterator[Finding]:
    """A run has no more than three chunks."""
    if trace.halt:
        yield tb.NotJudged("training that reaches the end")
    if len(trace.chunks) > 3:
        yield tb.Violation("the run", f"{len(trace.chunks)} chunks", "3 at most")


OURS = (*tb.PROPERTIES, no_chunk_is_long, there_are_few_chunks)


def test_properties_of_links_and_of_runs_are_judged_on_a_case() -> None:
    case = tb.Case(steps=16, chunk=4)

    report = tb.check(right(case), case, properties=OURS)

    assert [verdict.name for verdict in report.broken] == [p.__name__ for p in OURS[-2:]]
    assert str(report["no_chunk_is_long"].violations[0]) == (
        "time steps 0-3: 4 time steps, but should be 2 at most"
    )
    assert report["there_are_few_chunks"].claim == "A run has no more than three chunks."


def test_a_search_finds_the_smallest_case_that_breaks_them() -> None:
    report = tb.verify(right, max_examples=20, seed=0, properties=OURS)

    assert report["no_chunk_is_long"].case == tb.Case(steps=3, chunk=3)
    assert report["there_are_few_chunks"].status == "broken"
    assert "broken for" in report.as_text()


def test_a_property_alone_is_judged_alone() -> None:
    case = tb.Case(steps=4, chunk=2)

    report = tb.check(right(case), case, properties=[no_chunk_is_long])

    assert [(v.name, v.status) for v in report.verdicts] == [("no_chunk_is_long", "holds")]


def test_a_property_that_takes_something_else_is_refused() -> None:
    def of_what(run: tb.Trace) -> Iterator[Finding]:
        yield from ()

    with pytest.raises(TypeError, match=r"^of_what must take one argument, named link or trace$"):
        tb.check(right(tb.Case()), tb.Case(), properties=[of_what])


def test_pytest_has_an_item_for_each(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_mine=dedent("""
            import tbptt_props as tb
            from test_own_properties import no_chunk_is_long, right

            @tb.conformance(
                max_examples=5,
                properties=[no_chunk_is_long],
                expect={"no_chunk_is_long": tb.known("why", case=tb.Case(steps=3, chunk=3))},
            )
            def test_known(case):
                return right(case)

            @tb.conformance(max_examples=5, properties=[no_chunk_is_long])
            def test_new(case):
                return right(case)
        """)
    )

    result = pytester.runpytest_inprocess("-p", "tbptt_props.plugin", "--tbptt-profile=quick")

    result.assert_outcomes(xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["*3 time steps, but should be 2 at most*"])
