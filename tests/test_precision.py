"""What is judged in less than float64: no false alarm, and faults are found as before.

Shapes: B sequences, T time steps, I inputs, O outputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Optimizer

import tbptt_props as tb
from tbptt_props.compare import close, rounded_to, worst
from tbptt_props.precision import Precision
from tbptt_ref.faults import (
    ADAM,
    FAULTS,
    FUSED_ADAM,
    FUSED_MOMENTUM,
    MOMENTUM,
    UNDER_PRECISION,
    Fault,
)
from tbptt_ref.faults_update import CallsBackwardItself
from tbptt_ref.module import TruncatedRNN, detached

SEVERAL = tb.Case(batch=3, steps=7, chunk=3, inputs=2, hidden=3, outputs=2, batches=2, seed=3)
EVEN = tb.Case(batch=2, steps=6, chunk=2, inputs=3, hidden=2, outputs=2, batches=2, seed=8)
WHOLE = tb.Case(batch=2, steps=4, chunk=4, inputs=2, hidden=3, outputs=2, seed=12)
MANUAL = "backward_goes_through_manual_backward"
COARSE: tuple[Precision, ...] = ("32-true", "bf16-mixed", "16-mixed")
Core = type[nn.RNN | nn.LSTM | nn.GRU]


def core_for(precision: Precision) -> Core:
    return nn.GRU if precision == "16-mixed" else nn.LSTM  # which the CPU lacks a kernel for


def right(
    precision: Precision, core: Core, optimizer: Callable[..., Optimizer]
) -> Callable[[tb.Case], tb.Subject]:
    def build(case: tb.Case) -> tb.Subject:
        module = TruncatedRNN(
            core(case.inputs, case.hidden, batch_first=True),
            nn.Linear(case.hidden, case.outputs),
            chunk=case.chunk,
            optimizer=optimizer,
        )
        return tb.Subject(module, loss=mse_loss, precision=precision)

    return build


def broken_by(fault: Fault, precision: Precision | None, *cases: tb.Case) -> set[str]:
    broken: set[str] = set()
    for case in cases:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = fault.build(case)
        contract = tb.Contract(clip_norm=fault.clip_norm)
        subject = tb.Subject(module, loss=mse_loss, contract=contract, precision=precision)
        broken |= {verdict.name for verdict in tb.check(subject, case).broken}
    return broken


# How it is trained --------------------------------------------------------------------------


class Telling(TruncatedRNN):
    seen: Any = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        casts = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        type(self).seen = (self.trainer.precision, self.readout.weight.dtype, batch[0].dtype, casts)
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("precision", "seen"),
    [
        (None, ("32-true", torch.float64, torch.float64, None)),
        ("64-true", ("64-true", torch.float64, torch.float64, None)),
        ("32-true", ("32-true", torch.float32, torch.float32, None)),
        ("bf16-mixed", ("bf16-mixed", torch.float32, torch.float32, torch.bfloat16)),
        ("16-mixed", ("16-mixed", torch.float32, torch.float32, torch.float16)),
    ],
)
def test_a_real_trainer_trains_in_the_precision_that_is_asked_for(
    precision: Precision | None, seen: object
) -> None:
    module = Telling(nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2), chunk=3)

    report = tb.check(tb.Subject(module, loss=mse_loss, precision=precision), SEVERAL)

    assert Telling.seen == seen
    assert report.broken == ()


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="precision must be one of 64-true, 32-true, bf16-mixed, "):
        tb.Subject(nn.Linear(1, 1), precision="bf32")  # type: ignore[arg-type]


def test_observe_trains_in_it_too() -> None:
    trace = tb.observe(right("32-true", nn.GRU, MOMENTUM)(SEVERAL), SEVERAL)

    assert trace.chunks[0].given is not None
    assert {p.dtype for p in trace.chunks[0].given.parameters.values()} == {torch.float32}


class TakesNoFloat64(TruncatedRNN):
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if x.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return super().forward(x, state)


@pytest.mark.parametrize(
    ("precision", "halts"), [(None, False), ("64-true", True), ("32-true", False)]
)
def test_what_is_asked_for_is_not_fallen_back_from(precision: Precision, halts: bool) -> None:
    module = TakesNoFloat64(nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2), chunk=3)

    report = tb.check(tb.Subject(module, loss=mse_loss, precision=precision), SEVERAL)

    assert (report["training_reaches_the_end"].status == "broken") == halts


def test_float16_is_refused_where_the_device_has_no_kernel_for_it() -> None:
    with pytest.raises(tb.ObservationError, match=r"16-mixed on the CPU.* needs CUDA"):
        tb.check(right("16-mixed", nn.LSTM, ADAM)(SEVERAL), SEVERAL)


def test_nobodys_autocast_is_changed() -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        tb.check(right("bf16-mixed", nn.GRU, MOMENTUM)(EVEN), EVEN)

        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == torch.float32


# What holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("32-true", ADAM), ("bf16-mixed", MOMENTUM), ("16-mixed", MOMENTUM)],
)
def test_a_loop_that_is_right_breaks_nothing(
    precision: Precision, optimizer: Callable[..., Optimizer]
) -> None:
    report = tb.verify(right(precision, core_for(precision), optimizer), max_examples=40, seed=1)

    assert report.broken == ()
    assert {v.name for v in report.not_judged} <= {"each_chunk_draws_its_own_randomness"}


@pytest.mark.parametrize("precision", [None, *COARSE])
def test_the_reference_clips_gradients_that_are_no_longer_scaled(
    precision: Precision | None,
) -> None:
    fault = Fault(TruncatedRNN, core=nn.GRU, optimizer=MOMENTUM, clip_norm=0.05)

    assert broken_by(fault, precision, SEVERAL, EVEN) == set()


class AddsUp(TruncatedRNN):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        state: Any = None
        for x, y in self.chunks(*batch):
            prediction, state = self(x, state)
            self.manual_backward(self.loss(prediction, y))
            state = detached(state)
        optimizer.step()


@pytest.mark.parametrize("case", [SEVERAL, EVEN])
def test_gradients_that_add_up_while_they_are_scaled_break_nothing(case: tb.Case) -> None:
    module = Fault(AddsUp, core=nn.GRU, optimizer=MOMENTUM).build(case)
    contract = tb.Contract(update="batch")

    report = tb.check(
        tb.Subject(module, loss=mse_loss, contract=contract, precision="16-mixed"), case
    )

    assert report.broken == ()


@pytest.mark.parametrize("optimizer", [FUSED_ADAM, FUSED_MOMENTUM])
def test_an_optimizer_that_divides_by_the_scale_itself_breaks_nothing(
    optimizer: Callable[..., Optimizer],
) -> None:
    fault = Fault(TruncatedRNN, core=nn.GRU, optimizer=optimizer)

    assert broken_by(fault, "16-mixed", SEVERAL, EVEN) == set()


class CastsByHand(TruncatedRNN):
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.core(x, state)
        return self.readout(features), state

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prediction, state = self(x, state)
        loss = mse_loss(prediction.float(), y)
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach(), detached(state)


def test_autocast_that_a_loop_enters_by_itself_is_entered_again() -> None:
    module = CastsByHand(nn.GRU(2, 3, batch_first=True), nn.Linear(3, 2), chunk=3)

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return mse_loss(prediction.float(), target)

    report = tb.check(tb.Subject(module, loss=loss, precision="32-true"), SEVERAL)

    assert report.broken == ()
    assert report["loss_is_the_chunks_own"].status == "holds"


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRU(2, 3, batch_first=True)
        self.readout = nn.Linear(3, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.core(x, state)
        return self.readout(features), state


def scaled_loop(model: nn.Module, batches: Any, *, scale: float, unscales: bool = True) -> None:
    """Train as PyTorch's own recipe for float16 has it, or leave its scaler out on the way back."""
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for batch in batches:
        state: Any = None
        for x, y in zip(*(torch.split(part, 3, dim=1) for part in batch), strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
                prediction, state = model(x, state)
                loss = mse_loss(prediction, y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if unscales:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            state = detached(state)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**18], ids=["fits", "overflows at first"])
def test_a_loop_of_ones_own_with_a_scaler_breaks_nothing(scale: float) -> None:
    subject = tb.Subject(
        OwnModel(), loss=mse_loss, train=partial(scaled_loop, scale=scale), precision="16-mixed"
    )

    report = tb.check(subject, SEVERAL)

    assert report.broken == ()
    assert report["each_chunk_updates_once"].status == "holds"
    assert report["state_crosses_every_boundary"].status == "holds"


def test_an_update_of_gradients_that_are_still_scaled_is_found() -> None:
    train = partial(scaled_loop, scale=2.0**10, unscales=False)
    subject = tb.Subject(OwnModel(), loss=mse_loss, train=train, precision="16-mixed")

    assert "loss_is_the_chunks_own" in {v.name for v in tb.check(subject, SEVERAL).broken}


@pytest.mark.parametrize("scale", [2.0**18], ids=["overflows at first"])
def test_without_a_word_of_the_scaler_what_it_skips_is_not_taken_for_a_missing_update(
    scale: float,
) -> None:
    subject = tb.Subject(
        OwnModel(), loss=mse_loss, train=partial(scaled_loop, scale=scale), precision="16-mixed"
    )

    trace = tb.observe(subject, SEVERAL)

    assert trace.skipped > 0
    assert trace.updates + trace.skipped == len(trace.chunks)


# What is found ------------------------------------------------------------------------------

TELLING = {
    "NeverDetaches": "graph_crosses_no_boundary",
    "DetachesEveryTimeStep": "gradients_span_the_whole_chunk",
    "DetachesInMidChunk": "gradients_span_the_whole_chunk",
    "ForgetsState": "state_crosses_every_boundary",
    "AddsNoiseToState": "state_crosses_every_boundary",
    "KeepsStateAcrossBatches": "a_batch_knows_nothing_of_the_one_before",
    "ReshapesState": "state_crosses_every_boundary",
    "DropsTheTail": "chunks_tile_the_sequence",
    "ShiftsTheTargets": "loss_is_the_chunks_own",
    "NeverClears": "gradients_are_the_chunks_own",
    "UpdatesTwice": "each_chunk_updates_once",
    "ForgetsTheMomentum": "the_update_follows_the_optimizers_rule",
    "DecaysParameters": "nothing_but_the_update_moves_parameters",
    "CallsBackwardItself": MANUAL,
    "CallsBackwardTwice": "loss_is_the_chunks_own",
    "SumsTheErrors": "loss_is_the_chunks_own",
    "KeepsStates": "no_graph_outlives_its_chunk",
}


@pytest.mark.parametrize("precision", COARSE[:2])
@pytest.mark.parametrize("name", TELLING)
def test_a_fault_is_found_in_each_precision(name: str, precision: Precision) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)

    assert any(TELLING[name] in broken_by(fault, precision, case) for case in (SEVERAL, EVEN))


@pytest.mark.parametrize(
    ("fault", "precision", "due"),
    [
        (fault, precision, due)
        for (precision, fault), due in zip(
            UNDER_PRECISION,
            [
                "graph_crosses_no_boundary",
                "state_crosses_every_boundary",
                "loss_is_the_chunks_own",
                "state_crosses_every_boundary",
            ],
            strict=True,
        )
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_fault_of_mixed_precision_is_found_there_and_does_no_harm_in_float64(
    fault: Fault, precision: Precision, due: str
) -> None:
    assert any(due in broken_by(fault, precision, case) for case in (SEVERAL, EVEN))
    harmless = fault.name != "ClipsScaledGradients"  # which clips, and promised nothing
    assert not harmless or broken_by(fault, "64-true", SEVERAL, EVEN) == set()


@pytest.mark.parametrize(
    ("name", "judged", "cause"),
    [
        ("KeepsItsCastWeights", "graph_crosses_no_boundary", "cast_weights_are_kept"),
        ("KeepsItsCastWeights", "gradients_are_the_chunks_own", "cast_weights_are_kept"),
        ("CarriesAHalfState", "state_crosses_every_boundary", "state_is_changed_on_the_way"),
        ("ClipsScaledGradients", "loss_is_the_chunks_own", "scaled_gradients_are_changed"),
        ("CallsBackwardItself", "training_reaches_the_end", "the_scaler_is_gone_round"),
        ("CallsBackwardItself", MANUAL, "the_scaler_is_gone_round"),
    ],
)
def test_its_cause_is_named(name: str, judged: str, cause: str) -> None:
    bare: tuple[Precision, Fault] = ("16-mixed", Fault(CallsBackwardItself, core=nn.GRU))
    ((precision, fault),) = ((p, f) for p, f in (*UNDER_PRECISION, bare) if f.name == name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        subject = tb.Subject(fault.build(SEVERAL), loss=mse_loss, precision=precision)

    report = tb.check(subject, SEVERAL)

    assert [found.name for found in report[judged].causes] == [cause]


# Tolerances ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "steps", "gap", "answer"),
    [
        (torch.bfloat16, 2, 2**-6 * 0.9, True),
        (torch.bfloat16, 2, 2**-6 * 1.1, False),
        (torch.bfloat16, 8, 2**-5 * 0.9, True),
        (torch.bfloat16, 8, 2**-5 * 1.1, False),
        (torch.float16, 2, 2**-9 * 0.9, True),
        (torch.float16, 2, 2**-9 * 1.1, False),
        (None, 2, 2**-12, False),
    ],
)
def test_the_tolerance_grows_with_the_unit_and_the_root_of_the_length(
    dtype: torch.dtype | None, steps: int, gap: float, answer: bool
) -> None:
    due = torch.tensor([1.0, 1e-3])  # next to a large entry a small one may be off by as much

    with rounded_to(dtype, steps):
        assert close(due + torch.tensor([0.0, gap]), due) is answer
        assert not close(due + torch.tensor([0.0, gap]), due, rounded=False)
    assert not close(due + torch.tensor([0.0, gap]), due)


def test_what_an_optimizer_adds_up_is_held_to_its_own_dtype() -> None:
    found, due = {"w": torch.tensor([1.01])}, {"w": torch.tensor([1.0])}

    with rounded_to(torch.bfloat16, 8):
        assert not list(worst(found, due))
        assert list(worst(found, due, rounded=False))
