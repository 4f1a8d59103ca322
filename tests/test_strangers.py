"""More of strangers' loops: right ones break nothing and are judged; of wrong ones it is said why.

They are told of as shortly as may be, and judged as their authors would have them judged.
"""

import pytest
from gallery.strangers import RIGHT, WRONG, Build, seeded

import tbptt_props as tb

pytestmark = pytest.mark.filterwarnings("ignore:.*use_reentrant")

# Between them: tails and none, one chunk and many, one batch and several, shorter and longer ones.
CASES = (
    tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=3),
    tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=4, outputs=3, seed=4),
    tb.Case(batch=2, steps=6, chunk=2, inputs=3, hidden=2, outputs=2, batches=2, seed=8),
    tb.Case(batch=2, steps=4, chunk=4, inputs=2, hidden=3, outputs=2, seed=12),
    tb.Case(batch=2, steps=5, chunk=4, inputs=2, hidden=2, outputs=3, batches=3, seed=6),
    tb.Case(steps=2, chunk=1),
)
ALL = {judged.__name__ for judged in tb.PROPERTIES}
RANDOM = "each_chunk_draws_its_own_randomness"


# Its layers are the trainer's to make: one that nobody trains has none.
NEEDS_A_TRAINER = {"built_by_its_trainer"}


def reported(build: Build) -> list[tb.Report]:
    return [tb.check(seeded(build)(case), case) for case in CASES]


def summed(reports: list[tb.Report]) -> tuple[set[str], set[str]]:
    """Return the names of the properties that are broken on some case, and that hold on some."""
    broken = {verdict.name for report in reports for verdict in report.broken}
    held = {verdict.name for report in reports for verdict in report.holds}
    return broken, held - broken


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_breaks_nothing_and_is_judged(name: str) -> None:
    build, unjudged = RIGHT[name]

    reports = reported(build)
    broken, held = summed(reports)

    assert broken == set()
    reasons = {verdict.missing for report in reports for verdict in report.not_judged}
    unrepeated = {reason for reason in reasons if "repeated outside training" in reason}
    assert bool(unrepeated) == (name in NEEDS_A_TRAINER), unrepeated
    assert ALL - held - {RANDOM} == unjudged


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loop_breaks_the_right_property(name: str) -> None:
    build, due = WRONG[name]

    assert any(tb.check(seeded(build)(case), case)[due].violations for case in CASES)


# What long searches found, mended since.
ONCE_ACCUSED = (
    # Its features only ever fall: the largest one is the first, whatever comes last.
    ("largest_of_the_chunk", tb.Case(steps=2, chunk=2, seed=266)),
    # No call gets a state of as many sequences as the call before it returned.
    ("states_of_parts", tb.Case(batch=3, steps=3, chunk=2)),
)


@pytest.mark.parametrize(("name", "case"), ONCE_ACCUSED)
def test_a_right_loop_that_was_accused_once_breaks_nothing(name: str, case: tb.Case) -> None:
    build, _ = RIGHT[name]

    assert tb.verify(seeded(build), max_examples=1, seed=0, first=[case]).broken == ()
