"""What a report says, as plain data for programs: dicts, lists, texts, numbers, True, False, None.

Its layout is told in docs/json.md; SCHEMA goes up by one whenever something that is there changes
its name, place or meaning, and stays where something is added.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tbptt_props.case import SIZES, Case
from tbptt_props.story import Scene
from tbptt_props.trace import Cause, Span, Violation

SCHEMA = 1
PACKAGES = ("tbptt-props", "torch", "lightning", "hypothesis", "numpy", "pytest")


def versions() -> dict[str, str]:
    """Return the versions of all that has a say in what is found."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # used from its sources
            found[name] = "not installed"
    return found


def of_case(case: Case | None) -> dict[str, Any] | None:
    """Return a case as it is written, and all its sizes."""
    return None if case is None else {"text": repr(case), "sizes": asdict(case)}


def of_cases(cases: Sequence[Case]) -> dict[str, list[int]]:
    """Return the least and the largest of each size that was tried."""
    values = {size: [getattr(case, size) for case in cases] for size in SIZES if cases}
    return {size: [min(tried), max(tried)] for size, tried in values.items() if size != "seed"}


def of_violation(violation: Violation) -> dict[str, str]:
    """Return where, what was found and due, and the user's line."""
    told = {"where": violation.where, "found": violation.found, "due": violation.due}
    return {**told, "line": violation.line}


def of_cause(cause: Cause) -> dict[str, str]:
    """Return a likely cause and what to try."""
    return {"name": cause.name, "sentence": cause.sentence, "try": cause.fix}


def of_scene(scene: Scene) -> dict[str, Any]:
    """Return one chunk of the smallest case as it ran."""
    return {
        "batch": scene.batch,
        "steps": _span(scene.span),
        "plan": [_span(span) for span in scene.plan],
        "events": list(scene.events),
        "gradients_clear_before_backward": scene.clear,
        "reach": {"due": _places(scene.due), "found": _places(scene.reached)},
        "broken": sorted({name for name, _ in scene.wrong}),
        "held": sorted(scene.held),
    }


def _span(span: Span | None) -> list[int] | None:
    """Return the first and the last time step, as texts have them."""
    return None if span is None else [span[0], span[1] - 1]


def _places(places: frozenset[tuple[int, int]]) -> list[list[int]]:
    return [list(place) for place in sorted(places)]
