"""A kept case as a script: it fails by itself where the loop is broken, and else ends well."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.__main__ import main
from tbptt_props.kept import Kept, keep
from tbptt_props.script import SHOWN, NoScript, script_of
from tbptt_props.search import replay
from tbptt_ref.faults import FAULTS
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
FAULT = {fault.name: fault for fault in FAULTS}
CASE = tb.Case(batch=2, steps=5, chunk=2, batches=2)
ONE = tb.Case(batch=2, steps=2, chunk=2)
LOOPS = """
from torch import nn
from torch.nn.functional import mse_loss
import tbptt_props as tb
from tbptt_ref.faults import FAULTS
from tbptt_ref.module import TruncatedRNN

def broken(case):
    (fault,) = [fault for fault in FAULTS if fault.name == "{fault}"]
    return tb.Subject(fault.build(case), loss=mse_loss)

def right(case):
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)

@tb.conformance()
def test_broken(case):
    return broken(case)
"""
# What each shows of a fault, and what its script is due to end in.
ENDS = {
    ("NeverDetaches", CASE, "training_reaches_the_end"): "RuntimeError: Trying to backward",
    ("CutsIntoKChunks", CASE, "chunks_tile_the_sequence"): (
        r"AssertionError: chunks \[\(0, 0, 2\), \(0, 3, 4\).*, but should be \[\(0, 0, 1\)"
    ),
    ("LosesTheBoundaryTarget", ONE, "chunks_tile_the_sequence"): "AssertionError: gradient of",
    ("ForgetsState", CASE, "state_crosses_every_boundary"): (
        r"AssertionError: time steps \(2, 3\) do not start in the state of those before"
    ),
    ("KeepsStateAcrossBatches", CASE, "state_starts_afresh_with_each_batch"): (
        "AssertionError: a batch starts in the state of another"
    ),
    ("RetainsItsPast", CASE, "graph_crosses_no_boundary"): (
        r"AssertionError: time steps \(2, 3\) start in a state with a graph"
    ),
    ("NeverClears", CASE, "gradients_are_the_chunks_own"): "AssertionError: gradient of",
    ("RunsTheCoreOnUnderNoGrad", CASE, "gradients_span_the_whole_chunk"): (
        r"AssertionError: time steps \(2, 3\): slope of the loss"
    ),
    ("UpdatesTwice", CASE, "each_chunk_updates_once"): (
        "AssertionError: 12 updates, but should be 6"
    ),
    ("ScalesTheLoss", ONE, "one_chunk_is_one_ordinary_update"): (
        "AssertionError: core.weight_ih_l0 after one ordinary update"
    ),
}


def subject(name: str) -> Callable[[tb.Case], tb.Subject]:
    return lambda case: tb.Subject(FAULT[name].build(case), loss=mse_loss)


def kept_of(name: str, case: tb.Case, judged: str, build: str = "loops:broken") -> Kept:
    violation = replay(subject(name), case)[judged].violations[0]
    return Kept(judged, "loops:broken", case, build=build, found=str(violation))


def ended(script: str, fault: str, folder: Path) -> tuple[int, str]:
    """Run a script where the loops are; return its exit code and its last line."""
    (folder / "loops.py").write_text(LOOPS.replace("{fault}", fault))
    (folder / "issue.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "issue.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, (done.stderr if done.returncode else done.stdout).splitlines()[-1]


@pytest.mark.parametrize(("what", "due"), ENDS.items(), ids=lambda item: str(item)[:24])
def test_a_script_fails_where_the_loop_is_broken(
    what: tuple[str, tb.Case, str], due: str, tmp_path: Path
) -> None:
    fault, case, _ = what

    code, last = ended(script_of(kept_of(*what), subject(fault)(case)), fault, tmp_path)

    assert code == 1
    assert re.match(due, last)


@pytest.mark.parametrize("what", [list(ENDS)[i] for i in (1, 4, 6, 7, 9)], ids=str)
def test_the_same_script_ends_well_once_the_loop_is_right(
    what: tuple[str, tb.Case, str], tmp_path: Path
) -> None:
    fault, case, judged = what
    kept = kept_of(*what, build="loops:right")

    ran = ended(script_of(kept, subject(fault)(case)), fault, tmp_path)

    assert ran == (0, f"fixed: {judged} is not broken here")


def test_a_script_imports_nothing_of_the_kit() -> None:
    what = ("RetainsItsPast", CASE, "graph_crosses_no_boundary")

    script = script_of(kept_of(*what), subject(what[0])(CASE))

    imported = re.findall(r"(?m)^(?:from|import) ([\w.]+)", script)
    assert {name.split(".")[0] for name in imported} == {
        *("copy", "sys", "itertools", "types", "lightning", "torch", "loops"),
    }


def test_the_numbers_of_a_script_are_those_of_the_case() -> None:
    case = tb.Case(batch=3, steps=4, chunk=2, inputs=2, outputs=2, batches=2, seed=3)
    kept = Kept("training_reaches_the_end", "loops:right", case, build="loops:right")

    script = script_of(kept, subject("NeverDetaches")(case))

    numbers = script[script.index("import copy") : script.index("# The module")]
    made: dict[str, list[tuple[object, object]]] = {}
    import torch

    before = torch.get_default_dtype()
    try:
        exec(numbers, made)
    finally:
        torch.set_default_dtype(before)
    for (x, y), (due_x, due_y) in zip(made["batches"], case.tensors(), strict=True):
        assert torch.equal(x, due_x)  # type: ignore[arg-type]
        assert torch.equal(y, due_y)  # type: ignore[arg-type]


# What no script is made of ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found", "due"),
    [
        ("no_graph_outlives_its_chunk", "x: a, but should be b", "no script of plain torch shows"),
        (
            "state_crosses_every_boundary",
            "time steps 1-1, incoming state: handed over without any effect, but should be",
            "no script of plain torch shows this: time steps 1-1, incoming state: handed over",
        ),
    ],
)
def test_what_a_script_can_not_show_is_told(name: str, found: str, due: str) -> None:
    with pytest.raises(NoScript, match=due):
        script_of(Kept(name, "loops:broken", CASE, found=found), subject("NeverDetaches")(CASE))


def test_a_loop_that_is_wired_otherwise_than_most_has_no_script() -> None:
    module = TruncatedRNN(nn.RNN(1, 1, batch_first=True), nn.Linear(1, 1), chunk=2)
    plain = Kept("loss_is_the_chunks_own", "loops:broken", CASE, found="x: a, but should be b")

    for wired, due in [
        (tb.Subject(module, loss=mse_loss, batches=lambda case: []), "with batches="),
        (tb.Subject(module), "needs Subject"),
        (tb.Subject(module, loss=mse_loss, contract=tb.Contract(clip_norm=1.0)), "clipped"),
    ]:
        with pytest.raises(NoScript, match=due):
            script_of(plain, wired)


def test_every_property_that_has_a_script_is_one() -> None:
    assert SHOWN.keys() <= {judged.__name__ for judged in tb.PROPERTIES}


# The command ---------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "loops_to_show.py").write_text(LOOPS.replace("{fault}", "RetainsItsPast"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize("build", ["loops_to_show:broken", "loops_to_show.py:test_broken"])
def test_the_command_prints_a_script_of_a_kept_file(
    build: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ("RetainsItsPast", CASE, "graph_crosses_no_boundary")
    keep(here, [kept_of(*what, build=build)])
    (file,) = here.glob("*.toml")

    assert main(["show", str(file)]) == 0

    script = capsys.readouterr().out
    code, last = ended(script, "RetainsItsPast", here)
    assert (code, last.startswith("AssertionError: time steps (2, 3)")) == (1, True)


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("case = ", "can't be read"),
        (
            'property = "no_graph_outlives_its_chunk"\nsubject = "loops_to_show:broken"\n'
            'case = "Case()"\n',
            "no script of plain torch shows no_graph_outlives_its_chunk",
        ),
        (
            'property = "a"\nsubject = "b"\nbuild = "nowhere.py:test_broken"\ncase = "Case()"\n',
            "nowhere.py can't be imported (no file nowhere.py)",
        ),
    ],
)
def test_what_can_not_be_shown_is_misuse(
    text: str, due: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "kept.toml").write_text(text)

    assert main(["show", "kept.toml"]) == 2

    told = capsys.readouterr()
    assert (told.out, due in told.err) == ("", True)
