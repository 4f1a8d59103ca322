"""Truncated backpropagation through time in Lightning, as plainly as it can be written.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

PLAIN_SGD = partial(SGD, lr=0.1)
State = Any  # any nesting of tensors that the core hands on; None before the first time step


class TruncatedRNN(LightningModule):
    """A recurrent model that learns from one chunk of a sequence after another.

    The state's *value* crosses every chunk boundary; its *gradient* crosses none.

    Args:
        core: runs (B, K, I) inputs on from a state, `core(x, state) -> (features, state)`, with
            features (B, K, H). `nn.RNN`, `nn.GRU` and `nn.LSTM` with `batch_first=True` do.
        readout: maps features (B, K, H) to predictions (B, K, O).
        chunk: K, the time steps trained on together; the last chunk of a sequence may be shorter.
        loss: `loss(prediction, target)`, a scalar: the mean over the chunk it is given.
        optimizer: makes the optimizer from the parameters.
        scheduler: makes a learning-rate scheduler from the optimizer; it steps after every update.
        clip_norm: the largest norm of a chunk's gradient, if it is to be clipped.

    Raises:
        ValueError: `chunk` is below 1.

    Source: Williams and Peng (1990), with as many time steps between updates as are reached back.
    """

    def __init__(
        self,
        core: nn.Module,
        readout: nn.Module,
        *,
        chunk: int,
        loss: Callable[[Tensor, Tensor], Tensor] = mse_loss,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = PLAIN_SGD,
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 time step, got chunk={chunk}")
        self.automatic_optimization = False  # one update per chunk, not one per batch
        self.core = core
        self.readout = readout
        self.chunk = chunk
        self.loss = loss
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.clip_norm = clip_norm

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.core(x, state)
        return self.readout(features), state

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Learn from (B, T, I) inputs and (B, T, O) targets, one chunk after another."""
        state: State = None  # every batch starts its sequences afresh
        total = batch[0].new_zeros(())
        for x, y in self.chunks(*batch):
            loss, state = self.train_chunk(x, y, state)
            total += loss * x.shape[1]
        # Weighted by time steps: the last chunk may be shorter than the others.
        self.log("train_loss", total / batch[0].shape[1], prog_bar=True)

    def chunks(self, x: Tensor, y: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Cut both sequences along time into chunks of K time steps, the last one shorter."""
        return zip(*(torch.split(part, self.chunk, dim=1) for part in (x, y)), strict=True)

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Make one update; return the chunk's loss, and its state as a value without a past."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.manual_backward(loss)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return loss.detach(), detached(state)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip gradients, where asked for: only here are they no longer scaled for float16."""
        if self.clip_norm is not None:
            self.clip_gradients(optimizer, self.clip_norm, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the learning-rate scheduler where one was asked for."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [self.make_scheduler(optimizer)]


def detached(state: State) -> State:
    """Return `state` with every tensor in it cut from the graph, its value unchanged.

    Raises:
        TypeError: something in it may hold tensors that can't be seen; it must not stay attached.
    """
    if isinstance(state, Tensor):
        return state.detach()
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    if isinstance(state, dict):
        kept = copy(state)  # an ordered one stays ordered
        kept.update((key, detached(item)) for key, item in state.items())
        return kept
    if isinstance(state, tuple) and hasattr(state, "_fields"):  # a named tuple
        return type(state)(*map(detached, state))
    if isinstance(state, (list, tuple)):
        return type(state)(map(detached, state))
    if is_dataclass(state) and not isinstance(state, type):
        return replace(state, **{f.name: detached(getattr(state, f.name)) for f in fields(state)})
    raise TypeError(
        "state must be made of tensors, tuples, lists, dicts and dataclasses, "
        f"got a {type(state).__name__}"
    )
