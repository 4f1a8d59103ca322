"""What the Lightning examples share: a recurrent LightningModule, of which each trains its own way.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from lightning.pytorch import LightningModule
from torch import Tensor, nn

import tbptt_props as tb


class LitNet(LightningModule):
    """A GRU and a readout; `chunk` is K."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.chunk = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.rnn(x, state)
        return self.readout(features), state
