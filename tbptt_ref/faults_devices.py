"""Faults that do harm on a device with memory of its own: on the CPU all lies in the same place.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from tbptt_ref.module import State, TruncatedRNN


class SendsStateThroughTheHost(TruncatedRNN):
    """Carries the state by way of the host: each chunk waits for two copies that nobody needs."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        """Take the state from the host, and leave it there."""
        there = None if state is None else tree_map(lambda part: part.to(self.device), state)
        loss, state = super().train_chunk(x, y, there)
        return loss, tree_map(lambda part: part.cpu(), state)


class StartsOnTheHost(TruncatedRNN):
    """Makes the first state of a batch without saying on which device."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Start from zeros, wherever torch puts them; of an LSTM's dtype, shape and kind."""
        if state is None:
            core: Any = self.core
            zeros = torch.zeros(core.num_layers, len(x), core.hidden_size, dtype=x.dtype)
            state = (zeros, zeros) if isinstance(core, torch.nn.LSTM) else zeros
        return super().forward(x, state)


class MasksOnTheHost(TruncatedRNN):
    """Makes a mask in each chunk without saying on which device."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Hide no input: the mask is one of ones, each a number of its own."""
        return super().forward(x * torch.ones(x.shape, dtype=x.dtype), state)
