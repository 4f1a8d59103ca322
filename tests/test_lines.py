"""A failure names the line to look at: the user's own, not a library's, a trainer's or ours."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props import lines, watch
from tbptt_props.lines import is_the_users, shown, users_line
from tbptt_ref.module import State, TruncatedRNN

CASE = tb.Case(batch=2, steps=4, chunk=2, inputs=2, hidden=3)
HERE = Path(__file__).read_text().splitlines()


class Wrong(TruncatedRNN):
    """Forgets its state, clears nothing, scales its loss and updates twice."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features, state = self.core(x.transpose(0, 1), state)
        return self.readout(features.transpose(0, 1)), state

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers()
        prediction, after = self(x, None)  # forward
        loss: Any = 2 * mse_loss(prediction, y)
        loss.backward()  # backward
        optimizer.step()
        optimizer.step()  # update
        return loss.detach(), after


LOOKED_AT = {
    "state_crosses_every_boundary": "forward",
    "no_sequence_looks_at_another": "forward",
    "loss_is_the_chunks_own": "backward",
    "gradients_are_the_chunks_own": "backward",
    "events_come_in_a_legal_order": "backward",
    "backward_goes_through_manual_backward": "backward",
    "each_chunk_updates_once": "update",
}


def at(mark: str) -> str:
    """Return the marked line of this file, as a failure names it."""
    (number,) = (i for i, line in enumerate(HERE, start=1) if line.endswith(f"  # {mark}"))
    return shown((__file__, number))


def report(kind: type[TruncatedRNN] = Wrong) -> tb.Report:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        core = nn.GRU(CASE.inputs, CASE.hidden, batch_first=True)
        module = kind(core, nn.Linear(CASE.hidden, CASE.outputs), chunk=CASE.chunk)
    return tb.check(tb.Subject(module, loss=mse_loss), CASE)


def test_each_failure_names_the_line_of_the_call_that_matters() -> None:
    found = {v.name: v.violations[0].line for v in report().broken if v.name in LOOKED_AT}

    assert found == {name: at(mark) for name, mark in LOOKED_AT.items()}


def test_the_line_stands_in_the_failure_before_the_case() -> None:
    text = report().as_text().splitlines()

    line = text.index(f"  at                {at('update')}")
    assert text[line + 1].startswith("  smallest case ")


class LosesItsTail(TruncatedRNN):
    """Trains on whole chunks alone, past Lightning's optimizer."""

    def chunks(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x[:, :2], y[:, :2])]

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        prediction, after = self(x, state)  # forward of the whole chunk
        loss = mse_loss(prediction, y)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()  # past Lightning
        return loss.detach(), after


def test_what_a_run_breaks_is_looked_for_in_its_first_chunk() -> None:
    broken = report(LosesItsTail)

    found = {verdict.name: verdict.violations[0].line for verdict in broken.broken}
    assert found["chunks_tile_the_sequence"] == at("forward of the whole chunk")
    assert found["updates_go_through_lightnings_optimizer"] == at("past Lightning")


class Automatic(TruncatedRNN):
    """Leaves backward and update to Lightning."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.automatic_optimization = True
        prediction, _ = self(batch[0])
        return 2 * mse_loss(prediction, batch[1])


def test_what_a_trainer_does_by_itself_has_no_line() -> None:
    core = nn.GRU(CASE.inputs, CASE.hidden, batch_first=True)
    module = Automatic(core, nn.Linear(CASE.hidden, CASE.outputs), chunk=4)
    module.automatic_optimization = True

    broken = tb.check(tb.Subject(module, loss=mse_loss), tb.Case(2, 4, 4, 2, 3))

    assert broken["loss_is_the_chunks_own"].violations[0].line == ""


def test_a_chunk_that_is_updated_by_hand_names_no_line_of_the_next_one() -> None:
    def by_hand(module: Any, batches: Any) -> None:
        for x, y in batches:
            for start in range(0, x.shape[1], CASE.chunk):
                cut = slice(start, start + CASE.chunk)
                module.zero_grad()
                mse_loss(module(x[:, cut])[0], y[:, cut]).backward()  # type: ignore[no-untyped-call]
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.1 * parameter.grad

    core = nn.GRU(CASE.inputs, CASE.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(CASE.hidden, CASE.outputs), chunk=CASE.chunk)
    trace = tb.observe(tb.Subject(module, loss=mse_loss, train=by_hand), CASE)

    assert [{*chunk.lines} for chunk in trace.chunks] == [{"forward", "backward"}] * 2


@pytest.mark.parametrize(
    "file", [lines.__file__, watch.__file__, json.__file__, torch.__file__, "<string>"]
)
def test_a_file_of_a_library_of_pythons_or_of_ours_is_not_the_users(file: str) -> None:
    assert not is_the_users(file)


def test_a_file_of_anybody_elses_is_the_users() -> None:
    assert is_the_users(__file__)
    assert is_the_users("/home/me/train.py")


def test_the_line_that_runs_is_the_nearest_of_the_users() -> None:
    number = next(i for i, line in enumerate(HERE, 1) if line.strip() == "found = users_line()")

    found = users_line()

    assert found == (__file__, number)


def test_a_path_below_the_working_directory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("a = 1\n    b = 2\n")

    assert shown((str(tmp_path / "mine.py"), 2)) == "mine.py:2   b = 2"
    assert shown((str(tmp_path / "mine.py"), 2), "what it said") == "mine.py:2   what it said"
    assert shown(("/gone/other.py", 7)) == "/gone/other.py:7"
