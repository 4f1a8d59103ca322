"""The reference broken one way at a time: the mistakes people make, to try a property on.

Each fault is a class that overrides as little of `TruncatedRNN` as its mistake takes. One that
writes `train_chunk` or `training_step` anew leaves out the scheduler, which `Fault.build` doesn't
ask for.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from tbptt_ref import (
    faults_devices,
    faults_precision,
    faults_processes,
    faults_side_effects,
    faults_state,
    faults_time,
    faults_update,
)
from tbptt_ref.module import PLAIN_SGD, TruncatedRNN

Need = Literal[
    "two time steps in a chunk",
    "two chunks",
    "three chunks",
    "T other than K * K",
    "a tail",  # a chunk shorter than K
    "a sequence shorter than a chunk",
    "two sequences",
    "two batches",
    "batches of one size",
    "two updates",
]

ADAM = partial(Adam, lr=0.01)
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)  # Adam hardly notices a gradient that is scaled
# Fused kernels don't count a tensor's versions, so autograd can't see parameters change too early.
FUSED_ADAM = partial(Adam, lr=0.01, fused=True)
FUSED_MOMENTUM = partial(SGD, lr=0.1, momentum=0.9, fused=True)


class Sizes(Protocol):
    """What a fault is built from: any object with these four integers."""

    @property
    def chunk(self) -> int:
        """K, the time steps trained on together."""

    @property
    def inputs(self) -> int:
        """I, the inputs at a time step."""

    @property
    def hidden(self) -> int:
        """H, the hidden units."""

    @property
    def outputs(self) -> int:
        """O, the outputs at a time step."""


@dataclass(frozen=True)
class Fault:
    """One mistake: the class that makes it, and what it is built with so that it shows.

    With `TruncatedRNN` for its `module`, a fault builds the intact counterpart.

    Args:
        module: the reference with the mistake in it; its name says which, its docstring what.
        needs: what a case must have, or else the mistake does no harm; any case will do if empty.
        optimizer: makes the optimizer from the parameters.
        core: the kind of core; a mistake in (h, c) needs `nn.LSTM`.
        layers: the layers of the core.
        dropout: the share of units left out between the layers.
        clip_norm: the largest norm of a chunk's gradient, if it is to be clipped.
    """

    module: type[TruncatedRNN]
    needs: tuple[Need, ...] = ()
    optimizer: Callable[..., Optimizer] = ADAM
    core: type[nn.LSTM | nn.GRU] = nn.LSTM
    layers: int = 1
    dropout: float = 0.0
    clip_norm: float | None = None

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.module.__name__

    @property
    def mistake(self) -> str:
        """What the loop does wrong, in one sentence."""
        return inspect.getdoc(self.module) or ""

    def build(self, sizes: Sizes) -> TruncatedRNN:
        """Make the broken module anew, its parameters drawn from torch's own random numbers."""
        core = self.core(
            sizes.inputs,
            sizes.hidden,
            num_layers=self.layers,
            dropout=self.dropout,
            batch_first=True,
        )
        return self.module(
            core,
            nn.Linear(sizes.hidden, sizes.outputs),
            chunk=sizes.chunk,
            optimizer=self.optimizer,
            clip_norm=self.clip_norm,
        )


FAULTS: tuple[Fault, ...] = (
    # Detached too little.
    Fault(faults_state.NeverDetaches, ("two chunks",)),
    Fault(faults_state.RetainsItsPast, ("two chunks",), optimizer=FUSED_ADAM),
    Fault(faults_state.DetachesOnlyH, ("two chunks",)),
    Fault(faults_state.RetainsThePastOfC, ("two chunks",), optimizer=FUSED_ADAM),
    Fault(faults_state.ThrowsDetachAway, ("two chunks",)),
    Fault(faults_state.DetachesTheTuple),
    Fault(faults_state.DetachesATensorAsATuple, ("two chunks",), core=nn.GRU),
    # Detached too much.
    Fault(faults_state.DetachesEveryTimeStep, ("two time steps in a chunk",)),
    Fault(faults_state.DetachesInMidChunk, ("two time steps in a chunk",)),
    Fault(faults_state.DetachesOneLayer, ("two time steps in a chunk",), layers=2),
    Fault(faults_state.DetachesTheFeatures),
    Fault(faults_state.RunsOnUnderNoGrad, ("two chunks",)),
    Fault(faults_state.RunsTheCoreOnUnderNoGrad, ("two chunks",)),
    # State carried wrongly, or not at all.
    Fault(faults_state.ForgetsState, ("two chunks",)),
    Fault(faults_state.IgnoresState, ("two chunks",)),
    Fault(faults_state.ZeroesState, ("two chunks",)),
    Fault(faults_state.CarriesAStaleState, ("two chunks",)),
    Fault(faults_state.CarriesTheFirstState, ("three chunks",)),
    Fault(faults_state.KeepsStateAcrossBatches, ("two batches",)),
    Fault(faults_state.KeepsStateAcrossEqualBatches, ("two batches", "batches of one size")),
    Fault(faults_state.OverwritesTheInitialState, ("two batches", "batches of one size")),
    Fault(faults_state.LeavesTheStateToValidation, ("two batches",)),
    Fault(faults_state.RefreshesState, ("two chunks",)),
    Fault(faults_state.AdvancesStateTwice, ("two chunks",)),
    Fault(faults_state.ScalesState, ("two chunks",)),
    Fault(faults_state.AddsNoiseToState, ("two chunks",)),
    Fault(faults_state.RoundsState, ("two chunks",)),
    Fault(faults_state.FlipsTheSequences, ("two chunks", "two sequences")),
    Fault(faults_state.ReshapesState, ("two chunks", "two sequences"), layers=2),
    Fault(faults_state.SwapsHAndC, ("two chunks",)),
    Fault(faults_state.CarriesOnlyH, ("two chunks",)),
    Fault(faults_state.CarriesTheStateBeforeLast, ("two chunks",)),
    # Cut in the wrong places.
    Fault(faults_time.DropsTheTail, ("a tail",)),
    Fault(faults_time.DropsTheLastChunk),
    Fault(faults_time.MergesTheTail, ("two chunks", "a tail")),
    Fault(faults_time.PadsTheTail, ("a tail",)),
    Fault(faults_time.CutsFromTheEnd, ("two chunks", "a tail")),
    Fault(faults_time.CutsIntoKChunks, ("T other than K * K",)),
    Fault(faults_time.CutsAfterOneTooMany, ("two chunks",)),
    Fault(faults_time.OverlapsByOne, ("two chunks",)),
    Fault(faults_time.SkipsATimeStep, ("two chunks",)),
    Fault(faults_time.CutsAlongTheBatch),
    Fault(faults_time.NeverCuts, ("two chunks",)),
    Fault(faults_time.CutsOnlyTheFirstBatch, ("two chunks", "two batches")),
    # Taken in the wrong order or more than once, paired or scored wrongly.
    Fault(faults_time.ReversesTheChunks, ("two chunks",)),
    Fault(faults_time.RepeatsTheFirstChunk, ("two chunks",)),
    Fault(faults_time.RepeatsEveryChunk),
    Fault(faults_time.ShiftsTheTargets),
    Fault(faults_time.MixesBatchAndTime, ("two sequences",)),
    Fault(faults_time.RunsAlongTheBatch),
    Fault(faults_time.LosesTheBoundaryTarget),
    Fault(faults_time.ScoresOnlyTheLastTimeStep, ("two time steps in a chunk",)),
    # Gradients cleared too seldom, too late, or in part.
    Fault(faults_update.NeverClears, ("two updates",)),
    Fault(faults_update.ClearsOncePerBatch, ("two chunks",)),
    Fault(faults_update.ClearsEverySecondChunk, ("two updates",)),
    Fault(faults_update.ClearsBeforeUpdating),
    Fault(faults_update.ClearsOnlyTheReadout, ("two updates",)),
    # Updates missing, doubled, early or late.
    Fault(faults_update.NeverUpdates),
    Fault(faults_update.UpdatesTwice),
    Fault(faults_update.UpdatesBeforeBackward),
    Fault(faults_update.UpdatesBetweenForwardAndBackward, optimizer=FUSED_ADAM),
    Fault(faults_update.UpdatesOneChunkLate),
    Fault(faults_update.UpdatesOnFullChunksOnly, ("a tail",)),
    Fault(faults_update.UpdatesEverySecondChunk),
    Fault(faults_update.AccumulatesTwoChunks),
    Fault(faults_update.UpdatesOncePerBatch, ("two chunks",)),
    Fault(faults_update.KeepsOnlyTheLastGradient, ("two chunks",)),
    # Updates of the wrong parameters, with the wrong optimizer, or behind its back.
    Fault(faults_update.ForgetsTheMomentum, ("two updates",), optimizer=MOMENTUM),
    Fault(faults_update.MakesAnOptimizerPerChunk, ("two updates",), optimizer=MOMENTUM),
    Fault(faults_update.LearnsAtRateZero),
    Fault(faults_update.UpdatesByHand, ("two updates",), optimizer=MOMENTUM),
    Fault(faults_update.ClampsParameters),
    Fault(faults_update.DecaysParameters),
    Fault(faults_update.PerturbsParameters),
    Fault(faults_update.ScalesTheGradients, optimizer=MOMENTUM),
    Fault(faults_update.ClipsAfterUpdating, optimizer=MOMENTUM, clip_norm=0.01),
    Fault(faults_update.ClipsBeforeBackward, optimizer=MOMENTUM, clip_norm=0.01),
    # Backward passes too many, too few, round Lightning, or of another loss.
    Fault(faults_update.CallsBackwardItself),
    Fault(faults_update.TakesTheRawOptimizer),
    Fault(faults_update.CallsBackwardTwice, optimizer=MOMENTUM),
    Fault(faults_update.ScalesTheLoss, optimizer=MOMENTUM),
    Fault(faults_update.SumsTheErrors, optimizer=MOMENTUM),
    Fault(faults_update.DividesByTheNumberOfChunks, ("two chunks",), optimizer=MOMENTUM),
    Fault(faults_update.WeightsTheTail, ("a tail",), optimizer=MOMENTUM),
    Fault(faults_update.SumsTheLosses, ("two chunks",), optimizer=FUSED_MOMENTUM),
    Fault(faults_update.BackpropagatesOncePerBatch, ("two chunks",)),
    Fault(faults_update.BackpropagatesThroughTheBatch, ("two chunks",)),
    Fault(faults_update.RunsAheadOfTheUpdate, ("two chunks",), optimizer=FUSED_MOMENTUM),
    # Kept alive.
    Fault(faults_side_effects.SumsLossesWithTheirGraphs, ("two chunks",)),
    Fault(faults_side_effects.KeepsLosses, ("two updates",)),
    Fault(faults_side_effects.KeepsPredictions, ("two updates",)),
    Fault(faults_side_effects.KeepsStates, ("two updates",)),
    # Overwritten, left switched, asked of Lightning, or refused.
    Fault(faults_side_effects.ScalesTheBatch),
    Fault(faults_side_effects.LeavesResidualsInTheBatch),
    Fault(faults_side_effects.SeedsEveryChunk, layers=2, dropout=0.5),
    Fault(faults_side_effects.LeavesEvalOn, ("two updates",), layers=2, dropout=0.5),
    Fault(faults_side_effects.ForgetsManualOptimization),
    Fault(faults_side_effects.LeavesTheUpdateToLightning, ("two chunks",)),
    Fault(faults_side_effects.RefusesShortSequences, ("a sequence shorter than a chunk",)),
)

# Harmless in float64, where nothing is cast or scaled: the precision in which each does harm.
UNDER_PRECISION: tuple[tuple[Literal["32-true", "bf16-mixed", "16-mixed"], Fault], ...] = (
    ("32-true", Fault(faults_precision.KeepsItsCastWeights, ("two chunks",), optimizer=MOMENTUM)),
    ("bf16-mixed", Fault(faults_precision.CarriesAHalfState, ("two chunks",), core=nn.GRU)),
    ("16-mixed", Fault(faults_precision.ClipsScaledGradients, core=nn.GRU, optimizer=MOMENTUM)),
    (
        "16-mixed",
        Fault(faults_precision.ForgetsStateOfSkippedUpdates, ("two chunks",), core=nn.GRU),
    ),
)

# Harmless on the CPU: what is found only on a device that has memory of its own.
ON_A_DEVICE: tuple[Fault, ...] = (
    Fault(faults_devices.SendsStateThroughTheHost, ("two chunks",)),
    Fault(faults_devices.StartsOnTheHost),
    Fault(faults_devices.MasksOnTheHost),
)

# Harmless in a single process: several have to train together.
AMONG_PROCESSES: tuple[Fault, ...] = (
    Fault(faults_update.CallsBackwardItself),
    Fault(faults_processes.BlocksSynchronisation),
    Fault(faults_processes.SynchronisesOncePerBatch, ("two chunks",)),
    Fault(faults_processes.FollowsItsOwnLoss, optimizer=PLAIN_SGD),
    Fault(faults_processes.SkipsEasyChunks),
)
