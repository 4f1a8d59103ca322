import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import assume
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.__main__ import main
from tbptt_ref.faults_update import CallsBackwardItself
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
SIZES = {"batch": 1, "steps": 3, "chunk": 2, "inputs": 1, "hidden": 1, "outputs": 1, "batches": 2}
FIXED = [part for size, value in SIZES.items() for part in (f"--{size}", str(value))]
AT = "loss.backward()  # type: ignore[no-untyped-call]"  # as the broken loop has it
BROKEN = f"""\
test_main:wrong: 2 cases
  holds       training_reaches_the_end
  holds       chunks_tile_the_sequence
  holds       no_graph_outlives_its_chunk
  holds       the_batch_is_left_as_it_was
  holds       training_moves_the_parameters
  holds       updates_go_through_lightnings_optimizer
  not judged  one_chunk_is_one_ordinary_update  needs a case of one batch and one chunk
  holds       a_run_can_be_resumed_at_any_boundary
  holds       a_batch_knows_nothing_of_the_one_before
  holds       state_crosses_every_boundary
  holds       state_starts_afresh_with_each_batch
  holds       graph_crosses_no_boundary
  holds       loss_is_the_chunks_own
  holds       gradients_are_the_chunks_own
  holds       gradients_span_the_whole_chunk
  holds       state_sums_up_the_chunk
  not judged  no_sequence_looks_at_another
              needs two sequences in the first chunk, and no statistics over the batch
  holds       events_come_in_a_legal_order
  holds       each_chunk_updates_once
  holds       the_update_follows_the_optimizers_rule
  holds       nothing_but_the_update_moves_parameters
  BROKEN      backward_goes_through_manual_backward
  holds       chunks_are_trained_in_training_mode
  not judged  each_chunk_draws_its_own_randomness
              needs a forward that draws random numbers, and two chunks

backward_goes_through_manual_backward                                     broken for test_main:wrong
  Every backward goes through Lightning, which scales and synchronises it where needed.

  time steps 0-1, backward: called past Lightning, but should be self.manual_backward(loss)
  time steps 2-2, backward: called past Lightning, but should be self.manual_backward(loss)
  batch 1, time steps 0-1, backward: called past Lightning, but should be \
self.manual_backward(loss)
  batch 1, time steps 2-2, backward: called past Lightning, but should be \
self.manual_backward(loss)

  at                {AT}
  smallest case     Case(steps=3, chunk=2, batches=2)
  likely cause      Backward is called on the loss itself, past Lightning's precision and strategy
  try               self.manual_backward(loss) in place of loss.backward()
  replay            tbptt-props replay test_main:wrong 'Case(steps=3, chunk=2, batches=2)'

20 hold, 1 broken, 3 not judged
"""

built: list[tb.Case] = []


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    built.clear()


def subject(case: tb.Case, kind: type[TruncatedRNN]) -> tb.Subject:
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    return tb.Subject(
        kind(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk), loss=mse_loss
    )


def right(case: tb.Case) -> tb.Subject:
    built.append(case)
    return subject(case, TruncatedRNN)


def wrong(case: tb.Case) -> tb.Subject:
    return subject(case, CallsBackwardItself)


def bare(case: tb.Case) -> nn.Module:
    return right(case).module


def assuming(case: tb.Case) -> tb.Subject:
    assume(case.steps > 99)
    return right(case)


def unreadable(case: tb.Case) -> tb.Subject:
    raise RuntimeError("no file vocabulary.txt")


class Automatic(TruncatedRNN):
    def __init__(self) -> None:
        super().__init__(nn.RNN(1, 1, batch_first=True), nn.Linear(1, 1), chunk=2)
        self.automatic_optimization = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        prediction, _ = self(batch[0])
        return mse_loss(prediction, batch[1])


def automatic(case: tb.Case) -> tb.Subject:
    return tb.Subject(Automatic(), loss=mse_loss)


def without_place(text: str) -> str:
    """Leave out where the broken loop stands, which depends on the directory."""
    return re.sub(r"(?m)^(  at +)\S+:\d+   ", r"\1", text)


def check(name: str, *options: str, examples: int = 2) -> int:
    return main(["check", f"{__name__}:{name}", "--max-examples", str(examples), *options])


def test_a_loop_that_is_right_ends_in_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("right", *FIXED) == 0

    told = capsys.readouterr()
    assert told.out.splitlines()[0] == "test_main:right: 2 cases"
    assert told.out.splitlines()[-1] == "21 hold, 0 broken, 3 not judged"
    assert told.err == ""


def test_a_loop_that_is_wrong_ends_in_1_and_is_told_what_it_breaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("wrong", *FIXED) == 1

    told = capsys.readouterr()
    assert without_place(told.out) == BROKEN
    assert told.err == ""


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        (
            [f"{__name__}:automatic", "--chunk=2", "--steps=3", "--inputs=1", "--outputs=1"],
            "test_main:automatic: Automatic trains by automatic optimization, one update a batch: "
            "set self.automatic_optimization = False and make one update per chunk in "
            "training_step; or, if forward cuts the sequence itself and one update for all of its "
            "chunks is meant, promise that with Contract(update='batch')",
        ),
        (
            [f"{__name__}:bare"],
            "test_main:bare must return a Subject, got TruncatedRNN",
        ),
        (
            [f"{__name__}:right", "--chunk", "0"],
            "test_main:right: chunk must be an integer of at least 1, got chunk=0",
        ),
        (
            [f"{__name__}:right", "--max-examples", "0"],
            "test_main:right: max_examples must be at least 1, got max_examples=0",
        ),
        ([__name__], f"subject must be module.path:build, got {__name__!r}"),
        ([":right"], "subject must be module.path:build, got ':right'"),
        (
            ["no_such_module:build"],
            "no_such_module can't be imported (No module named 'no_such_module')",
        ),
        (
            ["tbptt_props.no_such_module:build"],
            "tbptt_props.no_such_module can't be imported "
            "(No module named 'tbptt_props.no_such_module')",
        ),
    ],
)
def test_misuse_ends_in_2_and_says_what_is_wrong(
    arguments: list[str], due: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments]) == 2

    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == f"tbptt-props: {due}\n"


def test_a_function_that_is_not_there_is_told_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loops_of_mine.py").write_text("def one(case): ...\ndef two(case): ...\n_three = 3\n")

    assert main(["check", "loops_of_mine:three"]) == 2

    del sys.modules["loops_of_mine"]
    due = "tbptt-props: loops_of_mine has no function 'three'; it has one, two\n"
    assert capsys.readouterr().err == due


@pytest.mark.parametrize("source", ["1 / 0\n", "def build(case:\n"])
def test_a_module_that_raises_when_it_is_imported_is_no_broken_loop(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loops_that_raise.py").write_text(source)

    assert ended_in(["check", "loops_that_raise:build"]) == 2


def test_a_factory_that_raises_is_no_broken_loop(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended_in(["check", f"{__name__}:unreadable"]) == 2
    assert "no file vocabulary.txt" in capsys.readouterr().err


def ended_in(arguments: list[str]) -> int:
    """Return the exit code that a shell sees: Python ends in 1 where an exception is left."""
    try:
        return main(arguments)
    except Exception:
        return 1


def test_a_seed_repeats_a_search_and_another_one_makes_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    searches = []
    for seed in ("7", "7", "8"):
        check("right", "--seed", seed, examples=5)
        searches.append((capsys.readouterr().out, list(dict.fromkeys(built))))
        built.clear()

    assert searches[0] == searches[1]
    assert searches[0][1] != searches[2][1]


@pytest.mark.parametrize(("size", "value"), SIZES.items())
def test_a_size_given_by_name_is_that_of_every_case(size: str, value: int) -> None:
    check("right", f"--{size}", str(value + 2))

    assert {getattr(case, size) for case in built} == {value + 2}


def test_a_failure_is_replayed_by_the_command_that_it_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check("wrong", *FIXED)
    (line,) = re.findall("replay +(tbptt-props .*)", capsys.readouterr().out)

    assert main(shlex.split(line)[1:]) == 1

    told = capsys.readouterr().out
    first, _, failure = told.partition("\n\n")
    assert first == (
        "still broken on Case(steps=3, chunk=2, batches=2): 20 hold, 1 broken, 3 not judged"
    )
    assert without_place(failure) == BROKEN[BROKEN.index("\n\n") + 2 : BROKEN.index("  replay")]


def test_a_loop_that_was_mended_is_said_to_be_fixed_on_the_case_which_alone_is_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["replay", f"{__name__}:right", "Case(steps=3, chunk=2, batches=2)"]) == 0

    told = capsys.readouterr()
    assert told.out == (
        "fixed on Case(steps=3, chunk=2, batches=2): 21 hold, 0 broken, 3 not judged\n"
    )
    assert set(built) == {tb.Case(steps=3, chunk=2, batches=2)}


@pytest.mark.parametrize(
    ("name", "case", "due"),
    [
        ("right", "3, 2", "a case is written as Case(steps=5, chunk=2), got '3, 2'"),
        ("right", "Case(steps=0)", "steps must be an integer of at least 1, got steps=0"),
        ("bare", "Case()", "must return a Subject, got TruncatedRNN"),
        ("assuming", "Case()", "assumes Case(steps=2, chunk=1) away"),
    ],
)
def test_a_replay_that_judges_nothing_is_misuse(
    name: str, case: str, due: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", f"{__name__}:{name}", case]) == 2

    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"tbptt-props: {__name__}:{name}")
    assert told.err.endswith(f"{due}\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("name", "found"), [("right", ""), ("wrong", ", 1 broken so far")], ids=["right", "wrong"]
)
def test_a_terminal_is_told_how_far_the_search_is_and_left_with_the_report_alone(
    name: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    check(name, *FIXED)

    clear = "\r\033[K"
    told = re.sub(r"\d+ s", "0 s", terminal.getvalue())
    assert told == (f"{clear}1 of 2 cases, 0 s{found}{clear}2 of 2 cases, 0 s{found}{clear}")


def test_several_processes_are_judged_by_what_they_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(
        [
            "check",
            "test_main:wrong",
            "--processes",
            "2",
            "--max-examples",
            "1",
            "--seed",
            "0",
            *FIXED,
        ]
    )

    assert code == 1
    out = capsys.readouterr().out
    assert "BROKEN      processes_share_their_gradients" in out
    assert "Backward leaves each process its own gradients" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--processes", "0"], "processes must be at least 2"),
        (["--processes", "2", "--sensitivity"], "leave out"),
    ],
)
def test_processes_that_there_cannot_be_are_misuse(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "test_main:wrong", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_misuse_is_told_on_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    assert check("right", "--chunk", "0") == 2

    due = "test_main:right: chunk must be an integer of at least 1, got chunk=0"
    assert terminal.getvalue() == f"\r\033[Ktbptt-props: {due}\n"


def test_the_installed_command_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    module, _, function = scripts["tbptt-props"].partition(":")

    found: Callable[..., int] = getattr(import_module(module), function)
    assert found is main


def test_the_package_runs_as_a_command_on_a_module_where_it_is_called(tmp_path: Path) -> None:
    source = (
        "from torch import nn\n"
        "from torch.nn.functional import mse_loss\n"
        "import tbptt_props as tb\n"
        "from tbptt_ref.faults_update import CallsBackwardItself\n"
        "def wrong(case):\n"
        "    parts = nn.RNN(1, 1, batch_first=True), nn.Linear(1, 1)\n"
        "    return tb.Subject(CallsBackwardItself(*parts, chunk=case.chunk), loss=mse_loss)\n"
    )
    (tmp_path / "test_main.py").write_text(source)

    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tbptt_props",
            "check",
            "test_main:wrong",
            "--max-examples=2",
            *FIXED,
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (run.returncode, without_place(run.stdout), run.stderr) == (1, BROKEN, "")
