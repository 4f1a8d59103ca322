"""Two optimizers, a scheduler and clipping, judged: `python -m examples.lightning_optimizers`.

The core and the readout have an optimizer each. Both are cleared, and both update after every
chunk; the core's gradients are clipped by Lightning, and its learning rate decays with every batch.
"""

from typing import Any

from torch import Tensor, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.lightning_model import LitNet
from examples.peers_model import chunks, detached, tell


class TwoOptimizers(LitNet):
    """Updates core and readout apart from each other."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Make an update of each optimizer for every chunk."""
        optimizers: Any = self.optimizers()
        core, readout = optimizers
        state = None
        for x, y in chunks(batch, self.chunk):
            prediction, state = self(x, state)
            core.zero_grad()
            readout.zero_grad()
            self.manual_backward(mse_loss(prediction, y))
            self.clip_gradients(core, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            core.step()
            readout.step()
            state = detached(state)
        scheduler: Any = self.lr_schedulers()
        scheduler.step()

    def configure_optimizers(self) -> Any:
        """Make both optimizers, and the core's scheduler."""
        core = optim.Adam(self.rnn.parameters(), lr=1e-2)
        readout = optim.SGD(self.readout.parameters(), lr=1e-1)
        return [core, readout], [optim.lr_scheduler.ExponentialLR(core, gamma=0.9)]


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    return tb.Subject(TwoOptimizers(case), loss=mse_loss)


if __name__ == "__main__":
    tell(build)
