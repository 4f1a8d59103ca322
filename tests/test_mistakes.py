"""A mistake breaks the property that names it, for the cause that it is, and no others besides."""

import pytest
from gallery.mistakes import RIGHT, WRONG

import tbptt_props as tb
from tbptt_props.causes import WHOLE

TRIED = 15


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_breaks_nothing_and_is_judged(name: str) -> None:
    report = tb.verify(RIGHT[name], max_examples=TRIED, seed=0)

    assert [verdict.name for verdict in report.broken] == []
    assert len(report.holds) >= 15, "a run that judges next to nothing proves nothing"


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_breaks_what_names_it_and_nothing_else(name: str) -> None:
    build, due, cause, besides = WRONG[name]

    report = tb.verify(build, max_examples=TRIED, seed=0)

    broken = {verdict.name for verdict in report.broken}
    assert broken - (WHOLE - besides - {due}) == {due, *besides}
    assert [found.name for found in report[due].causes] == [cause]
