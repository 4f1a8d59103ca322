"""Strangers' loops: correct ones break nothing, broken ones break the right property."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from gallery.broken import BROKEN
from gallery.broken_shapes import BROKEN_SHAPES, SelfResetInForward, as_wired
from gallery.correct import CORRECT
from gallery.other_shapes import OTHER, Unusual, growing, with_mask
from gallery.strangers import Build, seeded
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.search import Bench

# Loops that are right for what their authors wanted, and not what the textbook's contract says.
BY_ANOTHER_CONTRACT = {
    # Right on one device in full precision; elsewhere only Lightning's backward is.
    "plain_backward": {"backward_goes_through_manual_backward"},
    "autograd_grad": {"backward_goes_through_manual_backward"},
    # Weights kept within bounds after each update, by hand.
    "clamped_weights": {
        "nothing_but_the_update_moves_parameters",
        "one_chunk_is_one_ordinary_update",
    },
}


def subject_of(build: Callable[[tb.Case], Any]) -> Build:
    def subject(case: tb.Case) -> tb.Subject:
        module, loss = build(case)
        return tb.Subject(module, loss=loss)

    return subject


# Between them: tails and none, one chunk and many, one batch and several, of all sizes.
CASES = (
    tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=3),
    tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=4, outputs=3, batches=1, seed=4),
    tb.Case(batch=2, steps=6, chunk=2, inputs=3, hidden=2, outputs=2, batches=2, seed=8),
    tb.Case(batch=2, steps=4, chunk=4, inputs=2, hidden=3, outputs=2, batches=1, seed=12),
    tb.Case(batch=1, steps=3, chunk=1, inputs=1, hidden=1, outputs=1, batches=1, seed=20),
)


def judged(build: Callable[[tb.Case], Any]) -> tuple[set[str], set[str]]:
    """Return the names of the properties that are broken on some case, and that hold on some."""
    bench = Bench(subject_of(build))
    for case in CASES:
        bench.judge(case)  # what is broken is not shrunk, which takes longest
    report = bench.summed()
    return {verdict.name for verdict in report.broken}, {verdict.name for verdict in report.holds}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_loop_breaks_nothing(name: str) -> None:
    broken, held = judged(CORRECT[name])

    assert broken == BY_ANOTHER_CONTRACT.get(name, set())
    assert len(held | broken) >= 17, "a run that judges next to nothing proves nothing"


# The property that says it best; others may be broken by the same mistake.
RIGHT_PROPERTY = {
    "never_detached": "graph_crosses_no_boundary",
    "retains_graph": "graph_crosses_no_boundary",
    "retains_graph_and_fused": "graph_crosses_no_boundary",
    "only_hidden_detached": "graph_crosses_no_boundary",
    "detach_not_assigned": "graph_crosses_no_boundary",
    "one_layer_detached": "graph_crosses_no_boundary",
    "every_other_detached": "graph_crosses_no_boundary",
    "detaches_every_time_step": "gradients_span_the_whole_chunk",
    "detaches_around_every_call": "gradients_span_the_whole_chunk",
    "detaches_features": "gradients_span_the_whole_chunk",
    "core_under_no_grad": "gradients_span_the_whole_chunk",
    "learned_start_detached": "gradients_span_the_whole_chunk",
    "updates_by_hand": "graph_crosses_no_boundary",
    "total_loss_grows": "loss_is_the_chunks_own",
    "errors_swallowed": "graph_crosses_no_boundary",
    "state_never_fed_back": "state_crosses_every_boundary",
    "called_without_state": "state_crosses_every_boundary",
    "forward_ignores_state": "state_crosses_every_boundary",
    "zeros_in_every_chunk": "state_crosses_every_boundary",
    "kept_between_batches": "state_starts_afresh_with_each_batch",
    "rounded_state": "state_crosses_every_boundary",
    "reshaped_layers": "state_crosses_every_boundary",
    "hardest_first": "state_crosses_every_boundary",
    "recomputed_state": "state_crosses_every_boundary",
    "metric_advances_state": "state_crosses_every_boundary",
    "closure_advances_state": "state_crosses_every_boundary",
    "runs_ahead": "events_come_in_a_legal_order",
    "first_sequences_state": "state_crosses_every_boundary",
    "wrong_end_of_the_features": "state_sums_up_the_chunk",
    "batch_first_forgotten": "no_sequence_looks_at_another",
    "tuple_of_layers": "training_reaches_the_end",
    "counts_pieces": "chunks_tile_the_sequence",
    "whole_chunks_only": "chunks_tile_the_sequence",
    "range_stops_short": "chunks_tile_the_sequence",
    "last_chunk_dropped": "chunks_tile_the_sequence",
    "tail_merged": "chunks_tile_the_sequence",
    "first_chunk_longer": "chunks_tile_the_sequence",
    "tail_never_learnt": "chunks_tile_the_sequence",
    "splits_sequences": "chunks_tile_the_sequence",
    "overlapping": "chunks_tile_the_sequence",
    "easiest_first": "chunks_tile_the_sequence",
    "back_to_front": "chunks_tile_the_sequence",
    "padded_tail": "chunks_tile_the_sequence",
    "first_steps_only": "chunks_tile_the_sequence",
    "whole_sequence": "chunks_tile_the_sequence",
    "old_lightning_strict": "training_reaches_the_end",
    "burn_in": "chunks_tile_the_sequence",
    "never_zeroed": "events_come_in_a_legal_order",
    "zeroed_too_late": "events_come_in_a_legal_order",
    "zeroed_inside_stepped_outside": "each_chunk_updates_once",
    "stepped_per_batch": "each_chunk_updates_once",
    "only_readout_zeroed": "events_come_in_a_legal_order",
    "every_second_chunk": "each_chunk_updates_once",
    "backward_twice": "loss_is_the_chunks_own",
    "step_before_backward": "events_come_in_a_legal_order",
    "new_optimizer_per_chunk": "the_update_follows_the_optimizers_rule",
    "one_of_two_optimizers": "each_chunk_updates_once",
    "stepped_twice": "each_chunk_updates_once",
    "manual_forgotten": "training_reaches_the_end",
    "backward_under_automatic": "each_chunk_updates_once",
    "last_time_step_only": "loss_is_the_chunks_own",
    "shifted_inside_the_chunk": "chunks_tile_the_sequence",
    "flattened_two_ways": "loss_is_the_chunks_own",
    "divided_by_chunks": "loss_is_the_chunks_own",
    "evaluation_forever": "chunks_are_trained_in_training_mode",
    "losses_kept": "no_graph_outlives_its_chunk",
    "running_loss": "no_graph_outlives_its_chunk",
    "micro_batches_cleared": "gradients_are_the_chunks_own",
    "micro_batches_unweighted": "loss_is_the_chunks_own",
    "micro_states_swapped": "state_crosses_every_boundary",
    "micro_states_attached": "graph_crosses_no_boundary",
    "outputs_retained": "no_graph_outlives_its_chunk",
    "raw_optimizer": "updates_go_through_lightnings_optimizer",
}
# Automatic optimization, and no chunks at all: the kit has nothing to look at, and says so.
REFUSED = {"old_lightning"}


@pytest.mark.parametrize("name", RIGHT_PROPERTY)
def test_a_broken_loop_breaks_the_right_property(name: str) -> None:
    _, build = BROKEN[name]

    broken, _ = judged(build)

    assert RIGHT_PROPERTY[name] in broken


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_loop_by_automatic_optimization_is_refused_with_what_to_do(name: str) -> None:
    _, build = BROKEN[name]

    with pytest.raises(tb.ObservationError, match="automatic_optimization = False"):
        tb.verify(subject_of(build), max_examples=15, seed=0)


def test_every_broken_loop_is_judged() -> None:
    assert set(BROKEN) == set(RIGHT_PROPERTY) | REFUSED


# Loops wired otherwise -----------------------------------------------------------------------

# What has to be told of them; the others are found out.
WIRED: dict[str, dict[str, Any]] = {
    "dict_output": {"outputs": lambda out: (out["logits"], out["past"])},
    "model_output": {"outputs": lambda out: (out.logits, out.past), "state": "past"},
    "core_runs_chunks": {"forward": "core"},
    "time_major_batches": {"parts": lambda b: (b[0].transpose(0, 1), b[1].transpose(0, 1))},
    "shifted_tokens": {"parts": lambda ids: (ids[:, :-1], ids[:, 1:])},
    "next_input": {"parts": lambda x: (x[:-1].transpose(0, 1), x[1:].transpose(0, 1))},
    "ragged": {"parts": with_mask},
    "packed": {"parts": with_mask, "state": "state"},
    "takes_packed": {"parts": with_mask},
    "burn_in": {"contract": tb.Contract(carry="custom")},
    "windows": {"contract": tb.Contract(context=2)},
    "stepwise_windows": {"contract": tb.Contract(context=2)},
    "named_batches": {"parts": lambda batch: (batch.input, batch.target)},
    "pair_of_inputs": {"parts": lambda batch: (batch[0][0], batch[1])},
    "episode_mask": {"state": "state"},
    "speaker_ids": {"state": "state"},
    "reset_flag": {"state": "hidden"},
    "stream": {"contract": tb.Contract(carry="across")},
    "stream_of_chunks": {"contract": tb.Contract(carry="across")},
    "chunk_per_batch": {"contract": tb.Contract(carry="flagged")},
    "update_per_sequence": {"contract": tb.Contract(update="batch", weight="steps")},
    "summed_losses": {"contract": tb.Contract(update="batch")},
    "accumulates_two": {"contract": tb.Contract(update=2)},
    "mean_of_two": {"contract": tb.Contract(update=2, weight="mean")},
    "accumulates_batches": {"contract": tb.Contract(update="batch", accumulate_grad_batches=2)},
    "trainer_accumulates": {
        "contract": tb.Contract(
            carry="across", update="batch", accumulate_grad_batches=2, weight="mean"
        )
    },
    "random_lengths": {"contract": tb.Contract(lengths="any")},
    "growing_lengths": {"contract": tb.Contract(lengths=growing)},
    "last_chunk": {"contract": lambda case: tb.Contract(carry="custom", lengths=last(case.chunk))},
    "truncates_in_forward": {"contract": tb.Contract(update="batch")},
    "takes_the_iterator": {"contract": tb.Contract(update="batch")},
    "penalized": {"outputs": lambda out: out[:2]},
    "whole_chunks": {"contract": tb.Contract(tail="drop")},
    "frames": {"parts": lambda video: (video[:, :-1], video[:, 1:])},
    "flat_tokens": {"parts": lambda ids: (ids[:-1].t(), ids[1:].t())},
}

WIRED_CASES = (
    *CASES,
    tb.Case(batch=2, steps=3, chunk=5, inputs=2, hidden=3, outputs=1, batches=2, seed=16),
    tb.Case(steps=2, chunk=1),
)


def last(chunk: int) -> Callable[[int], list[tuple[int, int]]]:
    return lambda steps: [(max(0, steps - chunk), steps)]


def wired(build: Callable[[tb.Case], Unusual], told: Mapping[str, Any]) -> Build:
    """Return what builds a subject, with what has to be told of it."""

    def subject(case: tb.Case) -> tb.Subject:
        unusual = build(case)
        promised = told.get("contract")
        its_own = {**told, "contract": promised(case)} if callable(promised) else told
        train: Any = unusual.train
        return tb.Subject(
            unusual.module,
            loss=unusual.loss,
            batches=lambda _: unusual.batches,
            train=train,
            **its_own,
        )

    return seeded(subject)


def judged_as_wired(
    build: Callable[[tb.Case], Unusual], told: Mapping[str, Any]
) -> tuple[set[str], set[str]]:
    """Return the names of the properties that are broken on some case, and that hold on some."""
    subject = wired(build, told)
    reports = [tb.check(subject(case), case) for case in WIRED_CASES]
    broken = {verdict.name for report in reports for verdict in report.broken}
    held = {verdict.name for report in reports for verdict in report.holds}
    return broken, held - broken


@pytest.mark.parametrize("name", OTHER)
def test_a_right_loop_that_is_wired_otherwise_breaks_nothing(name: str) -> None:
    _, build = OTHER[name]

    broken, held = judged_as_wired(build, WIRED.get(name, {}))

    assert broken == set()
    assert len(held) >= LEAST_HELD.get(name, 17), "a run that judges next to nothing proves nothing"


# Fewer are judged where the kit is told or can see less.
LEAST_HELD = {"pair_of_inputs": 16}


@pytest.mark.parametrize(
    ("chunk", "law"),
    [(1, "a_run_can_be_resumed_at_any_boundary"), (2, "one_chunk_is_one_ordinary_update")],
)
def test_one_target_for_each_sequence_may_have_as_many_numbers_as_there_are_time_steps(
    chunk: int, law: str
) -> None:
    case = tb.Case(batch=3, steps=2, chunk=chunk, outputs=2, seed=4)

    report = tb.check(wired(OTHER["target_per_sequence"][1], {})(case), case)

    assert not report.broken
    assert law in {verdict.name for verdict in report.holds}


# What long searches found, mended since.
ONCE_ACCUSED = (
    # The last batch begins with the very token at which the run was resumed.
    ("tokens", tb.Case(steps=2, chunk=1, batches=3, seed=11)),
    # As many sequences as there are tokens, and one time step: (1, B) are predicted as (B, B).
    ("flat_tokens", tb.Case(batch=4, steps=1, chunk=1, inputs=2, seed=527)),
)


@pytest.mark.parametrize(("name", "case"), ONCE_ACCUSED)
def test_a_right_loop_that_was_accused_once_breaks_nothing(name: str, case: tb.Case) -> None:
    _, build = OTHER[name]

    report = tb.check(wired(build, WIRED.get(name, {}))(case), case)

    assert report.broken == ()


@pytest.mark.parametrize("name", BROKEN_SHAPES)
def test_a_broken_loop_that_is_wired_otherwise_breaks_the_right_property(name: str) -> None:
    loop, _, _, due = BROKEN_SHAPES[name]
    subject = wired(as_wired(name), WIRED.get(loop, {}))

    assert any(tb.check(subject(case), case)[due].violations for case in WIRED_CASES)


@pytest.mark.parametrize("told", [{}, {"state": "hidden"}])
def test_a_state_that_has_no_effect_breaks_the_right_property_told_or_not(told: Any) -> None:
    case = CASES[0]
    module = SelfResetInForward(case.inputs, case.hidden, case.outputs, case.chunk)

    report = tb.check(tb.Subject(module, loss=mse_loss, **told), case)

    assert "state_crosses_every_boundary" in {verdict.name for verdict in report.broken}


def test_a_state_that_comes_first_can_be_told() -> None:
    told = {"forward": "unroll", "state": "carry", "outputs": lambda out: (out[1], out[0])}

    broken, held = judged_as_wired(OTHER["state_first"][1], told)

    assert broken == set()
    assert len(held) > 20


def test_everything_told_is_told_of_a_loop_that_is_there() -> None:
    assert OTHER.keys() >= {*WIRED, *LEAST_HELD}
    assert OTHER.keys() >= {loop for loop, *_ in BROKEN_SHAPES.values()}
