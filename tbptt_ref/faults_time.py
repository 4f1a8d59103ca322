"""The reference with a mistake in time: which time steps and targets it learns from, and when.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""
# ruff: noqa: D102 - the class says the mistake; the method is the reference's, but for that

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tbptt_ref.module import State, TruncatedRNN, detached

Chunks = Iterable[tuple[Tensor, Tensor]]

# Cut in the wrong places.


class DropsTheTail(TruncatedRNN):
    """Trains on full chunks only: the time steps after the last one are dropped."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        for i in range(x.shape[1] // self.chunk):
            steps = slice(i * self.chunk, (i + 1) * self.chunk)
            yield x[:, steps], y[:, steps]


class DropsTheLastChunk(TruncatedRNN):
    """Drops the last chunk of every sequence, full or not."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        return list(super().chunks(x, y))[:-1]


class MergesTheTail(TruncatedRNN):
    """Adds the tail to the chunk before it."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        cuts = tuple(range(self.chunk, x.shape[1] - self.chunk + 1, self.chunk))
        return zip(x.tensor_split(cuts, dim=1), y.tensor_split(cuts, dim=1), strict=True)


class PadsTheTail(TruncatedRNN):
    """Fills the tail up with zeros, and trains on them too."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        missing = -x.shape[1] % self.chunk
        return super().chunks(pad(x, (0, 0, 0, missing)), pad(y, (0, 0, 0, missing)))


class CutsFromTheEnd(TruncatedRNN):
    """Cuts backwards from the last time step: the first chunk is the short one."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        cuts = tuple(range(x.shape[1] % self.chunk or self.chunk, x.shape[1], self.chunk))
        return zip(x.tensor_split(cuts, dim=1), y.tensor_split(cuts, dim=1), strict=True)


class CutsIntoKChunks(TruncatedRNN):
    """Takes the length of a chunk for the number of chunks."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        parts = self.chunk
        return zip(x.tensor_split(parts, dim=1), y.tensor_split(parts, dim=1), strict=True)


class CutsAfterOneTooMany(TruncatedRNN):
    """Cuts every sequence after K + 1 time steps for the first time, and every K from there."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        first = self.chunk + 1
        yield x[:, :first], y[:, :first]
        if x.shape[1] > first:
            yield from super().chunks(x[:, first:], y[:, first:])


class OverlapsByOne(TruncatedRNN):
    """Begins every chunk with the last time step of the chunk before."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        for start in range(0, x.shape[1], self.chunk):
            steps = slice(start, start + self.chunk + 1)
            yield x[:, steps], y[:, steps]


class SkipsATimeStep(TruncatedRNN):
    """Leaves out one time step between any two chunks."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        for start in range(0, x.shape[1], self.chunk + 1):
            steps = slice(start, start + self.chunk)
            yield x[:, steps], y[:, steps]


class CutsAlongTheBatch(TruncatedRNN):
    """Cuts the wrong dimension: K sequences at a time, each of them whole."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        return zip(torch.split(x, self.chunk), torch.split(y, self.chunk), strict=True)


class NeverCuts(TruncatedRNN):
    """Ignores the length of a chunk and trains on whole sequences."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        return [(x, y)]


class CutsOnlyTheFirstBatch(TruncatedRNN):
    """Overwrites the length of a chunk with that of the first batch: later ones stay whole."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        yield from super().chunks(x, y)
        self.chunk = max(self.chunk, x.shape[1])


# Taken in the wrong order, or more than once.


class ReversesTheChunks(TruncatedRNN):
    """Trains on the last chunk first."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        return reversed(list(super().chunks(x, y)))


class RepeatsTheFirstChunk(TruncatedRNN):
    """Never moves on: trains on the first chunk over and over."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        for _ in range(0, x.shape[1], self.chunk):
            yield x[:, : self.chunk], y[:, : self.chunk]


class RepeatsEveryChunk(TruncatedRNN):
    """Trains on every chunk twice in a row."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        for chunk in super().chunks(x, y):
            yield from (chunk, chunk)


# Paired with the wrong target, or scored in the wrong places.


class ShiftsTheTargets(TruncatedRNN):
    """Shifts targets that are in place already: each time step is scored against the next one's."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        return super().chunks(x, y.roll(-1, dims=1))


class MixesBatchAndTime(TruncatedRNN):
    """Reads (B, T, I) numbers as if they lay in memory as (T, B, I)."""

    def chunks(self, x: Tensor, y: Tensor) -> Chunks:
        sequences, steps = x.shape[:2]
        x, y = (tensor.reshape(steps, sequences, -1).transpose(0, 1) for tensor in (x, y))
        return super().chunks(x, y)


class RunsAlongTheBatch(TruncatedRNN):
    """Runs its recurrence along the batch, as a core without `batch_first=True` does."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features, state = self.core(x.transpose(0, 1), state)
        return self.readout(features.transpose(0, 1)), state


class LosesTheBoundaryTarget(TruncatedRNN):
    """Leaves the last time step of every chunk out of the loss, as a shift inside a chunk does."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction[:, :-1], y[:, :-1])
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class ScoresOnlyTheLastTimeStep(TruncatedRNN):
    """Takes the loss at the last time step of every chunk alone."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction[:, -1], y[:, -1])
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)
