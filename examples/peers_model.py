"""What the examples of other libraries share: a recurrent model, and how a verdict on it is said.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import tbptt_props as tb


class Net(nn.Module):
    """A GRU and a readout, without a line of any trainer's."""

    def __init__(self, case: tb.Case, *, batch_first: bool = True) -> None:
        super().__init__()
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=batch_first)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.rnn(x, state)
        return self.readout(features), state


def chunks(batch: tuple[Tensor, Tensor], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut (B, T, I) inputs and (B, T, O) targets along time."""
    x, y = batch
    for start in range(0, x.shape[1], length):
        yield x[:, start : start + length], y[:, start : start + length]


def detached(state: Tensor) -> Tensor:
    """Return the state without its graph."""
    return state.detach()


def tell(build: Callable[[tb.Case], tb.Subject], *, max_examples: int = 30) -> None:
    """Judge the loop of a peer, and say the verdicts."""
    torch.set_num_threads(1)
    print(tb.verify(build, max_examples=max_examples, seed=0).as_text(), end="\n\n")
