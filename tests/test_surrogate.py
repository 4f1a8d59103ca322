"""How a value that takes another one's gradient is told from one that has lost its own.

Shapes: B sequences, H hidden.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

from tbptt_props.surrogate import takes_anothers_gradient

Change = Callable[[Tensor], Tensor]


def features() -> Tensor:
    torch.manual_seed(0)
    return torch.tanh(torch.randn(2, 3) @ torch.randn(3, 4, requires_grad=True))


def without_a_gradient(b: Tensor) -> Tensor:
    with torch.no_grad():
        lost = b.round() - b
    return b + lost


def in_place(b: Tensor) -> Tensor:
    lost = (b.round() - b).detach()
    lost += b
    return lost


TAKES: dict[str, Change] = {
    "added": lambda b: b + (b.round() - b).detach(),
    "in three terms": lambda b: b.round().detach() + b - b.detach(),
    "subtracted": lambda b: b - (b - b.round()).detach(),
    "negated": lambda b: b + b.round() + (-b).detach(),
    "by .data": lambda b: b + (b.round() - b).data,
    "by no_grad": without_a_gradient,
    "in place": in_place,
    "torch's own": lambda b: gumbel_softmax(b, hard=True),
    "an exponential of no value": lambda b: (b - b.detach()).exp(),
}
CELL = nn.GRUCell(4, 4)
KEEPS: dict[str, Change] = {
    "detached": lambda b: b.detach(),
    "added to itself": lambda b: b.detach() + b,
    "both attached": lambda b: b + (b.round() - b),
    "both detached": lambda b: b.detach() + (b.round() - b).detach(),
    "written over": lambda b: (b.detach().clone().zero_() - b) + b.clone().mul_(2),
    "with a factor": lambda b: b + torch.sub(b.round(), b, alpha=2).mul(2).detach(),
    "a detached state": lambda b: CELL(b, CELL(b, b).detach()),
    "another of that shape": lambda b: b + (b.round() - b.tanh()).detach(),
}


@pytest.mark.parametrize("change", TAKES.values(), ids=TAKES)
def test_a_value_that_takes_anothers_gradient_is_told(change: Change) -> None:
    b = features()

    assert takes_anothers_gradient(lambda: change(b))


@pytest.mark.parametrize("change", KEEPS.values(), ids=KEEPS)
def test_a_gradient_that_is_lost_is_not_taken_for_anothers(change: Change) -> None:
    b = features()

    assert not takes_anothers_gradient(lambda: change(b))


def test_what_can_not_be_run_so_takes_none() -> None:
    def refuses() -> None:
        raise RuntimeError("no mode may be on")

    assert not takes_anothers_gradient(refuses)


def test_gradients_are_on_however_it_is_called() -> None:
    b = features()

    with torch.no_grad():
        assert takes_anothers_gradient(lambda: TAKES["added"](b))
        assert not torch.is_grad_enabled()
