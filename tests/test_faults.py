"""Which fault breaks which properties, exact both ways: these, and no others."""

import torch
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_ref.faults import FAULTS, Fault
from tbptt_ref.module import TruncatedRNN

RESUMED = "a_run_can_be_resumed_at_any_boundary"
ALONE = "a_batch_knows_nothing_of_the_one_before"
ORDINARY = "one_chunk_is_one_ordinary_update"
TILE = "chunks_tile_the_sequence"
CROSSES = "state_crosses_every_boundary"
CUT = "graph_crosses_no_boundary"
GRADIENTS = "gradients_are_the_chunks_own"
SPAN = "gradients_span_the_whole_chunk"
LOSS = "loss_is_the_chunks_own"
ORDER = "events_come_in_a_legal_order"
ONCE = "each_chunk_updates_once"
GONE = "no_graph_outlives_its_chunk"
END = "training_reaches_the_end"
AFRESH = "state_starts_afresh_with_each_batch"
SUMS = "state_sums_up_the_chunk"
APART = "no_sequence_looks_at_another"
RULE = "the_update_follows_the_optimizers_rule"
MOVES = "nothing_but_the_update_moves_parameters"
MANUAL = "backward_goes_through_manual_backward"
COUNTED = "updates_go_through_lightnings_optimizer"
LEARNS = "training_moves_the_parameters"
BATCH = "the_batch_is_left_as_it_was"
MODE = "chunks_are_trained_in_training_mode"
RANDOM = "each_chunk_draws_its_own_randomness"

BREAKS = {
    "NeverDetaches": {CUT, END},
    "RetainsItsPast": {CUT, GONE, GRADIENTS, RESUMED},
    "DetachesOnlyH": {CUT, END},
    "RetainsThePastOfC": {CUT, GONE, GRADIENTS, RESUMED},
    "ThrowsDetachAway": {CUT, END},
    "DetachesTheTuple": {END},
    "DetachesATensorAsATuple": {END},
    "DetachesEveryTimeStep": {SPAN},
    "DetachesInMidChunk": {SPAN},
    "DetachesOneLayer": {SPAN},
    "DetachesTheFeatures": {SPAN},
    "RunsOnUnderNoGrad": {END},
    "RunsTheCoreOnUnderNoGrad": {SPAN},
    "ForgetsState": {CROSSES, RESUMED},
    "IgnoresState": {CROSSES},
    "ZeroesState": {CROSSES, RESUMED},
    "CarriesAStaleState": {CROSSES, RESUMED},
    "CarriesTheFirstState": {CROSSES, RESUMED},
    "KeepsStateAcrossBatches": {AFRESH, ALONE},
    "KeepsStateAcrossEqualBatches": {AFRESH, ALONE},
    "OverwritesTheInitialState": {AFRESH, ALONE},
    "LeavesTheStateToValidation": {ALONE},
    "RefreshesState": {CROSSES, RESUMED},
    "AdvancesStateTwice": {CROSSES, RESUMED},
    "ScalesState": {CROSSES, RESUMED},
    "AddsNoiseToState": {CROSSES, RESUMED},
    "RoundsState": {CROSSES, RESUMED},
    "FlipsTheSequences": {CROSSES, RESUMED},
    "ReshapesState": {CROSSES, RESUMED},
    "SwapsHAndC": {CROSSES, RESUMED},
    "CarriesOnlyH": {CROSSES, RESUMED},
    "CarriesTheStateBeforeLast": {SUMS},
    "DropsTheTail": {TILE},
    "DropsTheLastChunk": {RESUMED, TILE},
    "MergesTheTail": {TILE},
    "PadsTheTail": {ORDINARY, TILE},
    "CutsFromTheEnd": {RESUMED, TILE},
    "CutsIntoKChunks": {END, ORDINARY, RESUMED, TILE},
    "CutsAfterOneTooMany": {RESUMED, TILE},
    "OverlapsByOne": {TILE},
    "SkipsATimeStep": {RESUMED, TILE},
    "CutsAlongTheBatch": {END, RESUMED, TILE},
    "NeverCuts": {RESUMED, TILE},
    "CutsOnlyTheFirstBatch": {RESUMED, TILE},
    "ReversesTheChunks": {RESUMED, TILE},
    "RepeatsTheFirstChunk": {RESUMED, TILE},
    "RepeatsEveryChunk": {ORDINARY, TILE},
    "ShiftsTheTargets": {LOSS, ORDINARY, RESUMED, TILE},
    "MixesBatchAndTime": {ORDINARY, RESUMED, TILE},
    "RunsAlongTheBatch": {APART, END},
    "LosesTheBoundaryTarget": {LOSS, ORDINARY, TILE},
    "ScoresOnlyTheLastTimeStep": {LOSS, ORDINARY, TILE},
    "NeverClears": {ALONE, GRADIENTS, ORDER, RESUMED},
    "ClearsOncePerBatch": {GRADIENTS, ORDER, RESUMED},
    "ClearsEverySecondChunk": {ALONE, GRADIENTS, ORDER, RESUMED},
    "ClearsBeforeUpdating": {ORDER, ORDINARY},
    "ClearsOnlyTheReadout": {ALONE, GRADIENTS, ORDER, RESUMED},
    "NeverUpdates": {ONCE, ORDINARY},
    "UpdatesTwice": {ONCE, ORDINARY},
    "UpdatesBeforeBackward": {ORDER, ORDINARY},
    "UpdatesBetweenForwardAndBackward": {ALONE, GRADIENTS, ORDER, ORDINARY, RESUMED},
    "UpdatesOneChunkLate": {ALONE, GRADIENTS, ONCE, ORDER, ORDINARY},
    "UpdatesOnFullChunksOnly": {ONCE, ORDINARY},
    "UpdatesEverySecondChunk": {ONCE, ORDINARY},
    "AccumulatesTwoChunks": {ALONE, GRADIENTS, ONCE, ORDER, ORDINARY, RESUMED},
    "UpdatesOncePerBatch": {GRADIENTS, ONCE, ORDER, RESUMED},
    "KeepsOnlyTheLastGradient": {ONCE},
    "ForgetsTheMomentum": {RULE},
    "MakesAnOptimizerPerChunk": {COUNTED, ORDINARY, RULE},
    "LearnsAtRateZero": {LEARNS},
    "UpdatesByHand": {MOVES, ONCE, ORDINARY},
    "ClampsParameters": {MOVES, ORDINARY},
    "DecaysParameters": {MOVES, ORDINARY},
    "PerturbsParameters": {MOVES, RESUMED},
    "ScalesTheGradients": {GRADIENTS},
    "ClipsAfterUpdating": {GRADIENTS, ORDINARY},
    "ClipsBeforeBackward": {GRADIENTS, ORDINARY},
    "CallsBackwardItself": {MANUAL},
    "TakesTheRawOptimizer": {COUNTED},
    "CallsBackwardTwice": {LOSS, ORDINARY},
    "ScalesTheLoss": {LOSS, ORDINARY},
    "SumsTheErrors": {LOSS, ORDINARY},
    "DividesByTheNumberOfChunks": {LOSS},
    "WeightsTheTail": {LOSS, ORDINARY},
    "SumsTheLosses": {CUT, GONE, GRADIENTS, LOSS, RESUMED},
    "BackpropagatesOncePerBatch": {ONCE, RESUMED},
    "BackpropagatesThroughTheBatch": {CUT, RESUMED, TILE},
    "RunsAheadOfTheUpdate": {GRADIENTS, ORDER, RESUMED},
    "SumsLossesWithTheirGraphs": {GONE},
    "KeepsLosses": {GONE},
    "KeepsPredictions": {GONE},
    "KeepsStates": {GONE},
    "ScalesTheBatch": {BATCH, ORDINARY},
    "LeavesResidualsInTheBatch": {BATCH},
    "SeedsEveryChunk": {RANDOM},
    "LeavesEvalOn": {ALONE, MODE, RESUMED},
    "ForgetsManualOptimization": {END},
    "LeavesTheUpdateToLightning": {GRADIENTS, MANUAL, ONCE, ORDER},
    "RefusesShortSequences": {END},
}

# Between them, these cases have all that a fault may need to show (`Fault.needs`).
CASES = (
    tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=3),
    tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=3, outputs=2, batches=1, seed=4),
    tb.Case(batch=2, steps=6, chunk=2, inputs=3, hidden=2, outputs=2, batches=2, seed=8),
    tb.Case(batch=2, steps=4, chunk=4, inputs=2, hidden=3, outputs=2, batches=1, seed=12),
    tb.Case(batch=2, steps=3, chunk=5, inputs=2, hidden=3, outputs=1, batches=1, seed=16),
    tb.Case(batch=1, steps=3, chunk=1, inputs=1, hidden=2, outputs=1, batches=1, seed=20),
    tb.Case(batch=3, steps=11, chunk=2, inputs=2, hidden=3, outputs=2, batches=1, seed=24),
)


def broken_as_built(fault: Fault) -> set[str]:
    """Return the names of the properties that the reference breaks, built as `fault` is."""
    broken: set[str] = set()
    for case in CASES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = Fault(
                TruncatedRNN,
                needs=fault.needs,
                optimizer=fault.optimizer,
                core=fault.core,
                layers=fault.layers,
                dropout=fault.dropout,
                clip_norm=fault.clip_norm,
            ).build(case)
        contract = tb.Contract(clip_norm=fault.clip_norm)
        report = tb.check(tb.Subject(built, loss=mse_loss, contract=contract), case)
        broken |= {verdict.name for verdict in report.broken}
    return broken


def test_the_reference_breaks_nothing_in_any_of_the_builds_that_faults_are_made_in() -> None:
    builds = {(f.optimizer, f.core, f.layers, f.dropout, f.clip_norm): f for f in FAULTS}

    assert {name for fault in builds.values() for name in broken_as_built(fault)} == set()


def test_every_fault_has_a_row_and_every_row_a_fault() -> None:
    assert [fault.name for fault in FAULTS] == list(BREAKS)


def test_every_property_has_a_fault_that_breaks_it() -> None:
    assert {p.__name__ for p in tb.PROPERTIES} == set().union(*BREAKS.values())


def test_no_fault_goes_unseen() -> None:
    assert [name for name, broken in BREAKS.items() if not broken] == []
