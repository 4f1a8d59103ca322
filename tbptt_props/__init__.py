"""Property-based correctness tests for truncated backpropagation through time in PyTorch Lightning.

`import tbptt_props` alone imports neither torch nor lightning: names are loaded when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbptt_props.alike import verify_devices as verify_devices
    from tbptt_props.case import Case as Case
    from tbptt_props.contract import Contract as Contract
    from tbptt_props.ddp import verify_ddp as verify_ddp
    from tbptt_props.judge import check as check
    from tbptt_props.observation import observe as observe
    from tbptt_props.properties import PROPERTIES as PROPERTIES
    from tbptt_props.rederivation import rederive as rederive
    from tbptt_props.report import BrokenProperty as BrokenProperty
    from tbptt_props.report import Report as Report
    from tbptt_props.report import Verdict as Verdict
    from tbptt_props.search import verify as verify
    from tbptt_props.strategies import batches as batches
    from tbptt_props.strategies import cases as cases
    from tbptt_props.strategies import chunk_lengths as chunk_lengths
    from tbptt_props.strategies import sequence_lengths as sequence_lengths
    from tbptt_props.strategies import states as states
    from tbptt_props.subject import ObservationError as ObservationError
    from tbptt_props.subject import Subject as Subject
    from tbptt_props.suite import conformance as conformance
    from tbptt_props.suite import known as known
    from tbptt_props.trace import Expected as Expected
    from tbptt_props.trace import Link as Link
    from tbptt_props.trace import NotJudged as NotJudged
    from tbptt_props.trace import Trace as Trace
    from tbptt_props.trace import Violation as Violation

__version__ = "0.1.0"

_HOMES = {
    "BrokenProperty": "report",
    "Case": "case",
    "Contract": "contract",
    "Expected": "trace",
    "Link": "trace",
    "NotJudged": "trace",
    "ObservationError": "subject",
    "PROPERTIES": "properties",
    "Report": "report",
    "Subject": "subject",
    "Trace": "trace",
    "Verdict": "report",
    "Violation": "trace",
    "batches": "strategies",
    "cases": "strategies",
    "check": "judge",
    "chunk_lengths": "strategies",
    "conformance": "suite",
    "known": "suite",
    "observe": "observation",
    "rederive": "rederivation",
    "sequence_lengths": "strategies",
    "states": "strategies",
    "verify": "search",
    "verify_ddp": "ddp",
    "verify_devices": "alike",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*_HOMES, "__version__"])
