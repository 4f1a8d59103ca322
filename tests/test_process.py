"""Nothing of the caller's is changed by a run: neither the process nor the module."""

import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import optimizer as optimizers

import tbptt_props as tb
from tbptt_props.process import (
    Hung,
    Watchdog,
    has_drawn,
    randomness,
    seed_all,
    set_randomness,
    undisturbed,
)
from tbptt_ref.faults import Fault
from tbptt_ref.faults_side_effects import LeavesEvalOn, LeavesResidualsInTheBatch, ScalesTheBatch
from tbptt_ref.faults_state import NeverDetaches
from tbptt_ref.faults_update import NeverClears
from tbptt_ref.module import TruncatedRNN

CASE = tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=3, outputs=2, batches=2, seed=1)

# The process --------------------------------------------------------------------------------

LOGGERS = (
    "",
    "lightning",
    "lightning.fabric",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer",
    "pytorch_lightning",
    "torch",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def of_logger(name: str) -> tuple[object, ...]:
    logger = logging.getLogger(name)
    parts = (logger.level, logger.propagate, logger.disabled)
    return (*parts, tuple(logger.handlers), tuple(logger.filters))


def of_numpy() -> tuple[object, ...]:
    state = np.random.get_state(legacy=False)
    return (state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"])


ASPECTS: dict[str, Callable[[], object]] = {
    "torch's random numbers": lambda: torch.get_rng_state().tolist(),
    "Python's random numbers": random.getstate,
    "NumPy's random numbers": of_numpy,
    "the default dtype": torch.get_default_dtype,
    "the default device": torch.get_default_device,
    "torch's threads": torch.get_num_threads,
    "whether gradients are on": torch.is_grad_enabled,
    "whether inference is on": torch.is_inference_mode_enabled,
    "anomaly mode": lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "deterministic algorithms": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    ),
    "the precision of products": torch.get_float32_matmul_precision,
    "warnings": lambda: (list(warnings.filters), warnings.showwarning),
    "loggers": lambda: {name: of_logger(name) for name in LOGGERS},
    "the environment": lambda: dict(os.environ),
    "the working directory": Path.cwd,
    "files": lambda: sorted(Path.cwd().rglob("*")),
    "signals": lambda: [signal.getsignal(number) for number in SIGNALS],
    "autograd": lambda: (torch.autograd.backward, torch.autograd.grad, Tensor.backward),
    "optimizers' hooks": lambda: (
        dict(optimizers._global_optimizer_pre_hooks),
        dict(optimizers._global_optimizer_post_hooks),
    ),
    "modules' hooks": lambda: (
        dict(nn.modules.module._global_forward_hooks),
        dict(nn.modules.module._global_forward_pre_hooks),
        dict(nn.modules.module._global_backward_hooks),
    ),
    "hooks for exceptions": lambda: (sys.excepthook, threading.excepthook, sys.unraisablehook),
    "threads": lambda: threads_left(),
    "the import path": lambda: (list(sys.path), list(sys.meta_path)),
    "the collector": lambda: (gc.isenabled(), gc.get_threshold(), gc.callbacks[:]),
    "the stack's limit": sys.getrecursionlimit,
    "standard streams": lambda: (sys.stdout, sys.stderr, sys.stdin),
}


def threads_left() -> set[threading.Thread]:
    """Return the threads that live on, after a moment for those that are about to end."""
    deadline = time.monotonic() + 2
    watchdogs = [t for t in threading.enumerate() if t.name == "tbptt-watchdog"]
    for thread in watchdogs:
        thread.join(max(0.0, deadline - time.monotonic()))
    return set(threading.enumerate())


def process() -> dict[str, object]:
    return {name: look() for name, look in ASPECTS.items()}


def changed(before: dict[str, object]) -> set[str]:
    """Name what is no longer as it was."""
    now = process()
    return {name for name in ASPECTS if now[name] != before[name]}


# Subjects -----------------------------------------------------------------------------------


class Interrupted(TruncatedRNN):
    """Somebody presses Ctrl+C in the second chunk."""

    pressed = False

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is not None:
            raise KeyboardInterrupt
        return super().train_chunk(x, y, state)


class Meddles(TruncatedRNN):
    """A loop that sets whatever can be set, and puts nothing back."""

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        answer = super().train_chunk(x, y, state)
        torch.default_generator.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        torch.autograd.set_detect_anomaly(mode=True, check_nan=False)
        warnings.filterwarnings("ignore", message="left behind")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        return answer


def subject(
    kind: type[TruncatedRNN] = TruncatedRNN, case: tb.Case = CASE, **named: Any
) -> tb.Subject:
    return tb.Subject(Fault(kind).build(case), loss=mse_loss, **named)


Build = Callable[[tb.Case], tb.Subject]


def built(kind: type[TruncatedRNN] = TruncatedRNN, **named: Any) -> Build:
    return lambda case: subject(kind, case, **named)


# What is judged, the error that a run of it ends in, and a property that it breaks.
ENDINGS: dict[str, tuple[Build, type[BaseException] | None, str]] = {
    "holds": (built(), None, ""),
    "is broken": (built(NeverClears), None, "gradients_are_the_chunks_own"),
    "raises": (built(NeverDetaches), None, "training_reaches_the_end"),
    "meddles": (built(Meddles), None, ""),
    "cannot be described": (built(forward="readout"), tb.ObservationError, ""),
    "is interrupted": (built(Interrupted), KeyboardInterrupt, ""),
}


def checked(judged: tb.Subject) -> set[str]:
    return {verdict.name for verdict in tb.check(judged, CASE).broken}


def verified(build: Build) -> set[str]:
    report = tb.verify(build, max_examples=2, seed=0, steps=5, chunk=2)
    return {verdict.name for verdict in report.broken}


def observed(judged: tb.Subject) -> set[str]:
    halt = tb.observe(judged, CASE).halt
    return {"training_reaches_the_end"} if halt else set()


# Each returns a call to be made once the process was looked at.
FACES: dict[str, Callable[[Build], Callable[[], set[str]]]] = {
    "check": lambda build: partial(checked, build(CASE)),
    "verify": lambda build: partial(verified, build),
    "observe": lambda build: partial(observed, build(CASE)),
}


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Let Lightning and Hypothesis set up what they set up once, which is no part of a run."""
    verified(built())


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a directory of its own, in which a file would be seen."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("face", FACES)
def test_a_run_leaves_the_process_as_it_was(
    face: str, ending: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    build, error, broken = ENDINGS[ending]
    run = FACES[face](build)
    found = set[str]()
    before = process()

    with pytest.raises(error) if error else nullcontext():
        found = run()

    assert changed(before) == set()
    assert capfd.readouterr() == ("", "")
    assert [record.getMessage() for record in caplog.records] == []
    if face != "observe" or broken == "training_reaches_the_end":
        assert broken in found or not broken
        assert bool(found) is bool(broken)


def test_a_build_that_raises_leaves_the_process_as_it_was() -> None:
    def build(case: tb.Case) -> tb.Subject:
        torch.rand(1)
        raise ZeroDivisionError

    before = process()

    with pytest.raises(tb.ObservationError, match="raised ZeroDivisionError"):
        tb.verify(build, max_examples=3, seed=0)

    assert changed(before) == set()


def test_batches_that_cannot_be_used_leave_the_process_as_it_was() -> None:
    judged = subject(batches=lambda case: [])
    before = process()

    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        tb.check(judged, CASE)

    assert changed(before) == set()


# Whatever the caller has set ----------------------------------------------------------------


@contextmanager
def dtype(chosen: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(chosen)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


@contextmanager
def anomaly() -> Iterator[None]:
    torch.autograd.set_detect_anomaly(mode=True, check_nan=False)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(mode=False)


@contextmanager
def loggers_of_ones_own() -> Iterator[None]:
    logger, handler = logging.getLogger("lightning.pytorch"), logging.NullHandler()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = not propagate
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.propagate = propagate
        logger.removeHandler(handler)


@contextmanager
def handlers_of_signals() -> Iterator[None]:
    def handle(number: int, frame: object) -> None: ...

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def warned() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("once", message="seen once")
        yield


@contextmanager
def hooked() -> Iterator[None]:
    handles = [
        optimizers.register_optimizer_step_pre_hook(lambda *arguments: None),
        optimizers.register_optimizer_step_post_hook(lambda *arguments: None),
        nn.modules.module.register_module_forward_hook(lambda *arguments: None),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


CALLERS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": lambda: dtype(torch.float64),
    "bfloat16": lambda: dtype(torch.bfloat16),
    "two threads": lambda: threads(2),
    "deterministic algorithms": deterministic,
    "anomaly mode": anomaly,
    "loggers of one's own": loggers_of_ones_own,
    "handlers of signals": handlers_of_signals,
    "warnings as errors": warned,
    "hooks of one's own": hooked,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_whatever_the_caller_has_set_is_left_and_changes_no_verdict(caller: str) -> None:
    judged = subject()

    with CALLERS[caller]():
        before = process()
        report = tb.check(judged, CASE)

        assert changed(before) == set()

    assert {verdict.name for verdict in report.broken} == set()
    assert len(report.holds) > 15


@pytest.mark.parametrize("caller", ["no_grad", "inference_mode", "float64", "two threads"])
def test_whatever_the_caller_has_set_is_left_by_a_search_and_by_a_run_that_raises(
    caller: str,
) -> None:
    with CALLERS[caller]():
        before = process()
        broken = verified(built(NeverDetaches))

        assert changed(before) == set()

    assert "training_reaches_the_end" in broken


def test_a_run_in_another_thread_is_a_run_like_any_other() -> None:
    judged, reports = subject(), list[tb.Report]()
    thread = threading.Thread(target=lambda: reports.append(tb.check(judged, CASE)))
    before = process()

    thread.start()
    thread.join()

    assert changed(before) == set()
    assert not reports[0].broken
    assert len(reports[0].holds) > 15


# Each change would be seen ------------------------------------------------------------------


@contextmanager
def attribute(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def randomly(draw: Callable[[], object]) -> Iterator[None]:
    before = randomness()
    draw()
    try:
        yield
    finally:
        set_randomness(before)


@contextmanager
def thread_left() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def environment() -> Iterator[None]:
    os.environ["TBPTT_TEST"] = "1"
    try:
        yield
    finally:
        del os.environ["TBPTT_TEST"]


@contextmanager
def elsewhere() -> Iterator[None]:
    here = Path.cwd()
    os.chdir("/")
    try:
        with attribute(Path, "rglob", lambda self, pattern: []):  # all of the disk takes a while
            yield
    finally:
        os.chdir(here)


@contextmanager
def matmul_precision(chosen: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def recursion(limit: int) -> Iterator[None]:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextmanager
def collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def file() -> AbstractContextManager[object]:
    return (Path.cwd() / "checkpoint.ckpt").open("w", encoding="utf-8")


def replaced(*arguments: object, **named: object) -> None: ...


CHANGES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "torch's random numbers": lambda: randomly(lambda: torch.rand(1)),
    "Python's random numbers": lambda: randomly(random.random),
    "NumPy's random numbers": lambda: randomly(np.random.random),
    "the default dtype": lambda: dtype(torch.float64),
    "the default device": lambda: torch.device("meta"),
    "torch's threads": lambda: threads(2),
    "whether gradients are on": torch.no_grad,
    "whether inference is on": torch.inference_mode,
    "anomaly mode": anomaly,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": deterministic,
    "the precision of products": lambda: matmul_precision("medium"),
    "warnings": warned,
    "loggers": loggers_of_ones_own,
    "the environment": environment,
    "the working directory": elsewhere,
    "files": file,
    "signals": handlers_of_signals,
    "autograd": lambda: attribute(torch.autograd, "backward", replaced),
    "optimizers' hooks": hooked,
    "modules' hooks": hooked,
    "hooks for exceptions": lambda: attribute(sys, "excepthook", replaced),
    "threads": thread_left,
    "the import path": lambda: attribute(sys, "path", [*sys.path, "elsewhere"]),
    "the collector": collector,
    "the stack's limit": lambda: recursion(sys.getrecursionlimit() + 100),
    "standard streams": lambda: attribute(sys, "stdin", None),
}
# What changes along with it.
ALONG = {
    "whether inference is on": {"whether gradients are on"},
    "optimizers' hooks": {"modules' hooks"},
    "modules' hooks": {"optimizers' hooks"},
}


@pytest.mark.parametrize("aspect", ASPECTS)
def test_each_change_of_the_process_would_be_seen(aspect: str) -> None:
    before = process()

    with CHANGES[aspect]():
        assert changed(before) == {aspect} | ALONG.get(aspect, set())

    assert changed(before) <= {"files"}


# The module ---------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> dict[str, object]:
    """Write down all that a module is: its tensors bitwise, the rest of its parts by identity."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        found[f"{path}: class"] = type(part)
        for name, value in vars(part).items():
            found[f"{path}.{name}"] = dict(value) if isinstance(value, dict) else id(value)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found[f"{name}: bits"] = tensor.detach().view(torch.uint8).tolist()
        found[f"{name}: kind"] = (tensor.dtype, tensor.requires_grad, tensor._version)
        found[f"{name}: gradient"] = None if tensor.grad is None else tensor.grad.tolist()
        found[f"{name}: hooks"] = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return found


def prepared(kind: type[TruncatedRNN]) -> TruncatedRNN:
    """Build a module as somebody may have left it: half trained, partly frozen, in eval mode."""
    module = Fault(kind).build(CASE).float()
    module.readout.requires_grad_(requires_grad=False)
    for parameter in module.core.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.register_forward_hook(lambda *arguments: None)
    return module.eval()


@pytest.mark.parametrize("build", [prepared, lambda kind: Fault(kind).build(CASE)])
@pytest.mark.parametrize(
    ("kind", "error", "named"),
    [
        (TruncatedRNN, None, {}),
        (NeverDetaches, None, {}),
        (LeavesEvalOn, None, {}),
        (Interrupted, KeyboardInterrupt, {}),
        (TruncatedRNN, tb.ObservationError, {"forward": "readout"}),
    ],
)
def test_the_users_own_module_is_left_as_it_was(
    build: Callable[[type[TruncatedRNN]], TruncatedRNN],
    kind: type[TruncatedRNN],
    error: type[BaseException] | None,
    named: dict[str, Any],
) -> None:
    module = build(kind)
    before = fingerprint(module)

    with pytest.raises(error) if error else nullcontext():
        tb.check(tb.Subject(module, loss=mse_loss, **named), CASE)

    assert fingerprint(module) == before
    assert module._trainer is None
    assert {"forward", "training_step"} & vars(module).keys() == set()


MODULE_CHANGES: dict[str, Callable[[TruncatedRNN], object]] = {
    "a parameter moved": lambda m: nn.init.zeros_(next(m.parameters())),
    "another dtype": lambda m: m.double(),
    "another mode": lambda m: m.train(not m.training),
    "another mode of a part": lambda m: m.core.train(not m.training),
    "a gradient": lambda m: setattr(next(m.parameters()), "grad", None),
    "frozen": lambda m: m.core.requires_grad_(requires_grad=False),
    "a hook": lambda m: m.register_forward_hook(lambda *arguments: None),
    "a hook on a part": lambda m: m.core.register_forward_pre_hook(lambda *arguments: None),
    "a hook on a parameter": lambda m: next(m.parameters()).register_hook(print),  # type: ignore[no-untyped-call]
    "an attribute": lambda m: setattr(m, "seen", 3),
    "an attribute gone": lambda m: delattr(m, "chunk"),
    "a wrapped method": lambda m: vars(m).update(forward=m.forward),
    "a trainer": lambda m: vars(m).update(_trainer=object()),
    "another part": lambda m: setattr(m, "readout", nn.Linear(3, 2)),
}


@pytest.mark.parametrize("change", MODULE_CHANGES)
def test_each_change_of_a_module_would_be_seen(change: str) -> None:
    module = prepared(TruncatedRNN)
    before = fingerprint(module)
    assert fingerprint(module) == before

    MODULE_CHANGES[change](module)

    assert fingerprint(module) != before


@pytest.mark.parametrize("kind", [TruncatedRNN, NeverDetaches])
def test_a_module_that_was_built_for_a_search_is_left_without_anything_of_ours(
    kind: type[TruncatedRNN],
) -> None:
    modules: list[nn.Module] = []

    def build(case: tb.Case) -> tb.Subject:
        made = subject(kind, case)
        modules.append(made.module)
        return made

    verified(build)

    assert modules
    for module in modules:
        assert not {"forward", "training_step"} & vars(module).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.forward.__func__ is TruncatedRNN.forward  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [TruncatedRNN, ScalesTheBatch, LeavesResidualsInTheBatch])
def test_the_users_own_batches_are_left_as_they_were(kind: type[TruncatedRNN]) -> None:
    own = CASE.tensors()

    report = tb.check(subject(kind, batches=lambda case: own), CASE)

    for pair, before in zip(own, CASE.tensors(), strict=True):
        for part, other in zip(pair, before, strict=True):
            assert torch.equal(part, other)
            assert not part.requires_grad
            assert part._version == 0
    due = "holds" if kind is TruncatedRNN else "broken"
    assert report["the_batch_is_left_as_it_was"].status == due


# The parts ----------------------------------------------------------------------------------


def test_a_block_is_run_seeded_in_its_dtype_with_gradients_on_and_quiet() -> None:
    def drawn() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.random())

    found = []
    for seed in (3, 3, 4):
        with torch.no_grad(), undisturbed(dtype=torch.float64, seed=seed):
            assert torch.is_grad_enabled()
            assert torch.zeros(1).dtype == torch.float64
            assert not torch.zeros(1).is_inference()
            assert torch.get_num_threads() == 1
            warnings.warn("nobody hears this", stacklevel=1)
            assert not logging.getLogger("lightning.pytorch").isEnabledFor(logging.ERROR)
            found.append(drawn())

    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_a_block_that_raises_is_undone_all_the_same() -> None:
    @undisturbed(dtype=torch.float16, seed=0)
    def block() -> None:
        torch.rand(1)
        torch.set_num_threads(3)
        torch.autograd.set_detect_anomaly(mode=True)
        raise ZeroDivisionError

    before = process()

    with pytest.raises(ZeroDivisionError):
        block()

    assert changed(before) == set()


def test_a_block_within_a_block_leaves_the_outer_one_as_it_was() -> None:
    with undisturbed(dtype=torch.float64, seed=1):
        before = process()
        with undisturbed(dtype=torch.float32, seed=2):
            torch.rand(1)

        assert changed(before) == set()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63])
def test_any_seed_seeds_all_three_generators(seed: int) -> None:
    before = randomness()
    try:
        seed_all(seed)
        first = (float(torch.rand(())), random.random(), float(np.random.random()))
        seed_all(seed)
        assert (float(torch.rand(())), random.random(), float(np.random.random())) == first
    finally:
        set_randomness(before)


def test_randomness_that_is_put_back_is_drawn_again() -> None:
    before = randomness()
    first = (torch.rand(3).tolist(), random.random(), np.random.normal())
    set_randomness(before)
    again = (torch.rand(3).tolist(), random.random(), np.random.normal())
    set_randomness(before)

    assert again == first


DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(1),
    "python": random.random,
    "numpy": np.random.random,
    "numpy, one that was kept": np.random.normal,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_from_any_generator_is_seen(draw: Callable[[], object]) -> None:
    before = randomness()
    try:
        seed_all(0)
        np.random.normal()  # numpy draws two at once, and keeps the second
        then = randomness()
        assert not has_drawn(then)
        draw()
        assert has_drawn(then)
    finally:
        set_randomness(before)


# The watchdog -------------------------------------------------------------------------------


def waits(seconds: float, *, feed: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        feed()
        time.sleep(0.005)


def test_the_watchdog_ends_what_goes_on_without_an_event() -> None:
    watchdog = Watchdog(0.1)
    begun = time.monotonic()

    with pytest.raises(Hung), watchdog:
        waits(20)

    assert watchdog.barked
    assert 0.1 < time.monotonic() - begun < 10


def test_the_watchdog_lets_go_on_what_it_is_told_of() -> None:
    with Watchdog(0.8) as watchdog:
        waits(1.2, feed=watchdog.fed)

    assert not watchdog.barked


def test_the_watchdog_lets_go_on_what_ends_in_time() -> None:
    with Watchdog(0.4) as watchdog:
        pass
    waits(0.6)

    assert not watchdog.barked


def test_the_watchdog_does_not_count_the_time_it_rests() -> None:
    with Watchdog(0.4) as watchdog:
        with watchdog.resting():
            waits(0.8)
        waits(0.1)

    assert not watchdog.barked


def test_the_watchdog_tells_of_a_training_that_swallows_what_it_raises() -> None:
    def swallows() -> None:
        try:
            waits(20)
        except BaseException:
            return

    watchdog = Watchdog(0.1)

    raised = watchdog.over(swallows)

    assert isinstance(raised, Hung)
    assert str(raised) == "nothing happened for 0.1 s: the loop does not come to an end"


def test_the_watchdog_raises_again_where_it_is_not_heard() -> None:
    heard: list[BaseException] = []

    def deaf() -> None:
        while len(heard) < 2:
            try:
                waits(20)
            except BaseException as error:
                heard.append(error)

    Watchdog(0.1).over(deaf)

    assert [type(error) for error in heard] == [Hung, Hung]


@pytest.mark.parametrize("error", [None, RuntimeError("full")])
def test_the_watchdog_hands_on_what_a_training_raised(error: Exception | None) -> None:
    assert Watchdog(30).over(lambda: error) is error


def test_the_watchdogs_thread_ends_with_its_block() -> None:
    before = threads_left()

    with Watchdog(30):
        assert set(threading.enumerate()) > before
    with pytest.raises(ZeroDivisionError), Watchdog(30):
        raise ZeroDivisionError

    assert threads_left() == before


class Stalls(TruncatedRNN):
    """A loop that never comes to an end, and calls nothing that is watched."""

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        answer = super().train_chunk(x, y, state)
        waits(20)
        return answer


def test_a_loop_that_hangs_is_a_finding_and_leaves_the_process_as_it_was() -> None:
    judged = subject(Stalls, patience=0.3)
    before = process()

    report = tb.check(judged, CASE)

    assert changed(before) == set()
    (violation,) = report["training_reaches_the_end"].violations
    assert violation.found.startswith(
        "raised nothing happened for 0.3 s: the loop does not come to an end"
    )
