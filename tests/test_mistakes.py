"""A mistake breaks the property that names it, for the cause that it is, and no others besides."""

import pytest
from gallery.mistakes import RIGHT, TILE, WRONG, CountsFullChunks
from gallery.strangers import told

import tbptt_props as tb
from tbptt_props.causes import WHOLE
from tbptt_props.search import Bench

TRIED = 15


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_breaks_nothing_and_is_judged(name: str) -> None:
    report = tb.verify(RIGHT[name], max_examples=TRIED, seed=0)

    assert [verdict.name for verdict in report.broken] == []
    assert len(report.holds) >= 15, "a run that judges next to nothing proves nothing"


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_breaks_what_names_it_and_nothing_else(name: str) -> None:
    build, due, cause, besides = WRONG[name]

    # Not shrunk, which would take longest, unless it takes more cases to tell one cause.
    bench = Bench(build)
    bench.search(tb.cases(), 0, TRIED, None)
    report = bench.summed()

    broken = {verdict.name for verdict in report.broken}
    assert broken - (WHOLE - besides - {due}) == {due, *besides}
    named = report[due]
    if len(named.causes) > 1:
        named = bench.shrunk(named, {}, 0, TRIED)
    assert [found.name for found in named.causes] == [cause]


def test_a_tail_is_dropped_also_where_one_that_stands_alone_is_kept() -> None:
    case = tb.Case(steps=8, chunk=3, batches=7, seed=2)  # down to sequences shorter than a chunk

    found = tb.check(told(CountsFullChunks)(case), case)[TILE]

    assert [cause.name for cause in found.causes] == ["tail_is_dropped"]
