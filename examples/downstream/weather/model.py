"""The forecaster, and how it is trained: a day at a time."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

Memory = tuple[Tensor, Tensor]


class Forecaster(pl.LightningModule):
    """Reads temperature, pressure and humidity by the hour; forecasts the temperature of a day on.

    Years of readings are one long sequence. It is trained on a day at a time, and what it has in
    memory goes on to the next day.
    """

    def __init__(self, hidden: int = 64, hours: int = 24, largest_norm: float = 1.0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hours = hours
        self.largest_norm = largest_norm
        self.encode = nn.Sequential(nn.Linear(3, hidden), nn.Tanh())
        self.recall = nn.LSTM(hidden, hidden, batch_first=True)
        self.decode = nn.Linear(hidden, 1)

    def forward(self, readings: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Forecast from (stations, hours, 3) readings; go on from what is in memory."""
        recalled, memory = self.recall(self.encode(readings), memory)
        return self.decode(recalled), memory

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Learn from the readings and temperatures of several stations, day by day."""
        optimizer = self.optimizers()
        memory = None
        days = zip(*(part.split(self.hours, dim=1) for part in batch), strict=True)
        for readings, temperatures in days:
            forecast, memory = self(readings, memory)
            loss = mse_loss(forecast, temperatures)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, self.largest_norm, gradient_clip_algorithm="norm")
            optimizer.step()
            memory = tuple(part.detach() for part in memory)
            self.log("train_loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam, as everybody does."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)
