"""The device that a loop trains on: whether it is there, and how it is made to repeat itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it, cuBLAS may sum in another order each time


def unavailable(device: str) -> str:
    """Say why nothing can be trained on a device here; '' where it can."""
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return ""
    built = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is found"
    return f"a CUDA device: {built}"


def repeats_itself(device: str) -> bool:
    """Tell whether the same operations on the same numbers give the same bits each time."""
    return torch.device(device).type == "cpu" or WORKSPACE in os.environ


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Have CUDA sum in one order within the block, and round no product to TF32."""
    if torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.init()  # type: ignore[no-untyped-call]
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32)
    modes = torch.are_deterministic_algorithms_enabled(), _warns_only()
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


def _warns_only() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


def drawn() -> Tensor:
    """Return the state of torch's generators: the CPU's, and behind it those of CUDA devices."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = torch.cuda.get_rng_state_all() if begun else []
    return torch.cat([torch.get_rng_state(), *states]) if states else torch.get_rng_state()


def set_drawn(state: Tensor) -> None:
    """Put back what `drawn` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size])
    if len(state) > size:
        torch.cuda.set_rng_state_all(list(state[size:].chunk(torch.cuda.device_count())))


def seed(number: int, device: str) -> None:
    """Seed the generators of the CPU and of `device`."""
    torch.default_generator.manual_seed(number)  # not manual_seed: it would seed all devices
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed_all(number)


def has_memory_of_its_own(device: str) -> bool:
    """Tell whether what lies on a device is not in the memory of the host."""
    return torch.device(device).type != "cpu"


def is_the_hosts(tensor: Tensor) -> bool:
    """Tell whether a tensor lies in the memory of the host, and not on a device."""
    return tensor.device.type == "cpu"
