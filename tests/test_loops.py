"""The examples of how loops are trained: right ones hold, and turn red where they are broken."""

from importlib import import_module
from typing import Any

import pytest
import torch

import tbptt_props as tb
from tbptt_props.judge import judge

RIGHT = [
    ("lightning_optimizers", "build"),
    ("lightning_automatic", "build"),
    ("lightning_in_forward", "build"),
    ("lightning_accumulates", "build"),
    ("lightning_accumulates", "build_every_second"),
    ("plain_pytorch", "build"),
]
CASE = tb.Case(batch=2, steps=7, chunk=2, inputs=2, hidden=3, outputs=2, batches=2)
LEAST_HELD = {"lightning_in_forward": 17, "plain_pytorch": 19}


def built(name: str, build: str) -> Any:
    return getattr(import_module(f"examples.{name}"), build)


def broken(name: str, build: str) -> set[str]:
    subject = built(name, build)
    return {verdict.name for verdict in judge(lambda: subject(CASE), CASE).broken}


@pytest.mark.parametrize(("name", "build"), RIGHT)
def test_a_right_loop_breaks_nothing(name: str, build: str) -> None:
    report = tb.verify(built(name, build), max_examples=25, seed=0)

    assert not report.broken, report.as_text()
    assert len(report.holds) >= LEAST_HELD.get(name, 20)


@pytest.mark.parametrize(("name", "build"), RIGHT)
def test_a_state_that_keeps_its_graph_crosses_a_boundary(
    name: str, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"examples.{name}.detached", lambda state: state)

    found = broken(name, build)

    assert "graph_crosses_no_boundary" in found
    assert "state_crosses_every_boundary" not in found


@pytest.mark.parametrize(
    ("name", "build"), [row for row in RIGHT if row[0] != "lightning_automatic"]
)
def test_a_state_that_is_dropped_does_not_cross(
    name: str, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"examples.{name}.detached", lambda state: None)

    found = broken(name, build)

    assert "state_crosses_every_boundary" in found
    assert "graph_crosses_no_boundary" not in found


def test_a_state_that_goes_on_changed_is_neither_carried_nor_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("examples.lightning_automatic.detached", lambda state: 0.5 * state.detach())

    assert "state_crosses_every_boundary" in broken("lightning_automatic", "build")


@pytest.mark.parametrize(("name", "build"), RIGHT)
def test_gradients_that_are_never_cleared_are_found(
    name: str, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)

    assert "gradients_are_the_chunks_own" in broken(name, build)
