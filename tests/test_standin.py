"""A stand-in is called in the place of a method, and no copy of its owner has it."""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tbptt_props.standin import standing_in

X = torch.ones(2, 3)


class Scaled(nn.Module):
    """Multiplies by its only parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class CopiesItself(Scaled):
    """Makes its copies itself, and does not say so."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CopiesItself":
        made = type(self).__new__(type(self))
        vars(made).update({name: copy.deepcopy(v, memo) for name, v in vars(self).items()})
        return made


def halved(x: Tensor) -> Tensor:
    return x / 2


seen: list[Tensor] = []


def noting(original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    seen.append(args[0])
    return original(*args, **kwargs)


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    assert b"tbptt_props" not in file.getvalue()
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def of_a_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(copy.deepcopy(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, of_a_copy])
def test_a_copy_runs_its_own_method(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = Scaled()
    with standing_in(module, "forward", noting):
        other = copied(module)
        nn.init.constant_(module.factor, 5.0)
        assert other(X).equal(X)
        assert module(X).equal(5 * X)

    assert len(seen) == 1
    assert other(X).equal(X)
    assert "forward" not in vars(module)


def test_a_copy_runs_its_own_where_one_stands_in_for_another() -> None:
    module = Scaled()
    with standing_in(module, "forward", noting), standing_in(module, "forward", noting):
        other = copy.deepcopy(module)
        nn.init.constant_(module.factor, 5.0)

        assert other(X).equal(X)
        assert not seen
        assert module(X).equal(5 * X)
        assert len(seen) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_what_was_set_on_the_object_itself_is_set_on_its_copy(
    copied: Callable[[nn.Module], nn.Module],
) -> None:
    module = Scaled()
    vars(module)["forward"] = halved
    with standing_in(module, "forward", noting):
        other = copied(module)

    assert vars(other)["forward"] is halved
    assert vars(module)["forward"] is halved


def test_an_object_that_copies_itself_can_be_copied() -> None:
    module = CopiesItself()
    with standing_in(module, "forward", noting):
        other = copy.deepcopy(module)

    assert other(X).equal(X)
    assert not seen


def test_it_looks_like_what_it_stands_in_for() -> None:
    module = Scaled()
    due = inspect.signature(module.forward)
    with standing_in(module, "forward", noting):
        assert inspect.signature(module.forward) == due
        assert module.forward.__name__ == "forward"
