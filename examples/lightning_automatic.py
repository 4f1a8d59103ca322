"""Automatic optimization, a chunk per batch, judged: `python -m examples.lightning_automatic`.

The loader cuts: each batch that Lightning hands out is one chunk, with a flag that says whether its
sequences begin in it. The state is kept on the module.
"""

from torch import Tensor, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.lightning_model import LitNet
from examples.peers_model import chunks, detached, tell

Marked = tuple[Tensor, Tensor, bool]


class ChunkPerBatch(LitNet):
    """Leaves backward and update to Lightning."""

    kept: Tensor | None = None

    def training_step(self, batch: Marked, batch_idx: int) -> Tensor:
        """Return the loss of one chunk."""
        x, y, begins = batch
        prediction, state = self(x, None if begins else self.kept)
        self.kept = detached(state)
        return mse_loss(prediction, y)

    def configure_optimizers(self) -> optim.Optimizer:
        """Make the optimizer."""
        return optim.Adam(self.parameters(), lr=1e-2)


def loaded(case: tb.Case) -> list[Marked]:
    """Return the batches as the loader makes them: chunks of each, the first of them marked."""
    return [
        (x, y, index == 0)
        for batch in case.tensors()
        for index, (x, y) in enumerate(chunks(batch, case.chunk))
    ]


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    contract = tb.Contract(carry="flagged")
    return tb.Subject(ChunkPerBatch(case), loss=mse_loss, batches=loaded, contract=contract)


if __name__ == "__main__":
    tell(build)
