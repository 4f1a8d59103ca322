"""`tbptt-props init` finds out how a stranger's module is handed over, and writes the test file.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, mse_loss

import tbptt_props as tb
from tbptt_props.__main__ import main

Batch = Any
State = Any


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


class Model(LightningModule):
    """What the modules below share: they differ in how they are built, fed and cut."""

    def __init__(self, core: nn.Module, readout: nn.Module, chunk: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.core = core
        self.readout = readout
        self.chunk = chunk

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        features, state = self.core(x, state)
        return self.readout(features), state

    def learn(self, loss: Tensor) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LabelsInADict(Model):
    """Its K is its own, its batches are dicts, its targets are labels."""

    def __init__(self, input_dim: int, num_classes: int, hidden: int = 16, lr: float = 0.1) -> None:
        core = nn.LSTM(input_dim, hidden, batch_first=True)
        super().__init__(core, nn.Linear(hidden, num_classes), chunk=5)
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch["features"], batch["labels"]
        state = None
        for start in range(0, x.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            logits, state = self(x[:, part], state)
            self.learn(self.criterion(logits.flatten(0, 1), y[:, part].flatten()))
            state = tuple(half.detach() for half in state)


class TokensTimeFirst(Model):
    """It predicts the next token, along the first dimension of what it is handed."""

    def __init__(self, vocab_size: int, emsize: int = 3, nhid: int = 4, bptt: int = 35) -> None:
        super().__init__(nn.GRU(emsize, nhid), nn.Linear(nhid, vocab_size), chunk=bptt)
        self.embedding = nn.Embedding(vocab_size, emsize)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        return super().forward(self.embedding(x), state)

    def training_step(self, ids: Tensor, batch_idx: int) -> None:
        state = None
        for start in range(0, len(ids) - 1, self.chunk):
            y = ids[start + 1 : start + 1 + self.chunk]
            logits, state = self(ids[start : start + len(y)], state)
            self.learn(functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
            state = state.detach()


class LosesItsTail(Model):
    """All of its sizes are its own, and its loss is written out."""

    def __init__(self) -> None:
        super().__init__(nn.RNN(3, 7, batch_first=True), nn.Linear(7, 2), chunk=10)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        state = None
        for i in range(x.shape[1] // self.chunk):
            part = slice(i * self.chunk, (i + 1) * self.chunk)
            prediction, state = self(x[:, part], state)
            self.learn(((prediction - y[:, part]) ** 2).mean())
            state = state.detach()


def half_of_it(prediction: Tensor, target: Tensor) -> Tensor:
    """Return a loss that torch does not have."""
    return mse_loss(prediction, target) / 2


class OwnLoss(Model):
    """Its loss is a function of its own file; as many numbers come out as go in."""

    def __init__(self, n_features: int, k: int) -> None:
        super().__init__(nn.RNN(n_features, 4, batch_first=True), nn.Linear(4, n_features), chunk=k)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        state = None
        for part, target in zip(x.split(self.chunk, 1), y.split(self.chunk, 1), strict=True):
            prediction, state = self(part, state)
            self.learn(half_of_it(prediction, target))
            state = state.detach()


class NeverDetaches(OwnLoss):
    """It halts at the second chunk."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        state = None
        for part, target in zip(x.split(self.chunk, 1), y.split(self.chunk, 1), strict=True):
            prediction, state = self(part, state)
            self.learn(half_of_it(prediction, target))


class Secret(Model):
    """It trains on a loss that nobody outside can call."""

    def __init__(self, inputs: int, outputs: int, chunk: int) -> None:
        super().__init__(nn.GRU(inputs, 4, batch_first=True), nn.Linear(4, outputs), chunk)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        state = None
        for start in range(0, x.shape[1], self.chunk):
            prediction, state = self(x[:, start : start + self.chunk], state)
            error = prediction - y[:, start : start + self.chunk]
            self.learn(error.abs().sqrt().mean() + 0.1 * (start + 1) * error.abs().mean())
            state = state.detach()


class PerSequence(Model):
    """One label for each sequence, and one update for all chunks of a batch."""

    def __init__(self, in_features: int, hidden_size: int, n_classes: int, k1: int) -> None:
        core = nn.GRU(in_features, hidden_size, batch_first=True)
        super().__init__(core, nn.Linear(hidden_size, n_classes), chunk=k1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, labels = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        state = None
        for part in x.split(self.chunk, dim=1):
            logits, state = self(part, state)
            self.manual_backward(cross_entropy(logits[:, -1], labels.long().clamp(0, 3)))
            state = state.detach()
        optimizer.step()


class Unheard(Model):
    """Nobody can know what it has to be given."""

    def __init__(self, wherewithal: str) -> None:
        raise AssertionError


class Fussy(Model):
    """It can't be built of the sizes that it is offered."""

    def __init__(self, hidden: int) -> None:
        raise ValueError(f"hidden must be a power of two, got {hidden}")


class Untrainable(Model):
    """No batch is right for it."""

    def __init__(self) -> None:
        super().__init__(nn.RNN(1, 1), nn.Linear(1, 1), chunk=1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        raise RuntimeError("no such batch")


LABELS_IN_A_DICT = '''\
"""Is the truncated backpropagation through time of LabelsInADict right?"""

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

import tbptt_props as tb
from test_wiring import LabelsInADict


def batches(case: tb.Case) -> list[Any]:
    return [{"features": x, "labels": y.argmax(-1)} for x, y in case.tensors()]


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(prediction.flatten(0, 1), target.flatten(0, 1))


@tb.conformance(chunk=5, outputs=4)
def test_labels_in_a_dict(case: tb.Case) -> tb.Subject:
    module = LabelsInADict(input_dim=case.inputs, num_classes=case.outputs, hidden=case.hidden)
    return tb.Subject(module, loss=loss, batches=batches)
'''

TOKENS_TIME_FIRST = '''\
"""Is the truncated backpropagation through time of TokensTimeFirst right?"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import tbptt_props as tb
from test_wiring import TokensTimeFirst

VOCABULARY = 11


def batches(case: tb.Case) -> list[Any]:
    generator = torch.Generator().manual_seed(case.seed)
    made = [torch.randint(VOCABULARY, (t + 1, b), generator=generator) for b, t in case.sizes()]
    return made


def loss(prediction: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(prediction.flatten(0, 1), target.flatten(0, 1))


@tb.conformance()
def test_tokens_time_first(case: tb.Case) -> tb.Subject:
    module = TokensTimeFirst(vocab_size=VOCABULARY, nhid=case.hidden, bptt=case.chunk)
    return tb.Subject(module, loss=loss, batches=batches, parts=lambda b: (b[:-1].T, b[1:].T))
'''

LOSES_ITS_TAIL = '''\
"""Is the truncated backpropagation through time of LosesItsTail right?"""

from torch.nn.functional import mse_loss

import tbptt_props as tb
from test_wiring import LosesItsTail


# QUESTION: is this meant? Then say contract=tb.Contract(tail="drop") below, with which nothing is
# broken
@tb.conformance(inputs=3, outputs=2, chunk=10)
def test_loses_its_tail(case: tb.Case) -> tb.Subject:
    module = LosesItsTail()
    return tb.Subject(module, loss=mse_loss)
'''

OWN_LOSS = '''\
"""Is the truncated backpropagation through time of OwnLoss right?"""

import tbptt_props as tb
from test_wiring import OwnLoss, half_of_it


@tb.conformance(outputs=4, inputs=4)
def test_own_loss(case: tb.Case) -> tb.Subject:
    module = OwnLoss(n_features=case.inputs, k=case.chunk)
    return tb.Subject(module, loss=half_of_it)
'''


FIXED = {"LabelsInADict": {"chunk": 5, "outputs": 4}, "OwnLoss": {"inputs": 4, "outputs": 4}}


def written(name: str, tmp_path: Path) -> str:
    """Return the test file that is written for a module of this file."""
    file = tmp_path / f"test_{name}.py"
    assert main(["init", f"test_wiring:{name}", "--output", str(file)]) == 0
    return file.read_text(encoding="utf-8")


def built(source: str, test: str) -> Any:
    """Return what a test file judges, without what makes it a pytest item."""
    plain = "\n".join(line for line in source.splitlines() if not line.startswith("@"))
    names: dict[str, Any] = {}
    exec(plain, names)
    return names[test]


@pytest.mark.parametrize(
    ("name", "due", "test"),
    [
        ("LabelsInADict", LABELS_IN_A_DICT, "test_labels_in_a_dict"),
        ("TokensTimeFirst", TOKENS_TIME_FIRST, "test_tokens_time_first"),
        ("OwnLoss", OWN_LOSS, "test_own_loss"),
    ],
)
def test_the_file_that_is_written_judges_a_right_loop_right(
    name: str, due: str, test: str, tmp_path: Path
) -> None:
    source = written(name, tmp_path)

    assert source == due
    fixed: dict[str, Any] = FIXED.get(name, {})
    report = tb.verify(built(source, test), max_examples=4, seed=0, **fixed)
    assert not report.broken
    assert "loss_is_the_chunks_own" in {verdict.name for verdict in report.holds}


def test_what_was_seen_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written("LabelsInADict", tmp_path)

    file = tmp_path / "test_LabelsInADict.py"
    assert capsys.readouterr().out.splitlines() == [
        "test_wiring:LabelsInADict",
        "  built by    LabelsInADict(input_dim=case.inputs, num_classes=case.outputs, "
        "hidden=case.hidden)",
        '  a batch is  {"features": inputs (B, T, I), "labels": labels (B, T)}',
        "  fixed       chunk=5, outputs=4",
        "  loss        cross_entropy(prediction.flatten(0, 1), target.flatten(0, 1))",
        "  chunks      0-4 5-9 10-10 of the first batch",
        "  updates     6 in 6 chunks of 2 batches",
        "  properties  22 hold on this one case",
        "  state       (1, 3, 5), (1, 3, 5)",
        "  optimizer   SGD",
        "",
        f"Written: {file}. Read it, then run: pytest {file}",
    ]


def test_what_may_be_meant_is_asked_and_not_taken_for_granted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert written("LosesItsTail", tmp_path) == LOSES_ITS_TAIL
    assert "  broken      chunks_tile_the_sequence" in capsys.readouterr().out

    source = written("PerSequence", tmp_path)
    assert '# QUESTION: is this meant? Then say contract=tb.Contract(update="batch")' in source
    assert "contract=tb.Contract(" not in source.partition("return tb.Subject")[2]


def test_a_mistake_in_the_loop_is_no_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written("NeverDetaches", tmp_path)

    assert "training_reaches_the_end" in capsys.readouterr().out
    assert "QUESTION" not in source
    broken = tb.verify(built(source, "test_never_detaches"), max_examples=4, inputs=4, outputs=4)
    assert "graph_crosses_no_boundary" in {verdict.name for verdict in broken.broken}


def test_a_loss_that_cannot_be_told_is_left_out_and_asked_for(tmp_path: Path) -> None:
    source = written("Secret", tmp_path)

    assert "# QUESTION: which loss(prediction, target) is trained on could not be told." in source
    assert source.endswith("    return tb.Subject(module)\n")


def test_without_tests_beside_it_the_file_is_written_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "test_wiring:OwnLoss"]) == 0
    assert (tmp_path / "test_own_loss_tbptt.py").read_text(encoding="utf-8") == OWN_LOSS

    (tmp_path / "tests").mkdir()
    assert main(["init", "test_wiring:OwnLoss"]) == 0
    assert (tmp_path / "tests" / "test_own_loss_tbptt.py").exists()


def test_a_file_that_is_there_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text("mine", encoding="utf-8")

    assert main(["init", "test_wiring:OwnLoss", "-o", str(file)]) == 2
    assert file.read_text(encoding="utf-8") == "mine"
    assert f"{file} exists already: name another one with --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("half_of_it", "half_of_it: it is no LightningModule: write a build(case) by hand"),
        ("Unheard", "Unheard must be given 'wherewithal', and what it is can't be told"),
        ("Fussy", "Fussy(hidden=case.hidden) raised ValueError: hidden must be a power of two"),
        ("Untrainable", "no batch was found that Untrainable trains on: RuntimeError: no such"),
    ],
)
def test_what_can_not_be_tried_out_is_told(
    what: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test_it.py"

    assert main(["init", f"test_wiring:{what}", "-o", str(file)]) == 2
    assert why in capsys.readouterr().err
    assert not file.exists()


def test_nothing_of_the_users_is_changed(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()

    written("OwnLoss", tmp_path)

    after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
