"""What judging costs on a device: `python -m benchmarks.device --device cuda`.

A bare `Trainer.fit` of a module and `tb.check` of the same module take turns, by the clock, for a
GPU works while the process waits. Memory is what CUDA's allocator has given out at most; elsewhere
`benchmarks.memory` measures it.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import tbptt_props as tb
from benchmarks.cost import quiet
from tbptt_ref.module import TruncatedRNN

SMALL = tb.Case(batch=2, steps=7, chunk=3, inputs=3, hidden=4, outputs=2)
MIDDLE = tb.Case(batch=16, steps=256, chunk=16, inputs=16, hidden=64, outputs=8)
LARGE = tb.Case(batch=16, steps=256, chunk=64, inputs=64, hidden=2048, outputs=8)
CHUNKS = (4, 16, 64)  # over which the peak is due to stay where it is
HIDDEN = (512, 1024, 2048, 4096)
MEGABYTE = 1e6
PAIRS = 5


def main() -> None:
    """Print the device, the versions and the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    quiet()
    print(described(device))
    print("\n| case | bare fit | check | ratio |\n|---|---|---|---|")
    for case in (SMALL, MIDDLE, LARGE) if device == "cuda" else (SMALL, MIDDLE):
        bare, judged = times(case, device)
        print(f"| {case} | {bare:.3f} s | {judged:.3f} s | {judged / bare:.1f} |")
    if device == "cuda":
        tell_memory()


def tell_memory() -> None:
    """Print the peaks: over more and more chunks, and over larger and larger modules."""
    print("\n| chunks, K = 16, H = 512 | peak of a check |\n|---|---|")
    for count in CHUNKS:
        case = replace(MIDDLE, hidden=512, steps=16 * count)
        print(f"| {count} | {peak(judge, case):.0f} MB |")
    print("\n| H, T = 256 | peak of a bare fit | of a check | ratio |\n|---|---|---|---|")
    for hidden in HIDDEN:
        case = replace(LARGE, hidden=hidden)
        bare, judged = peak(fit, case), peak(judge, case)
        print(f"| {hidden} | {bare:.0f} MB | {judged:.0f} MB | {judged / bare:.1f} |")


def described(device: str) -> str:
    """Name the device, and what runs on it."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    cuda = f", CUDA {torch.version.cuda}" if device == "cuda" else ""
    return f"{name}, torch {torch.__version__}{cuda}, Lightning {lightning.__version__}"


def module_for(case: tb.Case) -> TruncatedRNN:
    """Make the module anew."""
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
    return TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)


def fit(case: tb.Case, device: str) -> None:
    """Train bare, in float64 as a subject is."""
    trainer = pl.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    batches: Any = case.tensors()
    trainer.fit(module_for(case).double(), DataLoader(batches, batch_size=None))


def judge(case: tb.Case, device: str) -> None:
    """Judge the module on the case."""
    tb.check(tb.Subject(module_for(case), loss=mse_loss, device=device), case).raise_if_broken()


def times(case: tb.Case, device: str) -> tuple[float, float]:
    """Return the medians of the seconds of a bare fit and of a check, in turns."""
    fit(case, device)  # what is loaded once is loaded
    bare, judged = zip(
        *((seconds(fit, case, device), seconds(judge, case, device)) for _ in range(PAIRS)),
        strict=True,
    )
    return median(bare), median(judged)


def seconds(run: Callable[[tb.Case, str], None], case: tb.Case, device: str) -> float:
    """Return how long a run takes, until the device is done with it."""
    begun = time.perf_counter()
    run(case, device)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak(run: Callable[[tb.Case, str], None], case: tb.Case) -> float:
    """Return the most that CUDA's allocator had given out during a run, in MB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(case, "cuda")
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE


if __name__ == "__main__":
    main()
