"""Truncation inside of forward, judged: `python -m examples.lightning_in_forward`.

Forward runs over whole sequences and cuts the graph every K time steps. There is one loss, one
backward and one update for all chunks of a batch, all of them Lightning's own doing.
"""

import torch
from torch import Tensor, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.lightning_model import LitNet
from examples.peers_model import detached, tell


class TruncatesInForward(LitNet):
    """Predicts whole sequences, chunk by chunk."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return predictions (B, T, O) of inputs (B, T, I)."""
        predictions, state = [], None
        for start in range(0, x.shape[1], self.chunk):
            features, state = self.rnn(x[:, start : start + self.chunk], state)
            predictions.append(self.readout(features))
            state = detached(state)
        return torch.cat(predictions, dim=1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of all chunks."""
        x, y = batch
        return mse_loss(self(x), y)

    def configure_optimizers(self) -> optim.Optimizer:
        """Make the optimizer."""
        return optim.Adam(self.parameters(), lr=1e-2)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged: of a forward that cuts by itself, the calls of its layer."""
    return tb.Subject(TruncatesInForward(case), loss=mse_loss, contract=tb.Contract(update="batch"))


if __name__ == "__main__":
    tell(build)
