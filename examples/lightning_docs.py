"""The loop that Lightning's documentation shows, which counts chunks where it promises time steps.

Lightning 2.0 removed truncated backpropagation through time, and its documentation (the page
"Truncated Backpropagation Through Time", as of Lightning 2.6) says how to write it by hand: train
"every k steps", on "splits of size k". Its loop calls `tensor_split(k, dim=1)`. That makes k
*pieces*, not pieces of k *time steps*. The page's sequences have T = 100 time steps and its k is
10, so both readings give ten chunks of ten, and nobody noticed. At T = 1000 the chunks have 100
time steps instead of 10; at T = 20 they have 2; below T = 10 some are empty and training stops.

The loop stands here in our own words, its cut and its order of calls as on that page.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tbptt_props as tb

State = tuple[Tensor, Tensor] | list[Tensor]


class DocumentedLoop(LightningModule):
    """An LSTM regressor, trained by the loop that the documentation shows.

    Args:
        inputs: I.
        hidden: H.
        outputs: O.
        truncated_bptt_steps: meant as K, the time steps in a chunk; taken as the number of chunks.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, truncated_bptt_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.truncated_bptt_steps = truncated_bptt_steps
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.lstm(x, state)
        return self.readout(features), state

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Learn from (B, T, I) inputs and (B, T, O) targets, one update for every piece."""
        pieces = [tensor.tensor_split(self.truncated_bptt_steps, dim=1) for tensor in batch]
        optimizer: Any = self.optimizers()
        state = None
        losses = []
        for x, y in zip(*pieces, strict=True):
            prediction, state = self(x, state)
            loss = mse_loss(prediction, y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            state = [tensor.detach() for tensor in state]
            losses.append(loss.detach())
        self.log("train_loss", torch.stack(losses).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    module = DocumentedLoop(case.inputs, case.hidden, case.outputs, case.chunk)
    return tb.Subject(module, loss=mse_loss)
