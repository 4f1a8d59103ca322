from collections.abc import Callable
from math import inf, isnan, nan, nextafter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tbptt_props.compare import (
    EXACT,
    clipped,
    close,
    difference,
    is_clipped,
    near,
    near_slope,
    same,
    worst,
)
from tbptt_props.trace import Difference, told_apart


def numbers(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# Bitwise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "due"),
    [
        (numbers(1, 2), numbers(1, 2), True),
        (numbers(1, 2), numbers(1, 2 + 1e-15), False),
        (numbers(1, 2), numbers(2, 1), False),
        (numbers(), numbers(), True),
        (torch.zeros(0, 2), torch.zeros(0, 3), False),
        (numbers(1, 2), numbers(1, 2)[None], False),
        (numbers(1), numbers(1, 1), False),
        (numbers(1, 2), numbers(1, 2, dtype=torch.float32), False),
        (torch.tensor([1]), torch.tensor([1.0]), False),
        (numbers(nan, 1), numbers(nan, 1), True),
        (numbers(nan, 1), numbers(1, nan), False),
        (numbers(nan, 1), numbers(nan, 2), False),
        (numbers(nan, inf), numbers(nan, inf), True),
        (numbers(inf), numbers(-inf), False),
        (torch.tensor([True, False]), torch.tensor([True, False]), True),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), False),
        (torch.tensor([1j]), torch.tensor([1j]), True),
        (torch.tensor([1j]), torch.tensor([2j]), False),
        (torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0).reshape(2, 3).T.contiguous(), True),
    ],
)
def test_tensors_are_the_same_where_shape_dtype_and_every_number_are(
    one: Tensor, other: Tensor, due: bool
) -> None:
    assert same(one, other) is due
    assert same(other, one) is due
    assert same(one, one)


def test_a_graph_makes_no_difference() -> None:
    leaf = numbers(1, 2).requires_grad_()

    assert same(leaf * 1, numbers(1, 2))
    assert close(leaf * 1, numbers(1, 2))


# But for the order of sums ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("due", [1.0, -300.0, 1e6])
def test_what_differs_by_less_than_the_tolerance_is_close(dtype: torch.dtype, due: float) -> None:
    allowed = EXACT[dtype]["rtol"] * abs(due) + EXACT[dtype]["atol"]

    assert close(numbers(due + 0.9 * allowed, dtype=dtype), numbers(due, dtype=dtype))
    assert not close(numbers(due + 1.1 * allowed, dtype=dtype), numbers(due, dtype=dtype))
    assert near(due - 0.9 * allowed, due, dtype=dtype)
    assert not near(due - 1.1 * allowed, due, dtype=dtype)


def test_next_to_zero_the_absolute_tolerance_counts() -> None:
    assert close(numbers(9e-13), numbers(0))
    assert not close(numbers(2e-12), numbers(0))


@given(st.permutations(range(40)))
def test_a_sum_in_another_order_is_close(order: list[int]) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    found = sum(float(values[i]) for i in order)

    assert near(found, float(values.sum()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_coarser_than_float32_is_held_to_the_tolerance_of_float32(
    dtype: torch.dtype,
) -> None:
    assert close(numbers(1, dtype=dtype), numbers(1, dtype=dtype))
    assert not close(numbers(1.01, dtype=dtype), numbers(1, dtype=dtype))


@pytest.mark.parametrize(
    ("found", "due", "answer"),
    [
        (numbers(1, 2), numbers(1, 2)[None], False),
        (numbers(1, 1), numbers(1), False),
        (numbers(nan), numbers(nan), True),
        (numbers(nan), numbers(1), False),
        (numbers(inf), numbers(inf), True),
        (numbers(inf), numbers(-inf), False),
        (numbers(), numbers(), True),
        (torch.tensor([3]), torch.tensor([3]), True),
        (torch.tensor([3]), torch.tensor([4]), False),
    ],
)
def test_shapes_and_what_is_not_finite_must_be_equal_to_be_close(
    found: Tensor, due: Tensor, answer: bool
) -> None:
    assert close(found, due) is answer


@pytest.mark.parametrize(
    ("one", "other", "due"),
    [(1, 1 + 9e-7, True), (1, 1 + 2e-6, False), (0, 9e-9, True), (0, 2e-8, False), (-1, 1, False)],
)
def test_slopes_are_alike_but_for_what_differencing_costs(
    one: float, other: float, due: bool
) -> None:
    assert near_slope(one, other) is due
    assert near_slope(other, one) is due


# Where they differ --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "due", "entry"),
    [
        (numbers(1, 2, 5), numbers(1, 3, 3), Difference("g", (2,), 5, 3)),
        (numbers(1, 9), numbers(-10, 9), Difference("g", (0,), 1, -10)),
        (numbers(4)[0], numbers(3)[0], Difference("g", (), 4, 3)),
        (
            numbers(1, 2, 3, 4).view(2, 2),
            numbers(1, 2, 0, 4).view(2, 2),
            Difference("g", (1, 0), 3, 0),
        ),
        (numbers(1, inf), numbers(9, 1), Difference("g", (1,), inf, 1)),
        (numbers(inf, 1), numbers(inf, 2), Difference("g", (1,), 1, 2)),
        (torch.tensor([3, 4]), torch.tensor([3, 6]), Difference("g", (1,), 4, 6)),
        (
            torch.tensor([9, 0], dtype=torch.uint8),
            torch.tensor([10, 200], dtype=torch.uint8),
            Difference("g", (1,), 0, 200),
        ),
        (torch.tensor([True, False]), torch.tensor([True, True]), Difference("g", (1,), 0, 1)),
    ],
)
def test_the_difference_is_the_entry_that_differs_most(
    found: Tensor, due: Tensor, entry: Difference
) -> None:
    assert difference("g", found, due) == entry


def test_the_difference_between_complex_tensors_can_be_said() -> None:
    """Also of two that are equally far from zero."""
    found = difference("g", torch.tensor([1j, 1 + 3j]), torch.tensor([1j, 1 - 3j]))

    assert (found.entry, found.told) == ("g[1]", ("1+3j", "1-3j"))


def test_a_number_that_became_nan_differs_most() -> None:
    found = difference("g", numbers(1, nan), numbers(9, 2))

    assert found.index == (1,)
    assert isnan(found.found)
    assert found.due == 2


def test_a_nan_that_is_due_is_no_difference() -> None:
    assert difference("g", numbers(nan, 1), numbers(nan, 2)) == Difference("g", (1,), 1, 2)


def test_a_difference_leaves_its_tensors_as_they_are() -> None:
    found, due = numbers(1, nan).requires_grad_(), numbers(2, inf)

    difference("g", found, due)

    assert same(found, numbers(1, nan))
    assert same(due, numbers(2, inf))


FOUND = {"a": numbers(1, 2), "b": numbers(3, 4), "extra": numbers(5)}


def test_the_worst_is_one_entry_of_each_tensor_that_differs() -> None:
    due = {"b": numbers(3, 7), "a": numbers(0, 2)}

    assert list(worst(FOUND, due)) == [Difference("b", (1,), 4, 7), Difference("a", (0,), 1, 0)]


def test_nothing_is_the_worst_where_nothing_differs() -> None:
    assert list(worst(FOUND, {"a": numbers(1, 2), "b": numbers(3, 4)})) == []
    assert list(worst(FOUND, {})) == []


def test_what_is_missing_counts_as_zero() -> None:
    assert list(worst({}, {"a": numbers(0, 0), "b": numbers(0, 2)})) == [
        Difference("b", (1,), 0, 2)
    ]


def test_only_bitwise_the_last_bit_counts() -> None:
    due = {"a": numbers(1, 2 + 1e-14)}

    assert list(worst(FOUND, due)) == []
    assert list(worst(FOUND, due, bitwise=True)) == [Difference("a", (1,), 2, 2 + 1e-14)]


@pytest.mark.parametrize("bitwise", [False, True])
def test_of_another_shape_the_shapes_are_told(bitwise: bool) -> None:
    (found,) = worst(FOUND, {"a": numbers(1, 2, 3)}, bitwise=bitwise)

    assert (found.entry, found.told) == ("a", ("shape (2,)", "shape (3,)"))


@pytest.mark.parametrize("values", [(1, 2), ()], ids=["numbers", "empty"])
def test_of_another_dtype_alone_the_dtypes_are_told(values: tuple[float, ...]) -> None:
    due = {"a": numbers(*values, dtype=torch.float32)}

    (found,) = worst({"a": numbers(*values)}, due, bitwise=True)

    assert (found.entry, found.told) == ("a", ("torch.float64", "torch.float32"))


def test_of_another_dtype_and_other_numbers_the_numbers_are_told() -> None:
    (found,) = worst(FOUND, {"a": numbers(1, 3, dtype=torch.float32)}, bitwise=True)

    assert found == Difference("a", (1,), 2, 3)


# What is said of them -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "due", "told"),
    [
        (1.0, 2.0, ("1", "2")),
        (1 / 3, 2 / 3, ("0.333333", "0.666667")),
        (0.5, 0.5000001, ("0.5", "0.5000001")),
        (1.0, 1.0 + 2.0**-52, ("1", "1.0000000000000002")),
        (1e-300, -1e-300, ("1e-300", "-1e-300")),
        (nan, 1.0, ("nan", "1")),
        (inf, -inf, ("inf", "-inf")),
        (nan, nan, ("nan", "nan")),
        (1 / 3, 1 / 3, ("0.333333", "0.333333")),
        (1 + 1j, 1 - 1j, ("1+1j", "1-1j")),
    ],
)
def test_two_numbers_are_said_in_as_few_digits_as_tell_them_apart(
    found: complex, due: complex, told: tuple[str, str]
) -> None:
    assert told_apart(found, due) == told


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_no_two_numbers_that_differ_are_said_alike(found: float, due: float) -> None:
    one, other = told_apart(found, due)

    assert (one != other) or found == due


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_two_neighbours_are_said_as_two_numbers_in_their_order(number: float) -> None:
    neighbour = nextafter(number, inf)

    one, other = told_apart(number, neighbour)

    assert one != other
    assert float(one) <= float(other)


def test_a_difference_says_its_entry_and_both_values() -> None:
    assert str(Difference("g", (0, 2), 1.0, 1.0000001)) == "g[0, 2] = 1 (was 1.0000001)"
    assert str(Difference("g", (), 1.0, 2.0)) == "g = 1 (was 2)"


# Clipping -----------------------------------------------------------------------------------

GRADIENTS = {"w": numbers(3, -4), "b": numbers(0.5)}

HANDED: dict[str, tuple[dict[str, Tensor], bool]] = {
    "as they were": (GRADIENTS, False),
    "all by one factor": ({"w": numbers(1.5, -2), "b": numbers(0.25)}, True),
    "one tensor by a factor": ({"w": numbers(1.5, -2), "b": numbers(0.5)}, True),
    "at one height": ({"w": numbers(1, -1), "b": numbers(0.5)}, True),
    "at a height that cuts one entry": ({"w": numbers(3, -3.5), "b": numbers(0.5)}, True),
    "cleared": ({"w": numbers(0, 0), "b": numbers(0)}, False),
    "larger": ({"w": numbers(6, -8), "b": numbers(1)}, False),
    "turned round": ({"w": numbers(-1.5, 2), "b": numbers(0.5)}, False),
    "one entry changed": ({"w": numbers(3, -3.9), "b": numbers(0.4)}, True),
    "one entry grown": ({"w": numbers(3.1, -4), "b": numbers(0.5)}, False),
    "shifted": ({"w": numbers(2.9, -4.1), "b": numbers(0.4)}, False),
    "entries by their own factors": ({"w": numbers(1.5, -3), "b": numbers(0.5)}, False),
    "one tensor cleared": ({"w": numbers(0, 0), "b": numbers(0.5)}, False),
    "noise": ({"w": numbers(2.8, -3.9), "b": numbers(0.5)}, False),
    "not a number": ({"w": numbers(nan, nan), "b": numbers(0.5)}, False),
    "others": ({"x": numbers(1)}, False),
    "none": ({}, False),
}


@pytest.mark.parametrize("name", HANDED)
def test_gradients_are_clipped_where_they_were_shrunk_by_a_factor_or_at_a_height(
    name: str,
) -> None:
    handed, due = HANDED[name]

    assert is_clipped(GRADIENTS, handed) is due


Clip = Callable[[list[torch.nn.Parameter]], object]


@pytest.mark.parametrize(
    ("clip", "norm", "value"),
    [
        (lambda p: clip_grad_norm_(p, 1.0), 1.0, None),
        (lambda p: clip_grad_norm_(p, 4.0), 4.0, None),
        (lambda p: clip_grad_norm_(p, 100.0), 100.0, None),
        (lambda p: clip_grad_value_(p, 1.0), None, 1.0),
        (lambda p: clip_grad_value_(p, 3.5), None, 3.5),
        (lambda p: clip_grad_value_(p, 100.0), None, 100.0),
        (lambda p: None, None, None),
    ],
)
def test_gradients_are_clipped_as_torch_clips_them(
    clip: Clip, norm: float | None, value: float | None
) -> None:
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in GRADIENTS.items()}
    for name, parameter in parameters.items():
        parameter.grad = GRADIENTS[name].clone()
    clip(list(parameters.values()))

    found = clipped(GRADIENTS, norm=norm, value=value)

    handed = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert found.keys() == handed.keys()
    assert all(close(found[name], handed[name]) for name in handed)
    changed = any(not same(handed[name], GRADIENTS[name]) for name in handed)
    assert changed is (norm in (1.0, 4.0) or value in (1.0, 3.5))
    assert is_clipped(GRADIENTS, found) is changed


def test_no_gradients_are_clipped_to_none() -> None:
    assert clipped({}, norm=1.0, value=None) == {}
    assert clipped({}, norm=None, value=1.0) == {}


def test_clipping_changes_no_gradient_in_place() -> None:
    clipped(GRADIENTS, norm=1.0, value=None)
    clipped(GRADIENTS, norm=None, value=1.0)

    assert same(GRADIENTS["w"], numbers(3, -4))
    assert same(GRADIENTS["b"], numbers(0.5))


def test_rows_that_were_shrunk_each_by_a_factor_are_clipped() -> None:
    before = torch.tensor([[3.0, -4.0], [1.0, 2.0]], dtype=torch.float64)
    after = before * torch.tensor([[0.5], [0.25]], dtype=torch.float64)

    assert is_clipped({"w": before}, {"w": after})
    assert not is_clipped({"w": before}, {"w": torch.stack([after[0], -after[1]])})


def test_entries_clipped_at_a_height_and_then_by_one_factor_are_clipped() -> None:
    before = {"w": torch.tensor([3.0, -0.5, 0.1], dtype=torch.float64)}

    assert is_clipped(before, {"w": before["w"].clamp(-1, 1) * 0.3})
