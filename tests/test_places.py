"""Shapes: B sequences, T time steps, K time steps in a chunk, I inputs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tbptt_props.case import Case
from tbptt_props.places import locate, span_of, time_first
from tbptt_props.strategies import cases
from tbptt_props.trace import Span

Layout = Callable[[Tensor], Tensor]

# Parts of a batch (3, 7, ...), each the same whatever stands at a place.
VIEWS: dict[str, Layout] = {
    "the whole batch": lambda batch: batch,
    "a chunk": lambda batch: batch[:, 2:5],
    "the tail": lambda batch: batch[:, 6:],
    "a chunk, time first": lambda batch: batch[:, 2:5].transpose(0, 1),
    "one time step, as a call a step": lambda batch: batch[:, 3],
    "one time step, as a chunk": lambda batch: batch[:, 3:4],
    "one sequence": lambda batch: batch[1],
    "one sequence, as a batch": lambda batch: batch[1:2, :4],
    "some sequences": lambda batch: batch[1:, 2:4],
    "every other time step": lambda batch: batch[:, ::2],
    "all in one row": lambda batch: batch.flatten(0, 1),
    "one place": lambda batch: batch[2, 4],
    "as many chunks as there are": lambda batch: batch[:, :6].reshape(3, 2, 3, *batch.shape[2:]),
}
COPIES: dict[str, Layout] = {
    "back to front": lambda batch: batch[:, :4].flip(1),
    "sequences in another order": lambda batch: batch[[2, 0, 1], 1:4],
    "a time step repeated": lambda batch: batch[:, [3, 3, 4]],
    "a contiguous chunk": lambda batch: batch[:, 2:5].contiguous(),
    "contiguous, time first": lambda batch: batch[:, 2:5].transpose(0, 1).contiguous(),
}
LAYOUTS = VIEWS | COPIES


def places_of(sequences: int, steps: int) -> Tensor:
    """Return, for each place of a batch, itself: (B, T, 2)."""
    axes = torch.meshgrid(torch.arange(sequences), torch.arange(steps), indexing="ij")
    return torch.stack(axes, dim=-1)


PLACES = places_of(3, 7)


def inputs(*features: int) -> Tensor:
    """Return a batch (3, 7, ...) of unique numbers."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 7, *features, generator=generator, dtype=torch.float64)


def assert_places(found: Tensor | None, due: Tensor) -> None:
    assert found is not None
    assert found.tolist() == due.tolist()


# By memory, and by value --------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_found_whatever_its_numbers(name: str, width: int) -> None:
    for live in (inputs(width), torch.ones(3, 7, width)):
        found = locate(VIEWS[name](live), live, live.clone())

        assert_places(found, VIEWS[name](PLACES))


@pytest.mark.parametrize("width", [1, 2, 7])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_found_by_its_numbers(name: str, width: int) -> None:
    live = inputs(width)

    found = locate(LAYOUTS[name](live).clone(), live, live.clone())

    assert_places(found, LAYOUTS[name](PLACES))


@pytest.mark.parametrize("live", [None, "a batch", torch.zeros(3, 7), torch.zeros(2, 7, 2)])
def test_inputs_are_found_by_their_numbers_where_the_loops_own_batch_is_no_help(
    live: object,
) -> None:
    found = locate(inputs(2)[:, 2:5], live, inputs(2))

    assert_places(found, PLACES[:, 2:5])


STRIDED: dict[str, Layout] = {
    "time first in memory": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "time first, one more at the end": lambda t: torch.cat(
        [t.transpose(0, 1), t.transpose(0, 1)[:1]]
    )[:-1].transpose(0, 1),
    "one more time step before": lambda t: torch.cat([t[:, :1], t], dim=1)[:, 1:],
    "one more time step behind": lambda t: torch.cat([t, t[:, :1]], dim=1)[:, :-1],
    "every other sequence": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "every other time step of more": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "more features than it shows": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
}


def batch_of_ones(layout: str, features: tuple[int, ...]) -> Tensor:
    return STRIDED[layout](torch.ones(3, 7, *features))


def is_view(x: Tensor, of: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


STRIDED_VIEWS = [
    (layout, name, features)
    for layout in STRIDED
    for features in ((), (2,))
    if features or layout != "more features than it shows"
    for live in [batch_of_ones(layout, features)]
    for name, view in VIEWS.items()
    if is_view(view(live), live)
]


@pytest.mark.parametrize(("layout", "name", "features"), STRIDED_VIEWS)
def test_a_view_of_a_batch_of_any_strides_is_found(
    layout: str, name: str, features: tuple[int, ...]
) -> None:
    live = batch_of_ones(layout, features)

    found = locate(VIEWS[name](live), live, live.clone())

    assert not live.is_contiguous()
    assert_places(found, VIEWS[name](PLACES))


@pytest.mark.parametrize("layout", STRIDED)
def test_inputs_of_a_batch_that_is_not_contiguous_are_found_by_their_numbers(layout: str) -> None:
    live = STRIDED[layout](inputs(2))

    assert_places(locate(live[:, 2:5].clone(), live, live.clone()), PLACES[:, 2:5])


def test_the_targets_of_shifted_tokens_are_not_taken_for_other_inputs() -> None:
    ids = torch.zeros(3, 8, dtype=torch.int64)
    live = ids[:, :-1]

    assert_places(locate(ids[:, 2:5], live, live.clone()), PLACES[:, 2:5])
    assert_places(locate(ids[:, 1:7], live, live.clone()), PLACES[:, 1:7])
    assert locate(ids[:, 5:8], live, live.clone()) is None


def test_what_lies_beside_a_batch_in_memory_is_not_the_batchs() -> None:
    larger = torch.ones(5, 9, 2)
    live = larger[1:4, 1:8]

    assert locate(larger[:1, 1:4], live, live.clone()) is None
    assert locate(larger[4:, 1:4], live, live.clone()) is None
    assert locate(larger[1:4, :3], live, live.clone()) is None
    assert locate(larger[1:4, 6:9], live, live.clone()) is None
    assert_places(locate(larger[1:4, 3:6], live, live.clone()), PLACES[:, 2:5])


@pytest.mark.parametrize("sizes", [(1, 7), (3, 1), (1, 1)])
@pytest.mark.parametrize("time_first", [False, True])
def test_a_batch_of_one_sequence_or_one_time_step_is_found(
    sizes: tuple[int, int], time_first: bool
) -> None:
    live = torch.ones(*sizes, 2)
    if time_first:
        live = live.transpose(0, 1).contiguous().transpose(0, 1)

    assert_places(locate(live, live, live.clone()), places_of(*sizes))


def test_a_view_is_found_where_the_batch_is_a_part_of_something_larger() -> None:
    larger = torch.ones(5, 7, 2)
    live = larger[1:4]

    assert_places(locate(live[:, 2:5], live, live.clone()), PLACES[:, 2:5])


def test_a_view_of_a_single_input_is_found_whatever_the_stride_of_its_features() -> None:
    live = torch.ones(3, 7, 1)
    x = live[:, 2::2].transpose(1, 2)[..., :1]
    assert x.stride(-1) == 2

    assert_places(locate(x, live, live.clone()), PLACES[:, 2:3])


def test_a_view_is_found_after_the_batch_was_changed_in_place() -> None:
    live, pristine = inputs(2), inputs(2)
    x = live[:, 2:5]

    live.mul_(2).add_(1)

    assert_places(locate(x, live, pristine), PLACES[:, 2:5])
    assert locate(x.clone(), live, pristine) is None


def test_a_view_is_found_where_numbers_were_moved_in_place() -> None:
    live, pristine = inputs(2), inputs(2)

    live.copy_(live.flip(1))

    assert_places(locate(live[:, 2:5], live, pristine), PLACES[:, 2:5])
    assert_places(locate(live[:, 2:5].clone(), live, pristine), PLACES.flip(1)[:, 2:5])


def test_inputs_that_require_a_gradient_are_found() -> None:
    live = inputs(2)

    assert_places(locate(live[:, 2:5].clone().requires_grad_() * 1, live, live), PLACES[:, 2:5])


def test_numbers_that_come_up_twice_are_not_looked_up() -> None:
    live = inputs(2)
    live[1, 3, 0] = live[2, 5, 0]

    assert locate(live[:, 2:5].clone(), live, live.clone()) is None
    assert_places(locate(live[:, 2:5], live, live.clone()), PLACES[:, 2:5])
    assert locate(torch.ones(1, 2, 1), None, torch.ones(1, 2, 1)) is None
    assert_places(locate(torch.ones(1, 1, 1), None, torch.ones(1, 1, 1)), PLACES[:1, :1])


# What is not the batch's --------------------------------------------------------------------


def test_one_sequence_of_padding_has_no_place() -> None:
    live = inputs(2)
    x = torch.cat([live[:, 2:4], torch.zeros(1, 2, 2)])

    found = locate(x, live, live.clone())

    assert_places(found, torch.cat([PLACES[:, 2:4], torch.full((1, 2, 2), -1)]))


SIDES = {"behind": (5, 7, 1), "before": (0, 2, -1)}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_rows_beside_the_batchs_own_have_no_place(side: str, turned: bool) -> None:
    start, stop, way = SIDES[side]
    parts = [inputs(2)[:, start:stop], torch.zeros(3, 2, 2)][::way]
    places = [PLACES[:, start:stop], torch.full((3, 2, 2), -1)][::way]
    x, due = torch.cat(parts, dim=1), torch.cat(places, dim=1)
    if turned:
        x, due = x.transpose(0, 1), due.transpose(0, 1)

    assert_places(locate(x, None, inputs(2)), due)


CHANGED: dict[str, Layout] = {
    "sums over time": lambda x: x[:, 2:5].cumsum(1),
    "one left out": lambda x: x[:, 2:5] * torch.tensor([1, 0, 1]).reshape(1, 3, 1),
    "one of one sequence left out": lambda x: x[:, 2:5] * (x[:, 2:5] != x[1, 3]),
    "the last left out": lambda x: x[:, 4:] * torch.tensor([1, 1, 0]).reshape(1, 3, 1),
    "the first left out": lambda x: x[:, :3] * torch.tensor([0, 1, 1]).reshape(1, 3, 1),
    "in another order": lambda x: x[:, [4, 2, 3]] * torch.tensor([1, 1, 0]).reshape(1, 3, 1),
    "one number of one": lambda x: x[:, 2:5] + torch.eye(18).view(18, 3, 3, 2)[9],
    "all in one row": lambda x: (x[:, 2:5] * torch.tensor([1, 0, 1]).reshape(1, 3, 1)).flatten(
        0, 1
    ),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", CHANGED)
def test_of_rows_that_were_changed_nothing_is_claimed(name: str, turned: bool) -> None:
    x = CHANGED[name](inputs(2))

    assert locate(x.transpose(0, 1) if turned else x, None, inputs(2)) is None


UNLIKE: dict[str, Layout] = {
    "other numbers": lambda live: live[:, 2:5] + 1,
    "only padding": lambda live: torch.zeros(3, 4, 2, dtype=torch.float64),
    "more features": lambda live: torch.cat([live, live], dim=-1),
    "fewer features": lambda live: live[..., :1],
    "features before time": lambda live: live[:, 2:4].transpose(1, 2),
    "features in another order": lambda live: live[:, 2:4].flip(-1),
    "less precise numbers": lambda live: live[:, 2:4].float(),
    "integers": lambda live: live[:, 2:4].long(),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_not_the_batchs_is_not_found(name: str) -> None:
    live = inputs(2)

    assert locate(UNLIKE[name](live), live, live.clone()) is None


def test_a_view_that_cuts_through_the_features_is_not_found() -> None:
    live = inputs(2)

    assert locate(live.flatten()[1:13].view(1, 6, 2), live, live.clone()) is None


# Tokens, and features of more than one dimension --------------------------------------------


@pytest.mark.parametrize("name", VIEWS)
def test_tokens_are_found_by_their_memory(name: str) -> None:
    live = torch.zeros(3, 7, dtype=torch.int64)

    found = locate(VIEWS[name](live), live, live.clone())

    assert_places(found, VIEWS[name](PLACES))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_copies_of_tokens_are_not_found_for_tokens_are_not_unique(dtype: torch.dtype) -> None:
    live = torch.arange(21).reshape(3, 7).to(dtype)

    assert locate(live[:, 2:5].clone(), live, live.clone()) is None


def test_integers_with_features_are_found_by_their_memory_alone() -> None:
    live = torch.arange(42).reshape(3, 7, 2)

    assert_places(locate(live[:, 2:5], live, live.clone()), PLACES[:, 2:5])
    assert locate(live[:, 2:5].clone(), live, live.clone()) is None


@pytest.mark.parametrize("features", [(2, 3), (3, 3), (1, 2, 3)])
@pytest.mark.parametrize("copied", [False, True])
def test_a_frame_at_each_time_step_has_one_place_or_none_is_claimed(
    features: tuple[int, ...], copied: bool
) -> None:
    live = inputs(*features)
    x = live[:, 2:5].clone() if copied else live[:, 2:5]

    found = locate(x, live, live.clone())

    if found is not None:
        assert_places(found, PLACES[:, 2:5])


# Every case ---------------------------------------------------------------------------------


@given(cases(), st.data())
def test_each_chunk_of_any_case_is_found_in_any_layout(case: Case, data: st.DataObject) -> None:
    live, _ = data.draw(st.sampled_from(case.tensors()))
    layout = data.draw(
        st.sampled_from(
            [
                lambda t: t,
                lambda t: t.transpose(0, 1),
                torch.clone,
                lambda t: t.flip(0),
                lambda t: t.transpose(0, 1).contiguous(),
            ]
        )
    )
    due = places_of(*live.shape[:2])

    chunks = (torch.split(part, case.chunk, dim=1) for part in (live, due))
    for x, places in zip(*chunks, strict=True):
        assert_places(locate(layout(x), live, live.clone()), layout(places))


# Which way places run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "due"),
    [
        (PLACES[:, 2:5], False),
        (PLACES[:, 2:5].transpose(0, 1), True),
        (PLACES[:, 3:4], False),
        (PLACES[:, 3:4].transpose(0, 1), True),
        (PLACES[1:2, 2:5], False),
        (PLACES[1:2, 2:5].transpose(0, 1), True),
        (PLACES[1:2, 2:4].transpose(0, 1), True),
        (PLACES[[2, 0, 1], 2:5], False),
        (PLACES[:, 2:5].flip(1).transpose(0, 1), True),
        (PLACES[1:2, 3:4], False),
        (torch.cat([PLACES[:, 6:], torch.full((3, 2, 2), -1)], dim=1), False),
        (torch.cat([PLACES[:, 6:], torch.full((3, 2, 2), -1)], dim=1).transpose(0, 1), True),
        (PLACES[:, 3], False),
        (PLACES[:, :6].reshape(3, 2, 3, 2), False),
    ],
)
def test_time_comes_first_where_each_row_is_one_time_step(places: Tensor, due: bool) -> None:
    assert time_first(places) is due


@pytest.mark.parametrize(
    ("places", "due"),
    [
        (None, None),
        (PLACES[:, :0], None),
        (PLACES, (0, 7)),
        (PLACES[:, 2:5], (2, 5)),
        (PLACES[:, 2:5].transpose(0, 1).flip(0), (2, 5)),
        (PLACES[:, 3], (3, 4)),
        (PLACES[1, 6], (6, 7)),
        (PLACES[:, [1, 5]], (1, 6)),
        (torch.cat([PLACES[:, 5:], torch.full((3, 2, 2), -1)], dim=1), (5, 7)),
    ],
)
def test_places_span_the_first_time_step_to_the_last(
    places: Tensor | None, due: Span | None
) -> None:
    assert span_of(places) == due
