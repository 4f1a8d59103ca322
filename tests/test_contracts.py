"""What keeps a promise is right under it, and what breaks it is not: promises crossed with faults.

Shapes: B sequences, T time steps, K time steps in a chunk.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_faults import (
    AFRESH,
    ALONE,
    BREAKS,
    CASES,
    CROSSES,
    CUT,
    END,
    GRADIENTS,
    LOSS,
    MOVES,
    ONCE,
    ORDER,
    ORDINARY,
    RESUMED,
    TILE,
)
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_ref.faults import FAULTS, Fault
from tbptt_ref.module import TruncatedRNN

Promise = Callable[[tb.Case], dict[str, Any]]

FAULT = {fault.name: fault for fault in (*FAULTS, Fault(TruncatedRNN))}


def from_the_end(chunk: int) -> Callable[[int], list[int]]:
    """Return the lengths of chunks of which the first is the shorter one."""
    return lambda steps: [steps % chunk] * (steps % chunk > 0) + [chunk] * (steps // chunk)


def tail_merged(chunk: int) -> Callable[[int], list[int]]:
    """Return the lengths of chunks of which the last is the longer one."""
    return lambda steps: (
        [steps] if steps < chunk else [chunk] * (steps // chunk - 1) + [chunk + steps % chunk]
    )


def first_longer(chunk: int) -> Callable[[int], list[int]]:
    """Return the lengths of chunks of which the first has one time step more."""
    return lambda steps: [
        min(chunk + 1, steps),
        *(min(chunk, steps - start) for start in range(chunk + 1, steps, chunk)),
    ]


PROMISES: dict[str, Promise] = {
    "update='batch'": lambda case: {"update": "batch"},
    "update='batch', weight='mean'": lambda case: {"update": "batch", "weight": "mean"},
    "update='batch', weight='steps'": lambda case: {"update": "batch", "weight": "steps"},
    "update=1": lambda case: {"update": 1},
    "update=2": lambda case: {"update": 2},
    "carry='across'": lambda case: {"carry": "across"},
    "carry='flagged'": lambda case: {"carry": "flagged"},
    "tail='drop'": lambda case: {"tail": "drop"},
    "lengths='any'": lambda case: {"lengths": "any"},
    "lengths=from_the_end": lambda case: {"lengths": from_the_end(case.chunk)},
    "lengths=tail_merged": lambda case: {"lengths": tail_merged(case.chunk)},
    "lengths=first_longer": lambda case: {"lengths": first_longer(case.chunk)},
    "chunk=99": lambda case: {"chunk": 99},
}

NOTHING: set[str] = set()

# By promise, what a fault breaks under it. The first rows of each are right by that promise.
BREAKS_UNDER: Mapping[str, Mapping[str, set[str]]] = {
    "update='batch'": {
        "UpdatesOncePerBatch": NOTHING,
        "BackpropagatesOncePerBatch": NOTHING,
        "TruncatedRNN": {GRADIENTS, ONCE},
        "BackpropagatesThroughTheBatch": {CUT},
        "KeepsOnlyTheLastGradient": {GRADIENTS},
        "NeverClears": {ALONE, GRADIENTS, ONCE, ORDER},
        "ClearsOncePerBatch": {ONCE},
        "NeverUpdates": {GRADIENTS, ONCE, ORDINARY},
        "NeverDetaches": {CUT, END, ONCE},
        "ForgetsState": {CROSSES, GRADIENTS, ONCE},
    },
    "update='batch', weight='mean'": {"UpdatesOncePerBatch": {LOSS}},
    "update='batch', weight='steps'": {"UpdatesOncePerBatch": {LOSS}},
    "update=1": {
        "TruncatedRNN": NOTHING,
        "AccumulatesTwoChunks": BREAKS["AccumulatesTwoChunks"],
        "UpdatesOncePerBatch": BREAKS["UpdatesOncePerBatch"],
    },
    "update=2": {
        "TruncatedRNN": {GRADIENTS, ONCE},
        # It counts on from batch to batch, and leaves over what is not two chunks.
        "AccumulatesTwoChunks": {ALONE, GRADIENTS, ONCE, ORDER, ORDINARY, RESUMED},
        "UpdatesEverySecondChunk": {GRADIENTS, ONCE, ORDINARY},
        "UpdatesOncePerBatch": {GRADIENTS, ONCE, ORDER, RESUMED},
    },
    "carry='across'": {
        "KeepsStateAcrossBatches": NOTHING,
        "KeepsStateAcrossEqualBatches": NOTHING,
        "OverwritesTheInitialState": NOTHING,
        "TruncatedRNN": {CROSSES},
        "ForgetsState": {CROSSES, RESUMED},
        "NeverDetaches": {CUT, END},
        "ScalesState": {CROSSES, RESUMED},
    },
    "carry='flagged'": {
        "TruncatedRNN": NOTHING,
        "KeepsStateAcrossBatches": NOTHING,
        # Nobody but the loop knows what its flags say: each chunk may have one.
        "ForgetsState": NOTHING,
        "ScalesState": {CROSSES},
        "RoundsState": {CROSSES},
        "FlipsTheSequences": {CROSSES},
        "SwapsHAndC": {CROSSES},
        "CarriesAStaleState": {CROSSES, RESUMED},
        "CarriesOnlyH": {CROSSES},
        "RefreshesState": {CROSSES, RESUMED},
    },
    "tail='drop'": {
        "DropsTheTail": NOTHING,
        "TruncatedRNN": {TILE},
        "DropsTheLastChunk": {RESUMED, TILE},
        "MergesTheTail": {TILE},
        "NeverCuts": {RESUMED, TILE},
    },
    "lengths='any'": {
        "TruncatedRNN": NOTHING,
        "CutsFromTheEnd": NOTHING,
        "MergesTheTail": NOTHING,
        "CutsAfterOneTooMany": NOTHING,
        "NeverCuts": NOTHING,
        "CutsOnlyTheFirstBatch": NOTHING,
        "CutsIntoKChunks": {END},  # of which one is empty
        "OverlapsByOne": {TILE},
        "SkipsATimeStep": {TILE},
        "DropsTheTail": {TILE},
        "DropsTheLastChunk": {TILE},
        "ReversesTheChunks": {TILE},
        "RepeatsTheFirstChunk": {TILE},
        "RepeatsEveryChunk": {TILE},
        "PadsTheTail": {ORDINARY, TILE},
        "CutsAlongTheBatch": {END, TILE},
        "NeverDetaches": {CUT, END},
        "ForgetsState": {CROSSES},
    },
    "lengths=from_the_end": {"CutsFromTheEnd": NOTHING, "TruncatedRNN": {RESUMED, TILE}},
    "lengths=tail_merged": {"MergesTheTail": NOTHING, "TruncatedRNN": {TILE}},
    "lengths=first_longer": {"CutsAfterOneTooMany": NOTHING, "TruncatedRNN": {RESUMED, TILE}},
    "chunk=99": {"NeverCuts": NOTHING, "TruncatedRNN": {ORDINARY, TILE}},
}


def broken_by(fault: Fault, promise: Promise) -> set[str]:
    """Return the names of the properties that a fault breaks under a promise."""
    broken: set[str] = set()
    for case in CASES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = fault.build(case)
        contract = tb.Contract(**promise(case), clip_norm=fault.clip_norm)
        report = tb.check(tb.Subject(module, loss=mse_loss, contract=contract), case)
        broken |= {verdict.name for verdict in report.broken}
    return broken


PAIRS = [(promise, name) for promise, rows in BREAKS_UNDER.items() for name in rows]


@pytest.mark.parametrize(("promise", "name"), PAIRS)
def test_a_fault_breaks_just_what_it_breaks_under_a_promise(promise: str, name: str) -> None:
    assert broken_by(FAULT[name], PROMISES[promise]) == BREAKS_UNDER[promise][name]


def test_every_promise_is_kept_by_something_and_broken_by_something() -> None:
    assert PROMISES.keys() == BREAKS_UNDER.keys()
    kept = [p for p, rows in BREAKS_UNDER.items() if NOTHING in rows.values()]
    assert set(PROMISES) - {*kept} == {
        "update=2",  # kept by a loop of the gallery
        "update='batch', weight='mean'",
        "update='batch', weight='steps'",
    }
    assert all(any(rows.values()) for rows in BREAKS_UNDER.values())


# A loop that keeps a promise, with a fault besides --------------------------------------------

# The fault that keeps each promise, and what can't be judged under it.
KEPT_BY = {
    "tail='drop'": ("DropsTheTail", NOTHING),
    "lengths=from_the_end": ("CutsFromTheEnd", NOTHING),
    "lengths='any'": ("CutsFromTheEnd", {ALONE, RESUMED}),
    "update='batch'": ("UpdatesOncePerBatch", {RESUMED}),
    "carry='across'": ("KeepsStateAcrossBatches", {AFRESH, ALONE}),
}
# Faults in what the loop does with a chunk, for loops that differ in how they cut.
IN_CHUNKS = (
    "RetainsItsPast",
    "DetachesEveryTimeStep",
    "ForgetsState",
    "ScalesState",
    "FlipsTheSequences",
    "NeverClears",
    "ClearsBeforeUpdating",
    "NeverUpdates",
    "UpdatesTwice",
    "UpdatesBeforeBackward",
    "ForgetsTheMomentum",
    "ScalesTheGradients",
    "ClipsAfterUpdating",
    "CallsBackwardItself",
    "ScalesTheLoss",
    "KeepsLosses",
    "SeedsEveryChunk",
)
# Faults in forward and in how chunks are made, for loops that differ in what they do with them.
AROUND_CHUNKS = (
    "DetachesEveryTimeStep",
    "DetachesTheFeatures",
    "RunsTheCoreOnUnderNoGrad",
    "IgnoresState",
    "CarriesTheStateBeforeLast",
    "PadsTheTail",
    "OverlapsByOne",
    "ReversesTheChunks",
    "ShiftsTheTargets",
    "MixesBatchAndTime",
    "LearnsAtRateZero",
    "KeepsStates",
    "ScalesTheBatch",
)
BESIDES = [
    (promise, name)
    for promise in KEPT_BY
    for name in (AROUND_CHUNKS if promise in ("update='batch'", "carry='across'") else IN_CHUNKS)
]


@pytest.mark.parametrize(("promise", "name"), BESIDES)
def test_a_fault_is_seen_in_a_loop_that_keeps_its_promise(promise: str, name: str) -> None:
    keeper, unjudged = KEPT_BY[promise]
    both = type(name, (FAULT[name].module, FAULT[keeper].module), {})

    broken = broken_by(replace(FAULT[name], module=both), PROMISES[promise])

    assert broken == BREAKS[name] - unjudged


def test_a_promise_says_nothing_about_what_moves_parameters() -> None:
    promises = [PROMISES[promise] for promise in ("carry='flagged'", "lengths='any'")]

    assert all(MOVES in broken_by(FAULT["DecaysParameters"], promise) for promise in promises)
