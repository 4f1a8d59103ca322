"""What is generated of the pages in docs; `python tests/pages.py` writes it anew.

That is a part of each page in docs/properties, docs/gallery.md and docs/api.md.
"""

import inspect
import re
import warnings
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import Any

from test_faults import BREAKS
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.case import case_of
from tbptt_props.judge import Property
from tbptt_props.report import Report, failure_text
from tbptt_props.search import replay
from tbptt_ref.faults import FAULTS, Fault

DOCS = Path(__file__).parent.parent / "docs"
FOLDER, GALLERY, API = DOCS / "properties", DOCS / "gallery.md", DOCS / "api.md"
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
    return told(report_on(FAULT[fault], case), judged)


def report_on(fault: Fault, case: tb.Case) -> Report:
    contract = tb.Contract(clip_norm=fault.clip_norm)
    return replay(
        lambda case: tb.Subject(fault.build(case), loss=mse_loss, contract=contract), case
    )


def told(report: Report, judged: str) -> str:
    text = failure_text(replace(report, subject="test_rnn"), report[judged])
    return re.sub(r"\S*?(\w+\.py):\d+", r"\1", text)


# What each fault has said --------------------------------------------------------------------

LAWS = {
    "one_chunk_is_one_ordinary_update",
    "a_run_can_be_resumed_at_any_boundary",
    "a_batch_knows_nothing_of_the_one_before",
}
ABOUT_THE_GALLERY = """\
# What is said of each mistake

The faults of `tbptt_ref.faults`, each on the smallest case that breaks something, with what the kit
says of it there: of one property, if several are broken. [faults](faults.md) has the measured
table. Made by `python tests/pages.py`.
"""


def gallery() -> str:
    """Return the page on what each fault has said."""
    parts = [f"\n## {fault.name}\n\n{said_of(fault)}\n" for fault in FAULTS]
    return ABOUT_THE_GALLERY + "".join(parts)


def said_of(fault: Fault) -> str:
    """Return a fault's mistake, and the failure on its smallest case."""
    report = report_on(fault, smallest(fault))
    broken = [verdict.name for verdict in report.broken]
    shown = next((name for name in broken if name not in LAWS), broken[0])
    others = [f"`{name}`" for name in broken if name != shown]
    beside = f"\n\nBroken there, too: {', '.join(others)}." if others else ""
    return f"{fault.mistake}\n\n```\n{told(report, shown)}\n```{beside}"


def smallest(fault: Fault) -> tb.Case:
    """Return the case that docs/faults.md tells of a fault."""
    page = (DOCS / "faults.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"(?m)^\| {fault.name} \|.*$", page)
    (case,) = re.findall(r"Case\(.*?\)", row)
    return case_of(case)


# The reference -------------------------------------------------------------------------------

ABOUT_THE_API = """\
# Reference

All public names of `tbptt_props`, with their docstrings. Made by `python tests/pages.py`.
"""


def api() -> str:
    """Return the page on all public names."""
    names = [name for name in dir(tb) if name not in ("PROPERTIES", "__version__")]
    return ABOUT_THE_API + "".join(map(documented, names))


def called(name: str, public: Any) -> str:
    """Write a call of it, with its arguments and their defaults, one a line where it is long."""
    try:
        parameters = list(inspect.signature(public).parameters.values())
    except ValueError:
        return name
    listed = ["*" if p.kind is p.KEYWORD_ONLY else "" for p in parameters]
    first = listed.index("*") if "*" in listed else -1
    written = [as_written(p) for p in parameters if p.name != "self"]
    if first >= 0:
        written.insert(first - sum(p.name == "self" for p in parameters), "*")
    line = f"{name}({', '.join(written)})"
    return (
        line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {w}," for w in written), ")"])
    )


def docstring(public: Any) -> str:
    return inspect.getdoc(public) or ""


def as_written(parameter: inspect.Parameter) -> str:
    """Write an argument without its type, which its docstring tells of."""
    star = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    default = parameter.default
    if default is parameter.empty:
        return f"{star}{parameter.name}"
    plain = default is None or isinstance(default, (bool, int, float, str)) or default == ()
    return f"{parameter.name}={default!r}" if plain else f"{parameter.name}=..."


def documented(name: str) -> str:
    """Return what is told of a public name: how it is called, and its docstring."""
    public = getattr(tb, name)
    methods = [
        f"{called(f'{name}.{method}', function)}\n\n{indent(docstring(function), '    ')}"
        for method, function in vars(public).items()
        if inspect.isclass(public) and inspect.isfunction(function) and method[0] != "_"
    ]
    text = "\n\n".join([called(name, public), docstring(public), *methods])
    return f"\n## `{name}`\n\n```text\n{text}\n```\n"


def written_anew(page: str, part: str) -> str:
    """Return a page with its generated part replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{part}{rest.partition(END)[2]}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for judged in tb.PROPERTIES:
        path = FOLDER / f"{judged.__name__}.md"
        path.write_text(written_anew(path.read_text(), generated(judged)), encoding="utf-8")
    GALLERY.write_text(gallery(), encoding="utf-8")
    API.write_text(api(), encoding="utf-8")
