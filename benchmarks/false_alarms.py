"""Whether right loops are ever called wrong: `python -m benchmarks.false_alarms`.

Every right loop of `tests/gallery` is searched for a broken property, from every seed. What is
broken is told as soon as it is found, with its smallest case; the last line sums up. Exit code 1 if
anything is broken that its author would not call so.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import tbptt_props as tb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gallery.correct import CORRECT
from gallery.other_shapes import OTHER
from gallery.strangers import RIGHT, Build, seeded
from test_gallery import BY_ANOTHER_CONTRACT, WIRED, subject_of, wired


def loops() -> Iterator[tuple[str, Build]]:
    """Yield every right loop by its name, wired."""
    for name, made in CORRECT.items():
        yield name, subject_of(made)
    for name, (_, unusual) in OTHER.items():
        yield name, wired(unusual, WIRED.get(name, {}))
    for name, (build, _) in RIGHT.items():
        yield name, seeded(build)


def alarms(build: Build, examples: int, seed: int) -> Iterator[str]:
    """Yield what is found to be broken of a loop."""
    try:
        report = tb.verify(build, max_examples=examples, seed=seed)
    except tb.ObservationError as refusal:
        yield f"refused: {refusal}"
        return
    for verdict in report.broken:
        yield f"{verdict.name} on {verdict.case}: {verdict.violations[0]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search every loop from every seed; return 1 if one is called wrong."""
    parser = argparse.ArgumentParser(description="Search right loops for a broken property.")
    parser.add_argument("--examples", type=int, default=300, help="cases for each loop and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the search")
    parser.add_argument("names", nargs="*", help="which loops; all by default")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begun, found, tried = time.perf_counter(), 0, 0
    for name, build in loops():
        if options.names and name not in options.names:
            continue
        tried += 1
        meant = BY_ANOTHER_CONTRACT.get(name, set())
        for seed in options.seeds:
            for alarm in alarms(build, options.examples, seed):
                if alarm.split()[0] not in meant:
                    found += 1
                    print(f"{name}, seed {seed}: {alarm}", flush=True)
    minutes = (time.perf_counter() - begun) / 60
    searched = f"{options.examples} cases from each of {len(options.seeds)} seeds"
    print(f"{tried} right loops, {searched}: {found} false alarms ({minutes:.0f} min)")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
