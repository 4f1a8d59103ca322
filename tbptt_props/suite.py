"""`conformance()`: one pytest item per property, all of them judging the same cases once."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tbptt_props.case import Case
from tbptt_props.judge import Bench, Property
from tbptt_props.properties import PROPERTIES
from tbptt_props.report import BrokenProperty, failure_text
from tbptt_props.strategies import cases
from tbptt_props.subject import Subject


def conformance(
    *, max_examples: int | None = None, **fixed: int
) -> Callable[[Callable[..., Subject]], Any]:
    """Turn `def test_x(case): return Subject(...)` into one pytest item per property.

    Each item is an ordinary Hypothesis test, `test_x[graph_crosses_no_boundary]` and so on. They
    draw the same cases, on each of which the subject is trained once.

    Args:
        max_examples: how many cases to try; by default what Hypothesis' settings say.
        fixed: sizes of a case that the subject can't vary, by name: `conformance(chunk=35)`.

    Raises:
        TypeError: what is decorated takes no argument named `case`.
        ValueError: a size has no such name or value, or `max_examples` is below 1.
    """
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"max_examples must be at least 1, got max_examples={max_examples}")
    strategy = cases(**fixed)

    def decorate(build: Callable[..., Subject]) -> Any:
        name = getattr(build, "__name__", repr(build))
        if "case" not in inspect.signature(build).parameters:
            raise TypeError(f"{name} must take an argument named case, the Case to build for")
        tally = _Tally()
        test = _seeded()(_settled(max_examples)(given(case=strategy)(_test_of(build, tally))))
        by_name = {p.__name__: p for p in PROPERTIES}
        mark = pytest.mark.parametrize("judged", by_name.values(), ids=by_name)
        return mark(_skipping_what_nothing_was_judged_of(test, tally))

    return decorate


class _Tally:
    """What came of the item that is running."""

    def __init__(self) -> None:
        self.held = 0
        self.missing = ""


def _test_of(build: Callable[..., Subject], tally: _Tally) -> Callable[..., None]:
    """Make the body of the test: judge a case, and raise if the item's property is broken."""
    bench: dict[tuple[Any, ...], Bench] = {}

    @functools.wraps(build)
    def test(*owner: Any, case: Case, judged: Property, **fixtures: Any) -> None:
        __tracebackhide__ = True
        key = _key(owner, fixtures)
        if key not in bench:
            bench.clear()
            bench[key] = Bench(
                lambda case: build(*owner, case=case, **fixtures),
                name=getattr(build, "__name__", "test"),
            )
        report = bench[key].judge(case)
        verdict = report[judged.__name__]
        hypothesis.event(verdict.status)
        tally.held += verdict.judged
        tally.missing = tally.missing or verdict.missing
        if verdict.violations:
            raise BrokenProperty("\n" + failure_text(report, verdict))

    test.__signature__ = _with_property(build)  # type: ignore[attr-defined]
    return test


def _key(owner: tuple[Any, ...], fixtures: dict[str, Any]) -> tuple[Any, ...]:
    """Tell by what a subject is built; pytest makes a new instance of a test's class per item."""
    owned = {name: value for instance in owner for name, value in _attributes(instance)}
    parts = [(name, id(value)) for given in (owned, fixtures) for name, value in given.items()]
    return (*map(type, owner), *sorted(parts))


def _attributes(instance: Any) -> list[tuple[str, Any]]:
    return list(getattr(instance, "__dict__", {}).items())


def _skipping_what_nothing_was_judged_of(test: Any, tally: _Tally) -> Any:
    """Skip an item of which no case could be judged: it must not look as if it held."""

    # What Hypothesis hangs on its tests, its pytest plugin looks for: `wraps` takes it along.
    @functools.wraps(test)
    def item(*args: Any, **kwargs: Any) -> None:
        __tracebackhide__ = True
        tally.held, tally.missing = 0, ""
        test(*args, **kwargs)
        if not tally.held:
            pytest.skip(f"not judged: needs {tally.missing or 'cases'}")

    return item


def _with_property(build: Callable[..., Subject]) -> inspect.Signature:
    """Return the signature of `build` and the property: by name, as pytest hands fixtures over."""
    signature = inspect.signature(build)
    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters = signature.parameters.values()
    own = [p if p.name == "self" else p.replace(kind=by_name) for p in parameters]
    judged = inspect.Parameter("judged", by_name)
    return signature.replace(parameters=[*own, judged], return_annotation=None)


def _settled(max_examples: int | None) -> Any:
    # The first case of all trains nothing but imports half of Lightning.
    # Hypothesis' explanation would be of the kit's own lines.
    phases = [phase for phase in Phase if phase is not Phase.explain]
    chosen: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
        "phases": phases,
    }
    if max_examples is not None:
        chosen["max_examples"] = max_examples
    return settings(**chosen)


def _seeded() -> Any:
    """Give all items one seed, so that they draw the same cases.

    A global one comes first; and where nothing is to be random (Hypothesis' default in CI), it is
    always the same: Hypothesis itself would draw by each item's own name.
    """
    from hypothesis import core

    forced = getattr(core, "global_force_seed", None)
    if forced is not None:
        return hypothesis.seed(forced)
    return hypothesis.seed(0 if settings().derandomize else random.SystemRandom().getrandbits(64))
