"""Judge a loop that is right and one that is not, and say what was found: `python -m examples`."""

import sys

import torch

import tbptt_props as tb
from examples import character_model, lightning_docs

EXAMPLES = 50  # done in seconds, and every property has met several boundaries
AS_PROMISED = "chunks of the promised length"


def main() -> int:
    """Say three verdicts; return 0 if they are as they are due to be, else 1."""
    as_due = [character_model_holds(), documentation_miscounts(), documentation_looks_right()]
    return 0 if all(as_due) else 1


def character_model_holds() -> bool:
    """Judge the character model, where nothing is due to be broken."""
    headline("A character model, its loop written with care: examples/character_model.py")
    report = tb.verify(character_model.build, max_examples=EXAMPLES, seed=0)
    print(report.as_text())
    holds = bool(report.holds) and not report.broken
    return concluded(holds, "No property is broken: this loop does what it promises.")


def documentation_miscounts() -> bool:
    """Judge the documented loop, whose chunks are due to be of the wrong length."""
    headline("The loop in Lightning's documentation: examples/lightning_docs.py")
    report = tb.verify(lightning_docs.build, max_examples=EXAMPLES, seed=0)
    print(report.as_text())
    return concluded(
        bool(report["chunks_tile_the_sequence"].violations),
        "Chunks of the promised length were due. The loop takes k for the number of chunks.",
    )


def documentation_looks_right() -> bool:
    """Judge the documented loop at its k, on sequences of the documented length and others."""
    headline("The same loop with k = 10, as the documentation has it, at three lengths T")
    found = {steps: chunks_found(tb.Case(steps=steps, chunk=10)) for steps in (20, 100, 200)}
    for steps, text in found.items():
        print(f"T = {steps:3}  {text}")
    wrong = [steps for steps, text in found.items() if text != AS_PROMISED]
    return concluded(wrong == [20, 200], "The documentation has T = 100: nobody noticed.")


def chunks_found(case: tb.Case) -> str:
    """Say which chunks the documented loop trains on, and which were due."""
    report = tb.check(lightning_docs.build(case), case)
    violations = report["chunks_tile_the_sequence"].violations
    return "\n         ".join(map(str, violations)) or AS_PROMISED


def headline(title: str) -> None:
    """Say what comes next."""
    print(f"{title}\n{'=' * len(title)}\n")


def concluded(as_due: bool, story: str) -> bool:
    """Close a section with what it showed, or with a warning that it did not show it."""
    print(f"\n{story}\n" if as_due else f"\nNOT AS EXPECTED, which would be: {story}\n")
    return as_due


if __name__ == "__main__":
    torch.set_num_threads(1)  # on sizes as small as these, a second thread only costs
    sys.exit(main())
