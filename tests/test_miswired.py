"""A wrong wiring is refused as such, and a wrong loop is not taken for one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.broken import BROKEN
from gallery.other_shapes import OTHER
from gallery.strangers import StateComesFirst, StatesApart, StatesByName, seeded
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, l1_loss, mse_loss

import tbptt_props as tb
from tbptt_ref.faults_time import CutsAlongTheBatch, RunsAlongTheBatch
from tbptt_ref.module import TruncatedRNN

CASE = tb.Case(batch=3, steps=5, chunk=2, inputs=2, hidden=3, outputs=4, batches=2, seed=4)
CASES = (
    CASE,
    tb.Case(batch=2, steps=2, chunk=1, inputs=2, hidden=2, outputs=2, seed=8),
    tb.Case(batch=4, steps=4, chunk=2, inputs=3, hidden=3, outputs=3, seed=12),
    tb.Case(batch=5, steps=3, chunk=2, inputs=1, hidden=2, outputs=1, batches=2, seed=3),
)


class TimeMajor(TruncatedRNN):
    """Cuts its batches along their first dimension, as its core has time there."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Train on each chunk."""
        state = None
        for x, y in zip(*(part.split(self.chunk) for part in batch), strict=True):
            _, state = self.train_chunk(x, y, state)


def time_major(case: tb.Case) -> TruncatedRNN:
    core = nn.GRU(case.inputs, case.hidden)
    return TimeMajor(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)


def reference(case: tb.Case, **options: Any) -> TruncatedRNN:
    core = nn.GRU(case.inputs, case.hidden, batch_first=True)
    readout = nn.Linear(case.hidden, case.outputs)
    return TruncatedRNN(core, readout, chunk=case.chunk, **options)


def told(make: Callable[[tb.Case], nn.Module], **wiring: Any) -> Callable[[tb.Case], tb.Subject]:
    return seeded(lambda case: tb.Subject(make(case), **{"loss": mse_loss, **wiring}))


# Time first -------------------------------------------------------------------------------------


def test_time_first_where_sequences_are_handed_out_first_is_wrong_wiring() -> None:
    with pytest.raises(tb.ObservationError) as refused:
        tb.check(told(time_major)(CASE), CASE)

    assert str(refused.value) == (
        "TimeMajor takes the first dimension of a batch for time, but is handed sequences first, "
        "(B, T, ...) = (3, 5, ...): taken as (T, B, ...), every property holds. Hand out such "
        "batches, and say which way they lie: Subject(..., batches=lambda case: "
        "[(x.transpose(0, 1), y.transpose(0, 1)) for x, y in case.tensors()], parts=lambda batch: "
        "(batch[0].transpose(0, 1), batch[1].transpose(0, 1)))"
    )


def test_what_the_refusal_says_to_do_is_right() -> None:
    build = told(
        time_major,
        batches=lambda case: [(x.transpose(0, 1), y.transpose(0, 1)) for x, y in case.tensors()],
        parts=lambda batch: (batch[0].transpose(0, 1), batch[1].transpose(0, 1)),
    )

    report = tb.verify(build, max_examples=8, seed=0)

    assert not report.broken


def test_parts_that_turn_batches_for_nothing_are_wrong_wiring_too() -> None:
    turned = told(reference, parts=lambda b: (b[0].transpose(0, 1), b[1].transpose(0, 1)))

    with pytest.raises(tb.ObservationError, match="takes the first dimension of a batch for time"):
        tb.verify(turned, max_examples=8, seed=0)


@pytest.mark.parametrize("core", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("fault", [CutsAlongTheBatch, RunsAlongTheBatch])
def test_a_loop_that_cuts_or_runs_along_the_batch_is_no_wrong_wiring(fault: Any, core: Any) -> None:
    def made(case: tb.Case) -> nn.Module:
        layer = core(case.inputs, case.hidden, batch_first=True)
        module: nn.Module = fault(layer, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
        return module

    reports = [tb.check(told(made)(case), case) for case in CASES]

    assert any(report.broken for report in reports)


def test_a_strangers_loop_that_cuts_the_wrong_dimension_is_no_wrong_wiring() -> None:
    _, build = BROKEN["splits_sequences"]

    def subject(case: tb.Case) -> tb.Subject:
        module, loss = build(case)
        return tb.Subject(module, loss=loss)

    assert any(tb.check(seeded(subject)(case), case).broken for case in CASES)


def test_a_stateless_loop_that_cuts_the_wrong_dimension_is_not_refused() -> None:
    """Nothing shows which dimension is time where no state goes along it."""

    class Forgets(TimeMajor):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            prediction, _ = super().forward(x, None)
            return prediction, None

    def made(case: tb.Case) -> nn.Module:
        core = nn.GRU(case.inputs, case.hidden, batch_first=True)
        return Forgets(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)

    report = tb.check(told(made)(CASE), CASE)

    assert "chunks_tile_the_sequence" in {verdict.name for verdict in report.broken}


# Another loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trained", "other"), [("l1_loss", "mse_loss"), ("mse_loss", "smooth_l1_loss")]
)
def test_a_loop_that_trains_on_another_loss_than_was_told_is_wrong_wiring(
    trained: str, other: str
) -> None:
    module = reference(CASE, loss=getattr(functional, trained))

    with pytest.raises(tb.ObservationError) as refused:
        tb.check(tb.Subject(module, loss=getattr(functional, other)), CASE)

    assert str(refused.value) == (
        f"TruncatedRNN trains on {trained}(prediction, target) of torch.nn.functional, in value "
        f"and slopes, and the loss that was told is {other}: one is not meant, so tell the other, "
        "Subject(..., loss=...), or train on it"
    )


def classes(case: tb.Case) -> list[tuple[Tensor, Tensor]]:
    return [(x, y.argmax(-1)) for x, y in case.tensors()]


def of_rows(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda prediction, target: loss(prediction.flatten(0, 1), target.flatten())


def test_losses_of_classes_are_told_apart_too() -> None:
    module = reference(CASE, loss=of_rows(functional.nll_loss))

    with pytest.raises(tb.ObservationError, match=r"trains on nll_loss.* told is cross_entropy"):
        tb.check(tb.Subject(module, loss=of_rows(cross_entropy), batches=classes), CASE)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, y: 0.5 * mse_loss(p, y),
        lambda p, y: mse_loss(p, y, reduction="sum"),
        lambda p, y: mse_loss(p, y.roll(1, dims=1)),
        lambda p, y: mse_loss(p[:, -1], y[:, -1]),
        lambda p, y: mse_loss(p, y) + 0.1 * l1_loss(p, y),
    ],
)
def test_a_loss_that_is_no_common_one_is_a_mistake(loss: Any) -> None:
    report = tb.check(tb.Subject(reference(CASE, loss=loss), loss=mse_loss), CASE)

    assert "loss_is_the_chunks_own" in {verdict.name for verdict in report.broken}


def test_a_loss_told_that_is_no_common_one_is_what_the_loop_should_train_on() -> None:
    """Here weights may have been forgotten in the loop."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def weighted(prediction: Tensor, target: Tensor) -> Tensor:
        return (weights * (prediction - target) ** 2).mean()

    report = tb.check(tb.Subject(reference(CASE), loss=weighted), CASE)

    assert "loss_is_the_chunks_own" in {verdict.name for verdict in report.broken}


def test_a_single_entry_tells_one_loss_from_another() -> None:
    case = tb.Case(steps=2, chunk=1)

    with pytest.raises(tb.ObservationError, match="trains on l1_loss"):
        tb.check(tb.Subject(reference(case, loss=l1_loss), loss=mse_loss), case)


def test_what_is_wired_rightly_is_not_refused() -> None:
    build = OTHER["time_major_batches"][1]
    unusual = build(CASE)
    turned = tb.Subject(
        unusual.module,
        loss=unusual.loss,
        batches=lambda _: unusual.batches,
        parts=lambda b: (b[0].transpose(0, 1), b[1].transpose(0, 1)),
    )

    assert not tb.check(turned, CASE).broken


# Which argument is the state ----------------------------------------------------------------------


class StateFirstByName(StateComesFirst):
    """Its first call is without a state, so that nothing tells that its first argument is one."""

    def forward(self, state: Any = None, inputs: Any = None) -> Any:  # type: ignore[override]
        return super().forward(state, inputs)

    def run(self, x: Tensor, state: Any) -> Any:
        return self(inputs=x) if state is None else self(inputs=x, state=state)


class MasksBehind(StatesApart):
    """What it takes behind the inputs is no state, and what it returns last is none either."""

    def forward(self, x: Tensor, *masks: Tensor) -> Any:
        prediction, h, _ = super().forward(x)
        return prediction, h, prediction

    def run(self, x: Tensor, state: Any) -> Any:
        prediction, *_ = self(x, torch.ones(3))
        return prediction, []


class TwoByName(StatesByName):
    def forward(self, x: Tensor, **states: Tensor) -> Any:  # type: ignore[override]
        prediction, after = super().forward(x, **states)
        return prediction, (after["h"], after["c"])

    def cut(self, state: Any) -> Any:
        return {name: part.detach() for name, part in zip("hc", state, strict=True)}


@pytest.mark.parametrize("make", [StateFirstByName, MasksBehind, TwoByName])
def test_where_it_is_not_plain_which_argument_is_the_state_that_is_asked(
    make: Callable[[tb.Case], nn.Module],
) -> None:
    with pytest.raises(tb.ObservationError, match=r"say which argument(s are| is) the state"):
        tb.check(told(make)(CASE), CASE)


def test_a_state_that_is_told_needs_no_first_call_with_it() -> None:
    report = tb.check(told(StateFirstByName, state="state")(CASE), CASE)

    assert not report.broken
    assert "state_crosses_every_boundary" in {verdict.name for verdict in report.holds}
