"""Shapes: B sequences, K time steps in a chunk, I inputs, O outputs."""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from tbptt_props.case import Case
from tbptt_props.contract import Contract
from tbptt_props.subject import ObservationError, Subject, WiringError, resolve
from tbptt_ref.module import TruncatedRNN

pytestmark = [
    # Lightning's own call of torch's pytree; nothing a module can do about it.
    pytest.mark.filterwarnings(r"ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # The batches are in memory already; Lightning asks for workers where there are several cores.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Cell(nn.Module):
    """A core that keeps something of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, 2, batch_first=True)
        self.register_buffer("seen", torch.zeros(()))
        self.history: list[Tensor] = [torch.zeros(1)]
        # No leaf: it cannot be copied with its graph.
        self.doubled = 2 * dict(self.rnn.named_parameters())["weight_hh_l0"]

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.rnn(x, state)
        return features, state


class Weighted(TruncatedRNN):
    """The reference, with a loss of its own."""

    weight = 3.0

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.weight * mse_loss(prediction, target)


def module() -> Weighted:
    return Weighted(Cell(), nn.Linear(2, 1), chunk=2).double()


# What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"module": 3}, "module must be a torch module, got module=3"),
        (
            {"module": nn.Linear},
            "module must be a torch module, got module=<class 'torch.nn.modules.linear.Linear'>",
        ),
        (
            {"module": "x" * 70},
            f"module must be a torch module, got module='{'x' * 56}...",
        ),
        ({"loss": "mse"}, "loss must be callable, got loss='mse'"),
        ({"loss": 3}, "loss must be callable, got loss=3"),
        ({"contract": {"chunk": 3}}, "contract must be a Contract, got contract={'chunk': 3}"),
        ({"batches": [1]}, "batches must be callable, got batches=[1]"),
        ({"train": "fit"}, "train must be callable, got train='fit'"),
        ({"parts": (0, 1)}, "parts must be callable, got parts=(0, 1)"),
        ({"outputs": "logits"}, "outputs must be callable, got outputs='logits'"),
        ({"state": None}, "state must be a name or a tuple of names, got state=None"),
        ({"state": ("h", 1)}, "state must be a name or a tuple of names, got state=('h', 1)"),
        ({"state": {"h"}}, "state must be a name or a tuple of names, got state={'h'}"),
        ({"forward": None}, "forward must be a name, got forward=None"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Subject(**{"module": module(), "loss": mse_loss, **arguments})


@pytest.mark.parametrize("name", ["run", "core.run", "chunk", "core.rnn.hidden_size", "", "core."])
def test_a_forward_that_names_nothing_callable_is_refused(name: str) -> None:
    message = f"forward must name a method or submodule of Weighted, got forward={name!r}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Subject(module(), loss=mse_loss, forward=name)


@pytest.mark.parametrize("patience", [0, -1.5, float("nan")])
def test_a_patience_that_is_over_at_once_is_refused(patience: float) -> None:
    message = f"patience must be positive, got patience={patience}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Subject(module(), loss=mse_loss, patience=patience)


def test_everything_but_the_module_is_said_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        Subject(module(), mse_loss)  # type: ignore[call-arg]


def test_an_observation_error_is_no_failed_assertion() -> None:
    assert issubclass(ObservationError, RuntimeError)
    assert not issubclass(ObservationError, AssertionError)


# What is taken ------------------------------------------------------------------------------


def test_what_is_left_out_has_its_default() -> None:
    own = module()
    subject = Subject(own)

    assert subject.module is own
    assert subject.loss is None
    assert subject.forward == "forward"
    assert subject.contract == Contract()
    assert subject.batches is None
    assert subject.state == ()
    assert subject.parts is None
    assert subject.outputs is None
    assert subject.train is None
    assert subject.patience == 60.0


@pytest.mark.parametrize("name", ["forward", "core", "core.rnn", "core.rnn.forward", "error"])
def test_a_forward_is_the_name_of_a_method_or_a_submodule(name: str) -> None:
    assert Subject(module(), loss=mse_loss, forward=name).forward == name


def test_a_module_that_is_no_lightning_module_can_be_a_subject() -> None:
    assert isinstance(Subject(Cell(), loss=nn.MSELoss()).module, Cell)


def test_a_name_means_what_python_says_it_does() -> None:
    own = module()

    assert resolve(own, "core") is own.core
    assert resolve(own, "core.rnn") is own.core.rnn
    assert resolve(own, "error") == own.error
    assert resolve(own, "core.rnn.hidden_size") == 2
    assert resolve(own, "missing") is None
    assert resolve(own, "missing.core") is None


@pytest.mark.parametrize(
    ("state", "due"),
    [("h", ("h",)), (("h", "c"), ("h", "c")), (["core.h"], ("core.h",)), ((), ()), ([], ())],
)
def test_a_state_is_said_by_one_name_or_several(state: Any, due: tuple[str, ...]) -> None:
    assert Subject(module(), loss=mse_loss, state=state).state == due


def test_a_wiring_error_says_what_may_fit_instead() -> None:
    error = WiringError("it is kept elsewhere", {"state": ("hidden",)})

    assert isinstance(error, ObservationError)
    assert str(error) == "it is kept elsewhere"
    assert error.instead == {"state": ("hidden",)}


# Copies -------------------------------------------------------------------------------------


def tensors(part: nn.Module) -> Iterator[Tensor]:
    yield from part.parameters()
    yield from part.buffers()
    for each in part.modules():
        yield from (item for item in vars(each).values() if isinstance(item, Tensor))
        for item in vars(each).values():
            if isinstance(item, list):
                yield from (one for one in item if isinstance(one, Tensor))


def test_a_copy_shares_nothing_with_its_original() -> None:
    original = Subject(module(), loss=mse_loss)

    copy = original.copied()

    one, other = list(tensors(original.module)), list(tensors(copy.module))
    # The parameters, four of them once more in the list that `nn.RNN` keeps; a buffer, `doubled`
    # and what is in the history.
    assert len(one) == 6 + 4 + 3
    for before, after in zip(one, other, strict=True):
        assert torch.equal(before, after)
        assert before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()
    assert not {id(part) for part in original.module.modules()} & {
        id(part) for part in copy.module.modules()
    }


def test_a_copy_is_of_the_same_kind_and_says_the_same() -> None:
    def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
        return case.tensors()

    def train(module: nn.Module, batches: object) -> None: ...

    def parts(batch: Any) -> tuple[Tensor, Tensor]:
        return batch[1], batch[0]

    def outputs(returned: Any) -> tuple[Tensor, Any]:
        return returned["y"], returned["state"]

    original = Subject(
        module(),
        loss=mse_loss,
        forward="core",
        contract=Contract(chunk=3),
        batches=batches,
        train=train,
        state=("h", "c"),
        parts=parts,
        outputs=outputs,
        patience=3.0,
    )

    copy = original.copied()

    assert type(copy.module) is Weighted
    for item in fields(Subject):
        if item.name != "module":
            assert getattr(copy, item.name) == getattr(original, item.name)


def test_a_copy_keeps_dtype_and_mode_and_what_is_trained() -> None:
    own = module().float().eval()
    own.readout.requires_grad_(requires_grad=False)

    copy: Any = Subject(own, loss=mse_loss).copied().module

    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    assert not copy.training
    assert [p.requires_grad for p in copy.parameters()] == [
        p.requires_grad for p in own.parameters()
    ]


def test_a_loss_that_is_the_modules_own_method_becomes_the_copys() -> None:
    own = module()
    copy = Subject(own, loss=own.error).copied()
    own.weight = 100.0

    bound: Any = copy.loss
    assert bound.__self__ is copy.module
    assert float(bound(torch.ones(1), torch.zeros(1))) == 3.0


def test_a_loss_that_is_a_module_is_copied_too() -> None:
    weight = torch.ones(3)
    loss = nn.CrossEntropyLoss(weight=weight)

    copy: Any = Subject(module(), loss=loss).copied().loss

    assert copy is not loss
    assert torch.equal(copy.weight, weight)
    assert copy.weight is not loss.weight


def other_method() -> Callable[[Tensor, Tensor], Tensor]:
    return module().error


@pytest.mark.parametrize("loss", [mse_loss, other_method(), None])
def test_any_other_loss_stays_as_it_is(
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    assert Subject(module(), loss=loss).copied().loss == loss


def test_a_module_that_was_trained_before_can_be_copied() -> None:
    own = module()
    fit(own)

    copy = Subject(own, loss=mse_loss).copied()

    for before, after in zip(own.parameters(), copy.module.parameters(), strict=True):
        assert torch.equal(before, after)


def fit(own: TruncatedRNN) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(own, DataLoader(Case(1, 3, 2).tensors(), batch_size=None))  # type: ignore[arg-type]


def test_a_module_that_cannot_be_copied_is_refused_with_a_way_out() -> None:
    own = module()
    own.lock = threading.Lock()  # type: ignore[assignment]
    message = (
        "Weighted cannot be copied (TypeError: cannot pickle '_thread.lock' object); "
        "judge it with verify(build), whose build makes a fresh module each time"
    )

    with pytest.raises(ObservationError, match=f"^{re.escape(message)}$") as raised:
        Subject(own, loss=mse_loss).copied()

    assert isinstance(raised.value.__cause__, TypeError)
