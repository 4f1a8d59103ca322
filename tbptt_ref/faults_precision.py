"""Faults that do harm in mixed precision alone: in float64 nothing is cast, scaled or rounded.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor

from tbptt_ref.module import State, TruncatedRNN, detached


class KeepsItsCastWeights(TruncatedRNN):
    """Has weights cast once a batch: later chunks run on those from before the first update."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Enter autocast by hand, whose cache of cast weights no update clears."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            super().training_step(batch, batch_idx)


class CarriesAHalfState(TruncatedRNN):
    """Carries the state in the dtype of products, which loses most of its digits."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Round the state, a single tensor, on its way to the next chunk."""
        loss, state = super().train_chunk(x, y, state)
        device = self.device.type
        if torch.is_autocast_enabled(device):
            state = state.to(torch.get_autocast_dtype(device))
        return loss, state


class ClipsScaledGradients(TruncatedRNN):
    """Clips gradients that are still scaled up for float16: all of them come out too small."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Clip before the update, inside of which Lightning scales gradients down again."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss.detach(), detached(state)


class ForgetsStateOfSkippedUpdates(TruncatedRNN):
    """Takes a chunk for spoilt whose update the scaler skips, and starts from no state after it."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Tell a skipped update by the scale, which is lower then."""
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        before = scaler.get_scale() if scaler else 0.0
        loss, state = super().train_chunk(x, y, state)
        skipped = scaler is not None and scaler.get_scale() < before
        return loss, None if skipped else state
