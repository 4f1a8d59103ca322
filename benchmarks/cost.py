"""What judging costs, as a multiple of training bare: `python -m benchmarks.cost`.

A bare `Trainer.fit` of a module and `tb.check` of the same module on the same case take turns. Each
pair gives a ratio, and the median of the ratios is told, so that a busy machine, which slows down
both, changes it little. Time is CPU time of the process, with one torch thread.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

import argparse
import contextlib
import gc
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import log
from statistics import linear_regression, median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import tbptt_props as tb
from tbptt_ref.faults import FAULTS
from tbptt_ref.module import TruncatedRNN

SMALL = tb.Case(batch=2, steps=7, chunk=3, inputs=3, hidden=4, outputs=2)
MIDDLE = tb.Case(batch=16, steps=256, chunk=16, inputs=16, hidden=64, outputs=8)
LONG = replace(MIDDLE, steps=4096)
NARROW = replace(SMALL, steps=4096, chunk=16)  # hardly any work in a chunk: what we add stands out
FEWEST = 16  # chunks that an exponent is fitted from: a Trainer's own costs are fixed

BY_LENGTH = [replace(MIDDLE, steps=steps) for steps in (64, 256, 1024, 4096)]
BY_CHUNKS = [replace(SMALL, steps=1024, chunk=1024 // n) for n in (1, 4, 16, 64, 256, 1024)]

EXAMPLES = 100
BROKEN = ("ForgetsState", "DropsTheTail", "KeepsStateAcrossBatches")
FIRST_VERDICT = "from benchmarks import cost; cost.quiet(); cost.first_verdict(cost.BROKEN[0])"


@dataclass(frozen=True)
class Pair:
    """CPU seconds of one bare training and of one judgement, one right after the other."""

    bare: float
    judged: float


@dataclass(frozen=True)
class Cost:
    """The pairs that were timed of one case."""

    case: tb.Case
    pairs: Sequence[Pair]

    @property
    def bare(self) -> float:
        """The median of the bare trainings."""
        return median(pair.bare for pair in self.pairs)

    @property
    def judged(self) -> float:
        """The median of the judgements."""
        return median(pair.judged for pair in self.pairs)

    @property
    def ratios(self) -> list[float]:
        """The ratio of each pair, the smallest first."""
        return sorted(pair.judged / pair.bare for pair in self.pairs)

    @property
    def chunks(self) -> int:
        """How many chunks the case has."""
        return -(-self.case.steps // self.case.chunk) * self.case.batches


def main() -> None:
    """Measure everything, and print it as it comes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case (default: 2)")
    seconds = parser.parse_args().seconds
    quiet()
    cost_of(SMALL, 0.0)  # the first fit imports half of Lightning
    gc.freeze()  # so that clearing up before each run does not walk through all of torch
    table("One case each", [SMALL, MIDDLE, LONG, NARROW], seconds)
    by_length = table("Longer sequences, in chunks of K = 16", BY_LENGTH, seconds)
    print(growth(by_length, "T", lambda cost: cost.case.steps))
    by_chunks = table("More chunks, of one T = 1024", BY_CHUNKS, seconds)
    print(growth(by_chunks, "the number of chunks", lambda cost: cost.chunks))
    print(further(by_chunks))
    searches()


def quiet() -> None:
    """Compute on one thread, and leave Lightning's banners and advice out of the table."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


# One case -----------------------------------------------------------------------------------


def subject_of(case: tb.Case) -> tb.Subject:
    """Build the reference in float64, in which it is judged too."""
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module.double(), loss=mse_loss)


def fit_bare(module: pl.LightningModule, case: tb.Case) -> None:
    """Train as a user would who wants nothing but the training."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(case.tensors(), batch_size=None))  # type: ignore[arg-type]


@cache
def cost_of(case: tb.Case, seconds: float) -> Cost:
    """Time pairs for so many seconds, but at least three of them."""
    pairs: list[Pair] = []
    stop = time.monotonic() + seconds
    while len(pairs) < 3 or time.monotonic() < stop:
        module, subject = subject_of(case).module, subject_of(case)
        assert isinstance(module, pl.LightningModule)
        pairs.append(Pair(timed(fit_bare, module, case), timed(tb.check, subject, case)))
    return Cost(case, pairs)


def timed(action: Callable[..., object], *arguments: object) -> float:
    """Return the CPU seconds that an action takes, without the garbage of the one before it."""
    gc.collect()
    start = time.process_time()
    action(*arguments)
    return time.process_time() - start


# Tables -------------------------------------------------------------------------------------


def table(title: str, cases: Sequence[tb.Case], seconds: float) -> list[Cost]:
    """Measure cases and print one line each."""
    print(f"\n{title}\n")
    print(f"{'B':>4} {'T':>5} {'K':>5} {'H':>4} {'chunks':>7} ", end="")
    print(f"{'bare':>10} {'judged':>10} {'ratio':>6}   {'from':>5} {'to':>5} {'pairs':>6}")
    costs = []
    for case in cases:
        costs.append(cost_of(case, seconds))
        print(line(costs[-1]), flush=True)
    return costs


def line(cost: Cost) -> str:
    """Say what one case costs."""
    case, ratios = cost.case, cost.ratios
    return (
        f"{case.batch:4} {case.steps:5} {case.chunk:5} {case.hidden:4} {cost.chunks:7} "
        f"{cost.bare * 1e3:7.1f} ms {cost.judged * 1e3:7.1f} ms {median(ratios):6.2f}   "
        f"{ratios[0]:5.2f} {ratios[-1]:5.2f} {len(ratios):6}"
    )


def growth(costs: Sequence[Cost], size: str, size_of: Callable[[Cost], int]) -> str:
    """Say with which power of a size both times grow; 1 is linear, 2 is quadratic."""
    fitted = [cost for cost in costs if cost.chunks >= FEWEST]
    bare = exponent([(size_of(cost), cost.bare) for cost in fitted])
    judged = exponent([(size_of(cost), cost.judged) for cost in fitted])
    return (
        f"\nFrom {FEWEST} chunks on, time grows as {size} to the power of {judged:.2f} judged, "
        f"and {bare:.2f} bare."
    )


def further(costs: Sequence[Cost]) -> str:
    """Say what a further chunk costs between one case and the next; the same is linear."""
    fitted = [cost for cost in costs if cost.chunks >= FEWEST]
    steps = [
        f"{1e3 * (more.judged - less.judged) / (more.chunks - less.chunks):.2f} ms"
        f" ({less.chunks} to {more.chunks})"
        for less, more in pairwise(fitted)
    ]
    return f"A further chunk costs {', '.join(steps)} judged."


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Return the slope of a straight line through the logarithms."""
    sizes, times = zip(*points, strict=True)
    return linear_regression([log(s) for s in sizes], [log(t) for t in times]).slope


# Searches -----------------------------------------------------------------------------------


class Seen(BaseException):
    """Ends a search from inside; an `Exception` would be taken for a failing example."""


def searches() -> None:
    """Time searches, and how soon a broken loop is known to be broken."""
    print(f"\nSearches of {EXAMPLES} cases, in seconds by the clock\n")
    seconds, report = clocked(tb.verify, subject_of, max_examples=EXAMPLES, seed=0)
    assert not report.broken, report.as_text()
    print(f"{seconds:7.2f}   TruncatedRNN, which breaks nothing", flush=True)
    seconds, report = clocked(tb.verify, broken(BROKEN[0]), max_examples=EXAMPLES, seed=0)
    assert report.broken
    print(f"{seconds:7.2f}   {BROKEN[0]}, to the end, every case shrunk", flush=True)
    for name in BROKEN:
        print(f"{clocked(first_verdict, name)[0]:7.2f}   {name}, to the first verdict", flush=True)
    seconds, _ = clocked(subprocess.run, [sys.executable, "-c", FIRST_VERDICT], check=True)
    print(f"{seconds:7.2f}   {BROKEN[0]}, to the first verdict, in a new process with its imports")


def clocked(action: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[float, Any]:
    """Return how long an action takes by the clock, and what it returns."""
    start = time.monotonic()
    result = action(*arguments, **named)
    return time.monotonic() - start, result


def first_verdict(name: str) -> None:
    """Search until a fault is seen."""

    def note(number: int, report: tb.Report) -> None:
        if report.broken:
            raise Seen

    with contextlib.suppress(Seen):
        tb.verify(broken(name), max_examples=EXAMPLES, seed=0, on_case=note)
        raise AssertionError(f"{name} was not seen to break anything in {EXAMPLES} cases")


def broken(name: str) -> Callable[[tb.Case], tb.Subject]:
    """Return what builds the subject that has the fault of this name."""
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    return lambda case: tb.Subject(fault.build(case), loss=mse_loss)


if __name__ == "__main__":
    main()
