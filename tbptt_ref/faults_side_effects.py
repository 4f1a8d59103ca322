"""The reference with a mistake beside its loop: what it keeps, overwrites, seeds and refuses.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""
# ruff: noqa: D102 - the class says the mistake; the method is the reference's, but for that

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tbptt_ref.module import State, TruncatedRNN, detached

# What it keeps alive.


class SumsLossesWithTheirGraphs(TruncatedRNN):
    """Adds up losses that still have their graphs, for one number in the log."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss, detached(state)


class KeepsLosses(TruncatedRNN):
    """Collects every chunk's loss on the module, graph and all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.losses.append(loss)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class KeepsPredictions(TruncatedRNN):
    """Collects every chunk's predictions for a metric, graph and all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.predictions: list[Tensor] = []

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        prediction, state = super().forward(x, state)
        self.predictions.append(prediction)
        return prediction, state


class KeepsStates(TruncatedRNN):
    """Carries the state detached, and collects it for a plot with its graph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.states: list[State] = []

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        prediction, state = super().forward(x, state)
        self.states.append(state)
        return prediction, state


class ScalesTheBatch(TruncatedRNN):
    """Scales the inputs in place: whoever else holds the batch has them scaled too."""

    def chunks(self, x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return super().chunks(x.mul_(0.5), y)


class LeavesResidualsInTheBatch(TruncatedRNN):
    """Takes the prediction off the targets in place, after the update, for a number in the log."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_error", y.sub_(prediction.detach()).abs().mean())
        return loss.detach(), detached(state)


class SeedsEveryChunk(TruncatedRNN):
    """Sets the seed before every chunk: dropout leaves out the same units each time."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        torch.manual_seed(0)
        return super().train_chunk(x, y, state)


class LeavesEvalOn(TruncatedRNN):
    """Goes to `eval()` after a chunk, to measure something, and never back to `train()`."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        self.eval()
        return loss, state


# What it asks of Lightning, and what it refuses.


class ForgetsManualOptimization(TruncatedRNN):
    """Forgets `automatic_optimization = False`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True


class LeavesTheUpdateToLightning(TruncatedRNN):
    """Back-propagates by chunk under automatic optimization, which clears all but the last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        state: State = None
        *earlier, (x, y) = self.chunks(*batch)
        for x_before, y_before in earlier:
            prediction, state = self(x_before, detached(state))
            self.loss(prediction, y_before).backward()  # type: ignore[no-untyped-call]
        prediction, _ = self(x, detached(state))
        loss = self.loss(prediction, y)
        self.log("train_loss", loss)
        return loss


class RefusesShortSequences(TruncatedRNN):
    """Raises on a sequence shorter than a chunk instead of training on it as a tail."""

    def chunks(self, x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        if x.shape[1] < self.chunk:
            raise ValueError(f"a sequence of {x.shape[1]} time steps has no chunk of {self.chunk}")
        return super().chunks(x, y)
