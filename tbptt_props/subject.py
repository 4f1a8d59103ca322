"""What is judged, and what its author promises: nothing that could be seen from outside."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tbptt_props.batch import Parts
from tbptt_props.case import Case
from tbptt_props.contract import Contract
from tbptt_props.precision import PRECISIONS, Precision
from tbptt_props.state import leaves

Batches = Sequence[Any]


class ObservationError(RuntimeError):
    """The kit cannot describe this subject; the message says what it needs."""


class WiringError(ObservationError):
    """The subject is wired otherwise than it was told; `instead` are arguments that may fit it."""

    def __init__(self, message: str, instead: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.instead = instead


@dataclass(frozen=True)
class Subject:
    """A module and how it is trained.

    Args:
        module: a LightningModule with manual optimization, as its author wrote it.
        loss: `loss(prediction, target)`, a scalar: the chunk's loss as the module trains on it.
            Several predictions come as forward returns them, in a dict, say. Targets come as
            the batch has them, or laid out as the prediction is where that explains the loss.
            Without it, the loss and what follows from it are not judged.
        forward: the call that runs a chunk, `(x, state) -> (prediction, state)`, by the name of a
            method or a submodule. A module whose own forward its loop never calls, and that has
            one recurrent layer or cell of torch's, is judged by that one's calls, without a loss.
            Inputs (B, K, I), predictions (B, K, O), or any other layout with the features last.
        state: where the state is, if it is not forward's second argument and the second of what
            it returns: the names of several arguments, returned in that order behind the
            prediction, of `*states` or `**states`, which is all that they take, or of attributes
            of the module (`"hidden"`, `"core.h"`). Where forward
            returns something else than a pair, it is tried out where the state may be.
        contract: what the loop promises.
        batches: makes the batches of a case, a list of whatever the loop takes; by default
            `case.tensors()`, pairs of inputs (B, T, I) and targets (B, T, O).
        parts: returns inputs (B, T, ...) and targets of such a batch, sequences first, as views of
            it: `lambda ids: (ids[:, :-1], ids[:, 1:])`. Targets are (B, T, ...), one for each
            sequence, or None; or a tuple or dict of such, which `loss` then gets cut to the chunk:
            `lambda b: (b["x"], (b["y"], b["mask"]))`. By default they are the batch's first and
            second tensor.
        outputs: returns `(prediction, state)` of what forward returns, where that is no pair:
            `lambda out: (out["logits"], out["past"])`.
        train: `train(module, batches)` trains a module that is no LightningModule.
        precision: in which precision it is trained, as a Trainer's `precision` has it: "64-true",
            "32-true", "bf16-mixed" or "16-mixed". By default float64, or float32 if the module
            can't. A loop that `train` trains enters autocast by itself.
        device: where it is trained, "cpu" or "cuda": the module is moved there, and batches are
            handed out on the CPU, as a loader does.
        validates: whether Lightning validates the module, if it has a `validation_step`, before the
            last batch of every second case, on a copy of that batch: training must not notice.
        follows: whether inputs are followed through what the loop makes of them before forward, an
            embedding, say. Where forward gets other numbers than the batch's, it is found out.
        around: a context manager that is entered around each training, with the subject.
        disturbed: changes each batch before the loop gets it, which the judge does not see. Like
            `around`, it is there to break a loop on purpose.
        patience: seconds without any event after which training counts as hung.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: `forward` names nothing that the module has, there is no such `precision`, or
            `patience` is not positive.
    """

    module: nn.Module
    loss: Callable[[Tensor, Any], Tensor] | None = field(default=None, kw_only=True)
    forward: str = field(default="forward", kw_only=True)
    state: str | tuple[str, ...] = field(default=(), kw_only=True)
    contract: Contract = field(default_factory=Contract, kw_only=True)
    batches: Callable[[Case], Batches] | None = field(default=None, kw_only=True)
    parts: Parts | None = field(default=None, kw_only=True)
    outputs: Callable[[Any], tuple[Tensor, Any]] | None = field(default=None, kw_only=True)
    train: Callable[[Any, Batches], object] | None = field(default=None, kw_only=True)
    precision: Precision | None = field(default=None, kw_only=True)
    device: str = field(default="cpu", kw_only=True)
    validates: bool = field(default=True, kw_only=True)
    follows: bool = field(default=False, kw_only=True)
    around: Callable[[Subject], AbstractContextManager[object]] | None = field(
        default=None, kw_only=True
    )
    disturbed: Callable[[Any], Any] | None = field(default=None, kw_only=True)
    patience: float = field(default=60.0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be observed at all."""
        if not isinstance(self.module, nn.Module):
            raise TypeError(f"module must be a torch module, got module={shortened(self.module)}")
        if self.loss is not None and not callable(self.loss):
            raise TypeError(f"loss must be callable, got loss={shortened(self.loss)}")
        if not isinstance(self.contract, Contract):
            raise TypeError(f"contract must be a Contract, got contract={shortened(self.contract)}")
        for name in ("batches", "parts", "outputs", "train", "around", "disturbed"):
            given = getattr(self, name)
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be callable, got {name}={shortened(given)}")
        object.__setattr__(self, "state", _names(self.state))
        if not isinstance(self.forward, str):
            raise TypeError(f"forward must be a name, got forward={shortened(self.forward)}")
        if self.precision is not None and self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            given = shortened(self.precision)
            raise ValueError(f"precision must be one of {known}, got precision={given}")
        if not isinstance(self.device, str) or not _is_a_device(self.device):
            raise ValueError(f"device must be cpu or cuda, got device={shortened(self.device)}")
        if not self.patience > 0:
            raise ValueError(f"patience must be positive, got patience={self.patience}")
        if not callable(resolve(self.module, self.forward)):
            raise ValueError(
                f"forward must name a method or submodule of {type(self.module).__name__}, "
                f"got forward={self.forward!r}"
            )

    def copied(self) -> Subject:
        """Return this subject around a copy of its module, which shares nothing with it.

        Raises:
            ObservationError: the module cannot be copied.
        """
        # A tensor that is no leaf (old-style weight_norm leaves one) cannot be copied with its
        # graph; its value is enough, for whatever made it makes it again in the next forward.
        memo: dict[int, Any] = {
            id(item): item.detach().clone()
            for part in self.module.modules()
            for item in vars(part).values()
            if isinstance(item, Tensor) and not item.is_leaf
        }
        try:
            module = copy.deepcopy(self.module, memo)
        except Exception as error:
            raise ObservationError(
                f"{type(self.module).__name__} cannot be copied ({type(error).__name__}: {error}); "
                "judge it with verify(build), whose build makes a fresh module each time"
            ) from error
        return replace(self, module=module, loss=self._loss_of(module))

    def _loss_of(self, module: nn.Module) -> Callable[[Tensor, Any], Tensor] | None:
        """Return the loss, bound to the copy where it was a method of the original."""
        if inspect.ismethod(self.loss) and self.loss.__self__ is self.module:
            return self.loss.__func__.__get__(module)  # type: ignore[no-any-return]
        return copy.deepcopy(self.loss) if isinstance(self.loss, nn.Module) else self.loss


def _is_a_device(name: str) -> bool:
    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def _names(state: object) -> tuple[str, ...]:
    names = (state,) if isinstance(state, str) else state
    if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"state must be a name or a tuple of names, got state={shortened(state)}")
    return tuple(names)


def require(subject: object, case: object) -> None:
    """Refuse what is not a subject and a case.

    Raises:
        TypeError: either is of another kind.
    """
    if not isinstance(subject, Subject):
        raise TypeError(f"subject must be a Subject, got subject={shortened(subject)}")
    if not isinstance(case, Case):
        raise TypeError(f"case must be a Case, got case={shortened(case)}")


def held_to_be_one(loss: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Return `loss`, raising an ObservationError where it is none that a chunk can be judged by."""

    @functools.wraps(loss, updated=())
    def held(prediction: Any, target: Any) -> Tensor:
        try:
            value: object = loss(prediction, target)
        except Exception as error:
            shapes = f"{_shaped(prediction)} and a target of shape {_shaped(target)}"
            raise ObservationError(
                f"{LOSS_IS_DUE}, but for a prediction of shape {shapes} it raised "
                f"{type(error).__name__}: {error}"
            ) from error
        return _held(value, prediction)

    return held


def _shaped(tree: Any) -> str:
    return " and ".join(str(tuple(leaf.shape)) for leaf in leaves(tree).values())


LOSS_IS_DUE = "loss must take (prediction, target) and return a scalar tensor"


def _held(value: object, prediction: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ObservationError(f"{LOSS_IS_DUE}, got {shortened(value)}")
    if value.numel() != 1:
        raise ObservationError(f"{LOSS_IS_DUE}, got a tensor of shape {tuple(value.shape)}")
    graph = any(leaf.requires_grad for leaf in leaves(prediction).values())
    if torch.is_grad_enabled() and graph and not value.requires_grad:
        raise ObservationError(f"{LOSS_IS_DUE}, got one without the prediction's graph")
    return value


def resolve(module: nn.Module, name: str) -> Any:
    """Return what a dotted name means on `module`, or None where it means nothing."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def shortened(value: object) -> str:
    """Write a value on one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
