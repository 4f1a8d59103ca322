"""The reference with a mistake in its state: where it is detached, and what is carried on.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
An LSTM's state is a pair (h, c), each of shape (layers, B, H).
"""
# ruff: noqa: D102 - the class says the mistake; the method is the reference's, but for that

from typing import Any

import torch
from torch import Tensor

from tbptt_ref.module import State, TruncatedRNN, detached

# Detached too little.


class NeverDetaches(TruncatedRNN):
    """Carries the state with its graph: the second backward pass runs into the first chunk."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), state


class RetainsItsPast(TruncatedRNN):
    """Never detaches, and quiets the error with `retain_graph=True`."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss, retain_graph=True)
        optimizer.step()
        return loss.detach(), state


class DetachesOnlyH(TruncatedRNN):
    """Detaches h, but not c: an LSTM's state is a pair."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, (h, c) = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), (h.detach(), c)


class RetainsThePastOfC(TruncatedRNN):
    """Detaches h, but not c, and quiets the error with `retain_graph=True`."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, (h, c) = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss, retain_graph=True)
        optimizer.step()
        return loss.detach(), (h.detach(), c)


class ThrowsDetachAway(TruncatedRNN):
    """Calls `detach` and drops what it returns, as if it worked in place."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        for tensor in state:
            tensor.detach()
        return loss.detach(), state


class DetachesTheTuple(TruncatedRNN):
    """Calls `detach` on an LSTM's pair of tensors, which has no such method."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), state.detach()


class DetachesATensorAsATuple(TruncatedRNN):
    """Detaches a GRU's state like an LSTM's: one tensor becomes a tuple of its layers."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(tensor.detach() for tensor in state)


# Detached too much.


class DetachesEveryTimeStep(TruncatedRNN):
    """Detaches the state before every time step: no gradient reaches back at all."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features = []
        for time_step in torch.split(x, 1, dim=1):
            feature, state = self.core(time_step, detached(state))
            features.append(feature)
        return self.readout(torch.cat(features, dim=1)), state


class DetachesInMidChunk(TruncatedRNN):
    """Runs a chunk as two halves and detaches the state between them."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features = []
        for half in x.chunk(2, dim=1):
            feature, state = self.core(half, detached(state))
            features.append(feature)
        return self.readout(torch.cat(features, dim=1)), state


class DetachesOneLayer(TruncatedRNN):
    """Detaches the first layer's state before every time step; the other layers' gradient flows."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features = []
        for time_step in torch.split(x, 1, dim=1):
            feature, state = self.core(time_step, state)
            state = tuple(torch.cat([tensor[:1].detach(), tensor[1:]]) for tensor in state)
            features.append(feature)
        return self.readout(torch.cat(features, dim=1)), state


class DetachesTheFeatures(TruncatedRNN):
    """Detaches the features before the readout: the core never learns."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features, state = self.core(x, state)
        return self.readout(features.detach()), state


class RunsOnUnderNoGrad(TruncatedRNN):
    """Runs every chunk that is handed a state under `no_grad`, readout and all."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        if state is None:
            return super().forward(x, state)
        with torch.no_grad():
            return super().forward(x, state)


class RunsTheCoreOnUnderNoGrad(TruncatedRNN):
    """Runs the core under `no_grad` once it is handed a state: only first chunks teach it."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        with torch.set_grad_enabled(state is None):
            features, state = self.core(x, state)
        return self.readout(features), state


# Carried wrongly, or not at all.


class ForgetsState(TruncatedRNN):
    """Starts every chunk from no state, as if it were the first."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        return super().train_chunk(x, y, None)


class IgnoresState(TruncatedRNN):
    """Takes a state into `forward` and doesn't use it."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features, state = self.core(x)
        return self.readout(features), state


class ZeroesState(TruncatedRNN):
    """Makes a new state of zeros for every chunk instead of one for every batch."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(torch.zeros_like(tensor) for tensor in state)


class CarriesAStaleState(TruncatedRNN):
    """Starts a chunk from the state of two chunks ago."""

    newest: State = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.newest = None
        super().training_step(batch, batch_idx)

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        stale = self.newest
        loss, self.newest = super().train_chunk(x, y, state)
        return loss, stale


class CarriesTheFirstState(TruncatedRNN):
    """Hands the state that the first chunk ended in to every chunk after it."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, after = super().train_chunk(x, y, state)
        return loss, after if state is None else state


class KeepsStateAcrossBatches(TruncatedRNN):
    """Starts a batch in the state that the batch before it ended in, cut to as many sequences."""

    kept: State = None

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        if state is None and self.kept is not None and self.kept[0].shape[1] >= len(x):
            state = tuple(tensor[:, : len(x)].contiguous() for tensor in self.kept)
        loss, self.kept = super().train_chunk(x, y, state)
        return loss, self.kept


class KeepsStateAcrossEqualBatches(TruncatedRNN):
    """Resets the state only when the number of sequences changes, not with every batch."""

    kept: State = None

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        if state is None and self.kept is not None and self.kept[0].shape[1] == len(x):
            state = self.kept
        loss, self.kept = super().train_chunk(x, y, state)
        return loss, self.kept


class OverwritesTheInitialState(TruncatedRNN):
    """Shares one state of zeros between batches of a size, and writes the new state into it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial: dict[int, State] = {}

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        if state is None:
            state = self.initial.get(len(x))
        loss, after = super().train_chunk(x, y, state)
        if state is None:
            state = self.initial[len(x)] = tuple(torch.zeros_like(tensor) for tensor in after)
        for tensor, value in zip(state, after, strict=True):
            tensor.copy_(value)
        return loss, state


class LeavesTheStateToValidation(TruncatedRNN):
    """Resets the state when a batch is over: a validation before the next one leaves its own."""

    hidden: State = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.hidden = None

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, self.hidden = super().train_chunk(x, y, self.hidden)
        return loss, self.hidden

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for x, _ in self.chunks(*batch):
            _, self.hidden = self(x, self.hidden)


class RefreshesState(TruncatedRNN):
    """Computes the state anew after the update, with parameters the chunk was not run with."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, _ = super().train_chunk(x, y, state)
        with torch.no_grad():
            _, state = self(x, state)
        return loss, state


class AdvancesStateTwice(TruncatedRNN):
    """Runs the chunk once more for a metric, and carries the state that this run ended in."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        with torch.no_grad():
            prediction, state = self(x, state)
        self.log("train_error", (prediction - y).abs().mean())
        return loss, state


class ScalesState(TruncatedRNN):
    """Carries nine tenths of the state."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(0.9 * tensor for tensor in state)


class AddsNoiseToState(TruncatedRNN):
    """Carries the state with a little noise on it."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(tensor + 1e-3 * torch.randn_like(tensor) for tensor in state)


class RoundsState(TruncatedRNN):
    """Carries the state through float32, whatever precision the module has."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(tensor.float().to(tensor.dtype) for tensor in state)


class FlipsTheSequences(TruncatedRNN):
    """Carries each sequence's state to another sequence: the order of the batch is reversed."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(tensor.flip(1) for tensor in state)


class ReshapesState(TruncatedRNN):
    """Keeps the state as (B, layers, H), and gets it back with `reshape`, not `transpose`."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        return loss, tuple(tensor.transpose(0, 1).reshape(tensor.shape) for tensor in state)


class SwapsHAndC(TruncatedRNN):
    """Hands an LSTM's pair on in the wrong order."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, (h, c) = super().train_chunk(x, y, state)
        return loss, (c, h)


class CarriesOnlyH(TruncatedRNN):
    """Carries an LSTM's h, and starts its c from zeros."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, (h, c) = super().train_chunk(x, y, state)
        return loss, (h, torch.zeros_like(c))


class CarriesTheStateBeforeLast(TruncatedRNN):
    """Hands on the state before a chunk's last time step, not the one after it."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        prediction, _ = super().forward(x, state)
        if x.shape[1] > 1:
            _, state = self.core(x[:, :-1], state)
        return prediction, state
