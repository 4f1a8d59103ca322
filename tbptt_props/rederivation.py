"""What is due of a chunk, worked out from what it was given and nothing else.

Trusted: the values that the subject's own forward and loss return. Not trusted: how its loop cut,
carried, cleared and stepped, for none of that runs here; nor what its forward detaches, for the
slope comes from values alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt_props.compare import close, near, same, worst
from tbptt_props.graph import nodes_behind as _nodes
from tbptt_props.process import randomness, set_randomness
from tbptt_props.state import leaves, map_tensors, value_of
from tbptt_props.subject import Subject, resolve
from tbptt_props.trace import (
    Call,
    Chunk,
    Difference,
    Expected,
    Given,
    Outcome,
    Rule,
    Tensors,
    time_dimension,
)

NUDGE = 1e-5  # central differences in float64: truncation error near NUDGE² = 1e-10


def rederive(subject: Subject, chunk: Chunk) -> Expected:
    """Run one chunk by itself on `subject`'s module, with no past to leak from and no loop.

    The module's parameters, buffers and plain attributes are overwritten with what the chunk was
    given: pass a subject that nobody trains.
    """
    given, outcome = chunk.given, chunk.outcome
    if given is None or outcome is None:
        return Expected(missing="the chunk's tensors were dropped")
    try:
        with _kept_randomness():
            return _rederived(
                subject,
                given,
                outcome,
                within_batch=not chunk.starts_batch,
                time=time_dimension(chunk),
            )
    except Exception as error:  # whatever a stranger's forward raises outside its loop
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Expected(missing=f"forward could not be repeated outside training ({reason})")


@contextmanager
def _kept_randomness() -> Iterator[None]:
    before = randomness()
    try:
        yield
    finally:
        set_randomness(before)


def _rederived(
    subject: Subject, given: Given, outcome: Outcome, *, within_batch: bool, time: int | None
) -> Expected:
    module = subject.module
    _load(module, given)
    incoming = map_tensors(_wanting_gradient, given.calls[0].state)
    predictions, state = _forward(subject, given, incoming)
    nodes = _nodes([*predictions, *leaves(state).values()])
    connected = _connected(nodes, leaves(incoming).values())
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    form = _form_of(subject, given, predictions, outcome.loss)
    loss, cotangents = _loss(subject, given, predictions, form)
    # The gradient of the loss that the subject really had; where that one is wrong, the loss is
    # to blame and not the gradient.
    seen = outcome.cotangents
    known = [g for g in seen if g is not None]
    due_alone = not (len(known) == len(seen) == len(predictions)) or _same_all(known, cotangents)
    along = cotangents if due_alone else seen
    gradients = _pulled_back(predictions, along, trainable)
    draws = not torch.equal(torch.get_rng_state(), given.randomness[0])
    parameters, rule_missing = _updated(outcome)
    slope, autograd_slope, unclear = None, None, ""
    if loss is not None:
        due = gradients if along is cotangents else _pulled_back(predictions, cotangents, trainable)
        slope, autograd_slope, unclear = _slopes(subject, given, nodes, trainable, due, form)
    return Expected(
        loss=None if loss is None else float(loss.detach()),
        cotangents=tuple(cotangents),
        gradients=gradients,
        parameters=parameters,
        state=value_of(state),
        slope=slope,
        autograd_slope=autograd_slope,
        slope_unclear=unclear,
        rule_missing=rule_missing,
        state_matters=(
            _state_matters(subject, given, predictions, state, connected=connected)
            if within_batch
            else None
        ),
        draws=draws,
        in_two=(
            None if draws or within_batch else _in_two(subject, given, time, predictions, state)
        ),
    )


def _same_all(ones: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(a is not None and b is not None and same(a, b) for a, b in pairs)


def _load(module: nn.Module, given: Given) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in given.trainable)
            parameter.copy_(given.parameters[name])
    _load_values(module, given)


def _load_values(module: nn.Module, given: Given) -> None:
    """Put buffers, plain attributes and random numbers where they were when the chunk began."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in given.buffers:
                buffer.copy_(given.buffers[name])
    for name, part in module.named_modules():
        part.__dict__.update(value_of(given.attributes.get(name, {})))
    set_randomness(given.randomness)


def _forward(subject: Subject, given: Given, state: Any) -> tuple[list[Tensor], Any]:
    """Repeat the calls of a chunk; only the first one starts from a state that was handed in."""
    call_forward = resolve(subject.module, subject.forward)
    predictions: list[Tensor] = []
    for i, call in enumerate(given.calls):
        if i and not call.attached:  # cut by the loop: whether it should be is judged elsewhere
            state = value_of(state)
        prediction, state = _repeat(call_forward, call, state)
        predictions.append(prediction)
    return predictions, state


def _repeat(call_forward: Any, call: Call, state: Any) -> tuple[Tensor, Any]:
    positional, named = value_of(call.others)
    arguments = (value_of(call.x), state) if call.handed else (value_of(call.x),)
    prediction, after = call_forward(*arguments, *positional, **named)
    return prediction, after


@torch.no_grad()
def _in_two(
    subject: Subject,
    given: Given,
    time: int | None,
    predictions: Sequence[Tensor],
    state: Any,
) -> tuple[Difference, ...] | None:
    """Run the chunk in two parts; return what differs, or None where it need not be the same."""
    first = given.calls[0]
    if time is None or len(given.calls) > 1 or not leaves(state):
        return None
    steps = first.x.shape[time]
    whole = predictions[0].detach()
    positional, named = first.others
    if steps < 2 or whole.dim() <= time or whole.shape[time] != steps or positional or named:
        return None
    _load_values(subject.module, given)
    call_forward = resolve(subject.module, subject.forward)
    carried = value_of(first.state)
    part = 1 if steps < 4 else 2  # two time steps, for a forward that treats a single one apart
    early, late = torch.split(first.x, [part, steps - part], dim=time)
    before, carried = _repeat(call_forward, replace(first, x=early), carried)
    # A forward that looks ahead within the chunk, or takes its statistics as batch norm does, and
    # a state that grows with the time steps, legitimately depend on how the chunk is cut.
    due, midway = leaves(state), leaves(carried)
    if [leaf.shape for leaf in due.values()] != [leaf.shape for leaf in midway.values()]:
        return None
    if not close(before, whole.narrow(time, 0, part)):
        return None
    _, carried = _repeat(call_forward, replace(first, x=late, handed=True), carried)
    return tuple(worst(leaves(carried), due))


@torch.no_grad()
def _state_matters(
    subject: Subject, given: Given, predictions: Sequence[Tensor], state: Any, *, connected: bool
) -> bool | None:
    """Tell whether what a chunk does depends on the state it starts from."""
    first = given.calls[0]
    if not any(leaf.is_floating_point() for leaf in leaves(first.state).values()):
        return None
    if connected:  # it has a path, be it through units that are dead here
        return True
    _load_values(subject.module, given)
    changed, after = _forward(subject, given, map_tensors(_nudged, first.state))
    if not all(map(same, changed, (p.detach() for p in predictions))):
        return True
    return not all(map(same, leaves(after).values(), leaves(state).values()))


def _wanting_gradient(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.is_floating_point() else copied


def _connected(nodes: set[Any], inputs: Iterable[Tensor]) -> bool:
    """Tell whether one of autograd's nodes accumulates the gradient of any of the inputs."""
    wanted = {id(tensor) for tensor in inputs}
    return any(id(getattr(node, "variable", None)) in wanted for node in nodes)


def _nudged(tensor: Tensor) -> Tensor:
    return tensor + 0.5 if tensor.is_floating_point() else tensor


def _loss(
    subject: Subject, given: Given, predictions: Sequence[Tensor], form: Form
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the chunk's loss, and its gradient by each prediction; None where it isn't known."""
    if given.target is None:
        return None, [None] * len(predictions)
    loss = _as_trained(subject, given.target, predictions, form)
    grads = torch.autograd.grad(loss, list(predictions), retain_graph=True, allow_unused=True)
    return loss, list(grads)


Form = Literal["whole", "mean", "sum"]


@torch.no_grad()
def _form_of(subject: Subject, given: Given, predictions: Sequence[Tensor], found: float) -> Form:
    """Tell how a loop that calls forward several times a chunk puts its loss together.

    It may take the loss of all predictions, or the mean or sum of each call's: all are its own.
    """
    if len(predictions) == 1 or given.target is None:
        return "whole"
    forms: tuple[Form, ...] = ("whole", "mean", "sum")
    losses = {form: _as_trained(subject, given.target, predictions, form) for form in forms}
    return next((form for form in forms if near(float(losses[form]), found)), "whole")


def _as_trained(
    subject: Subject, target: Tensor, predictions: Sequence[Tensor], form: Form
) -> Tensor:
    """Compute the loss over the chunk, put together in this form."""
    if len(predictions) == 1:
        return subject.loss(predictions[0], target)
    if all(p.dim() == 2 for p in predictions):
        pieces = list(target.unbind(1))
        whole = torch.stack(list(predictions), dim=1)
    else:
        lengths = [p.shape[1] for p in predictions]
        pieces = list(torch.split(target, lengths, dim=1))
        whole = torch.cat(list(predictions), dim=1)
    if form == "whole":
        return subject.loss(whole, target)
    losses = torch.stack([subject.loss(p, y) for p, y in zip(predictions, pieces, strict=True)])
    return losses.mean() if form == "mean" else losses.sum()


def _pulled_back(
    predictions: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    trainable: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """Carry the loss's gradient by the predictions back to the parameters, by autograd."""
    pairs = [(p, g) for p, g in zip(predictions, cotangents, strict=True) if g is not None]
    if not pairs or not trainable:
        return {}
    outputs, along = zip(*pairs, strict=True)
    grads = torch.autograd.grad(
        outputs, list(trainable.values()), along, retain_graph=True, allow_unused=True
    )
    return {n: g for n, g in zip(trainable, grads, strict=True) if g is not None}


# The slope of the loss, from values alone ---------------------------------------------------


def _slopes(
    subject: Subject,
    given: Given,
    nodes: set[Any],
    trainable: Mapping[str, nn.Parameter],
    gradients: Tensors,
    form: Form,
) -> tuple[float | None, float | None, str]:
    """Difference the loss along one direction, and take autograd's word for the same."""
    custom = _custom_function(nodes)
    if custom:
        return None, None, f"{custom} defines a gradient of its own, which need not be the slope"
    if any(p.dtype != torch.float64 for p in trainable.values()):
        return None, None, "values in less than float64 are too coarse to difference"
    direction = _direction(trainable)
    told = sum(float((gradients[n] * v).sum()) for n, v in direction.items() if n in gradients)
    wide = _differenced(subject, given, trainable, direction, NUDGE, form)
    if _agree(wide, told):
        return wide, told, ""
    # A kink within the nudge (relu, clamp) shows as two nudges that disagree with each other.
    narrow = _differenced(subject, given, trainable, direction, NUDGE / 4, form)
    if not _agree(wide, narrow):
        return None, None, "the loss has a kink close by"
    return wide, told, ""


def _agree(one: float, other: float) -> bool:
    # Rounding leaves about 1e-16 / NUDGE = 1e-11 of a loss near 1.
    return abs(one - other) <= 1e-8 + 1e-6 * max(abs(one), abs(other))


def _direction(trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in trainable.items()
    }


@torch.no_grad()
def _differenced(
    subject: Subject,
    given: Given,
    trainable: Mapping[str, nn.Parameter],
    direction: Tensors,
    nudge: float,
    form: Form,
) -> float:
    losses = []
    for sign in (1, -1):
        for name, parameter in trainable.items():
            parameter.copy_(given.parameters[name] + sign * nudge * direction[name])
        _load_values(subject.module, given)
        predictions, _ = _forward(subject, given, value_of(given.calls[0].state))
        assert given.target is not None
        whole = _as_trained(subject, given.target, predictions, form)
        losses.append(float(whole))
    for name, parameter in trainable.items():
        parameter.copy_(given.parameters[name])
    return (losses[0] - losses[1]) / (2 * nudge)


def _custom_function(nodes: set[Any]) -> str:
    """Name a custom autograd function among the nodes, if there is one."""
    custom = torch.autograd.function.BackwardCFunction
    return next((type(node).__name__ for node in nodes if isinstance(node, custom)), "")


# The update, by the optimizer's own rule ----------------------------------------------------


def _updated(outcome: Outcome) -> tuple[tuple[Tensors, ...], str]:
    """Repeat the updates on copies: the same optimizer, settings, memory and gradients."""
    after: list[Tensors] = []
    for rule in outcome.rules:
        copies = {name: nn.Parameter(value.clone()) for name, value in rule.before.items()}
        try:
            apply_rule(rule, copies)
        except Exception as error:  # whatever a stranger's optimizer raises out of its place
            return (), f"{type(rule.optimizer).__name__} could not be repeated ({error})"
        after.append({name: p.detach() for name, p in copies.items()})
    return tuple(after), ""


def apply_rule(
    rule: Rule, copies: Mapping[str, nn.Parameter], gradients: Tensors | None = None
) -> Optimizer:
    """Make one update of `copies` by `rule`, in place; return the optimizer that made it."""
    handed = rule.handed if gradients is None else gradients
    groups = []
    memory: dict[Any, Any] = {}
    for group in rule.groups:
        members = [copies[name] for name in group["params"] if name]
        for name in filter(None, group["params"]):
            grad = handed.get(name)
            copies[name].grad = None if grad is None else grad.clone()
            if rule.memory.get(name):
                memory[copies[name]] = map_tensors(Tensor.clone, dict(rule.memory[name]))
        groups.append({**copy.copy(dict(group)), "params": members})
    optimizer = object.__new__(type(rule.optimizer))
    optimizer.__dict__.update(_own_attributes(rule.optimizer))
    optimizer.__setstate__(
        {"defaults": rule.optimizer.defaults, "state": _defaulting(memory), "param_groups": groups}
    )
    optimizer.step()
    return optimizer  # type: ignore[no-any-return]


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps besides torch's own, which `__setstate__` makes anew."""
    return {
        key: value
        for key, value in vars(optimizer).items()
        if not key.startswith("_") and key not in ("defaults", "state", "param_groups", "step")
    }


def _defaulting(memory: dict[Any, Any]) -> Any:
    from collections import defaultdict

    return defaultdict(dict, memory)
