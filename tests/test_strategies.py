"""Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs."""

import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tbptt_props.case import SIZES, Case
from tbptt_props.strategies import (
    MOST_CHUNK,
    MOST_STEPS,
    batches,
    cases,
    chunk_lengths,
    sequence_lengths,
    states,
)

Drawn = TypeVar("Drawn")

SEEDS = (0, 1, 2)


def hundred(strategy: st.SearchStrategy[Drawn], number: int, *, examples: int = 100) -> list[Drawn]:
    """Draw what one run of 100 examples draws, the same each time."""
    drawn: list[Drawn] = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(strategy)
    def draw(value: Drawn) -> None:
        drawn.append(value)

    draw()
    return drawn


@cache
def run(number: int, fixed: tuple[tuple[str, int], ...] = ()) -> tuple[Case, ...]:
    return tuple(hundred(cases(**dict(fixed)), number))


def smallest(strategy: st.SearchStrategy[Drawn], wanted: Callable[[Drawn], bool]) -> Drawn:
    return find(
        strategy,
        wanted,
        settings=settings(
            max_examples=1000, database=None, suppress_health_check=list(HealthCheck)
        ),
        random=random.Random(1),
    )


# Edges --------------------------------------------------------------------------------------


def several(case: Case) -> bool:
    return case.batches > 1


EDGES: dict[str, Callable[[Case], bool]] = {
    "K = 1": lambda case: case.chunk == 1,
    "K >= T": lambda case: case.chunk >= case.steps,
    "T a multiple of K": lambda case: case.steps > case.chunk and case.steps % case.chunk == 0,
    "T = K + 1": lambda case: case.steps == case.chunk + 1,
    "T = K²": lambda case: case.steps == case.chunk**2,
    "a tail": lambda case: case.steps > case.chunk and case.steps % case.chunk != 0,
    "B = 1": lambda case: case.batch == 1,
    "three batches": lambda case: case.batches == 3,
    "batches of different B": lambda case: len({b for b, _ in case.sizes()}) > 1,
    "batches of different T": lambda case: len({t for _, t in case.sizes()}) > 1,
    "batches that grow longer": lambda case: case.sizes()[0][1] < case.sizes()[-1][1],
    "several batches alike": lambda case: several(case) and len(set(case.sizes())) == 1,
    "five chunks": lambda case: case.steps > 4 * case.chunk,
    "one batch of one chunk": lambda case: case.batches == 1 and case.chunk >= case.steps,
}
# An example of each, and what makes it none.
EXAMPLES: dict[str, tuple[Case, Case]] = {
    "K = 1": (Case(steps=5, chunk=1), Case(steps=5, chunk=2)),
    "K >= T": (Case(steps=3, chunk=3), Case(steps=4, chunk=3)),
    "T a multiple of K": (Case(steps=6, chunk=3), Case(steps=3, chunk=3)),
    "T = K + 1": (Case(steps=4, chunk=3), Case(steps=5, chunk=3)),
    "T = K²": (Case(steps=9, chunk=3), Case(steps=6, chunk=3)),
    "a tail": (Case(steps=4, chunk=3), Case(steps=2, chunk=3)),
    "B = 1": (Case(batch=1), Case(batch=2)),
    "three batches": (Case(batches=3), Case(batches=2)),
    "batches of different B": (Case(batch=2, batches=2, seed=1), Case(batches=2, seed=1)),
    "batches of different T": (Case(batches=2, seed=2), Case(batches=2, seed=1)),
    "batches that grow longer": (Case(batches=2, seed=6), Case(batches=2, seed=2)),
    "several batches alike": (Case(batches=2), Case(batches=2, seed=2)),
    "five chunks": (Case(steps=9, chunk=2), Case(steps=8, chunk=2)),
    "one batch of one chunk": (Case(steps=2, chunk=3), Case(steps=2, chunk=3, batches=2)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("number", SEEDS)
def test_each_edge_comes_up_in_every_run_of_a_hundred(edge: str, number: int) -> None:
    assert any(map(EDGES[edge], run(number)))


@pytest.mark.parametrize("edge", EDGES)
def test_not_every_case_is_at_an_edge(edge: str) -> None:
    there, elsewhere = EXAMPLES[edge]

    assert EDGES[edge](there)
    assert not EDGES[edge](elsewhere)
    assert not all(map(EDGES[edge], run(0)))


IMPOSSIBLE = {
    "chunk=35": {"K = 1", "T = K²"},  # 1,225 time steps are more than a test has time for
    "steps=4096": {"batches of different T", "batches that grow longer"},
    "batch=4": {"B = 1", "batches of different B"},
    "batches=1": {edge for edge in EDGES if "batches" in edge},
    "batches=2": {"three batches", "one batch of one chunk"},
    "seed=0": {"batches of different B", "batches of different T", "batches that grow longer"},
}


@pytest.mark.parametrize("given_size", IMPOSSIBLE)
def test_each_edge_that_is_left_comes_up_where_a_size_is_given(given_size: str) -> None:
    name, value = given_size.split("=")
    drawn = run(0, ((name, int(value)),))

    missing = {edge for edge, there in EDGES.items() if not any(map(there, drawn))}

    assert missing == IMPOSSIBLE[given_size]


@pytest.mark.parametrize(
    ("number", "fixed"),
    [*((number, ()) for number in SEEDS), (0, (("chunk", 35),)), (0, (("steps", 4096),))],
)
def test_most_cases_have_a_boundary(number: int, fixed: tuple[tuple[str, int], ...]) -> None:
    assert sum(case.steps > case.chunk for case in run(number, fixed)) > 50


def test_b_t_and_k_differ_but_for_the_few_cases_that_are_about_equality() -> None:
    drawn = [case for number in SEEDS for case in run(number)]

    several = [case for case in drawn if case.batch > 1]
    alike = [case for case in several if case.batch in (case.steps, case.chunk)]
    assert 0 < len(alike) < len(several) / 3
    longer = [case for case in drawn if case.chunk > 1]
    alike = [case for case in longer if case.steps == case.chunk]
    assert 0 < len(alike) < len(longer) / 4


def test_cases_are_small_where_no_size_is_given() -> None:
    for case in (case for number in SEEDS for case in run(number)):
        assert case.steps <= MOST_STEPS
        assert case.chunk <= MOST_CHUNK
        assert case.batch <= MOST_CHUNK
        assert case.batches <= 3
        assert max(case.inputs, case.hidden, case.outputs) <= 4


# Sizes given by name ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fixed",
    [
        {"chunk": 35},
        {"steps": 4096},
        {"chunk": 35, "steps": 4096},
        {"chunk": 4096, "steps": 35},
        {"steps": 4096, "batch": 7, "batches": 3},
        {"chunk": 1},
        {"steps": 1},
        {"batch": 1},
        {"batch": 64, "inputs": 28, "hidden": 512, "outputs": 10},
        {"batches": 5, "batch": 2},
        {"seed": 7},
        dict.fromkeys(SIZES, 3) | {"seed": 0},
    ],
)
def test_a_size_given_by_name_is_that_size_in_every_batch(fixed: dict[str, int]) -> None:
    for case in hundred(cases(**fixed), 0, examples=25):
        assert {name: getattr(case, name) for name in fixed} == fixed
        for b, t in case.sizes():
            assert b == fixed.get("batch", b)
            assert t == fixed.get("steps", t)


@pytest.mark.parametrize(("number", "fixed"), [(1, {"batch": 4}), (2, {"steps": 9})])
def test_a_size_given_by_name_is_the_same_in_every_batch_also_where_the_seed_is_given(
    number: int, fixed: dict[str, int]
) -> None:
    for case in hundred(cases(seed=number, **fixed), 0, examples=25):
        for b, t in case.sizes():
            assert b == fixed.get("batch", b)
            assert t == fixed.get("steps", t)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [-1, 2.0, True, None, "4"])
def test_an_impossible_size_is_refused(name: str, value: Any) -> None:
    least = 0 if name == "seed" else 1
    message = f"{name} must be an integer of at least {least}, got {name}={value!r}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cases(**{name: value})


@pytest.mark.parametrize("name", ["window", "Batch", "k"])
def test_an_unknown_name_is_refused_and_the_names_are_listed(name: str) -> None:
    message = (
        f"a case has no size '{name}': its sizes are "
        "batch, steps, chunk, inputs, hidden, outputs, batches, seed"
    )

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cases(**{name: 3})


# Shrinking ----------------------------------------------------------------------------------

LEAST: dict[str, tuple[Callable[[Case], bool], Case]] = {
    "any": (lambda case: True, Case()),
    "two time steps in a chunk": (lambda case: case.steps > case.chunk > 1, Case(1, 3, 2)),
    "a tail": (lambda case: case.steps % case.chunk != 0, Case(1, 3, 2)),
    "two sequences": (lambda case: case.batch > 1, Case(3)),
    "two batches": (lambda case: case.batches > 1, Case(batches=2)),
    "batches that grow shorter": (
        lambda case: len({t for _, t in case.sizes()}) > 1,
        Case(batches=2, seed=2),
    ),
    "batches that grow longer": (
        lambda case: case.sizes()[0][1] < case.sizes()[-1][1],
        Case(batches=2, seed=6),
    ),
    "batches that grow smaller": (
        lambda case: len({b for b, _ in case.sizes()}) > 1,
        Case(3, batches=2, seed=1),
    ),
    "a sequence shorter than a chunk": (lambda case: case.steps < case.chunk, Case(1, 1, 2)),
    "T = K": (lambda case: case.steps == case.chunk > 1, Case(1, 2, 2)),
    "five chunks": (lambda case: case.steps > 4 * case.chunk, Case(1, 5, 1)),
    "all sizes two": (
        lambda case: min(case.inputs, case.hidden, case.outputs) > 1,
        Case(1, 2, 1, 2, 2, 2),
    ),
}


@pytest.mark.parametrize("wanted", LEAST)
def test_shrinking_ends_in_the_smallest_case(wanted: str) -> None:
    predicate, least = LEAST[wanted]

    assert smallest(cases(), predicate) == least


@pytest.mark.parametrize(
    ("wanted", "fixed", "least"),
    [
        ("any", {"chunk": 35}, Case(1, 36, 35)),
        ("any", {"steps": 4096, "batch": 3}, Case(3, 4096, 1)),
        ("two sequences", {"chunk": 35}, Case(2, 36, 35)),
        ("two sequences", {"steps": 7}, Case(2, 7, 1)),
        ("two batches", {"chunk": 35}, Case(1, 36, 35, batches=2)),
    ],
)
def test_shrinking_ends_in_the_smallest_case_of_the_sizes_that_are_given(
    wanted: str, fixed: dict[str, int], least: Case
) -> None:
    assert smallest(cases(**fixed), LEAST[wanted][0]) == least


# Lengths alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 7, 16, 4096])
def test_chunk_lengths_are_of_all_kinds_for_the_steps_that_are_given(steps: int) -> None:
    drawn = hundred(chunk_lengths(steps=steps), 0)

    assert sum(chunk < steps for chunk in drawn) > 50
    assert {1, steps - 1} <= set(drawn)
    assert any(chunk >= steps for chunk in drawn)
    assert all(1 <= chunk <= steps + 1 for chunk in drawn)
    if steps == 16:
        assert {2, 3, 4, 8} <= set(drawn)


@pytest.mark.parametrize("chunk", [1, 2, 5, 35])
def test_sequence_lengths_are_of_all_kinds_for_the_chunk_that_is_given(chunk: int) -> None:
    drawn = hundred(sequence_lengths(chunk=chunk), 0)

    assert sum(steps > chunk for steps in drawn) > 50
    assert any(steps <= chunk for steps in drawn)
    assert any(steps > 4 * chunk for steps in drawn)
    assert any(steps > chunk and steps % chunk == 0 for steps in drawn)
    assert chunk + 1 in drawn
    assert all(1 <= steps <= max(24, 6 * chunk) for steps in drawn)
    if chunk == 2:
        assert 4 in drawn
        assert any(steps % chunk for steps in drawn)


def test_lengths_are_small_where_nothing_is_given() -> None:
    assert set(hundred(chunk_lengths(), 0)) <= set(range(1, MOST_CHUNK + 1))
    assert len(set(hundred(chunk_lengths(), 0))) > 4
    assert set(hundred(sequence_lengths(), 0)) <= set(range(1, MOST_STEPS + 1))
    assert len(set(hundred(sequence_lengths(), 0))) > 8


def test_lengths_shrink_to_the_smallest_with_a_boundary() -> None:
    assert smallest(chunk_lengths(), lambda chunk: True) == 1
    assert smallest(chunk_lengths(steps=7), lambda chunk: True) == 1
    assert smallest(sequence_lengths(), lambda steps: True) == 2
    assert smallest(sequence_lengths(chunk=5), lambda steps: True) == 6


@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_a_length_that_no_sequence_has_is_refused(value: Any) -> None:
    for name, strategy in (("steps", chunk_lengths), ("chunk", sequence_lengths)):
        message = f"{name} must be an integer of at least 1, got {name}={value!r}"

        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            strategy(**{name: value})


# States -------------------------------------------------------------------------------------


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


@dataclass
class Memory:
    slots: list[Tensor]
    age: int


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


LIKE: Any = {
    "pair": Pair(zeros(2, 3), zeros(2, 4)),
    "ordered": OrderedDict(b=[zeros(1)], a=(zeros(), None)),
    "memory": Memory([zeros(5, 1, 2)], 7),
    "name": "encoder",
}


def tensors_in(state: Any) -> list[Tensor]:
    ordered, memory = state["ordered"], state["memory"]
    return [*state["pair"], ordered["b"][0], ordered["a"][0], *memory.slots]


@settings(max_examples=20)
@given(states(LIKE))
def test_states_have_the_structure_they_are_asked_for(state: Any) -> None:
    assert list(state) == ["pair", "ordered", "memory", "name"]
    assert type(state["pair"]) is Pair
    assert type(state["ordered"]) is OrderedDict
    assert list(state["ordered"]) == ["b", "a"]
    assert state["ordered"]["a"][1] is None
    assert type(state["memory"]) is Memory
    assert state["memory"].age == 7
    assert state["name"] == "encoder"
    for tensor, like in zip(tensors_in(state), tensors_in(LIKE), strict=True):
        assert tensor.shape == like.shape
        assert tensor.dtype == like.dtype
        assert not tensor.requires_grad
        assert not bool(like.any())  # what was asked for is left as it is


def test_states_are_zero_or_normal_at_three_scales() -> None:
    drawn = hundred(states((zeros(40), zeros(40))), 0)

    scales = [float(torch.cat(state).square().mean().sqrt()) for state in drawn]
    for scale in (0.01, 1.0, 10.0):
        assert any(abs(found / scale - 1) < 0.4 for found in scales)
    assert any(found == 0 for found in scales)
    assert all(found == 0 or 0.006 < found < 14 for found in scales)
    assert any(bool((torch.cat(state).tanh().abs() == 1).any()) for state in drawn)


def test_no_number_of_a_state_that_is_not_zero_comes_up_twice() -> None:
    for h, c in hundred(states((zeros(20), zeros(20))), 0):
        found = [*h.tolist(), *c.tolist()]
        assert len(set(found)) == 40 or set(found) == {0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_a_tensor_of_a_state_keeps_its_dtype(dtype: torch.dtype) -> None:
    (state,) = smallest(states([torch.ones(3, dtype=dtype)]), lambda s: bool(s[0].any()))

    assert state.dtype == dtype


def test_a_state_shrinks_to_zeros() -> None:
    for tensor in tensors_in(smallest(states(LIKE), lambda state: True)):
        assert not bool(tensor.any())


@pytest.mark.parametrize("like", [None, (), {"h": [1.5, None]}])
def test_a_state_without_a_tensor_is_refused(like: Any) -> None:
    message = f"like must hold at least one tensor, got like={like!r}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        states(like)


# Batches ------------------------------------------------------------------------------------


def numbers(pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [number for pair in pairs for part in pair for number in part.flatten().tolist()]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6])
def test_batches_have_the_sizes_of_their_case_and_numbers_of_their_own(number: int) -> None:
    case = Case(3, 5, 2, inputs=2, outputs=3, batches=3, seed=number)

    drawn = hundred(batches(case), 0)

    for found in drawn:
        assert [x.shape for x, _ in found] == [(b, t, 2) for b, t in case.sizes()]
        assert [y.shape for _, y in found] == [(b, t, 3) for b, t in case.sizes()]
        assert {part.dtype for pair in found for part in pair} == {torch.float64}
        assert len(set(numbers(found))) == len(numbers(found))
    assert len({numbers(found)[0] for found in drawn}) > 80
    assert case == Case(3, 5, 2, inputs=2, outputs=3, batches=3, seed=number)


def test_batches_shrink_to_those_of_the_first_seed_that_varies_them_alike() -> None:
    case = Case(2, 3, 2, batches=2, seed=15)

    found = smallest(batches(case), lambda found: True)

    assert numbers(found) == numbers(replace(case, seed=7).tensors())


@given(cases())
def test_numbers_of_a_drawn_case_are_unique(case: Case) -> None:
    found = numbers(case.tensors())

    assert len(set(found)) == len(found)


# The caller's own random numbers ------------------------------------------------------------


def randomness() -> tuple[list[int], object, list[int]]:
    state = np.random.get_state(legacy=False)["state"]["key"].tolist()
    return torch.get_rng_state().tolist(), random.getstate(), state


@pytest.mark.parametrize(
    "strategy",
    [cases(), chunk_lengths(), sequence_lengths(), states(LIKE), batches(Case(2, 3, batches=2))],
    ids=["cases", "chunk_lengths", "sequence_lengths", "states", "batches"],
)
def test_drawing_touches_nobodys_generator(strategy: st.SearchStrategy[Any]) -> None:
    # Seen within a test: Hypothesis itself puts back two of the three when a run ends.
    @settings(max_examples=10, database=None)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        before = randomness()
        data.draw(strategy)
        assert randomness() == before

    before = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_strategy_that_touches_torchs_generator_would_be_seen() -> None:
    @settings(max_examples=10, database=None)
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        before = randomness()
        data.draw(st.integers(0, 3).map(torch.rand))
        assert randomness() == before

    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError):
        draw()
