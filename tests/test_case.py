"""Shapes: B sequences, T time steps, I inputs, O outputs."""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tbptt_props.case import SIZES, Case, case_of, require_size

SOME = Case(batch=4, steps=7, chunk=3, inputs=2, hidden=5, outputs=3, batches=3, seed=12)


def sized() -> st.SearchStrategy[Case]:
    """Draw any case, without the library's own strategy for it."""
    sizes = st.integers(1, 6)
    return st.builds(
        Case, sizes, st.integers(1, 9), sizes, sizes, sizes, sizes, sizes, st.integers(0, 1000)
    )


def numbers(batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    return [number for pair in batches for part in pair for number in part.flatten().tolist()]


def test_a_case_has_eight_sizes_all_of_them_one_by_default_but_for_a_boundary() -> None:
    assert tuple(field.name for field in fields(Case)) == SIZES
    assert Case() == Case(1, 2, 1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (Case(), "Case(steps=2, chunk=1)"),
        (Case(steps=3, chunk=2), "Case(steps=3, chunk=2)"),
        (Case(batches=2, seed=1), "Case(steps=2, chunk=1, batches=2, seed=1)"),
        (
            SOME,
            "Case(batch=4, steps=7, chunk=3, inputs=2, hidden=5, outputs=3, batches=3, seed=12)",
        ),
    ],
)
def test_the_repr_says_how_a_sequence_is_cut_and_what_is_not_the_default(
    case: Case, told: str
) -> None:
    assert repr(case) == told


@given(sized())
def test_the_repr_is_the_reproduction(case: Case) -> None:
    again = eval(repr(case))

    assert again == case
    assert numbers(again.tensors()) == numbers(case.tensors())


def test_a_case_stays_as_it_is() -> None:
    with pytest.raises(FrozenInstanceError, match=r"^cannot assign to field 'steps'$"):
        SOME.steps = 3  # type: ignore[misc]


def test_cases_are_ordered_by_their_sizes_and_can_be_looked_up() -> None:
    one, two, three = Case(batch=1, steps=9), Case(batch=2, steps=1), Case(batch=2, steps=2)

    assert sorted([three, one, two]) == [one, two, three]
    assert {SOME: "found"}[replace(SOME)] == "found"


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [-1, 1.0, True, False, "3", None, np.int64(3)])
def test_a_size_that_no_problem_has_is_refused(name: str, value: object) -> None:
    least = 0 if name == "seed" else 1
    message = f"{name} must be an integer of at least {least}, got {name}={value!r}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(SOME, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_size(name, value)


@pytest.mark.parametrize("name", SIZES)
def test_zero_is_a_seed_and_no_size(name: str) -> None:
    if name == "seed":
        assert replace(SOME, seed=0).seed == 0
        return
    message = f"{name} must be an integer of at least 1, got {name}=0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        replace(SOME, **{name: 0})


@pytest.mark.parametrize("name", SIZES)
def test_the_least_size_and_a_large_one_are_sizes(name: str) -> None:
    for value in (0 if name == "seed" else 1, 4096):
        require_size(name, value)
        assert getattr(replace(SOME, **{name: value}), name) == value


def test_a_name_that_no_size_has_is_refused_and_the_names_are_listed() -> None:
    message = (
        "a case has no size 'window': its sizes are "
        "batch, steps, chunk, inputs, hidden, outputs, batches, seed"
    )

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_size("window", 3)


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [
        (0, ((3, 4), (3, 4), (3, 4), (3, 4), (3, 4))),
        (1, ((3, 4), (2, 4), (1, 4), (1, 4), (1, 4))),
        (2, ((3, 4), (3, 3), (3, 2), (3, 1), (3, 1))),
        (3, ((3, 4), (2, 3), (1, 2), (1, 1), (1, 1))),
        (4, ((3, 4), (3, 4), (3, 4), (3, 4), (3, 4))),
        (5, ((3, 4), (2, 4), (1, 4), (1, 4), (1, 4))),
        (6, ((3, 1), (3, 1), (3, 2), (3, 3), (3, 4))),
        (7, ((3, 1), (2, 1), (1, 2), (1, 3), (1, 4))),
    ],
)
def test_the_seed_says_whether_batches_grow_smaller_and_shorter_or_longer(
    seed: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    for further in (0, 8, 8 * 1023):
        case = Case(batch=3, steps=4, batches=5, seed=seed + further)

        assert case.sizes() == sizes


@given(sized())
def test_tensors_are_inputs_and_targets_of_the_sizes_of_each_batch(case: Case) -> None:
    batches = case.tensors()

    assert max(b for b, _ in case.sizes()) == case.batch
    assert max(t for _, t in case.sizes()) == case.steps
    assert len(batches) == len(case.sizes()) == case.batches
    for (x, y), (b, t) in zip(batches, case.sizes(), strict=True):
        assert x.shape == (b, t, case.inputs)
        assert y.shape == (b, t, case.outputs)


@given(sized())
def test_no_number_comes_up_twice_in_a_case(case: Case) -> None:
    found = numbers(case.tensors())

    assert len(set(found)) == len(found)


def test_a_number_that_comes_up_twice_would_be_seen() -> None:
    x, y = SOME.tensors()[0]

    found = numbers([(x, y), (x.flip(1), y + 100)])

    assert len(found) - len(set(found)) == x.numel()


def test_numbers_are_standard_normal_float64_leaves_without_a_graph() -> None:
    ((x, y),) = Case(batch=40, steps=50, inputs=5, outputs=5).tensors()

    for part in (x, y):
        assert part.dtype == torch.float64
        assert not part.requires_grad
        assert part.is_contiguous()
        # 10,000 numbers: a mean within 4 of its standard errors, a deviation likewise.
        assert abs(float(part.mean())) < 4 / 100
        assert abs(float(part.std()) - 1) < 4 / 140


def test_numbers_grow_from_the_seed_and_from_nothing_else() -> None:
    assert numbers(SOME.tensors()) == numbers(SOME.tensors())
    assert numbers(SOME.tensors()) == numbers(replace(SOME, chunk=1, hidden=1).tensors())
    other = numbers(replace(SOME, seed=SOME.seed + 4).tensors())
    assert not set(other) & set(numbers(SOME.tensors()))


def in_float32(grow: Callable[[], list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return grow()
    finally:
        torch.set_default_dtype(before)


def on_meta(grow: Callable[[], list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    with torch.device("meta"):
        return grow()


def reseeded(grow: Callable[[], list[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return grow()


@pytest.mark.parametrize("within", [in_float32, on_meta, reseeded])
def test_numbers_do_not_depend_on_what_torch_is_set_to(
    within: Callable[[Callable[[], list[tuple[Tensor, Tensor]]]], list[tuple[Tensor, Tensor]]],
) -> None:
    found = within(SOME.tensors)

    for pair, due in zip(found, SOME.tensors(), strict=True):
        for part, other in zip(pair, due, strict=True):
            assert part.dtype == torch.float64
            assert torch.equal(part, other)


def test_growing_numbers_touches_nobodys_generator() -> None:
    def states() -> tuple[list[int], object, list[int]]:
        generated = np.random.get_state(legacy=False)["state"]["key"].tolist()
        return torch.get_rng_state().tolist(), random.getstate(), generated

    before = states()
    SOME.tensors()
    assert states() == before

    with torch.random.fork_rng(devices=[]):
        torch.randn(1)
        assert states() != before


# As it is written -----------------------------------------------------------------------------


@given(sized())
def test_a_case_is_read_from_its_repr(case: Case) -> None:
    assert case_of(repr(case)) == case


@pytest.mark.parametrize(
    ("text", "due"),
    [
        (" tb.Case(chunk=2, steps=5)\n", Case(steps=5, chunk=2)),
        ("tbptt_props.Case(2, 5, 3, seed=4)", Case(batch=2, steps=5, chunk=3, seed=4)),
        ("Case()", Case()),
    ],
)
def test_a_case_is_read_however_it_may_be_written(text: str, due: Case) -> None:
    assert case_of(text) == due


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1, 5, 4, 0",
        "Case",
        "Case(steps=2",
        "Cases(steps=2)",
        "Case(steps=1 + len('x'))",
        "Case(steps=print('run'))",
        "Case(**{'steps': 2})",
        "Case(*[1, 2])",
        "Case(1, batch=1)",
        "Case(steps=2, steps=3)",
        "Case(1, 2, 3, 4, 5, 6, 7, 8, 9)",
        "Case(steps={[]: 1})",
        "Case(steps=2).tensors()",
        "(" * 9999,
        "Case(steps=2)\0",
    ],
)
def test_what_is_no_case_is_told_how_one_is_written_and_not_run(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="written as") as refusal:
        case_of(text)

    assert str(refusal.value) == f"a case is written as Case(steps=5, chunk=2), got {text!r}"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("Case(steps=0)", "steps must be an integer of at least 1, got steps=0"),
        ("Case(seed=-1)", "seed must be an integer of at least 0, got seed=-1"),
        ("Case(steps=True)", "steps must be an integer of at least 1, got steps=True"),
        ("Case(step=2)", f"a case has no size 'step': its sizes are {', '.join(SIZES)}"),
    ],
)
def test_a_written_case_of_no_such_size_is_refused_as_any_other(text: str, due: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 -- its text is compared below
        case_of(text)

    assert str(refusal.value) == due
