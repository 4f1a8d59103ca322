"""Faults that do harm where several processes train together: each goes its own way.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor

from tbptt_ref.module import State, TruncatedRNN, detached


class BlocksSynchronisation(TruncatedRNN):
    """Blocks the averaging of gradients over processes, as one does to add them up."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Train on the chunk without a word to the other processes."""
        strategy: Any = self.trainer.strategy
        if not hasattr(strategy, "block_backward_sync"):  # a single process
            return super().train_chunk(x, y, state)
        with strategy.block_backward_sync():
            return super().train_chunk(x, y, state)


class SynchronisesOncePerBatch(TruncatedRNN):
    """Averages gradients over processes in the first chunk of each batch alone."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Block the averaging wherever a state came in."""
        strategy: Any = self.trainer.strategy
        if state is None or not hasattr(strategy, "block_backward_sync"):
            return super().train_chunk(x, y, state)
        with strategy.block_backward_sync():
            return super().train_chunk(x, y, state)


class SkipsEasyChunks(TruncatedRNN):
    """Makes no backward on a chunk whose loss is small, whatever the other processes see."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Compare the loss to what it is about, and go on without an update."""
        with torch.no_grad():
            prediction, after = self(x, state)
            loss = self.loss(prediction, y)
        if loss < 1.0:
            return loss, after
        return super().train_chunk(x, y, state)


class FollowsItsOwnLoss(TruncatedRNN):
    """Sets the learning rate by the loss of its own sequences: processes drift apart."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Update at a rate that no other process has."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + float(loss.detach()))
        optimizer.step()
        return loss.detach(), detached(state)
