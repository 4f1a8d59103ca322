"""A river's level, forecast from the rain upstream.

Shapes: B gauges, T hours, K hours in a chunk, F rain stations.
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


def error(forecast: Tensor, record: dict[str, Tensor]) -> Tensor:
    """Return the mean squared error over the hours at which a gauge (B, K) was working."""
    squared = (forecast - record["level"]).square() * record["working"]
    return squared.sum() / record["working"].sum().clamp(min=1)


class RiverLevel(LightningModule):
    """An LSTM over hours, trained by truncated backpropagation through time.

    Args:
        stations: F, the rain stations upstream.
        width: the LSTM's hidden units.
        hours: K, the hours trained on together; the last chunk of a record may be shorter.
    """

    def __init__(self, stations: int, width: int = 32, hours: int = 48) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hours = hours
        self.lstm = nn.LSTM(stations, width, batch_first=True)
        self.level = nn.Linear(width, 1)

    def forward(self, rain: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the level (B, K) that follows from rain (B, K, F), and the new state."""
        features, state = self.lstm(rain, state)
        return self.level(features).squeeze(-1), state

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Make one update for every chunk of K hours."""
        optimizer: Any = self.optimizers()
        state = None
        for start in range(0, batch["rain"].shape[1], self.hours):
            chunk = {name: part[:, start : start + self.hours] for name, part in batch.items()}
            forecast, state = self(chunk["rain"], state)
            loss = error(forecast, chunk)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            optimizer.step()
            state = (state[0].detach(), state[1].detach())
            self.log("error", loss.detach())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
