"""What a loop that is broken on purpose proves: which properties can fail, and which cannot."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim import optimizer as optim_module

import tbptt_props as tb
from tbptt_props.search import Bench
from tbptt_props.sensitivity import DISTURBANCES
from tbptt_ref.faults_update import CallsBackwardItself
from tbptt_ref.module import TruncatedRNN

SUMS = "state_sums_up_the_chunk"


def subject(case: tb.Case, *, kind: type[TruncatedRNN] = TruncatedRNN, dropout: float = 0.0) -> Any:
    core = nn.LSTM(case.inputs, case.hidden, batch_first=True, num_layers=2, dropout=dropout)
    module = kind(core, nn.Linear(case.hidden, case.outputs), chunk=case.chunk)
    return tb.Subject(module, loss=mse_loss)


@functools.cache
def proved(build: Callable[[tb.Case], tb.Subject] = subject) -> dict[str, tuple[str, ...]]:
    """Return what broke each property that holds."""
    report = tb.verify(build, max_examples=20, seed=1, sensitivity=True)
    assert report.broken == ()
    return {verdict.name: verdict.proved_by or () for verdict in report.holds}


def test_every_property_of_a_right_loop_is_proved_and_every_disturbance_proves_something() -> None:
    plain = proved()
    dropping = proved(lambda case: subject(case, dropout=0.5))

    assert set(plain) | set(dropping) == {p.__name__ for p in tb.PROPERTIES}
    assert [name for name, by in (plain | dropping).items() if not by] == []
    by = {
        disturbance
        for found in (plain, dropping)
        for names in found.values()
        for disturbance in names
    }
    assert by == {disturbance.name for disturbance in DISTURBANCES}


@pytest.mark.parametrize(
    ("disturbance", "broken"),
    [
        ("the state is not detached", "graph_crosses_no_boundary"),
        ("the state is dropped", "state_crosses_every_boundary"),
        ("the state is kept across batches", "state_starts_afresh_with_each_batch"),
        ("the last time step is withheld", "chunks_tile_the_sequence"),
        ("gradients are never cleared", "gradients_are_the_chunks_own"),
        ("each update is made twice", "each_chunk_updates_once"),
        ("manual_backward is bypassed", "backward_goes_through_manual_backward"),
        ("graphs are kept", "no_graph_outlives_its_chunk"),
        ("forward detaches half of what it returns", "gradients_span_the_whole_chunk"),
        ("forward returns another state", SUMS),
    ],
)
def test_a_disturbance_breaks_the_property_that_it_is_about(disturbance: str, broken: str) -> None:
    assert disturbance in proved()[broken]


class Forgetful(TruncatedRNN):
    """Has no use for a state."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(x, None)[0], None


def test_what_a_model_without_a_state_can_not_fail_is_not_said_to_be_proved() -> None:
    report = tb.verify(
        lambda case: subject(case, kind=Forgetful), max_examples=3, seed=1, sensitivity=True
    )

    judged = {verdict.name for verdict in report.holds if verdict.proved_by}
    assert "state_crosses_every_boundary" not in judged
    assert "loss_is_the_chunks_own" in judged


def test_a_property_that_nothing_breaks_holds_vacuously_and_is_told_so() -> None:
    """Where each batch is a single update, no state is ever dropped."""
    report = tb.verify(
        subject, max_examples=5, seed=1, sensitivity=True, steps=2, chunk=2, batches=1
    )

    names = [verdict.name for verdict in report.vacuous]
    assert names
    line = next(line for line in report.as_text().splitlines() if names[0] in line)
    assert "vacuous here" in report.as_text()[report.as_text().index(line) :]
    assert f"({len(names)} vacuously)" in report.as_text()


def test_where_a_property_is_broken_without_it_a_disturbance_proves_nothing() -> None:
    def build(case: tb.Case) -> Any:
        return subject(case, kind=CallsBackwardItself if case.steps > 2 else TruncatedRNN)

    right, now_and_then = Bench(subject), Bench(build)
    right.judge(tb.Case())
    for case in (tb.Case(), tb.Case(steps=3, chunk=1, batches=2)):
        now_and_then.judge(case)

    name = "backward_goes_through_manual_backward"
    assert now_and_then.proof_of(name) == right.proof_of(name) != ()
    assert "the state is dropped" in now_and_then.proof_of("state_crosses_every_boundary")


def test_all_that_holds_is_proved_at_once() -> None:
    built: list[tb.Case] = []

    def build(case: tb.Case) -> Any:
        built.append(case)
        return subject(case)

    bench = Bench(build)
    bench.judge(tb.Case())
    bench.proof_of("chunks_tile_the_sequence")
    before = len(built)

    assert "the state is dropped" in bench.proof_of("state_crosses_every_boundary")
    assert len(built) == before


def test_nothing_is_left_wrapped_or_changed() -> None:
    before = (
        torch.autograd.backward,
        Optimizer.zero_grad,
        nn.Module.zero_grad,
        inspect.getattr_static(LightningModule, "manual_backward"),
        dict(optim_module._global_optimizer_pre_hooks),
        dict(optim_module._global_optimizer_post_hooks),
        torch.get_rng_state().tolist(),
    )

    tb.verify(subject, max_examples=1, seed=1, sensitivity=True)

    assert before == (
        torch.autograd.backward,
        Optimizer.zero_grad,
        nn.Module.zero_grad,
        inspect.getattr_static(LightningModule, "manual_backward"),
        dict(optim_module._global_optimizer_pre_hooks),
        dict(optim_module._global_optimizer_post_hooks),
        torch.get_rng_state().tolist(),
    )


def test_without_being_asked_nothing_is_tried() -> None:
    report = tb.verify(subject, max_examples=2, seed=1)

    assert {verdict.proved_by for verdict in report.verdicts} == {None}
    assert report.vacuous == ()
