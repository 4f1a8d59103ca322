"""The generated part of each page in docs/properties; `python tests/pages.py` writes them anew."""

import re
import warnings
from dataclasses import replace
from pathlib import Path

from test_faults import BREAKS
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.judge import Property, replay
from tbptt_props.report import failure_text
from tbptt_ref.faults import FAULTS

FOLDER = Path(__file__).parent.parent / "docs" / "properties"
BEGIN, END = "<!-- made by tests/pages.py -->", "<!-- end -->"
FAULT = {fault.name: fault for fault in FAULTS}
ALONE = tb.Case(steps=5, chunk=2)
WIDE = tb.Case(batch=2, steps=5, chunk=2, hidden=2, batches=2)
WHOLE = tb.Case(batch=2, steps=2, chunk=2)

# The fault and the case of which each page shows the real output.
SHOWN: dict[str, tuple[str, tb.Case]] = {
    "training_reaches_the_end": ("NeverDetaches", ALONE),
    "chunks_tile_the_sequence": ("CutsIntoKChunks", ALONE),
    "no_graph_outlives_its_chunk": ("KeepsLosses", ALONE),
    "the_batch_is_left_as_it_was": ("ScalesTheBatch", ALONE),
    "training_moves_the_parameters": ("LearnsAtRateZero", ALONE),
    "updates_go_through_lightnings_optimizer": ("TakesTheRawOptimizer", ALONE),
    "one_chunk_is_one_ordinary_update": ("NeverUpdates", WHOLE),
    "a_run_can_be_resumed_at_any_boundary": ("NeverClears", ALONE),
    "a_batch_knows_nothing_of_the_one_before": ("KeepsStateAcrossBatches", WIDE),
    "state_crosses_every_boundary": ("ForgetsState", ALONE),
    "state_starts_afresh_with_each_batch": ("KeepsStateAcrossBatches", WIDE),
    "graph_crosses_no_boundary": ("DetachesOnlyH", ALONE),
    "loss_is_the_chunks_own": ("ScalesTheLoss", ALONE),
    "gradients_are_the_chunks_own": ("RetainsItsPast", ALONE),
    "gradients_span_the_whole_chunk": ("DetachesEveryTimeStep", WIDE),
    "state_sums_up_the_chunk": ("CarriesTheStateBeforeLast", tb.Case(steps=3, chunk=3)),
    "no_sequence_looks_at_another": ("RunsAlongTheBatch", tb.Case(batch=2, steps=1, chunk=1)),
    "events_come_in_a_legal_order": ("NeverClears", ALONE),
    "each_chunk_updates_once": ("UpdatesTwice", ALONE),
    "the_update_follows_the_optimizers_rule": ("ForgetsTheMomentum", ALONE),
    "nothing_but_the_update_moves_parameters": ("ClampsParameters", ALONE),
    "backward_goes_through_manual_backward": ("CallsBackwardItself", ALONE),
    "chunks_are_trained_in_training_mode": ("LeavesEvalOn", ALONE),
    "each_chunk_draws_its_own_randomness": ("SeedsEveryChunk", ALONE),
}


def generated(judged: Property) -> str:
    """Return what is made of a page: the claim, real output, and what breaks it."""
    fault, case = SHOWN[judged.__name__]
    claim = (judged.__doc__ or "").splitlines()[0]
    mistakes = [
        f"* {FAULT[name].mistake} (`{name}`)"
        for name, broken in BREAKS.items()
        if judged.__name__ in broken
    ]
    return "\n".join(
        [
            BEGIN,
            f"**{claim}**",
            "",
            f"What is said where it is broken, here by the fault `{fault}`:",
            "",
            "```",
            output(judged.__name__, fault, case),
            "```",
            "",
            "The faults of `tbptt_ref.faults` that break it:",
            "",
            *mistakes,
            END,
        ]
    )


def output(judged: str, fault: str, case: tb.Case) -> str:
    """Return what a failure says, but for the numbers of lines, which change with the sources."""
    broken = FAULT[fault]
    contract = tb.Contract(clip_norm=broken.clip_norm)
    report = replay(
        lambda case: tb.Subject(broken.build(case), loss=mse_loss, contract=contract), case
    )
    text = failure_text(replace(report, subject="test_rnn"), report[judged])
    return re.sub(r"\S*?(\w+\.py):\d+", r"\1", text)


def written_anew(page: str, part: str) -> str:
    """Return a page with its generated part replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{part}{rest.partition(END)[2]}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for judged in tb.PROPERTIES:
        path = FOLDER / f"{judged.__name__}.md"
        path.write_text(written_anew(path.read_text(), generated(judged)), encoding="utf-8")
