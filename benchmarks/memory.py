"""What judging takes in memory, as a multiple of training bare: `python -m benchmarks.memory`.

Each run has a process of its own, whose peak is that of its resident set (`ru_maxrss`): that is
what a machine must have. What is left of it without the imports is shown as well. Both runs are in
float64, in which a subject is judged.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from functools import partial

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, Optimizer

import tbptt_props as tb
from benchmarks.cost import fit_bare, quiet
from tbptt_ref.module import TruncatedRNN

# 10,023,958 parameters, 80 MB of them; little else is large, so that copies of them stand out.
LARGE = tb.Case(batch=1, steps=64, chunk=1, inputs=64, hidden=1550, outputs=8)
SMALL = replace(LARGE, hidden=32)  # 12,808 parameters: what is kept of each chunk stands out
CHUNKS = (4, 16, 64)
MANY_CHUNKS = (64, 256, 1024)
MOST = 4.0

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD": partial(SGD, lr=0.01),
    "Adam": partial(Adam, lr=0.001),
}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Peak:
    """The memory of one process in bytes: with its imports done, and at its most."""

    imported: int
    most: int

    @property
    def added(self) -> int:
        """What the run itself took."""
        return self.most - self.imported


def main() -> None:
    """Run everything in processes of its own, or be one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("RUN", "OPTIMIZER", "HIDDEN", "CHUNKS"))
    one = parser.parse_args().one
    if one:
        print(*astuple(peak_here(one[0], one[1], *map(int, one[2:]))))
        return
    print(f"{parameters(LARGE):,} parameters, {LARGE.steps} chunks, in MB\n")
    print(f"{'':12} {'bare':>7} {'judged':>7} {'ratio':>6}   {'without imports':>22}")
    ratios = [compared(name) for name in OPTIMIZERS]
    print(f"\nAt most {max(ratios):.2f} times as much, where at most {MOST} times is due.")
    grown(LARGE, CHUNKS)
    grown(SMALL, MANY_CHUNKS)
    if max(ratios) > MOST:
        raise SystemExit(1)


def compared(optimizer: str) -> float:
    """Print the peaks of a bare training and of a judgement; return their ratio."""
    bare, judged = (peak(run, optimizer, LARGE) for run in ("bare", "judged"))
    ratios = judged.most / bare.most, judged.added / bare.added
    print(
        f"{optimizer:12} {bare.most / MEGABYTE:7.0f} {judged.most / MEGABYTE:7.0f} {ratios[0]:6.2f}"
        f"   {bare.added / MEGABYTE:7.0f} {judged.added / MEGABYTE:7.0f} {ratios[1]:6.2f}",
        flush=True,
    )
    return ratios[0]


def grown(case: tb.Case, numbers: Iterable[int]) -> None:
    """Print how the peak of a judgement grows with the number of chunks."""
    print(
        f"\n{parameters(case):,} parameters, SGD, in MB\n\n{'chunks':>12} {'bare':>7} {'judged':>7}"
    )
    for chunks in numbers:
        longer = replace(case, steps=chunks * case.chunk)
        bare, judged = (peak(run, "SGD", longer).added for run in ("bare", "judged"))
        print(f"{chunks:12} {bare / MEGABYTE:7.1f} {judged / MEGABYTE:7.1f}", flush=True)


# One process --------------------------------------------------------------------------------


def peak(run: str, optimizer: str, case: tb.Case) -> Peak:
    """Return the peak of a run in a process of its own."""
    arguments = ("--one", run, optimizer, str(case.hidden), str(case.steps // case.chunk))
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    imported, most = map(int, done.stdout.split())
    return Peak(imported, most)


def peak_here(run: str, optimizer: str, hidden: int, chunks: int) -> Peak:
    """Return the peak of a run in this process."""
    quiet()
    imported = resident()
    case = replace(LARGE, hidden=hidden, steps=chunks * LARGE.chunk)
    module = module_of(case, optimizer)
    if run == "bare":
        fit_bare(module, case)
    else:
        report = tb.check(tb.Subject(module, loss=mse_loss), case)
        assert report.holds, report.as_text()
        assert not report.broken, report.as_text()
    return Peak(imported, resident())


def resident() -> int:
    """Return the most memory that this process has had resident, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def module_of(case: tb.Case, optimizer: str) -> pl.LightningModule:
    """Build the reference in float64 with an optimizer."""
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
    readout = nn.Linear(case.hidden, case.outputs)
    module = TruncatedRNN(core, readout, chunk=case.chunk, optimizer=OPTIMIZERS[optimizer])
    return module.double()


def parameters(case: tb.Case) -> int:
    """Count the parameters of the module for a case."""
    with torch.device("meta"):
        return sum(p.numel() for p in module_of(case, "SGD").parameters())


if __name__ == "__main__":
    main()
