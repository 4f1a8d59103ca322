"""Processes that train together: what holds of a right loop, what is found, and nothing is left.

Real processes, over gloo. They import `build` and the rest of this module by its name.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import tbptt_props as tb
from tbptt_props import ddp
from tbptt_props.agreement import OF_GROUPS, Processes, Told, Update
from tbptt_props.ddp import _Group, backend, judged, placed
from tbptt_props.observation import observing
from tbptt_ref.faults import AMONG_PROCESSES, Fault
from tbptt_ref.module import TruncatedRNN, detached

END, SHARED, SAME = (p.__name__ for p in OF_GROUPS)
TIMEOUT = 4.0
SHIPPED = ddp.START_METHOD


class OwnModel(nn.Module):
    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.core = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.core(x, state)
        return self.readout(features), state


def sharding_loop(module: nn.Module, batches: Any) -> None:
    """Leave each process but a part of each parameter."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes long: not in processes without it

    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    for x, _ in batches:
        module(x)


def wrapped_loop(module: nn.Module, batches: Any, *, bypasses: bool = False) -> None:
    """Wrap the model as a loop without Lightning does, and call it so or go round the wrapper."""
    ddp = DistributedDataParallel(module)
    model = ddp.module if bypasses else ddp
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for batch in batches:
        state: Any = None
        for x, y in zip(*(part.split(2, dim=1) for part in batch), strict=True):
            optimizer.zero_grad()
            prediction, state = model(x, state)
            mse_loss(prediction, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            state = detached(state)


def bypassing_loop(module: nn.Module, batches: Any) -> None:
    wrapped_loop(module, batches, bypasses=True)


class Raises(TruncatedRNN):
    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.global_rank == 1:
            raise RuntimeError("no disk left")
        return super().train_chunk(x, y, state)


class Dies(TruncatedRNN):
    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        if self.global_rank == 1:
            os._exit(3)
        return super().train_chunk(x, y, state)


def built(kind: type[TruncatedRNN], case: tb.Case) -> tb.Subject:
    fault = Fault(kind)
    return tb.Subject(fault.build(case), loss=mse_loss)


def made_by(fault: Fault, case: tb.Case) -> tb.Subject:
    return tb.Subject(fault.build(case), loss=mse_loss)


def adding_up(case: tb.Case) -> tb.Subject:
    module = AddsUp(*parts(case), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss, contract=tb.Contract(update="batch"))


class AddsUp(TruncatedRNN):
    """Adds gradients up over a batch, each process by itself, and averages the sum: rightly so."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        strategy, optimizer, state = self.trainer.strategy, self.optimizers(), None
        pieces = list(self.chunks(*batch))
        optimizer.zero_grad()  # type: ignore[union-attr]
        for x, y in pieces[:-1]:
            with strategy.block_backward_sync():  # type: ignore[attr-defined]
                state = self.added(x, y, state)
        self.added(*pieces[-1], state)
        optimizer.step()  # type: ignore[union-attr]

    def added(self, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, state = self(x, state)
        self.manual_backward(self.loss(prediction, y))
        return detached(state)


def parts(case: tb.Case) -> tuple[nn.Module, nn.Module]:
    core = nn.GRU(case.inputs, case.hidden, batch_first=True)
    return core, nn.Linear(case.hidden, case.outputs)


# What is built is told by a size that makes no other difference: processes live from case to case.
KINDS: dict[int, Callable[[tb.Case], tb.Subject]] = {
    1: lambda case: built(TruncatedRNN, case),
    2: adding_up,
    3: lambda case: tb.Subject(OwnModel(case), loss=mse_loss, train=wrapped_loop),
    4: lambda case: tb.Subject(OwnModel(case), loss=mse_loss, train=bypassing_loop),
    5: lambda case: tb.Subject(
        AMONG_PROCESSES[0].build(case), loss=mse_loss, precision="bf16-mixed"
    ),
    6: lambda case: tb.Subject(
        Fault(TruncatedRNN).build(case), loss=mse_loss, precision="bf16-mixed"
    ),
    7: lambda case: built(Raises, case),
    8: lambda case: built(Dies, case),
    9: lambda case: tb.Subject(OwnModel(case), loss=mse_loss, train=sharding_loop),
    20: lambda case: hypothesis.reject(),
    21: lambda case: hypothesis.reject() if case.seed else built(TruncatedRNN, case),
    **{10 + i: partial(made_by, fault) for i, fault in enumerate(AMONG_PROCESSES)},
}


def build(case: tb.Case) -> tb.Subject:
    return KINDS[case.outputs](case)


def right(case: tb.Case) -> tb.Subject:
    hypothesis.assume(case.steps < 9)
    return built(TruncatedRNN, case)


def of_no_use(case: tb.Case) -> tb.Subject:
    raise OSError("no such corpus")


def case_of(kind: int) -> tb.Case:
    return tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=3, outputs=kind, batches=2)


@pytest.fixture(scope="module")
def _started_sooner() -> Iterator[None]:
    """Fork processes from one that has imported all: it would take each of them many seconds."""
    multiprocessing.set_forkserver_preload([ddp.__name__, __name__])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ddp, "START_METHOD", "forkserver")
        yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def group(_started_sooner: None) -> Iterator[_Group]:
    with _Group(build, 2, TIMEOUT, uneven=False, strategy="ddp") as group:
        yield group


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def report_on(group: _Group, kind: int) -> tb.Report:
    return judged(group.train(case_of(kind)), case_of(kind))


def statuses(report: tb.Report) -> dict[str, str]:
    return {verdict.name: verdict.status for verdict in report.verdicts}


# What holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [1, 2, 3, 6])
def test_processes_that_train_rightly_break_nothing(group: _Group, kind: int) -> None:
    assert statuses(report_on(group, kind)) == dict.fromkeys((END, SHARED, SAME), "holds")


def test_gradients_are_those_of_one_process_on_all_the_sequences(group: _Group) -> None:
    case = case_of(1)
    told = group.train(case)
    with observing(case):  # as process 0 makes it, whose parameters all others get
        build(case)
        subject = build(case)
    both = [group.case_of(rank, case).tensors() for rank in (0, 1)]
    together = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*both, strict=True)]

    alone = tb.observe(
        tb.Subject(subject.module, loss=mse_loss, batches=lambda _: together), case
    ).chunks

    assert len(alone) == len(told[0].updates) == len(told[1].updates) == 6
    for chunk, *updates in zip(alone, told[0].updates, told[1].updates, strict=True):
        assert chunk.outcome is not None
        for update in updates:
            torch.testing.assert_close(dict(update.met), dict(chunk.outcome.gradients))


def test_a_search_draws_cases_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "START_METHOD", SHIPPED)
    environment, running = dict(os.environ), {*multiprocessing.active_children()}

    report = tb.verify_ddp(right, max_examples=2, seed=1)

    assert statuses(report) == dict.fromkeys((END, SHARED, SAME), "holds")
    assert report.examples == 2
    assert report.subject == "test_ddp:right"
    assert {*multiprocessing.active_children()} == running
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized()


# What is found ------------------------------------------------------------------------------

BROKEN = {
    "CallsBackwardItself": ({SHARED, SAME}, "backward_is_not_synchronised"),
    "BlocksSynchronisation": ({SHARED, SAME}, "backward_is_not_synchronised"),
    "SynchronisesOncePerBatch": ({SHARED, SAME}, "some_backwards_are_not_synchronised"),
    "FollowsItsOwnLoss": ({SAME}, "processes_go_by_numbers_of_their_own"),
    "SkipsEasyChunks": ({END}, "numbers_of_chunks_differ"),
}


@pytest.mark.parametrize("number", range(len(AMONG_PROCESSES)))
def test_a_fault_among_processes_is_found_and_its_cause_is_named(
    group: _Group, number: int
) -> None:
    broken, cause = BROKEN[AMONG_PROCESSES[number].name]

    report = report_on(group, 10 + number)

    assert {verdict.name for verdict in report.broken} == broken
    assert {c.name for verdict in report.broken for c in verdict.causes} == {cause}


def test_a_wrapper_that_is_gone_round_is_found(group: _Group) -> None:
    report = report_on(group, 4)

    assert {verdict.name for verdict in report.broken} == {SHARED, SAME}
    assert "its own alone" in str(report[SHARED].violations[0])


def test_it_is_found_in_mixed_precision_too(group: _Group) -> None:
    assert report_on(group, 5)[SHARED].status == "broken"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (7, "process 1: raised RuntimeError: no disk left"),
        (8, "process 1: raised nothing: the process is gone"),
    ],
)
def test_a_process_that_raises_or_dies_is_told_and_the_others_are_ended(
    group: _Group, kind: int, error: str
) -> None:
    report = report_on(group, kind)

    assert str(report[END].violations[0]) == f"{error}, but should be trained to the end"
    assert group.running == []
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("_started_sooner")
def test_processes_that_wait_for_one_another_are_told_of_in_time_and_ended() -> None:
    running = {*multiprocessing.active_children()}

    report = tb.verify_ddp(
        right, max_examples=20, seed=0, timeout=TIMEOUT, uneven=True, chunk=1, steps=3, batches=1
    )

    assert report[END].status == "broken"
    assert "after 3 and 2 backward passes" in str(report[END].violations[0])
    assert [cause.name for cause in report[END].causes] == ["numbers_of_chunks_differ"]
    assert {*multiprocessing.active_children()} == running


# What can't be judged -----------------------------------------------------------------------


def test_what_no_process_can_import_is_refused() -> None:
    with pytest.raises(tb.ObservationError, match="build must be importable by its name"):
        tb.verify_ddp(lambda case: build(case))


@pytest.mark.usefixtures("_started_sooner")
def test_what_a_factory_raises_is_told_of_and_nobody_is_left() -> None:
    running = {*multiprocessing.active_children()}

    with pytest.raises(tb.ObservationError, match=r"process [01]: OSError: no such corpus"):
        tb.verify_ddp(of_no_use, max_examples=1)
    assert {*multiprocessing.active_children()} == running


def test_parameters_of_which_each_process_has_but_a_part_are_refused(group: _Group) -> None:
    with pytest.raises(tb.ObservationError, match=r"process [01]: parameters are sharded over"):
        group.train(case_of(9))


def test_processes_live_on_where_all_assume_a_case_away(group: _Group) -> None:
    group.train(case_of(1))
    running = [process.pid for process in group.running]

    with pytest.raises(UnsatisfiedAssumption):
        group.train(case_of(20))
    assert [process.pid for process in group.running] == running


def test_they_are_ended_where_one_alone_does(
    group: _Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.train(case_of(1))
    monkeypatch.setattr(group, "timeout", 0.5)

    with pytest.raises(UnsatisfiedAssumption):
        group.train(case_of(21))
    assert group.running == []


# Where it is trained ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "spoken", "where"),
    [(0, "gloo", "cpu"), (1, "gloo", "cpu"), (2, "cpu:gloo,cuda:nccl", "cuda")],
)
def test_processes_talk_by_nccl_where_each_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, devices: int, spoken: str, where: str
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    subject = tb.Subject(nn.Linear(1, 1), device="cuda")

    assert backend(2) == spoken
    assert placed(subject, 1, 2).device == where
    assert chosen == ([1] if where == "cuda" else [])
    assert placed(tb.Subject(nn.Linear(1, 1)), 1, 2).device == "cpu"


def right_on_gpus(case: tb.Case) -> tb.Subject:
    return replace(right(case), device="cuda")


def bare_on_gpus(case: tb.Case) -> tb.Subject:
    return replace(made_by(AMONG_PROCESSES[0], case), device="cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("build", "status"), [(right_on_gpus, "holds"), (bare_on_gpus, "broken")])
def test_processes_with_a_gpu_each_are_judged_over_nccl(
    build: Callable[[tb.Case], tb.Subject], status: str
) -> None:
    report = tb.verify_ddp(build, max_examples=3, seed=0, timeout=60.0)

    assert report[SHARED].status == status


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"processes": 1}, "processes must be at least 2"),
        ({"max_examples": 0}, "max_examples must be at least 1"),
        ({"timeout": 0}, "timeout must be positive"),
    ],
)
def test_an_impossible_number_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tb.verify_ddp(build, **given)


# Findings, on what is made up ---------------------------------------------------------------


def told(*gradients: float, own: tuple[float, float], end: float = 1.0) -> Processes:
    return [
        Told(
            updates=(Update("time steps 0-1", one(own[rank]), one(met)),),
            parameters=one(end if rank else 1.0),
        )
        for rank, met in enumerate(gradients)
    ]


def one(value: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([value], dtype=torch.float64)}


def found(processes: Processes) -> dict[str, list[str]]:
    report = judged(processes, tb.Case())
    return {v.name: [str(violation) for violation in v.violations] for v in report.broken}


def test_the_mean_is_due_and_nothing_else() -> None:
    assert found(told(2.0, 2.0, own=(1.0, 3.0))) == {}
    assert found(told(4.0, 4.0, own=(1.0, 3.0))) == {
        SHARED: [
            "process 0, time steps 0-1, gradient of w[0] at update 0: 4, but should be 2, the mean "
            "of all processes"
        ]
    }


def test_the_last_bit_counts_at_the_end() -> None:
    assert list(found(told(2.0, 2.0, own=(1.0, 3.0), end=1.0 + 2**-52))) == [SAME]


def test_what_is_not_known_is_not_judged() -> None:
    unknown = [Told(updates=(Update("time steps 0-0", None, one(1.0), "a loss"),)) for _ in "ab"]

    report = judged(unknown, tb.Case())

    assert {v.name: v.missing for v in report.not_judged} == {
        SHARED: "a loss",
        SAME: "training that ends in all processes",
    }
