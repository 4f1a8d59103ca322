"""Cores and modules that torch.compile has been over, and activations that are worked out twice."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import tbptt_props as tb
from tbptt_props.device import unavailable
from tbptt_props.judge import judge
from tbptt_ref import faults_state, faults_update
from tbptt_ref.module import TruncatedRNN

CASE = tb.Case(batch=3, steps=5, chunk=2, inputs=2, hidden=3, outputs=2, batches=2)
BACKENDS = ("eager", "aot_eager")
UNJUDGED = {"one_chunk_is_one_ordinary_update", "each_chunk_draws_its_own_randomness"}
SPAN = "gradients_span_the_whole_chunk"

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def _compiles_anew() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Core(nn.Module):
    """A recurrence in Python, which a compiler makes something of."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 3)
        self.back = nn.Linear(3, 3)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = x.new_zeros(len(x), 3)
        features = []
        for step in x.unbind(1):
            state = torch.tanh(self.own(step) + self.back(state))
            features.append(state)
        return torch.stack(features, dim=1), state


class ForgetsWithin(Core):
    """Detaches its state within forward: only slopes show that."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        early, before = super().forward(x[:, :1], state)
        if x.shape[1] < 2:
            return early, before
        late, after = super().forward(x[:, 1:], before.detach())
        return torch.cat([early, late], dim=1), after


def compiled(module: nn.Module, backend: str = "inductor") -> nn.Module:
    made: Any = torch.compile(module, backend=backend)
    return made  # type: ignore[no-any-return]


class Checkpointed(nn.Module):
    """Keeps no activations: backward works them out once more."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return checkpoint(self.core, x, state, use_reentrant=False)


def around(core: nn.Module, kind: type[TruncatedRNN] = TruncatedRNN) -> tb.Subject:
    return tb.Subject(kind(core, nn.Linear(3, 2), chunk=2), loss=mse_loss)


def judged(build: Callable[[], tb.Subject]) -> tb.Report:
    """Judge what is built anew each time: a copy of what is compiled is compiled no more."""
    return judge(build, CASE)


def compiled_forward(backend: str) -> tb.Subject:
    subject = around(Core())
    module: Any = subject.module
    module.forward = torch.compile(module.forward, backend=backend)
    return subject


def compiled_in_place(backend: str) -> tb.Subject:
    subject = around(Core())
    subject.module.compile(backend=backend)
    return subject


RIGHT: dict[str, Callable[[str], tb.Subject]] = {
    "core": lambda backend: around(compiled(Core(), backend)),
    "lstm": lambda backend: around(compiled(nn.LSTM(2, 3, batch_first=True), backend)),
    "forward": compiled_forward,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", RIGHT)
def test_what_is_compiled_rightly_breaks_nothing(what: str, backend: str) -> None:
    report = judged(lambda: RIGHT[what](backend))

    assert report.broken == ()
    assert {verdict.name for verdict in report.not_judged} == UNJUDGED


def test_a_module_that_is_compiled_in_place_breaks_nothing() -> None:
    report = judged(lambda: compiled_in_place("eager"))

    assert report.broken == ()
    assert {verdict.name for verdict in report.not_judged} == UNJUDGED


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler for C++")
def test_what_inductor_makes_of_a_core_breaks_nothing() -> None:
    assert judged(lambda: around(compiled(Core()))).broken == ()


def test_a_lightning_module_that_was_made_another_object_is_refused_with_what_to_do() -> None:
    subject = tb.Subject(compiled(around(Core()).module, "eager"), loss=mse_loss)

    with pytest.raises(tb.ObservationError, match=r"call module\.compile\(\), or compile its core"):
        judged(lambda: subject)


FAULTS: dict[str, tuple[type[TruncatedRNN], str]] = {
    "NeverDetaches": (faults_state.NeverDetaches, "graph_crosses_no_boundary"),
    "ForgetsState": (faults_state.ForgetsState, "state_crosses_every_boundary"),
    "DetachesEveryTimeStep": (faults_state.DetachesEveryTimeStep, SPAN),
    "NeverClears": (faults_update.NeverClears, "gradients_are_the_chunks_own"),
    "UpdatesTwice": (faults_update.UpdatesTwice, "each_chunk_updates_once"),
}


@pytest.mark.parametrize("wrap", ["eager", "aot_eager", "checkpointed"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_around_such_a_core_is_found(name: str, wrap: str) -> None:
    kind, due = FAULTS[name]

    def build() -> tb.Subject:
        core = Core()
        wrapped = Checkpointed(core) if wrap == "checkpointed" else compiled(core, wrap)
        return around(wrapped, kind)

    assert due in {verdict.name for verdict in judged(build).broken}


@pytest.mark.parametrize("wrap", ["eager", "aot_eager", "checkpointed"])
def test_a_fault_within_such_a_core_is_found(wrap: str) -> None:
    """What aot_eager compiles is one node of the graph, whose gradient could be anything."""

    def build() -> tb.Subject:
        core = ForgetsWithin()
        return around(Checkpointed(core) if wrap == "checkpointed" else compiled(core, wrap))

    assert [verdict.name for verdict in judged(build).broken] == [SPAN]


class DropsWithin(Core):
    """Starts from zeros, whatever state comes in."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(x)


@pytest.mark.parametrize("wrap", ["eager", "aot_eager", "checkpointed"])
def test_a_core_that_drops_its_state_is_found(wrap: str) -> None:
    def build() -> tb.Subject:
        core = DropsWithin()
        return around(Checkpointed(core) if wrap == "checkpointed" else compiled(core, wrap))

    broken = {verdict.name for verdict in judged(build).broken}

    assert "state_crosses_every_boundary" in broken


@pytest.mark.parametrize(
    "core", [Core, lambda: nn.LSTM(2, 3, batch_first=True)], ids=["own", "lstm"]
)
def test_activations_that_are_worked_out_again_break_nothing(core: Callable[[], nn.Module]) -> None:
    report = judged(lambda: around(Checkpointed(core())))

    assert report.broken == ()
    assert {verdict.name for verdict in report.not_judged} == UNJUDGED


# CUDA graphs --------------------------------------------------------------------------------


def replays(x: Tensor, state: Any = None) -> Any:
    """Stand in for what make_graphed_callables puts in the place of a forward."""


replays.__module__ = "torch.cuda.graphs"


@pytest.mark.parametrize("where", ["forward", "run"])
def test_what_replays_a_graph_is_refused_with_what_to_do(where: str) -> None:
    subject = around(Core())
    setattr(subject.module.core, where, replays)

    with pytest.raises(
        tb.ObservationError, match=rf"\.core\.{where} replays a CUDA graph.*without"
    ):
        judged(lambda: subject)


class Captures(TruncatedRNN):
    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


def test_a_loop_that_captures_a_graph_itself_is_refused() -> None:
    with pytest.raises(
        tb.ObservationError, match="can't be watched while it captures a CUDA graph"
    ):
        judged(lambda: around(Core(), Captures))


@pytest.mark.skipif(bool(unavailable("cuda")), reason=f"needs {unavailable('cuda')}")
def test_a_core_that_was_captured_on_a_gpu_is_refused() -> None:
    sample = torch.zeros(3, 2, 2, device="cuda"), torch.zeros(3, 3, device="cuda")
    core: Any = torch.cuda.make_graphed_callables(Core().cuda(), sample)
    subject = around(core)

    with pytest.raises(tb.ObservationError, match=r"\.core\.forward replays a CUDA graph"):
        judged(lambda: replace(subject, device="cuda"))


class Clones(nn.Module):
    """Hands on copies: the next replay of a graph writes over what it returned."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return features.clone(), state.clone()


@pytest.mark.skipif(bool(unavailable("cuda")), reason=f"needs {unavailable('cuda')}")
def test_a_core_that_is_compiled_to_a_graph_breaks_nothing_on_a_gpu() -> None:
    def build() -> tb.Subject:
        core: Any = torch.compile(Core(), mode="reduce-overhead")
        return replace(around(Clones(core)), device="cuda", precision="32-true")

    assert judged(build).broken == ()
