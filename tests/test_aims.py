"""Shapes: B sequences, T time steps, K time steps in a chunk, O outputs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

from tbptt_props.aims import FURTHEST, targets_of
from tbptt_props.batch import Batch
from tbptt_props.case import Case
from tbptt_props.strategies import cases
from tbptt_props.trace import Place

Loss = Callable[[Tensor, Tensor], Tensor]

B, T = 3, 9


def places_of(sequences: int, steps: int) -> Tensor:
    """Return, for each place of a batch, itself: (B, T, 2)."""
    axes = torch.meshgrid(torch.arange(sequences), torch.arange(steps), indexing="ij")
    return torch.stack(axes, dim=-1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLACES = places_of(B, T)
TARGETS = random(B, T, 2)


def at(places: Tensor) -> Tensor:
    """Return the targets at these places."""
    return TARGETS[places[..., 0], places[..., 1]]


def batch_with(targets: Tensor) -> Batch:
    return Batch.of((torch.zeros(*targets.shape[:2], 1), targets), None)


def listed(places: Tensor) -> tuple[Place, ...]:
    return tuple((int(b), int(t)) for b, t in places.reshape(-1, 2).tolist())


def found_for(
    places: Tensor, trained: Callable[[Tensor], Tensor], loss: Loss = mse_loss, y: Tensor = TARGETS
) -> tuple[Place, ...] | None:
    """Tell which targets are found of predictions at `places` for a loop's own loss of them."""
    prediction = random(*places.shape[:-1], 2, seed=1).requires_grad_()
    value = trained(prediction)
    (cotangent,) = torch.autograd.grad(value, prediction)
    return targets_of(
        loss, prediction.detach(), cotangent, float(value.detach()), batch_with(y), places
    )


CHUNK = PLACES[:, 3:6]


@pytest.mark.parametrize("loss", [mse_loss, l1_loss, lambda p, y: (p - y).square().sum()])
@pytest.mark.parametrize(
    "places",
    [
        CHUNK,
        CHUNK.transpose(0, 1),
        PLACES[:, :1],
        PLACES[:, 3],
        PLACES[1:2, 2:4],
        PLACES,
        PLACES[[2, 0, 1], 2:4],
    ],
)
def test_a_loss_against_its_own_targets_looked_at_those(places: Tensor, loss: Loss) -> None:
    found = found_for(places, lambda p: loss(p, at(places)), loss)

    assert found == listed(places)


@given(cases())
def test_a_loss_against_its_own_targets_looked_at_those_in_every_case(case: Case) -> None:
    _, y = case.tensors()[0]
    places = places_of(*y.shape[:2])[:, : case.chunk]
    prediction = random(*places.shape[:2], case.outputs, seed=case.seed).requires_grad_()
    value = mse_loss(prediction, y[:, : case.chunk])
    (cotangent,) = torch.autograd.grad(value, prediction)

    found = targets_of(
        mse_loss, prediction.detach(), cotangent, float(value.detach()), batch_with(y), places
    )

    assert found == listed(places)


@pytest.mark.parametrize("time", [1, 0])
@pytest.mark.parametrize("used", [[2], [0, 1], [0, 2], [1]])
def test_targets_of_some_time_steps_are_told_by_the_predictions_that_matter(
    used: list[int], time: int
) -> None:
    places = CHUNK if time == 1 else CHUNK.transpose(0, 1)
    kept = places.index_select(time, torch.tensor(used))

    found = found_for(
        places, lambda p: mse_loss(p.index_select(time, torch.tensor(used)), at(kept))
    )

    assert found == listed(kept)


@pytest.mark.parametrize("time", [1, 0])
@pytest.mark.parametrize("shift", [n for n in range(-FURTHEST, FURTHEST + 1) if n])
def test_targets_of_other_time_steps_are_told_up_to_three_away(shift: int, time: int) -> None:
    shifted = PLACES[:, 3 + shift : 6 + shift]
    places, aim = (p if time == 1 else p.transpose(0, 1) for p in (CHUNK, shifted))

    found = found_for(places, lambda p: mse_loss(p, at(aim)))

    assert found == listed(aim)


@pytest.mark.parametrize("shift", [-1, 1])
def test_targets_that_were_rolled_within_the_chunk_are_told(shift: int) -> None:
    aim = CHUNK.roll(shift, dims=1)

    found = found_for(CHUNK, lambda p: mse_loss(p, at(aim)))

    assert found == listed(aim)


def test_a_target_that_is_lost_at_the_boundary_is_told() -> None:
    """The mistake: predicting the next time step, cut inside the chunk, leaves its last one out."""
    aim = CHUNK[:, 1:]

    found = found_for(CHUNK, lambda p: mse_loss(p[:, :-1], at(aim)))

    assert found == listed(aim)


@pytest.mark.parametrize(
    ("places", "aim"),
    [
        (PLACES[:, :3], PLACES[:, [T - 1, 0, 1]]),  # one before: there is none before the first
        (PLACES[:, 6:], PLACES[:, [7, 8, 0]]),  # one after: there is none after the last
        (PLACES[:, 1:3], PLACES[:, 1 + FURTHEST + 1 : 3 + FURTHEST + 1]),
    ],
)
def test_no_target_is_looked_for_outside_the_batch_or_further_away(
    places: Tensor, aim: Tensor
) -> None:
    assert found_for(places, lambda p: mse_loss(p, at(aim))) is None


UNEXPLAINED: dict[str, Callable[[Tensor], Tensor]] = {
    "targets of other sequences": lambda p: mse_loss(p, at(CHUNK.flip(0))),
    "a scaled loss": lambda p: 2 * mse_loss(p, at(CHUNK)),
    "another loss": lambda p: l1_loss(p, at(CHUNK)),
    "targets back to front": lambda p: mse_loss(p, at(CHUNK.flip(1))),
    "no target at all": lambda p: p.square().mean(),
}


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_what_nothing_explains_is_not_told(name: str) -> None:
    assert found_for(CHUNK, UNEXPLAINED[name]) is None


def test_where_the_gradient_is_not_known_only_its_own_targets_are_tried() -> None:
    prediction = random(B, 3, 2, seed=1)
    own = float(mse_loss(prediction, at(CHUNK)))
    last = float(mse_loss(prediction[:, 2:], at(CHUNK[:, 2:])))

    assert targets_of(mse_loss, prediction, None, own, batch_with(TARGETS), CHUNK) == listed(CHUNK)
    assert targets_of(mse_loss, prediction, None, last, batch_with(TARGETS), CHUNK) is None


def test_a_loss_that_depends_on_no_prediction_is_not_told() -> None:
    assert found_for(CHUNK, lambda p: (0 * p).sum() + 1.5) is None


def test_a_loss_that_cannot_take_such_sizes_explains_nothing() -> None:
    def particular(prediction: Tensor, target: Tensor) -> Tensor:
        if target.shape[1] != 3:
            raise RuntimeError("three time steps, please")
        return mse_loss(prediction, target)

    whole = found_for(CHUNK, lambda p: mse_loss(p, at(CHUNK)), particular)
    part = found_for(CHUNK, lambda p: mse_loss(p[:, :1], at(CHUNK[:, :1])), particular)

    assert whole == listed(CHUNK)
    assert part is None


def test_a_loss_that_is_no_scalar_explains_nothing() -> None:
    def each(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square()

    assert found_for(CHUNK, lambda p: mse_loss(p, at(CHUNK)), each) is None


def test_classes_are_targets_as_numbers_are() -> None:
    classes = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0, 0]] * B)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(prediction.flatten(0, 1), target.flatten())

    found = found_for(CHUNK, lambda p: loss(p, classes[:, 3:6]), loss, classes)

    assert found == listed(CHUNK)
