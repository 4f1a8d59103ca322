"""snnTorch's TBPTT, judged: `python -m examples.peers_snntorch`.

`documented` uses it as its documentation says, on input that varies in time: it stops before the
first chunk. `clocked` goes round that: TBPTT is told that its input is the same at all time steps,
and the network reads its own time step of it. So the chunks themselves can be judged.

Shapes: B sequences, T time steps, I inputs, O outputs. snnTorch's batches are (T, B, ...).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn.functional import mse_loss

import tbptt_props as tb
from examples.peers_model import tell

try:
    import snntorch as snn

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed one day
        from snntorch import backprop
except ModuleNotFoundError as missing:
    raise SystemExit("This example needs snnTorch: pip install snntorch") from missing

Batch = tuple[Tensor, Tensor]


def mse_membrane_loss(membrane: Tensor, target: Tensor) -> Tensor:
    """Compare membrane potentials with targets, time step by time step.

    TBPTT knows a criterion by its name, and this is the one that may have targets in time.
    """
    return mse_loss(membrane, target)


mse_membrane_loss.time_var_targets = True  # type: ignore[attr-defined]


def leaky(case: tb.Case) -> list[nn.Module]:
    """Make a layer of leaky neurons."""
    neurons = snn.Leaky(beta=0.5, learn_beta=True, init_hidden=True, output=True)
    return [nn.Linear(case.inputs, case.outputs), neurons]


def leaky_and_synaptic(case: tb.Case, *, spike: Any = torch.sigmoid) -> list[nn.Module]:
    """Make two layers, of neurons of two kinds; by default, they spike smoothly, in any dtype."""
    return [
        nn.Linear(case.inputs, case.hidden),
        snn.Leaky(beta=0.5, init_hidden=True, spike_grad=spike),
        nn.Linear(case.hidden, case.outputs),
        snn.Synaptic(alpha=0.5, beta=0.5, init_hidden=True, output=True, spike_grad=spike),
    ]


STATE: dict[Callable[..., list[nn.Module]], str | tuple[str, ...]] = {
    leaky: "1.mem",
    leaky_and_synaptic: ("1.mem", "3.syn", "3.mem"),
}


class Clocked(nn.Sequential):
    """Is handed the whole sequence (T, B, I) at each time step, and takes the one it is at."""

    time = 0

    def forward(self, sequence: Tensor) -> Any:
        """Go one time step further."""
        now, self.time = self.time, (self.time + 1) % len(sequence)
        return self.step(sequence[now])

    def step(self, x: Tensor) -> Any:
        """Run one time step (B, I); return spikes and membrane potentials (B, O)."""
        return super().forward(x)  # type: ignore[no-untyped-call]  # torch's own


def train(net: nn.Module, batches: Sequence[Batch], **how: Any) -> None:
    """Train for one epoch as snnTorch does."""
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    backprop.TBPTT(net, batches, optimizer, mse_membrane_loss, **how)


def membranes(returned: Sequence[Tensor]) -> tuple[Tensor, None]:
    """Return what is compared with targets: the last layer's membrane potentials."""
    return returned[-1], None


def time_first(batch: Batch) -> Batch:
    """Exchange sequences and time steps, which undoes itself."""
    return batch[0].transpose(0, 1), batch[1].transpose(0, 1)


def equally_long(case: tb.Case) -> list[Batch]:
    """Make batches of T time steps each: TBPTT is told T once for all of them."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        (normal(case.steps, b, case.inputs), normal(case.steps, b, case.outputs))
        for b, _ in case.sizes()
    ]


def documented(case: tb.Case) -> tb.Subject:
    """Make the subject that goes by the documentation."""
    return tb.Subject(
        nn.Sequential(*leaky(case)),
        loss=mse_loss,
        state=STATE[leaky],
        outputs=membranes,
        batches=lambda case: [time_first(batch) for batch in case.tensors()],
        parts=time_first,
        train=partial(train, K=case.chunk),
    )


def clocked(case: tb.Case, *, layers: Callable[[tb.Case], list[nn.Module]] = leaky) -> tb.Subject:
    """Make the subject whose network keeps its own time."""
    chunk = min(case.chunk, case.steps)  # TBPTT refuses chunks that are longer than the sequence
    return tb.Subject(
        Clocked(*layers(case)),
        loss=mse_loss,
        forward="step",
        state=STATE[layers],
        outputs=membranes,
        batches=equally_long,
        parts=time_first,
        train=partial(train, K=chunk, time_var=False, num_steps=case.steps),
    )


if __name__ == "__main__":
    tell(documented, max_examples=10)
    tell(clocked, max_examples=10)
