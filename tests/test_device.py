"""Where loops are trained. What needs a GPU is run by .ci/cuda, and skipped elsewhere.

What can be is tried on the CPU: by the same code, for the device is a parameter everywhere.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from benchmarks.device import MIDDLE, judge, peak
from tbptt_props import alike, device
from tbptt_props.compare import close, difference, same
from tbptt_props.device import WORKSPACE, drawn, repeatable, repeats_itself, set_drawn, unavailable
from tbptt_props.precision import Precision
from tbptt_ref.faults import ADAM, FAULTS, ON_A_DEVICE, Fault
from tbptt_ref.module import State, TruncatedRNN

NO_CUDA = unavailable("cuda")
needs_cuda = pytest.mark.skipif(bool(NO_CUDA), reason=f"needs {NO_CUDA}")
without_cuda = pytest.mark.skipif(not NO_CUDA, reason="there is a GPU")
LOAD = ("-p", "tbptt_props.plugin")  # which is no more than once, where it is installed
SEVERAL = tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=4)

SUITE = """
import torch
from torch import nn
from torch.nn.functional import mse_loss
import tbptt_props as tb
from tbptt_ref.module import TruncatedRNN

@tb.conformance(max_examples=2)
def test_it(case: tb.Case) -> tb.Subject:
    core = nn.GRU(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)
"""


def right(case: tb.Case) -> tb.Subject:
    core = nn.GRU(case.inputs, case.hidden, batch_first=True)
    module = TruncatedRNN(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)


def on_cuda(case: tb.Case) -> tb.Subject:
    return tb.Subject(right(case).module, loss=mse_loss, device="cuda")


# What is asked for --------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["warp", "meta", 3])
def test_a_device_that_there_is_not_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda, got device="):
        tb.Subject(nn.Linear(1, 1), device=device)


@without_cuda
@pytest.mark.parametrize(
    "judge",
    [
        lambda: tb.observe(on_cuda(SEVERAL), SEVERAL),
        lambda: tb.check(on_cuda(SEVERAL), SEVERAL),
        lambda: tb.verify(right, max_examples=1, device="cuda"),
        lambda: tb.verify_devices(right, max_examples=1),
    ],
)
def test_what_is_to_be_trained_on_a_gpu_says_that_there_is_none(judge: Callable[[], Any]) -> None:
    with pytest.raises(tb.ObservationError, match=r"training on cuda needs a CUDA device: "):
        judge()


def test_verify_has_the_last_word_on_the_device() -> None:
    assert tb.verify(on_cuda, max_examples=2, seed=0, device="cpu").broken == ()


@pytest.mark.parametrize(
    ("option", "ids"),
    [([], ("",)), (["--tbptt-device=cpu"], ("cpu",)), (["--tbptt-device=all"], ("cpu", "cuda"))],
)
def test_each_property_is_an_item_on_each_device(
    pytester: pytest.Pytester, option: list[str], ids: tuple[str, ...]
) -> None:
    pytester.makepyfile(test_mine=SUITE)

    result = pytester.runpytest_inprocess(*LOAD, "--collect-only", "-q", *option)

    collected = [line for line in result.outlines if "::" in line]
    assert len(collected) == len(ids) * len(tb.PROPERTIES)
    for name in ids:
        on = [line for line in collected if not name or name in line.split("[")[1]]
        assert len(on) == len(tb.PROPERTIES)


@without_cuda
@pytest.mark.parametrize(("strict", "outcome"), [(False, "skipped"), (True, "failed")])
def test_without_a_gpu_its_items_are_skipped_with_the_reason_and_fail_where_all_has_to_be_judged(
    pytester: pytest.Pytester, strict: bool, outcome: str
) -> None:
    pytester.makepyfile(test_mine=SUITE)
    options = ["-rs", "--tbptt-device=cuda", *(["--tbptt-strict"] if strict else [])]

    result = pytester.runpytest_inprocess(*LOAD, *options)

    result.assert_outcomes(**{outcome: len(tb.PROPERTIES)})
    assert "not judged: needs a CUDA device: " in result.stdout.str().replace("\n", " ")


def test_the_device_can_be_set_in_pyproject_and_an_unknown_one_is_refused(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyprojecttoml("[tool.tbptt_props]\ndevice = 'cpu'")
    pytester.makepyfile(test_mine=SUITE)

    asked = pytester.runpytest_inprocess(*LOAD, "--collect-only", "-q")
    wrong = pytester.runpytest_inprocess(*LOAD, "--tbptt-device=gpu")

    assert "test_it[cpu-each_chunk_updates_once]" in asked.stdout.str()
    wrong.stderr.fnmatch_lines(["*--tbptt-device: no device 'gpu': *cpu, cuda, all"])


def test_a_failure_names_the_device_in_its_replay(pytester: pytest.Pytester) -> None:
    broken = SUITE.replace("TruncatedRNN(core", "CallsBackwardItself(core").replace(
        "tbptt_ref.module import TruncatedRNN", "tbptt_ref.faults_update import CallsBackwardItself"
    )
    pytester.makepyfile(test_mine=broken)

    result = pytester.runpytest_inprocess(*LOAD, "--tbptt-device=cpu")

    assert "--tbptt-device=cpu" in result.stdout.str()
    result.stdout.fnmatch_lines(["test_mine.py::test_it[[]cpu[]]: *1 broken*"])


# What is placed wrongly ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", ON_A_DEVICE, ids=lambda fault: fault.name)
def test_what_is_misplaced_on_a_device_does_no_harm_on_the_cpu(fault: Fault) -> None:
    assert tb.check(tb.Subject(fault.build(SEVERAL), loss=mse_loss), SEVERAL).broken == ()


class MasksElsewhere(TruncatedRNN):
    """Makes a mask on a device of its own: `meta` is one that each machine has."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        mask = torch.ones(3, x.shape[-1], dtype=x.dtype, device="meta")
        return super().forward(nn.functional.linear(x, mask)[..., :2], state)


def test_what_is_left_on_another_device_is_told_of_with_its_cause() -> None:
    module = MasksElsewhere(nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2), chunk=3)
    subject = tb.Subject(module, loss=mse_loss)

    verdict = tb.check(subject, SEVERAL)["training_reaches_the_end"]

    assert "made on another device" in str(verdict.violations[0])
    assert [cause.name for cause in verdict.causes] == ["something_is_on_another_device"]


# One device against another -----------------------------------------------------------------


class ActsOtherwiseInATrainer(TruncatedRNN):
    """Stands in for a device that multiplies wrongly: where it is worked out anew, it is right."""

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        prediction, state = super().forward(x, state)
        return prediction * (1 if self._trainer is None else 1.001), state


@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed"])
def test_a_right_loop_trains_alike_on_each_device(precision: Precision | None) -> None:
    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(right(case).module, loss=mse_loss, precision=precision)

    report = tb.verify_devices(build, devices=("cpu", "cpu"), max_examples=10, seed=0)

    assert report["devices_train_alike"].status == "holds"


def test_what_comes_out_otherwise_is_told_with_the_smallest_case() -> None:
    def build(case: tb.Case) -> tb.Subject:
        core = nn.GRU(case.inputs, case.hidden, batch_first=True)
        module = ActsOtherwiseInATrainer(
            core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk
        )
        return tb.Subject(module, loss=mse_loss)

    verdict = tb.verify_devices(build, devices=("cpu", "cpu"), max_examples=5, seed=0)[
        "devices_train_alike"
    ]

    assert verdict.status == "broken"
    assert verdict.case == tb.Case(steps=1, chunk=1)
    assert "time steps 0-0 on cpu, loss: " in str(verdict.violations[0])


# A state that makes its way through the host ------------------------------------------------
#
# On the CPU, memory for float64 stands in for the host's: to it and back, float32 loses nothing.


@pytest.fixture
def float64_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_the_hosts", lambda tensor: tensor.dtype == torch.float64)
    monkeypatch.setattr(alike, "has_memory_of_its_own", lambda device: True)


class Moves(TruncatedRNN):
    """Does something with each state on its way, and something with the loss."""

    def train_chunk(self, x: Tensor, y: Tensor, state: State) -> tuple[Tensor, State]:
        loss, state = super().train_chunk(x.double().float(), y.double().float(), state)
        return loss, self.moved(state)

    def moved(self, state: Any) -> Any:
        raise NotImplementedError


class ThereAndBack(Moves):
    def moved(self, state: Any) -> Any:
        return tuple(tensor.double().float() for tensor in state)


class ByNumpy(Moves):
    def moved(self, state: Any) -> Any:
        h, c = state
        return torch.from_numpy(h.double().numpy()).float(), c


class ByLists(Moves):
    def moved(self, state: Any) -> Any:
        h, c = state
        return h, torch.tensor(c.tolist(), dtype=torch.float64).float()


class IntoABuffer(Moves):
    def moved(self, state: Any) -> Any:
        h, c = state
        return torch.empty_like(h).copy_(h.double()), c


class NowAndThen(Moves):
    count = 0

    def moved(self, state: Any) -> Any:
        self.count += 1
        return state if self.count == 2 else tuple(tensor.double().float() for tensor in state)


class KeepsACopy(Moves):
    """Logs and keeps what it likes of a state, and goes on from the state itself."""

    def moved(self, state: Any) -> Any:
        self.kept = [tensor.double() for tensor in state]
        self.log("norm", self.kept[0].norm().item())
        self.shown = [tensor.float() for tensor in self.kept]
        return tuple(tensor.clone() for tensor in state)


class MasksFromTheHost(Moves):
    def moved(self, state: Any) -> Any:
        mask = torch.ones(state[0].shape, dtype=torch.float64).float()
        return tuple(mask * tensor for tensor in state)


class UsesMemoryAgain(Moves):
    """What was copied from the host is written over with the state itself."""

    def moved(self, state: Any) -> Any:
        memory = [torch.zeros_like(tensor, dtype=torch.float64).float() for tensor in state]
        return tuple(to.copy_(tensor) for to, tensor in zip(memory, state, strict=True))


class AddsToMemory(Moves):
    """As it is done where the first state is made on the host, and all others are added to it."""

    def moved(self, state: Any) -> Any:
        memory = [torch.zeros_like(tensor, dtype=torch.float64).float() for tensor in state]
        return tuple(to.add_(tensor) for to, tensor in zip(memory, state, strict=True))


class TakesStatesFromTheHost(Moves):
    """As with states that are kept beside the data: what comes in is not what went out."""

    def moved(self, state: Any) -> Any:
        return tuple(torch.ones_like(tensor, dtype=torch.float64).float() for tensor in state)


def moving(kind: type[TruncatedRNN]) -> Callable[[tb.Case], tb.Subject]:
    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(Fault(kind).build(case), loss=mse_loss, precision="32-true")

    return build


STAYS = "the_state_stays_on_its_device"


@pytest.mark.usefixtures("float64_is_the_host")
@pytest.mark.parametrize("kind", [ThereAndBack, ByNumpy, ByLists, IntoABuffer])
def test_a_state_that_goes_to_the_host_and_back_is_found(kind: type[TruncatedRNN]) -> None:
    verdict = tb.verify_devices(moving(kind), devices=("cpu", "cpu"), max_examples=2, seed=0)[STAYS]

    assert verdict.case == tb.Case(steps=2, chunk=1)
    assert re.fullmatch(
        r"time steps 1-1 on cpu, incoming state\[[01]\]: a copy that went to the host and back, "
        "but should be left on cpu",
        str(verdict.violations[0]),
    )
    assert [cause.name for cause in verdict.causes] == ["the_state_is_sent_to_the_host"]


@pytest.mark.usefixtures("float64_is_the_host")
@pytest.mark.parametrize(
    "kind",
    [
        TruncatedRNN,
        KeepsACopy,
        MasksFromTheHost,
        UsesMemoryAgain,
        AddsToMemory,
        TakesStatesFromTheHost,
        NowAndThen,
    ],
)
def test_other_copies_are_left_alone(kind: type[TruncatedRNN]) -> None:
    report = tb.verify_devices(
        moving(kind), devices=("cpu", "cpu"), max_examples=1, seed=0, steps=5, chunk=1
    )

    assert report.broken == ()
    assert report[STAYS].status == "holds"


def test_on_the_cpu_there_is_no_other_memory_and_nothing_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(alike, "copies_noted", None)

    report = tb.verify_devices(right, devices=("cpu", "cpu"), max_examples=2, seed=0)

    assert "memory of its own" in report[STAYS].missing


# The device itself --------------------------------------------------------------------------


def test_the_cpu_repeats_itself_and_cuda_where_cublas_is_told_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    assert repeats_itself("cpu")
    assert not repeats_itself("cuda")
    monkeypatch.setenv(WORKSPACE, ":4096:8")
    assert repeats_itself("cuda")


def test_what_was_drawn_can_be_put_back() -> None:
    with torch.random.fork_rng(devices=[]):
        before = drawn()
        first = torch.randn(3)
        assert not torch.equal(drawn(), before)
        set_drawn(before)
        assert torch.equal(torch.randn(3), first)


def test_on_the_cpu_nothing_is_switched() -> None:
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    with repeatable("cpu"):
        inside = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    assert inside == flags


# With a GPU ---------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("core", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_right_loop_breaks_nothing_on_a_gpu(core: Any, precision: Precision | None) -> None:
    def build(case: tb.Case) -> tb.Subject:
        parts = (
            core(case.inputs, case.hidden, batch_first=True),
            nn.Linear(case.hidden, case.outputs),
        )
        module = TruncatedRNN(*parts, chunk=case.chunk, optimizer=ADAM)
        return tb.Subject(module, loss=mse_loss, precision=precision)

    report = tb.verify(build, max_examples=100, seed=0, device="cuda")

    assert report.broken == ()
    assert len(report.not_judged) <= 1


@needs_cuda
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_found_on_a_gpu(fault: Any) -> None:
    contract = tb.Contract(clip_norm=fault.clip_norm)

    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(fault.build(case), loss=mse_loss, contract=contract)

    assert tb.verify(build, max_examples=30, seed=0, device="cuda").broken


@needs_cuda
@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed"])
def test_a_gpu_comes_to_what_the_cpu_does(precision: Precision | None) -> None:
    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(right(case).module, loss=mse_loss, precision=precision)

    report = tb.verify_devices(build, max_examples=50, seed=0)

    assert report["devices_train_alike"].status == "holds"


@needs_cuda
def test_tensors_on_two_devices_are_compared() -> None:
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")

    assert same(here, there)
    assert close(there, here)
    assert difference("x", there, here + torch.eye(3)[1]).index == (1,)


@needs_cuda
def test_what_is_switched_for_a_gpu_is_put_back() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    state = torch.cuda.get_rng_state()

    tb.check(tb.Subject(right(SEVERAL).module, loss=mse_loss, device="cuda"), SEVERAL)

    assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.cuda.get_rng_state(), state)


@needs_cuda
@pytest.mark.parametrize("fault", ON_A_DEVICE[1:], ids=lambda fault: fault.name)
def test_what_is_left_on_the_host_is_told_of(fault: Fault) -> None:
    subject = tb.Subject(fault.build(SEVERAL), loss=mse_loss, device="cuda")

    verdict = tb.check(subject, SEVERAL)["training_reaches_the_end"]

    assert [cause.name for cause in verdict.causes] == ["something_is_on_another_device"]


@needs_cuda
def test_the_peak_of_memory_stays_where_it_is_however_many_chunks_there_are() -> None:
    few, many = (
        peak(judge, replace(MIDDLE, hidden=512, steps=count * MIDDLE.chunk)) for count in (4, 32)
    )

    assert many < 1.2 * few  # the batch itself grows, by less than that


@needs_cuda
def test_a_state_that_goes_through_the_memory_of_the_host_is_found() -> None:
    (fault,) = (fault for fault in ON_A_DEVICE if fault.name == "SendsStateThroughTheHost")

    def build(case: tb.Case) -> tb.Subject:
        return tb.Subject(fault.build(case), loss=mse_loss)

    verdict = tb.verify_devices(build, max_examples=10, seed=0)[STAYS]

    assert [cause.name for cause in verdict.causes] == ["the_state_is_sent_to_the_host"]
