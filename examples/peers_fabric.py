"""A loop for Lightning Fabric, judged: `python -m examples.peers_fabric`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import tbptt_props as tb
from examples.peers_model import Net, chunks, detached, tell


def train(module: nn.Module, batches: Sequence[Any], *, chunk: int) -> None:
    """Train for one epoch: Fabric wraps the module, the optimizer and the loader."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(module, optim.Adam(module.parameters(), lr=1e-2))
    whole: Any = batches  # a sequence of batches is a data set whose items are not put together
    loader: Any = fabric.setup_dataloaders(DataLoader(whole, batch_size=None))
    for batch in loader:
        state: Tensor | None = None
        for x, y in chunks(batch, chunk):
            prediction, state = model(x, state)
            optimizer.zero_grad()
            fabric.backward(mse_loss(prediction, y))
            optimizer.step()
            state = detached(state)


def build(case: tb.Case) -> tb.Subject:
    """Make the subject that is judged."""
    return tb.Subject(Net(case), loss=mse_loss, train=partial(train, chunk=case.chunk))


if __name__ == "__main__":
    tell(build)
