"""The reference with a mistake in its update: clearing, backward pass, optimizer.

Shapes: B sequences, K time steps in a chunk, I inputs, O outputs.
"""
# ruff: noqa: D102 - the class says the mistake; the method is the reference's, but for that

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tbptt_ref.module import State, TruncatedRNN, detached

# Gradients cleared too seldom, too late, or in part.


class NeverClears(TruncatedRNN):
    """Never calls `zero_grad`: every update takes all gradients so far."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class ClearsOncePerBatch(TruncatedRNN):
    """Clears the gradients before a batch's first chunk only."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        if state is None:
            optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class ClearsEverySecondChunk(TruncatedRNN):
    """Clears the gradients before every second update only."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        if self.global_step % 2 == 0:
            optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class ClearsBeforeUpdating(TruncatedRNN):
    """Clears the gradients between backward pass and update: there is nothing to update with."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.zero_grad()
        optimizer.step()
        return loss.detach(), detached(state)


class ClearsOnlyTheReadout(TruncatedRNN):
    """Clears the readout's gradients, but not the core's."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        self.readout.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


# Updates missing, doubled, early or late.


class NeverUpdates(TruncatedRNN):
    """Never calls `step`."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        return loss.detach(), detached(state)


class UpdatesTwice(TruncatedRNN):
    """Calls `step` twice for one gradient."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.step()
        return loss.detach(), detached(state)


class UpdatesBeforeBackward(TruncatedRNN):
    """Calls `step` before the backward pass, when there is no gradient yet."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        optimizer.step()
        self.manual_backward(loss)
        return loss.detach(), detached(state)


class UpdatesBetweenForwardAndBackward(TruncatedRNN):
    """Updates with the chunk before's gradient, between this one's forward and backward pass."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        optimizer.step()
        optimizer.zero_grad()
        self.manual_backward(loss)
        return loss.detach(), detached(state)


class UpdatesOneChunkLate(TruncatedRNN):
    """Makes a chunk's update when the next one begins: the last gradient waits for a next batch."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        return loss.detach(), detached(state)


class UpdatesOnFullChunksOnly(TruncatedRNN):
    """Makes no update on a chunk shorter than K."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        if x.shape[1] == self.chunk:
            optimizer.step()
        return loss.detach(), detached(state)


class UpdatesEverySecondChunk(TruncatedRNN):
    """Makes an update on every second chunk, and drops the gradients of the others."""

    count = 0

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        self.count += 1
        if self.count % 2 == 0:
            optimizer.step()
        return loss.detach(), detached(state)


class AccumulatesTwoChunks(TruncatedRNN):
    """Makes one update with the gradients of two chunks, added up."""

    count = 0

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        self.count += 1
        if self.count % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach(), detached(state)


class UpdatesOncePerBatch(TruncatedRNN):
    """Adds up the gradients of all chunks, and makes one update at the end of the batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        super().training_step(batch, batch_idx)
        optimizer.step()

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        return loss.detach(), detached(state)


class KeepsOnlyTheLastGradient(TruncatedRNN):
    """Clears the gradients for every chunk, but makes one update at the end of the batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.step()

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        return loss.detach(), detached(state)


# Updates of the wrong parameters, with the wrong optimizer, or behind its back.


class ForgetsTheMomentum(TruncatedRNN):
    """Empties the optimizer's state before every chunk: no momentum builds up."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.state.clear()
        return super().train_chunk(x, y, state)


class MakesAnOptimizerPerChunk(TruncatedRNN):
    """Makes a new optimizer for every chunk, with no momentum, which Lightning never sees."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer = self.make_optimizer(self.parameters())
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class LearnsAtRateZero(TruncatedRNN):
    """Leaves the learning rate at 0, as before a warm-up that never comes."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return optimizer


class UpdatesByHand(TruncatedRNN):
    """Takes the gradient off the parameters itself: no momentum, and Lightning counts no update."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        rate = optimizer.param_groups[0]["lr"]
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-rate)
        return loss.detach(), detached(state)


class ClampsParameters(TruncatedRNN):
    """Clamps the parameters after every update."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        for parameter in self.parameters():
            parameter.data.clamp_(-0.01, 0.01)
        return loss, state


class DecaysParameters(TruncatedRNN):
    """Shrinks the parameters by hand after every update."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x, y, state)
        for parameter in self.parameters():
            parameter.data.mul_(0.99)
        return loss, state


class PerturbsParameters(TruncatedRNN):
    """Adds noise to the parameters before every chunk, and never takes it off."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        for parameter in self.parameters():
            parameter.data.add_(0.01 * torch.randn_like(parameter))
        return super().train_chunk(x, y, state)


class ScalesTheGradients(TruncatedRNN):
    """Halves the gradients by hand before the update."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5
        optimizer.step()
        return loss.detach(), detached(state)


class ClipsAfterUpdating(TruncatedRNN):
    """Clips the gradients when the update has been made."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the gradients as they are."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        self.clip_gradients(optimizer, self.clip_norm, gradient_clip_algorithm="norm")
        return loss.detach(), detached(state)


class ClipsBeforeBackward(TruncatedRNN):
    """Clips the gradients when there are none yet."""

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the gradients as they are."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.clip_gradients(optimizer, self.clip_norm, gradient_clip_algorithm="norm")
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


# Backward passes too many, too few, round Lightning, or of another loss.


class CallsBackwardItself(TruncatedRNN):
    """Calls `loss.backward()`: no precision plugin, no strategy and no callback hears of it."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach(), detached(state)


class TakesTheRawOptimizer(TruncatedRNN):
    """Updates with the bare torch optimizer: Lightning counts no update."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class CallsBackwardTwice(TruncatedRNN):
    """Makes the same backward pass twice: the gradient is doubled."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class ScalesTheLoss(TruncatedRNN):
    """Halves the loss before the backward pass."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss / 2)
        optimizer.step()
        return loss.detach(), detached(state)


class SumsTheErrors(TruncatedRNN):
    """Takes the sum of the squared errors for their mean."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = (prediction - y).square().sum()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


class DividesByTheNumberOfChunks(TruncatedRNN):
    """Divides every chunk's loss by the number of chunks, as if they shared one update."""

    parts = 1

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.parts = len(list(self.chunks(*batch)))
        super().training_step(batch, batch_idx)

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss / self.parts)
        optimizer.step()
        return loss.detach(), detached(state)


class WeightsTheTail(TruncatedRNN):
    """Divides by K where a chunk is shorter: the tail's loss counts for less."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss * x.shape[1] / self.chunk)
        optimizer.step()
        return loss.detach(), detached(state)


class SumsTheLosses(TruncatedRNN):
    """Back-propagates the sum of a batch's losses so far at every chunk."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        state: State = None
        total = torch.zeros((), device=self.device)
        for x, y in self.chunks(*batch):
            prediction, state = self(x, detached(state))
            total = total + self.loss(prediction, y)
            optimizer.zero_grad()
            self.manual_backward(total, retain_graph=True)
            optimizer.step()
        self.log("train_loss", total.detach())


class BackpropagatesOncePerBatch(TruncatedRNN):
    """Makes one backward pass and one update per batch, with the sum of its chunks' losses."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        state: State = None
        total = torch.zeros((), device=self.device)
        for x, y in self.chunks(*batch):
            prediction, state = self(x, detached(state))
            total = total + self.loss(prediction, y)
        optimizer.zero_grad()
        self.manual_backward(total)
        optimizer.step()
        self.log("train_loss", total.detach())


class BackpropagatesThroughTheBatch(TruncatedRNN):
    """Makes one backward pass per batch through a state never detached: nothing is truncated."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        state: State = None
        total = torch.zeros((), device=self.device)
        for x, y in self.chunks(*batch):
            prediction, state = self(x, state)
            total = total + self.loss(prediction, y)
        optimizer.zero_grad()
        self.manual_backward(total)
        optimizer.step()
        self.log("train_loss", total.detach())


class RunsAheadOfTheUpdate(TruncatedRNN):
    """Runs the next chunk forward before the update of this one, to keep the device busy."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        state: State = None
        pending: Tensor | None = None
        for x, y in self.chunks(*batch):
            prediction, state = self(x, detached(state))
            if pending is not None:
                self.update(pending)
            pending = self.loss(prediction, y)
        if pending is not None:
            self.update(pending)

    def update(self, loss: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train_loss", loss.detach())
