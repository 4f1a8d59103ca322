"""Inputs that the loop makes of the batch are followed: where they are from is judged all the same.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from gallery.strangers import Loop, seeded
from torch import Tensor, nn

import tbptt_props as tb
from tbptt_props.lineage import Lineage
from tbptt_props.places import by_memory

CASES = (
    tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=3),
    tb.Case(batch=2, steps=6, chunk=2, inputs=3, hidden=2, outputs=2, batches=2, seed=8),
    tb.Case(batch=2, steps=4, chunk=4, inputs=2, hidden=3, outputs=2, seed=12),
)
NAMES = 7  # as many tokens as there are


class Made(Loop):
    """Hands forward what it makes of the inputs, chunk by chunk; heirs make a mistake of it."""

    def make(self, x: Tensor) -> Tensor:
        return x * 2 - 1

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        return super().train_on(self.make(x), y, state)


class Noisy(Made):
    def make(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Masked(Made):
    """Without some of the inputs: those that are left are the batch's own numbers."""

    def make(self, x: Tensor) -> Tensor:
        return x * (torch.rand(*x.shape[:2], 1) < 0.7)


class Standardized(Made):
    """By the whole batch's mean and deviation, before it is cut."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        deviation = x.std((0, 1), unbiased=False)
        super().training_step(((x - x.mean((0, 1))) / (1 + deviation), y), batch_idx)

    def make(self, x: Tensor) -> Tensor:
        return x


class Encoded(Made):
    """By layers of the module's that are not in its forward."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.encoder = nn.Sequential(
            nn.Linear(case.inputs, case.inputs), nn.Tanh(), nn.Dropout(0.2)
        )

    def make(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(x)
        return encoded


class Widened(Made):
    """By a further feature."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRU(case.inputs + 1, case.hidden, batch_first=True)

    def make(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


class OneHot(Made):
    """Of tokens, transposed on its way, as if that were needed."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRU(NAMES, case.hidden, batch_first=True)

    def make(self, x: Tensor) -> Tensor:
        ones = F.one_hot(x.t(), NAMES).to(torch.get_default_dtype())
        return ones.transpose(0, 1)


def tokens(case: tb.Case) -> list[Any]:
    return [((10 * x[..., 0]).long() % NAMES, y) for x, y in case.tensors()]


WAYS: dict[str, tuple[type[Made], dict[str, Any]]] = {
    "scaled": (Made, {}),
    "noisy": (Noisy, {}),
    "masked": (Masked, {}),
    "standardized": (Standardized, {}),
    "encoded": (Encoded, {}),
    "widened": (Widened, {}),
    "one_hot": (OneHot, {"batches": tokens}),
}


def without_tail(kind: type[Made]) -> type[Made]:
    class WithoutTail(kind):  # type: ignore[misc, valid-type]
        def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
            return super().train_on(x, y, state) if x.size(1) == self.k else state

    return WithoutTail


def without_state(kind: type[Made]) -> type[Made]:
    class WithoutState(kind):  # type: ignore[misc, valid-type]
        def cut(self, state: Any) -> Any:
            return None

    return WithoutState


def with_other_targets(kind: type[Made]) -> type[Made]:
    class WithOtherTargets(kind):  # type: ignore[misc, valid-type]
        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            return super().loss(prediction, target.roll(1, dims=1))  # type: ignore[no-any-return]

    return WithOtherTargets


MISTAKES: dict[str, tuple[Callable[[type[Made]], type[Made]], str]] = {
    "tail": (without_tail, "chunks_tile_the_sequence"),
    "state": (without_state, "state_crosses_every_boundary"),
    "targets": (with_other_targets, "loss_is_the_chunks_own"),
}


def judged(kind: type[Made], wiring: dict[str, Any]) -> tuple[set[str], set[str]]:
    build = seeded(lambda case: tb.Subject(kind(case), loss=F.mse_loss, **wiring))
    reports = [tb.check(build(case), case) for case in CASES]
    broken = {verdict.name for report in reports for verdict in report.broken}
    held = {verdict.name for report in reports for verdict in report.holds}
    return broken, held - broken


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_the_loop_makes_are_judged_as_the_batchs_own(way: str) -> None:
    broken, held = judged(*WAYS[way])

    assert broken == set()
    assert {due for _, due in MISTAKES.values()} <= held


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("way", WAYS)
def test_a_mistake_is_found_behind_what_the_loop_makes(way: str, mistake: str) -> None:
    kind, wiring = WAYS[way]
    mistaken, due = MISTAKES[mistake]

    broken, _ = judged(mistaken(kind), wiring)

    assert due in broken


@pytest.mark.parametrize("more", [0, 1])
def test_what_mixes_time_steps_is_not_followed(more: int) -> None:
    """Nor is it accused where the first time step is the batch's own."""

    class Sums(Made):
        def make(self, x: Tensor) -> Tensor:
            return more + x.cumsum(dim=1)

    broken, held = judged(Sums, {})

    assert broken == set()
    assert "chunks_tile_the_sequence" not in held


# One operation after the other ------------------------------------------------------------------

ROWS = torch.randn(3, 5, 2)


def followed(make: Callable[[Tensor], Tensor]) -> Tensor | None:
    lineage = Lineage(lambda tensor: by_memory(tensor, ROWS), lambda: False)
    with lineage:
        made = make(ROWS)
    return lineage.places(made)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: 1 - x,
        lambda x: 2 / (x + 3),
        lambda x: torch.relu(x).mul_(2),
        lambda x: x @ torch.ones(2, 4),
        lambda x: F.layer_norm(x, (2,)),
        lambda x: x.float().double(),
        lambda x: x * x.mean(dim=1, keepdim=True),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
        lambda x: torch.cat([x + 1, x * 2], dim=2),
    ],
)
def test_what_makes_each_row_of_one_row_is_followed(make: Callable[[Tensor], Tensor]) -> None:
    places = followed(make)

    assert places is not None
    assert places[2, 4].tolist() == [2, 4]
    assert places.shape == (3, 5, 2)


def test_views_of_what_was_made_are_followed() -> None:
    places = followed(lambda x: (x * 2).transpose(0, 1)[1:3])

    assert places is not None
    assert places[1, 2].tolist() == [2, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.cumsum(dim=1),
        lambda x: x[:, 1:] - x[:, :-1],
        lambda x: torch.cat([x + 1, x + 2], dim=1),
        lambda x: x.mean(dim=1),
        lambda x: x.flip(1),
        lambda x: torch.ones(5, 5) @ x,
        lambda x: torch.randn(3, 5, 2),
    ],
)
def test_what_makes_a_row_of_several_or_moves_it_ends_the_trail(
    make: Callable[[Tensor], Tensor],
) -> None:
    assert followed(make) is None


def test_what_the_kit_does_itself_is_not_noted() -> None:
    lineage = Lineage(lambda tensor: by_memory(tensor, ROWS), lambda: True)
    with lineage:
        made = ROWS * 2

    assert lineage.places(made) is None


def test_a_batch_that_is_over_is_forgotten() -> None:
    lineage = Lineage(lambda tensor: by_memory(tensor, ROWS), lambda: False)
    with lineage:
        made = ROWS * 2
    lineage.forget()

    assert lineage.places(made) is None
