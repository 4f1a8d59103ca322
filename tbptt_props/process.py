"""The caller's process: what a run may change in it is put back, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def undisturbed(*, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Run the block seeded, in `dtype`, with gradients on and quiet; then put everything back."""
    before = torch.get_default_dtype(), torch.get_num_threads(), randomness(), anomaly()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
            _quiet_loggers(),
        ):
            warnings.simplefilter("ignore")
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() > 1:  # sums in one order; sizes are too small for two
                torch.set_num_threads(1)
            seed_all(seed)
            yield
    finally:
        torch.set_default_dtype(before[0])
        if torch.get_num_threads() != before[1]:
            torch.set_num_threads(before[1])
        set_randomness(before[2])
        torch.autograd.set_detect_anomaly(*before[3])


def anomaly() -> tuple[bool, bool]:
    """Return autograd's anomaly mode, and whether it checks for NaN."""
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


def seed_all(seed: int) -> None:
    """Seed the three generators a loop may draw from."""
    torch.default_generator.manual_seed(seed)  # not manual_seed: it would seed devices too
    random.seed(seed)
    np.random.seed(seed % 2**32)


def randomness() -> tuple[Any, ...]:
    """Return the state of the three generators a loop may draw from."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_randomness(state: tuple[Any, ...]) -> None:
    """Put back what `randomness` returned."""
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


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


class Hung(RuntimeError):
    """Training went on without ever coming to an end."""


class Watchdog:
    """Raises `Hung` in the thread that made it when `fed` has not been called for a while.

    Needed for a loop that neither advances nor calls anything that is observed; it works by an
    asynchronous exception, because a signal would need a handler, which belongs to the caller.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.thread = threading.get_ident()
        self.last = time.monotonic()
        self.done = threading.Event()
        self.barked = False

    def fed(self) -> None:
        """Note that something happened."""
        self.last = time.monotonic()

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        threading.Thread(target=self._watch, daemon=True, name="tbptt-watchdog").start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop watching."""
        self.done.set()

    def _watch(self) -> None:
        while not self.done.wait(min(1.0, self.patience / 4)):
            if time.monotonic() - self.last > self.patience:
                self.barked = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self.thread), ctypes.py_object(Hung)
                )
                return
