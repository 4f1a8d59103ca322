"""Shapes: B sequences, T time steps, K time steps in a chunk."""

import re
from dataclasses import FrozenInstanceError
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbptt_props.case import Case
from tbptt_props.contract import Contract
from tbptt_props.strategies import cases


def test_nothing_is_promised_by_default_but_the_textbook() -> None:
    assert Contract() == Contract(chunk=None, tail="keep", clip_norm=None, clip_value=None)


def test_a_promise_stays_as_it_is() -> None:
    with pytest.raises(FrozenInstanceError, match=r"^cannot assign to field 'chunk'$"):
        Contract().chunk = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 time step, got chunk=0"),
        ({"chunk": -2}, "chunk must be at least 1 time step, got chunk=-2"),
        ({"tail": "merge"}, "tail must be 'keep' or 'drop', got tail='merge'"),
        ({"tail": None}, "tail must be 'keep' or 'drop', got tail=None"),
        ({"clip_norm": 0}, "clip_norm must be positive, got clip_norm=0"),
        ({"clip_norm": -1.5}, "clip_norm must be positive, got clip_norm=-1.5"),
        ({"clip_norm": nan}, "clip_norm must be positive, got clip_norm=nan"),
        ({"clip_value": 0.0}, "clip_value must be positive, got clip_value=0.0"),
        ({"clip_value": -inf}, "clip_value must be positive, got clip_value=-inf"),
        (
            {"clip_norm": 1.0, "clip_value": 0.5},
            "only one of clip_norm and clip_value can be promised, "
            "got clip_norm=1.0 and clip_value=0.5",
        ),
    ],
)
def test_a_promise_nobody_can_keep_is_refused(promise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Contract(**promise)


@pytest.mark.parametrize("chunk", [2.5, 3.0, True, "3"])
def test_a_chunk_that_is_no_whole_number_of_time_steps_is_refused(chunk: Any) -> None:
    with pytest.raises(ValueError, match=r"^chunk must be .*, got chunk="):
        Contract(chunk=chunk)


@pytest.mark.parametrize(
    "promise",
    [{"chunk": 1}, {"tail": "drop"}, {"clip_norm": 1e-9}, {"clip_norm": inf}, {"clip_value": 3}],
)
def test_a_promise_somebody_can_keep_is_taken(promise: dict[str, Any]) -> None:
    contract = Contract(**promise)

    assert {name: getattr(contract, name) for name in promise} == promise


@pytest.mark.parametrize(
    ("steps", "chunk", "kept", "dropped"),
    [
        (7, 3, ((0, 3), (3, 6), (6, 7)), ((0, 3), (3, 6))),
        (6, 3, ((0, 3), (3, 6)), ((0, 3), (3, 6))),
        (3, 1, ((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 3))),
        (3, 3, ((0, 3),), ((0, 3),)),
        (2, 3, ((0, 2),), ()),
        (1, 1, ((0, 1),), ((0, 1),)),
        (4, 3, ((0, 3), (3, 4)), ((0, 3),)),
        (9, 3, ((0, 3), (3, 6), (6, 9)), ((0, 3), (3, 6), (6, 9))),
    ],
)
def test_the_plan_cuts_into_chunks_of_k_time_steps(
    steps: int, chunk: int, kept: tuple[tuple[int, int], ...], dropped: tuple[tuple[int, int], ...]
) -> None:
    case = Case(steps=99, chunk=chunk)

    assert Contract().plan(case, steps) == kept
    assert Contract(tail="drop").plan(case, steps) == dropped


def test_a_promised_chunk_stands_for_that_of_the_case() -> None:
    case = Case(steps=7, chunk=3)

    assert Contract(chunk=5).plan(case, 7) == ((0, 5), (5, 7))
    assert Contract(chunk=5, tail="drop").plan(case, 7) == ((0, 5),)


@given(cases(), st.none() | st.integers(1, 9))
def test_the_plan_has_each_time_step_once_and_drops_only_a_shorter_tail(
    case: Case, chunk: int | None
) -> None:
    length = chunk or case.chunk
    kept = Contract(chunk=chunk).plan(case, case.steps)
    dropped = Contract(chunk=chunk, tail="drop").plan(case, case.steps)

    assert [t for start, stop in kept for t in range(start, stop)] == list(range(case.steps))
    assert all(stop - start == length for start, stop in kept[:-1])
    assert 0 < kept[-1][1] - kept[-1][0] <= length
    assert dropped == kept[: case.steps // length]


def test_clipping_changes_nothing_about_the_plan() -> None:
    case = Case(steps=7, chunk=3)

    assert Contract(clip_norm=1.0).plan(case, 7) == Contract().plan(case, 7)
    assert Contract(clip_value=1.0).plan(case, 7) == Contract().plan(case, 7)
