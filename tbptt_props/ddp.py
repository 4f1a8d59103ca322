"""Judges a loop that several processes run together: DistributedDataParallel, over gloo or NCCL.

The processes are started anew, as `spawn` does it, and live from case to case. Each trains on
sequences of its own, and tells of its updates through a pipe. Whoever waits for another that does
not come is told of, and ended.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import distributed

from tbptt_props.agreement import OF_GROUPS, Processes, Told, Update, causes_among
from tbptt_props.case import Case
from tbptt_props.judge import is_of_dtypes
from tbptt_props.observation import batches_of, made_ready, observing
from tbptt_props.precision import dtype_of
from tbptt_props.rederivation import rederive
from tbptt_props.report import Report, Verdict
from tbptt_props.search import Bench, measure
from tbptt_props.strategies import cases
from tbptt_props.subject import ObservationError, Subject, shortened
from tbptt_props.trace import Chunk
from tbptt_props.train import train
from tbptt_props.watch import Watch

Build = Callable[[Case], Subject]
START_METHOD = "spawn"  # which leaves nothing running when the processes have ended
STARTING = 120.0  # seconds in which a process has to come up: it imports torch and Lightning
SMALLER = 12  # trainings to make a case smaller that breaks something
SMALLEST_FIRST = ("batches", "steps", "batch", "hidden", "inputs", "outputs")
APART = 4096  # by so much are the seeds of processes apart: the two low bits are sizes


def verify_ddp(
    build: Build,
    *,
    processes: int = 2,
    max_examples: int = 10,
    seed: int | None = None,
    timeout: float = 10.0,
    uneven: bool = False,
    strategy: str = "ddp",
    **fixed: int,
) -> Report:
    """Train what `build(case)` returns in several processes together, and judge what they share.

    Args:
        build: makes a fresh subject; the processes import it by its name, so it is a function of a
            module. A script that calls this does so under `if __name__ == "__main__"`.
        processes: how many; each gets sequences of its own.
        max_examples: how many cases to try.
        seed: makes the search repeatable; drawn anew if it is not given.
        timeout: seconds in which no process moves, after which they count as waiting.
        uneven: whether sequences are shorter in some processes, as they are in data of many
            lengths: a loop has to make as many backward passes in each all the same.
        strategy: the name of a strategy of Lightning's, such as `ddp_find_unused_parameters_true`.
            One that shards parameters, such as `fsdp`, is refused.
        fixed: sizes of a case that the subject can't vary, by name.

    Raises:
        ObservationError: the processes can't be started, or a subject can't be described.
        TypeError: `build` can't be called, or does not return a subject.
        ValueError: a number is impossible, or a size has no such name or value.
    """
    if not callable(build):
        raise TypeError(f"build must be callable, got build={shortened(build)}")
    least = {"processes": (processes, 2), "max_examples": (max_examples, 1)}
    for name, (given, due) in least.items():
        if given < due:
            raise ValueError(f"{name} must be at least {due}, got {name}={given}")
    if not timeout > 0:
        raise ValueError(f"timeout must be positive, got timeout={timeout}")
    number = random.SystemRandom().getrandbits(64) if seed is None else seed
    with _Group(build, processes, timeout, uneven, strategy) as group:
        bench = _Together(build, group)
        examples = bench.searched(cases(**fixed), number, max_examples)
        verdicts = tuple(
            bench.made_smaller(verdict, fixed) if verdict.violations else verdict
            for verdict in bench.summed().verdicts
        )
    return Report(bench.name, verdicts, examples=examples)


class _Enough(Exception):
    """Ends a search."""


class _Together(Bench):
    """Judges by what several processes do."""

    def __init__(self, build: Build, group: _Group) -> None:
        super().__init__(build, properties=())
        self.group = group

    def judge(self, case: Case) -> Report:
        """Return the report on `case`, training only the first time."""
        if case not in self.reports:
            self.reports[case] = judged(self.group.train(case), case, self.name)
        return self.reports[case]

    def searched(self, strategy: Any, number: int, max_examples: int) -> int:
        """Judge drawn cases until processes wait for one another: that costs time, and says it."""

        def stop(count: int, report: Report) -> None:
            if self.group.ended:
                raise _Enough

        try:
            return self.search(strategy, number, max_examples, stop)
        except _Enough:
            return len(self.reports)

    def summed(self) -> Report:
        """Sum up all cases: broken on one is broken, and the smallest is told."""
        verdicts = []
        for index in range(len(OF_GROUPS)):
            found = [report.verdicts[index] for report in self.reports.values()]
            broken = [verdict for verdict in found if verdict.violations]
            first = min(broken, key=lambda v: measure(v.case or Case())) if broken else found[0]
            count = sum(verdict.judged for verdict in found)
            verdicts.append(replace(first, judged=count, missing="" if count else first.missing))
        return Report(self.name, tuple(verdicts), examples=len(self.reports))

    def made_smaller(self, verdict: Verdict, fixed: Mapping[str, int]) -> Verdict:
        """Try smaller cases, but only a few: processes may have to be started anew for each."""
        best = verdict
        most = len(self.reports) + (SMALLER if not self.group.ended else 2)
        for size, less in product(SMALLEST_FIRST, (1, 2)):
            case = best.case or Case()
            if size in fixed or less >= getattr(case, size) or len(self.reports) >= most:
                continue
            found = self.judge(replace(case, **{size: less}))[verdict.name]
            best = found if found.violations else best
        return replace(best, judged=verdict.judged)


def judged(told: Processes, case: Case, name: str = "subject") -> Report:
    """Judge what the processes told of one case."""
    verdicts = []
    for property_ in OF_GROUPS:
        verdict = Verdict.of(property_, list(property_(told)), case)
        causes = causes_among(told, verdict.name) if verdict.violations else ()
        verdicts.append(replace(verdict, causes=causes))
    return Report(name, tuple(verdicts))


# The processes, from outside ------------------------------------------------------------------


class _Group:
    """Processes that train together, started when they are needed and ended in any case."""

    def __init__(
        self, build: Build, processes: int, timeout: float, uneven: bool, strategy: str
    ) -> None:
        self.build = build
        self.processes = processes
        self.timeout = timeout
        self.uneven = uneven
        self.strategy = strategy
        self.running: list[Any] = []
        self.pipes: list[Connection] = []
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.ended = 0  # how often processes had to be, for they waited

    def __enter__(self) -> _Group:
        try:
            pickle.dumps(self.build)
        except Exception as error:
            raise ObservationError(
                f"build must be importable by its name, for each process imports it: a function of "
                f"a module, and no lambda, got {shortened(self.build)} ({error})"
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def start(self) -> None:
        """Start the processes, which meet by a file of their own."""
        context: Any = multiprocessing.get_context(START_METHOD)
        self.folder = tempfile.TemporaryDirectory()
        meeting = f"{self.folder.name}/meeting"
        for rank in range(self.processes):
            ours, theirs = context.Pipe()
            member = _Member(rank, self.processes, meeting, self.timeout, self.strategy)
            process = context.Process(target=_work, args=(theirs, member, self.build), daemon=True)
            process.start()
            theirs.close()
            self.running.append(process)
            self.pipes.append(ours)
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(STARTING) or self._received(rank) is None:
                self.end()
                raise ObservationError(
                    f"process {rank} could not be started: what it raised is told above. A script "
                    'has to call verify_ddp under if __name__ == "__main__"'
                )

    def end(self) -> None:
        """End all processes, wherever they are, and wait until they are gone."""
        for process in self.running:
            process.kill()
        for process in self.running:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.running, self.pipes, self.folder = [], [], None

    def train(self, case: Case) -> Processes:
        """Train on one case; end the processes where they wait for one another."""
        if not self.running:
            self.start()
        for rank, pipe in enumerate(self.pipes):
            pipe.send_bytes(_packed(self.case_of(rank, case)))
        told = [Told() for _ in self.pipes]
        away: set[int] = set()  # those that assume the case away
        under_way, moved = {*range(self.processes)}, time.monotonic()
        while under_way and time.monotonic() - moved < self.timeout:
            for rank, (kind, message) in self._messages(under_way):
                moved = time.monotonic()
                if kind == "failed":
                    self.end()
                    raise ObservationError(message)
                away |= {rank} if kind == "assumed away" else set()
                told[rank] = message if kind != "assumed away" else told[rank]
                under_way -= {rank} if kind != "goes on" else set()
            if away and any(one.backwards for one in told):
                break  # they would wait for those that do not train
        if away:
            self._assumed_away(away)
        if under_way or any(one.halt for one in told):
            self.ended += bool(under_way)
            self.end()  # what they share may be out of step
        return [_waiting(one) if rank in under_way else one for rank, one in enumerate(told)]

    def _assumed_away(self, away: set[int]) -> None:
        """Leave the case out; end processes of which some train on it."""
        if len(away) < self.processes:
            self.end()
        raise UnsatisfiedAssumption

    def _messages(self, ranks: Iterable[int]) -> Iterator[tuple[int, tuple[str, Any]]]:
        by_pipe = {self.pipes[rank]: rank for rank in ranks}
        for ready in wait(list(by_pipe), timeout=0.1):
            rank = by_pipe[ready]  # type: ignore[index]
            gone = Told(halt="nothing: the process is gone", gone=True)
            yield rank, self._received(rank) or ("done", gone)

    def case_of(self, rank: int, case: Case) -> Case:
        """Return the case of one process: other numbers, and where asked for other lengths."""
        other = replace(case, seed=case.seed + APART * rank)
        left_out = case.chunk * rank if self.uneven else 0
        return replace(other, steps=max(1, case.steps - left_out))

    def _received(self, rank: int) -> Any:
        try:
            packed = io.BytesIO(self.pipes[rank].recv_bytes())
            return torch.load(packed, map_location="cpu", weights_only=False)
        except (EOFError, OSError):
            return None


def _waiting(told: Told) -> Told:
    where = told.updates[-1].chunk if told.updates else ""
    return replace(told, waits=f"behind {where}" if where else "at the first chunk")


# One of the processes, from inside ------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """What one process has to know of the group."""

    rank: int
    processes: int
    meeting: str  # a file
    timeout: float
    strategy: str


def _work(pipe: Connection, member: _Member, build: Build) -> None:
    """Train on each case that comes, until nobody sends one."""
    os.environ.update(LOCAL_RANK=str(member.rank), NODE_RANK="0", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        backend(member.processes),
        init_method=f"file://{member.meeting}",
        rank=member.rank,
        world_size=member.processes,
        timeout=timedelta(seconds=STARTING + 10 * member.timeout),
    )
    pipe.send_bytes(_packed(("ready",)))
    while True:
        try:
            case = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except EOFError:
            return
        try:
            message: tuple[str, Any] = ("done", _Run(pipe, member, build, case).trained())
        except UnsatisfiedAssumption as error:
            message = ("assumed away", str(error))
        except Exception as error:
            kind = "" if isinstance(error, ObservationError) else f"{type(error).__name__}: "
            message = ("failed", f"process {member.rank}: {kind}{error}")
        pipe.send_bytes(_packed(message))


def backend(processes: int) -> str:
    """Return by what processes talk: on CUDA by NCCL, if there is a device for each of them."""
    enough = torch.cuda.device_count() >= processes and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if enough else "gloo"


def placed(subject: Subject, rank: int, processes: int) -> Subject:
    """Have a subject trained on this process's own GPU; on the CPU if there is none for each."""
    if torch.device(subject.device).type != "cuda":
        return subject
    if torch.cuda.device_count() < processes:
        return replace(subject, device="cpu")
    torch.cuda.set_device(rank)
    return subject


@contextmanager
def _refusing_shards(*_: Subject) -> Iterator[None]:
    """Refuse modules of whose parameters each process has but a part, before they are called."""

    def look(module: torch.nn.Module, args: Any) -> None:
        kinds = {type(parameter).__name__ for parameter in module.parameters()}
        if kinds & {"DTensor", "FlatParameter"}:
            raise ObservationError(
                "parameters are sharded over the processes, as by FSDP: each has but a part of "
                "them, from which no chunk can be worked out anew; judge the loop with "
                "strategy='ddp', which leaves them whole"
            )

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def _packed(message: object) -> bytes:
    """Return a message with its tensors in it, and not in memory that is shared."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


@dataclass
class _Run:
    """One training of one process."""

    pipe: Connection
    member: _Member
    build: Build
    case: Case
    updates: list[Update] = field(default_factory=list)
    owed: dict[str, torch.Tensor] = field(default_factory=dict)  # since the update before
    missing: str = ""
    backwards: int = 0
    device: str = "cpu"

    def placed(self) -> Subject:
        """Build the subject, for a device that there is; refuse what can't be judged among many."""
        subject = placed(self.build(self.case), self.member.rank, self.member.processes)
        return replace(subject, around=_refusing_shards)

    def trained(self) -> Told:
        """Train in the dtype that is asked for; in float32 if the module can't in float64."""
        with observing(self.case):
            subject = self.placed()
        precision, self.device = subject.precision, subject.device
        told = self.trained_in(dtype_of(precision))
        if precision is None and is_of_dtypes(told.halt):
            return self.trained_in(torch.float32)
        return told

    def trained_in(self, dtype: torch.dtype) -> Told:
        self.updates, self.owed, self.missing, self.backwards = [], {}, "", 0
        with observing(self.case, dtype, self.device):
            twin, subject = (made_ready(self.placed) for _ in range(2))
            batches = batches_of(subject, self.case)
            watch = Watch(subject, batches, lambda chunk: self.looked_at(twin, chunk))
            with watch.on(), self.counting(watch):
                copies = [batch.copied().whole for batch in batches]
                processes, strategy = self.member.processes, self.member.strategy
                error = train(subject, copies, watch, processes=processes, strategy=strategy)
                if isinstance(error, ObservationError):
                    raise error
                watch.finished()
            if watch.problem is not None:
                raise watch.problem
            halt = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
            named = {n: p.detach().clone() for n, p in subject.module.named_parameters()}
        return self.told(parameters={} if error else named, halt=halt)

    def told(self, **more: Any) -> Told:
        return Told(updates=tuple(self.updates), backwards=self.backwards, **more)

    @contextmanager
    def counting(self, watch: Watch) -> Iterator[None]:
        """Tell of each backward that begins: it may never end."""
        original = torch.autograd.backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            if not watch.busy:
                self.backwards += 1
                self.pipe.send_bytes(_packed(("goes on", self.told())))
            return original(*args, **kwargs)

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original

    def looked_at(self, twin: Subject, chunk: Chunk) -> None:
        """Work out what the process's own gradients are, and note them at an update."""
        assert chunk.outcome is not None
        assert chunk.given is not None
        due = rederive(twin, chunk, slope=False, mixing=False)
        self.missing = self.missing or due.missing
        elsewhere = chunk.given.feeding | chunk.outcome.besides
        for name, gradient in due.gradients.items():
            before = self.owed.get(name)
            self.owed[name] = gradient.clone() if before is None else before + gradient
        if not chunk.outcome.rules:
            return
        known = {name: g for name, g in self.owed.items() if name not in elsewhere}
        own = None if self.missing else known
        self.updates.append(Update(str(chunk), own, dict(chunk.outcome.met), self.missing))
        self.owed, self.missing = {}, ""
