"""What torch.compile makes of a module, and how the kit keeps out of it; and CUDA graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

_Function = TypeVar("_Function", bound=Callable[..., Any])


def as_written() -> AbstractContextManager[object]:
    """Run what is compiled as it was written, within the block: its graph is its own again."""
    if not _compiles():
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def left_alone(function: _Function) -> _Function:
    """Keep the compiler from looking into one of the kit's functions; not into what it calls."""
    if not _compiles():
        return function
    disable: Callable[..., _Function] = torch.compiler.disable
    return disable(function, recursive=False)


def graphed_in(module: nn.Module) -> str:
    """Name a part of a module that replays a CUDA graph, by make_graphed_callables; '' if none."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if getattr(value, "__module__", "") == "torch.cuda.graphs":
                return f"{path}.{name}".lstrip(".")
    return ""


def _compiles() -> bool:
    """Tell whether anything may be compiled; to ask torch would load its compiler."""
    return "torch._dynamo" in sys.modules
