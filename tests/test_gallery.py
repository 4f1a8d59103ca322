"""Strangers' loops: the correct ones break nothing, the broken ones break the property they should."""

from collections.abc import Callable

import pytest
from gallery.broken import BROKEN
from gallery.correct import CORRECT

import tbptt_props as tb

# Loops that are right for what their authors wanted, and not what the textbook's contract says.
BY_ANOTHER_CONTRACT = {
    # Right on one device in full precision; elsewhere only Lightning's backward is.
    "plain_backward": {"backward_goes_through_manual_backward"},
    "autograd_grad": {"backward_goes_through_manual_backward"},
    # Weights kept within bounds after each update, by hand.
    "clamped_weights": {"nothing_but_the_update_moves_parameters"},
    # Several forwards and backwards, each with a part of the sequences, before one update.
    "micro_batches": {
        "a_run_can_be_resumed_at_any_boundary",
        "chunks_tile_the_sequence",
        "each_chunk_updates_once",
        "events_come_in_a_legal_order",
        "gradients_are_the_chunks_own",
        "loss_is_the_chunks_own",
        "one_chunk_is_one_ordinary_update",
        "state_starts_afresh_with_each_batch",
    },
}


def subject_of(build: Callable[[tb.Case], object]) -> Callable[[tb.Case], tb.Subject]:
    def subject(case: tb.Case) -> tb.Subject:
        module, loss = build(case)  # type: ignore[misc]
        return tb.Subject(module, loss=loss)

    return subject


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_loop_breaks_nothing(name: str) -> None:
    report = tb.verify(subject_of(CORRECT[name]), max_examples=10, seed=0)

    assert {verdict.name for verdict in report.broken} <= BY_ANOTHER_CONTRACT.get(name, set())
    assert len(report.holds) >= 12, "a run that judges next to nothing proves nothing"
