"""The caller's process: what a run may change in it is put back, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from tbptt_props.device import drawn, repeatable, seed, set_drawn

_Result = TypeVar("_Result")


@contextlib.contextmanager
def undisturbed(*, dtype: torch.dtype, seed: int, device: str = "cpu") -> Iterator[None]:
    """Run the block seeded, in `dtype`, with gradients on and quiet; then put everything back."""
    with repeatable(device):
        yield from _undisturbed(dtype, seed, device)


def _undisturbed(dtype: torch.dtype, number: int, device: str) -> Iterator[None]:
    before = torch.get_default_dtype(), torch.get_num_threads(), randomness(), anomaly()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
            _quiet_loggers(),
            _on_the_cpu(),
        ):
            warnings.simplefilter("ignore")
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() > 1:  # sums in one order; sizes are too small for two
                torch.set_num_threads(1)
            seed_all(number, device)
            yield
    finally:
        torch.set_default_dtype(before[0])
        if torch.get_num_threads() != before[1]:
            torch.set_num_threads(before[1])
        set_randomness(before[2])
        torch.autograd.set_detect_anomaly(*before[3])


@contextlib.contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Make new tensors on the CPU, as loops expect, whatever the caller's default device is."""
    if torch.get_default_device().type == "cpu":  # being told so slows each call of torch down
        yield
        return
    with torch.device("cpu"):
        yield


def anomaly() -> tuple[bool, bool]:
    """Return autograd's anomaly mode, and whether it checks for NaN."""
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def seed_all(number: int, device: str = "cpu") -> None:
    """Seed the three generators a loop may draw from."""
    seed(number, device)
    random.seed(number)
    np.random.seed(number % 2**32)


def randomness() -> tuple[Any, ...]:
    """Return the state of the three generators a loop may draw from."""
    return drawn(), random.getstate(), np.random.get_state()


def set_randomness(state: tuple[Any, ...]) -> None:
    """Put back what `randomness` returned."""
    set_drawn(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


@contextlib.contextmanager
def kept_randomness() -> Iterator[tuple[Any, ...]]:
    """Leave the three generators as they were, whatever draws from them within the block."""
    before = randomness()
    try:
        yield before
    finally:
        set_randomness(before)


def starting_from(state: tuple[Any, ...], run: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return what draws the same each time it is run, from what `randomness` returned on."""

    def ran(*args: Any) -> _Result:
        set_randomness(state)
        return run(*args)

    return ran


def has_drawn(before: tuple[Any, ...]) -> bool:
    """Tell whether any of the three was drawn from since `randomness` returned `before`."""
    torchs, pythons, numpys = randomness()
    ours = zip(numpys, before[2], strict=True)
    return (
        not torch.equal(torchs, before[0])
        or pythons != before[1]
        or any(not np.array_equal(one, other) for one, other in ours)
    )


def drawn_to() -> tuple[int, ...]:
    """Return what tells, as short numbers, how far the three generators were drawn from."""
    torchs, (_, pythons, gauss), numpys = randomness()
    crcs = zlib.crc32(torchs.numpy().tobytes()), zlib.crc32(numpys[1].tobytes())
    return *crcs, hash((pythons, gauss or 0.0)), hash(tuple(map(float, numpys[2:])))


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Silence Lightning's banners; its loggers are put back to the levels they had."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning")


EMPTY_CALLS = 4  # zero-length chunks in a row after which a loop is taken not to advance


class Hung(BaseException):
    """Training went on without ever coming to an end; no Exception, for loops swallow those."""


class Watchdog:
    """Raises `Hung` in the thread that made it when `fed` has not been called for a while.

    Needed for a loop that neither advances nor calls anything that is observed; it works by an
    asynchronous exception, because a signal would need a handler, which belongs to the caller.
    """

    def __init__(self, patience: float, *, longest: int = 0) -> None:
        """Watch for `patience` seconds without an event, on batches of `longest` time steps."""
        self.patience = patience
        self.longest = longest
        self.thread = threading.get_ident()
        self.last = time.monotonic()
        self.done = threading.Event()
        self.barked = False
        self.lock = threading.Lock()
        self.rests = 0
        self.calls = 0
        self.empty_calls = 0

    def fed(self) -> None:
        """Note that something happened."""
        self.last = time.monotonic()

    def turned(self) -> None:
        """Note that training turned to a batch."""
        self.fed()
        self.calls = 0

    def called(self, x: Any) -> None:
        """Note a call of forward on `x`.

        Raises:
            Hung: the calls are of no time step, or too many for one batch.
        """
        self.fed()
        self.calls += 1
        empty = isinstance(x, torch.Tensor) and x.numel() == 0
        self.empty_calls = self.empty_calls + 1 if empty else 0
        if self.empty_calls >= EMPTY_CALLS:
            raise Hung(
                f"forward got inputs of shape {tuple(x.shape)} {EMPTY_CALLS} times in a row: "
                "the loop does not advance"
            )
        if self.calls > 100 + 20 * self.longest:
            raise Hung(
                f"forward was called {self.calls} times in one batch of at most {self.longest} "
                "time steps: the loop does not advance"
            )

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Count no time within the block: it is the kit's own, not the loop's."""
        with self.lock:
            self.rests += 1
        try:
            yield
        finally:
            self.fed()
            self.rests -= 1

    def over(self, train: Callable[[], BaseException | None]) -> BaseException | None:
        """Watch over a training; return what it raised, or that it hung."""
        try:
            with self:
                raised = train()
        except Hung as hung:  # raised behind the back of whoever trains
            return self._silence(hung)
        finally:
            self.done.set()
        return self._silence(raised) if self.barked else raised

    def _silence(self, error: BaseException | None) -> Hung:
        """Say that nothing happened, to whom it was raised and whoever swallowed it."""
        text = f"nothing happened for {self.patience:g} s: the loop does not come to an end"
        place = error.__traceback__ if isinstance(error, Hung) else None
        return Hung(text).with_traceback(place)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self.fed()
        threading.Thread(target=self._watch, daemon=True, name="tbptt-watchdog").start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop watching."""
        with self.lock:
            self.done.set()

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.patience / 4)):
            with self.lock:
                if self._silent():
                    self._bark()

    def _silent(self) -> bool:
        hungry = time.monotonic() - self.last > self.patience
        return hungry and not self.rests and not self.done.is_set()

    def _bark(self) -> None:
        # A bare `except:` may swallow it, so it is not the last one; but what is raised already
        # has to find its way out before the next.
        self.last = time.monotonic() + max(0.0, 1.0 - self.patience)
        self.barked = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self.thread), ctypes.py_object(Hung)
        )
