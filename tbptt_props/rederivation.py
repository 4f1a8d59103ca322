"""What is due of a chunk, worked out from what it was given and nothing else.

Trusted: the values that the subject's own forward and loss return. Not trusted: how its loop cut,
carried, cleared and stepped, for none of that runs here; nor what its forward detaches, for the
slope comes from values alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt_props.byhand import BY_HAND
from tbptt_props.compare import close, difference, near, near_slope, same, worst
from tbptt_props.compiling import as_written
from tbptt_props.device import drawn
from tbptt_props.forward import Arguments, Forward
from tbptt_props.graph import hooked, nodes_behind
from tbptt_props.layout import Heads, alike, as_the_loss_takes, of_parts
from tbptt_props.precision import autocasting
from tbptt_props.process import has_drawn, randomness, set_randomness
from tbptt_props.state import dense, leaves, map_tensors, value_of
from tbptt_props.subject import ObservationError, Subject
from tbptt_props.surrogate import takes_anothers_gradient
from tbptt_props.trace import (
    REWORKED,
    RUN_AGAIN,
    Call,
    Chunk,
    Difference,
    Expected,
    Given,
    Mixing,
    Outcome,
    Rule,
    Tensors,
    time_dimension,
)

Form = Literal["whole", "mean", "sum"]  # how a loss is put together from several calls

_Measured = TypeVar("_Measured")

ROUNDING = 1e-15  # a few of float64's units in the last place
OTHERS = 8  # inputs on which to look for what depends on a time step
NUDGE = 1e-5  # central differences in float64: truncation error near NUDGE² = 1e-10


def rederive(
    subject: Subject, chunk: Chunk, *, slope: bool = True, mixing: bool = True
) -> Expected:
    """Run one chunk by itself on `subject`'s module, with no past to leak from and no loop.

    The module's parameters, buffers and plain attributes are overwritten with what the chunk was
    given, and its parameters with what the update is due to make of them: pass a subject that
    nobody trains, and use what is returned before the next call. Without `slope`, two forwards
    are saved, and without `mixing` five.
    """
    given, outcome = chunk.given, chunk.outcome
    if given is None or outcome is None:
        return Expected(missing="the chunk's tensors were dropped")
    if chunk.copies:
        return Expected(missing=RUN_AGAIN)
    device = torch.device(subject.device).type
    try:
        with _kept_randomness(), as_written(), autocasting(given.autocast, device):
            return _rederived(subject, chunk, given, outcome, slope=slope, mixing=mixing)
    except ObservationError as error:  # the loss is none, or none of several calls' predictions
        if len(given.calls) == 1:
            raise
        return Expected(missing=str(error))
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


@dataclass(frozen=True)
class _Again:
    """A chunk's forward and loss, run again; the graph is alive."""

    predictions: list[Tensor]
    heads: list[Heads]  # the same, as forward returned them
    state: Any
    nodes: set[Any]
    connected: bool  # a path leads from what came out to the incoming state
    draws: bool  # random numbers were drawn
    form: Form
    loss: Tensor | None
    cotangents: list[Tensor | None]  # by way of other predictions, too
    direct: list[Tensor | None]  # but for those ways
    gradients: Tensors  # of that loss


def _rederived(
    subject: Subject, chunk: Chunk, given: Given, outcome: Outcome, *, slope: bool, mixing: bool
) -> Expected:
    given = replace(given, target=_laid_out(subject, given, outcome.loss))
    _load(subject.module, given)
    again = _run(subject, given, outcome.loss)
    within_batch = not chunk.starts_batch
    expected = Expected(
        loss=None if again.loss is None else float(again.loss.detach()),
        cotangents=tuple(again.cotangents),
        gradients=_shared(_of_the_loss_seen(subject, given, again, outcome), outcome.gradients),
        state=value_of(again.state),
        state_matters=_state_matters(subject, given, again),
        numbers_matter=given.left is not None
        and _is_otherwise_from(subject, given, again, given.left),
        draws=again.draws,
        in_two=None if within_batch else _in_two(subject, chunk, given, again),
        mixed=_mixed(subject, chunk, given) if mixing else None,
        hooked=given.hooked - hooked(subject.module),
        partial=subject.loss is None,
    )
    expected = replace(expected, reordered=_is_reordered(subject, given, again, outcome.loss))
    expected = _with_slopes(expected, subject, given, again, wanted=slope)
    del again  # its gradients are many parameters long, and so are those of the update
    parameters, rule_missing = _updated(outcome, subject.module)
    return replace(expected, parameters=parameters, rule_missing=rule_missing)


def _laid_out(subject: Subject, given: Given, found: float) -> Any:
    """Return the targets as the loop lays them out, told from the loss that it found."""
    prediction = given.calls[0].prediction
    if subject.loss is None or given.target is None or prediction is None or len(given.calls) > 1:
        return given.target
    kept = (
        prediction if not given.context else _behind(given.context, [prediction], given.target)[0]
    )
    return as_the_loss_takes(_loss_of(subject, given), kept, given.target, found)


def _loss_of(subject: Subject, given: Given) -> Callable[[Any, Any], Tensor]:
    assert subject.loss is not None  # without one, there is no target
    return of_parts(subject.loss, given.calls[0].nest)


def _shared(due: Tensors, found: Tensors) -> Tensors:
    """Take the tensors of `found` for those that are due and the same: parameters are large."""
    return {n: found[n] if n in found and same(g, found[n]) else g for n, g in due.items()}


def _with_slopes(
    expected: Expected, subject: Subject, given: Given, again: _Again, *, wanted: bool
) -> Expected:
    if not wanted or again.loss is None:
        unclear = "a loss" if again.loss is None else "slopes are looked at in other chunks"
        return replace(expected, slope_unclear=unclear)
    by_values, by_autograd, unclear = _slopes_in_float64(subject, given, again)
    return replace(expected, slope=by_values, autograd_slope=by_autograd, slope_unclear=unclear)


def _run(subject: Subject, given: Given, found: float, form: Form | None = None) -> _Again:
    incoming = map_tensors(_wanting_gradient, given.calls[0].state)
    heads, state = _forward_in_heads(subject, given, incoming)
    predictions = [call.joined for call in heads]
    draws = has_drawn(given.randomness)
    nodes = nodes_behind([*predictions, *leaves(state).values()])
    form = form or _form_of(subject, given, predictions, found)
    loss = None
    cotangents: list[Tensor | None] = [None] * len(predictions)
    direct, gradients = cotangents, dict[str, Tensor]()
    if given.target is not None:
        loss = _as_trained(subject, given, predictions, form)
        cotangents, direct, gradients = _differentiated(loss, heads, _trainable(subject))
    return _Again(
        predictions=predictions,
        heads=heads,
        state=state,
        nodes=nodes,
        connected=_connected(nodes, leaves(incoming).values()),
        draws=draws,
        form=form,
        loss=loss,
        cotangents=cotangents,
        direct=direct,
        gradients=gradients,
    )


def steps_reached(subject: Subject, chunk: Chunk) -> frozenset[int] | None:
    """Return the time steps by which the prediction at a chunk's last one has gradients.

    They are found by running the chunk's forward once more; None where they can't be told.
    """
    given, time = chunk.given, time_dimension(chunk)
    if given is None or time is None or not given.calls[0].x.is_floating_point():
        return None
    try:
        with _kept_randomness():
            return _steps_reached(subject, given, time, min(step for _, step in chunk.inputs))
    except Exception:  # whatever a stranger's forward raises outside its loop
        return None


def _steps_reached(subject: Subject, given: Given, time: int, start: int) -> frozenset[int] | None:
    _load(subject.module, given)
    first = given.calls[0]
    x = _wanting_gradient(first.x)
    arguments = Arguments(x, None, first.handed, value_of(first.others))
    heads, _ = Forward(subject).again(arguments, value_of(first.state))
    prediction, steps = heads.joined, x.shape[time]
    if prediction.dim() <= time or prediction.shape[time] != steps:
        return None
    last = prediction.select(time, steps - 1).sum()
    if not last.requires_grad:
        return frozenset()
    (slope,) = torch.autograd.grad(last, x, allow_unused=True)
    by_step = [] if slope is None else slope.unbind(time)
    return frozenset(start + i for i, step in enumerate(by_step) if bool(step.any()))


def _trainable(subject: Subject) -> dict[str, nn.Parameter]:
    return {n: p for n, p in subject.module.named_parameters() if p.requires_grad}


def _differentiated(
    loss: Tensor, heads: Sequence[Heads], trainable: Mapping[str, nn.Parameter]
) -> tuple[list[Tensor | None], list[Tensor | None], dict[str, Tensor]]:
    """Return the loss's gradient by each call's predictions, twice, and by each parameter.

    One prediction may be made of another. First is what is seen of them from outside, in which
    that way counts; second what the loss itself makes of them.
    """
    apart, whole = [call.attached for call in heads], [call.joined for call in heads]
    wanted = [*itertools.chain(*apart), *whole, *trainable.values()]
    grads = iter(_gradients([loss], wanted, [None]))
    seen = [
        call.slopes([*itertools.islice(grads, len(own))])
        for call, own in zip(heads, apart, strict=True)
    ]
    direct = [*itertools.islice(grads, len(whole))]
    by_parameter = zip(trainable, grads, strict=True)
    return seen, direct, {n: g for n, g in by_parameter if g is not None}


def _gradients(
    roots: Sequence[Tensor], wanted: Sequence[Tensor], along: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients of `roots` by what is wanted."""
    try:
        found = torch.autograd.grad(roots, wanted, along, retain_graph=True, allow_unused=True)
        return [None if g is None else dense(g) for g in found]
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
    # One that is reentrant leaves gradients where they are wanted, and returns none.
    for tensor in wanted:
        tensor.grad = None
        tensor.retain_grad()
    torch.autograd.backward(roots, along, retain_graph=True)
    left = [None if tensor.grad is None else dense(tensor.grad) for tensor in wanted]
    for tensor in wanted:
        tensor.grad = None
    return left


def _of_the_loss_seen(subject: Subject, given: Given, again: _Again, outcome: Outcome) -> Tensors:
    """Return the gradients of the loss that the subject really had.

    Where that loss is wrong, it is to blame, and not the gradients that follow from it.
    """
    seen = outcome.cotangents
    if len(seen) != len(again.predictions) or any(g is None for g in seen):
        return again.gradients
    if _same_all(seen, again.cotangents):
        return again.gradients
    trainable = _trainable(subject)
    if not any(call.is_state or call.nest for call in given.calls):
        return _pulled_back(again.predictions, seen, trainable)
    apart = [tensor for call in again.heads for tensor in call.attached]
    pairs = zip(again.heads, seen, strict=True)
    found = [g for call, slopes in pairs if slopes is not None for g in call.cotangents(slopes)]
    return _pulled_back(apart, _direct(apart, found), trainable)


def _direct(predictions: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor | None]:
    """Take away from the gradient by each prediction what comes by way of those made of it."""
    direct: list[Tensor | None] = [None] * len(seen)
    for i in sorted(range(len(seen)), key=lambda i: -_number(predictions[i])):
        by_way = _pulled_back(predictions, direct, {"": predictions[i]})
        direct[i] = seen[i] - by_way[""] if by_way else seen[i]
    return direct


def _number(tensor: Tensor) -> int:
    """Return the number of a tensor's node: what is made of it has a later one."""
    assert tensor.grad_fn is not None
    return tensor.grad_fn._sequence_nr()


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
    _put_buffers(module, given)
    for name, part in module.named_modules():
        part.__dict__.update(value_of(given.attributes.get(name, {})))
    set_randomness(given.randomness)


@torch.no_grad()
def _put_buffers(module: nn.Module, given: Given, but: Sequence[str] = ()) -> None:
    for name, buffer in module.named_buffers():
        if name in given.buffers and name not in but:
            put_buffer(module, name, buffer, given.buffers[name])


def put_buffer(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    """Give a buffer a value, which may be of another shape: a state kept there grows with B."""
    if buffer.shape == value.shape:
        buffer.copy_(value)
        return
    head, _, tail = name.rpartition(".")
    setattr(module.get_submodule(head), tail, value.clone())


def _forward(subject: Subject, given: Given, state: Any) -> tuple[list[Tensor], Any]:
    heads, state = _forward_in_heads(subject, given, state)
    return [call.joined for call in heads], state


def _forward_in_heads(subject: Subject, given: Given, state: Any) -> tuple[list[Heads], Any]:
    """Repeat the calls of a chunk, each from the state that the one before it ended in.

    Raises:
        ObservationError: the loop makes another state of it on its way to the next call.
    """
    heads: list[Heads] = []
    forward = Forward(subject)
    for i, call in enumerate(given.calls):
        if i and given.turns:
            state = map_tensors(_wanting_gradient, call.state)
        elif i and not call.attached:  # cut by the loop: whether it should be is judged elsewhere
            state = value_of(call.state)
        elif i and not alike(given.calls[i - 1].state_after, call.state):
            raise ObservationError(REWORKED)
        found, state = _in_heads(forward, call, state)
        heads.append(found)
    return heads, state


def _repeat(forward: Forward, call: Call, state: Any) -> tuple[Tensor, Any]:
    heads, state = _in_heads(forward, call, state)
    return heads.joined, state


def _in_heads(forward: Forward, call: Call, state: Any) -> tuple[Heads, Any]:
    arguments = Arguments(value_of(call.x), None, call.handed, value_of(call.others))
    return forward.again(arguments, state)


@torch.no_grad()
def _in_two(
    subject: Subject, chunk: Chunk, given: Given, again: _Again
) -> tuple[Difference, ...] | None:
    """Run the chunk in two parts; return what differs, or None where it need not be the same."""
    first, time = given.calls[0], time_dimension(chunk)
    positional, named = first.others
    if again.draws or time is None or not leaves(again.state) or positional or named:
        return None
    steps, whole = first.x.shape[time], again.predictions[0].detach()
    if steps < 2 or whole.dim() <= time or whole.shape[time] != steps:
        return None
    _load_values(subject.module, given)
    forward = Forward(subject)
    part = 1 if steps < 3 else 2  # two time steps, for a forward that treats a single one apart
    early, late = torch.split(first.x, [part, steps - part], dim=time)
    before, midway = _repeat(forward, replace(first, x=early), value_of(first.state))
    # A forward that looks ahead within the chunk, or takes its statistics as batch norm does, and
    # a state that grows with the time steps, legitimately depend on how the chunk is cut.
    shapes = [[leaf.shape for leaf in leaves(tree).values()] for tree in (again.state, midway)]
    if shapes[0] != shapes[1] or not close(before, whole.narrow(time, 0, part)):
        return None
    rest = replace(first, x=late, handed=True)
    _, carried = _repeat(forward, rest, value_of(midway))
    if has_drawn(given.randomness):
        return None  # noise on a state that comes in, say
    wrong = tuple(worst(leaves(carried), leaves(again.state)))
    if wrong:  # a forward may make weights anew in buffers with every call, as spectral norm does
        _put_buffers(subject.module, given, but=forward.kept)
        _, carried = _repeat(forward, rest, midway)
    wrong = tuple(worst(leaves(carried), leaves(again.state)))
    # A memory that is written once a chunk, and features that are padded where it begins, depend on
    # the cut as well: of a state that is not the last, some part knows nothing of the last step.
    stale = _ignoring_the_last_step(subject, given, time) if wrong else frozenset()
    return wrong if stale.intersection(d.name for d in wrong) or not wrong else None


def _ignoring_the_last_step(subject: Subject, given: Given, time: int) -> frozenset[str]:
    """Name the leaves of a state that inputs move, but never those of the last time step.

    None do where the predictions ignore that step as well, as where frames are skipped.
    """
    first, last = given.calls[0], given.calls[0].x.shape[time] - 1
    moving: set[str] = set()  # by the last time step
    before: Tensors | None = None
    moved: set[str] = set()
    noticed = False
    for x in _others_like(first.x, time):
        prediction, due = _ran(subject, given, x)
        moved |= _differing(due, before or due)
        before = due
        for step in _others_for(x, time, last):
            other = x.clone()
            other.select(time, last).copy_(step)
            predicted, after = _ran(subject, given, other)
            moving |= _differing(after, due)
            noticed = noticed or not same(predicted, prediction)
    return frozenset(moved - moving) if noticed else frozenset()


def _others_like(x: Tensor, time: int) -> Iterator[Tensor]:
    """Yield a chunk's inputs, and some others: a maximum over time may be taken anywhere."""
    yield x
    generator = _fixed()
    for by in range(1, OTHERS):
        if x.is_floating_point():
            yield torch.randn(x.shape, generator=generator).to(x)
        else:
            yield x.roll(by, time).flip(1 - time)


def _ran(subject: Subject, given: Given, x: Tensor) -> tuple[Tensor, Tensors]:
    """Run a chunk's first call on other inputs; return its prediction, and the state's leaves."""
    first = given.calls[0]
    _load_values(subject.module, given)
    prediction, state = _repeat(Forward(subject), replace(first, x=x), value_of(first.state))
    return prediction, leaves(state)


def _differing(found: Tensors, due: Tensors) -> set[str]:
    return {path for path in found.keys() & due.keys() if not same(found[path], due[path])}


@torch.no_grad()
def _mixed(subject: Subject, chunk: Chunk, given: Given) -> tuple[Mixing, ...] | None:
    """Feed one sequence something else; return what that does to others, or None where it may.

    Statistics over a batch, as batch norm takes them, have each sequence depend on each. One that
    depends on those before it, or behind it, alone is taken for a time step.
    """
    dim = _sequence_dimension(chunk, given)
    count = 0 if dim is None else given.calls[0].x.shape[dim]
    # Rows that are not of one sequence each are a mistake in how chunks are cut.
    if dim is None or count < 2 or len({*chunk.lanes}) != count:
        return None
    try:
        plain = _with_row(subject, given, dim)
        moves = {row: _moves(subject, given, dim, row, plain) for row in (0, count - 1)}
    except Exception:  # whatever a stranger's forward raises on inputs that are not its own
        return None
    if any(found is None for found in moves.values()) or all(moves.values()):
        return None
    return tuple(
        Mixing(chunk.lanes[row], chunk.lanes[by], moved)
        for by, found in moves.items()
        for row, moved in found or ()
    )


def _sequence_dimension(chunk: Chunk, given: Given) -> int | None:
    """Return along which dimension of a call's inputs its sequences lie; None where unclear."""
    time, x = time_dimension(chunk), given.calls[0].x
    if given.turns:
        return None
    if time is not None:
        return 1 - time
    if not isinstance(x, Tensor):
        return None
    found = [dim for dim, size in enumerate(x.shape[:2]) if size == len(chunk.lanes)]
    return found[0] if len(found) == 1 else None


def _with_row(
    subject: Subject, given: Given, dim: int, row: int = 0, otherwise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a chunk's first call; return what it predicts of each, and the random numbers it left."""
    first = given.calls[0]
    x = first.x.clone()
    if otherwise is not None:
        x.select(dim, row).copy_(otherwise)
    _load_values(subject.module, given)
    heads, _ = _in_heads(Forward(subject), replace(first, x=x), value_of(first.state))
    return heads.of_each, drawn()


def _moves(
    subject: Subject, given: Given, dim: int, row: int, plain: tuple[Tensor, Tensor]
) -> list[tuple[int, Difference]] | None:
    """Return the first other sequence that one moves, if any; None where they can't be told."""
    before = _by_sequence(plain[0], given.calls[0].x, dim)
    for other in _others_for(given.calls[0].x, dim, row):
        prediction, left = _with_row(subject, given, dim, row, other)
        after = _by_sequence(prediction, given.calls[0].x, dim)
        if before is None or after is None or before.shape != after.shape:
            return None
        if not torch.equal(left, plain[1]):  # how much is drawn depends on the inputs
            return None
        for i, (one, due) in enumerate(zip(after, before, strict=True)):
            if i != row and not close(one, due):
                return [(i, difference("prediction", one, due))]
    return []


def _others_for(x: Tensor, dim: int, row: int) -> Iterator[Tensor]:
    """Yield two other inputs for a sequence; what are no real numbers may be ids: other rows'."""
    own = x.select(dim, row)
    for by in (1, 2):
        if x.is_floating_point():  # further out than any, for a maximum over the batch to move
            yield own + (-1) ** by * (1 + 2 * x.abs().max())
        else:
            yield x.select(dim, (row + by) % x.shape[dim])


def _by_sequence(prediction: Tensor, x: Tensor, dim: int) -> Tensor | None:
    """Lay a prediction out with its sequences first; None where it is unclear how they lie."""
    leading = x.shape[:2]
    flat = prediction.dim() > 0 and len(leading) == 2 and len(prediction) == leading.numel()
    if flat and prediction.shape[:2] != leading:
        prediction = prediction.reshape(*leading, *prediction.shape[1:])
    dims = (dim, 0)
    found = [d for d in dims if d < prediction.dim() and prediction.shape[d] == x.shape[dim]]
    return prediction.movedim(found[0], 0) if found else None


@torch.no_grad()
def _state_matters(subject: Subject, given: Given, again: _Again) -> bool | None:
    """Tell whether what a chunk does depends on the state it starts from."""
    first = given.calls[0]
    if not any(leaf.is_floating_point() for leaf in leaves(first.state).values()):
        return None
    if again.connected:  # it has a path, be it through units that are dead here
        return True
    return _is_otherwise_from(subject, given, again, map_tensors(_nudged, first.state))


@torch.no_grad()
def _is_otherwise_from(subject: Subject, given: Given, again: _Again, state: Any) -> bool:
    """Tell whether from this state something else comes out than did."""
    _load_values(subject.module, given)
    changed, after = _forward(subject, given, value_of(state))
    if not all(map(same, changed, (p.detach() for p in again.predictions))):
        return True
    return not all(map(same, leaves(after).values(), leaves(again.state).values()))


def _wanting_gradient(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_() if tensor.is_floating_point() else copied


def _connected(nodes: set[Any], inputs: Iterable[Tensor]) -> bool:
    """Tell whether one of autograd's nodes accumulates the gradient of any of the inputs."""
    wanted = {id(tensor) for tensor in inputs}
    return any(id(getattr(node, "variable", None)) in wanted for node in nodes)


def _nudged(tensor: Tensor) -> Tensor:
    return tensor + 0.5 if tensor.is_floating_point() else tensor


@torch.no_grad()
def _form_of(subject: Subject, given: Given, predictions: Sequence[Tensor], found: float) -> Form:
    """Tell how a loop that calls forward several times a chunk puts its loss together.

    It may take the loss of all predictions, or the mean or sum of each call's: all are its own.
    """
    if len(predictions) == 1 or given.target is None or given.turns:
        return "whole"
    forms: tuple[Form, ...] = ("whole", "mean", "sum")
    losses = {form: _as_trained(subject, given, predictions, form) for form in forms}
    return next((form for form in forms if near(float(losses[form]), found)), "whole")


def _as_trained(
    subject: Subject, given: Given, predictions: Sequence[Tensor], form: Form
) -> Tensor:
    """Compute the loss over the chunk, put together in this form."""
    loss = _loss_of(subject, given)
    target, by_step = given.target, all(p.dim() == 2 for p in predictions)
    if given.context:
        predictions = _behind(given.context, predictions, target)
    if len(given.calls) == 1:
        return loss(predictions[0], target)
    if given.turns:
        return loss(_side_by_side(predictions, target), target)
    if by_step:
        pieces = [_narrowed(target, 1, i, 1, drop=True) for i in range(len(predictions))]
        whole = torch.stack(list(predictions), dim=1)
    else:
        time = _time_of(predictions, target)
        lengths = [p.shape[time] for p in predictions]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        pieces = [_narrowed(target, time, *cut) for cut in zip(starts, lengths, strict=True)]
        whole = torch.cat(list(predictions), dim=time)
    if form == "whole":
        return loss(whole, target)
    losses = torch.stack([loss(p, y) for p, y in zip(predictions, pieces, strict=True)])
    return losses.mean() if form == "mean" else losses.sum()


def _side_by_side(predictions: Sequence[Tensor], target: Any) -> Tensor:
    """Join predictions of different sequences, which lie as in the targets."""
    first = next(iter(leaves(target).values()))
    if all(p.dim() > 1 for p in predictions):
        second = sum(p.shape[1] for p in predictions)
        if first.shape[:2] == (predictions[0].shape[0], second):
            return torch.cat(list(predictions), dim=1)
    return torch.cat(list(predictions))


@torch.no_grad()
def _is_reordered(subject: Subject, given: Given, again: _Again, found: float) -> bool:
    """Tell whether the loss is that of the targets in another order: turned, or laid out so."""
    target = given.target
    if again.loss is None or not isinstance(target, Tensor) or target.dim() < 2:
        return False
    if given.context or near(float(again.loss), found):
        return False
    turned = (
        target.flip(1),
        target.flip(0),
        target.roll(1, 0),
        target.roll(-1, 0),
        target.transpose(0, 1).reshape(target.shape),
        target.reshape(target.shape[1], target.shape[0], *target.shape[2:]).transpose(0, 1),
    )
    others = (replace(given, target=other) for other in turned if not same(other, target))
    return any(
        near(float(_as_trained(subject, other, again.predictions, again.form)), found)
        for other in others
    )


def _behind(context: int, predictions: Sequence[Tensor], target: Any) -> list[Tensor]:
    """Leave out the predictions of the first time steps, which have no loss."""
    if all(p.dim() == 2 for p in predictions):
        return list(predictions[context:] if len(predictions) > 1 else predictions)
    time = _time_of(predictions, target, context)
    kept = []
    for prediction in predictions:
        steps = prediction.shape[time]
        left_out, context = min(context, steps), max(0, context - steps)
        if left_out < steps:
            kept.append(prediction.narrow(time, left_out, steps - left_out))
    return kept


def _narrowed(target: Any, dim: int, start: int, length: int, *, drop: bool = False) -> Any:
    """Cut targets (B, K, ...) along time; of one time step, the dimension may be dropped."""

    def cut(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dim:  # one for each sequence
            return tensor
        return tensor.select(dim, start) if drop else tensor.narrow(dim, start, length)

    return map_tensors(cut, target)


def _time_of(predictions: Sequence[Tensor], target: Any, context: int = 0) -> int:
    """Return along which dimension the predictions of several calls make up the target's steps."""
    first = next(iter(leaves(target).values()))
    along = first.shape[0] + context == sum(p.shape[0] for p in predictions)
    return 0 if along and all(p.shape[1] == first.shape[1] for p in predictions) else 1


def _pulled_back(
    predictions: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    trainable: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Carry the loss's gradient by the predictions back to the parameters, by autograd."""
    pairs = [(p, g) for p, g in zip(predictions, cotangents, strict=True) if g is not None]
    if not pairs or not trainable:
        return {}
    outputs, along = zip(*pairs, strict=True)
    grads = _gradients(outputs, list(trainable.values()), along)
    return {n: g for n, g in zip(trainable, grads, strict=True) if g is not None}


# The slope of the loss, from values alone ---------------------------------------------------


def _slopes_in_float64(
    subject: Subject, given: Given, again: _Again
) -> tuple[float | None, float | None, str]:
    """Look at slopes in float64, also where training had less.

    What forward detaches, it detaches in each dtype; but only float64 tells it from rounding.
    """
    dtype, module = torch.get_default_dtype(), subject.module
    if dtype == torch.float64 or any(p.dtype != dtype for p in module.parameters()):
        return _slopes(subject, given, again)
    try:
        torch.set_default_dtype(torch.float64)
        module.double()
        wide = _widened(given)
        _load(module, wide)
        return _slopes(subject, wide, _run(subject, wide, 0.0, again.form))
    except Exception:  # whatever a stranger's forward raises in a dtype that it was not written for
        return None, None, TOO_COARSE
    finally:
        torch.set_default_dtype(dtype)
        module.to(dtype)


def _widened(given: Given) -> Given:
    """Return what a chunk was given with its numbers in float64; where it holds none, as it was."""

    def wide(tree: Any) -> Any:
        return map_tensors(lambda t: t.double() if t.is_floating_point() else t, tree)

    return replace(
        given,
        calls=tuple(
            replace(c, x=wide(c.x), state=wide(c.state), others=wide(c.others)) for c in given.calls
        ),
        parameters=wide(given.parameters),
        buffers=wide(given.buffers),
        attributes=wide(given.attributes),
        target=wide(given.target),
    )


TOO_COARSE = "values in less than float64 are too coarse to difference"


def _slopes(
    subject: Subject, given: Given, again: _Again
) -> tuple[float | None, float | None, str]:
    """Difference the loss along one direction, and take autograd's word for the same."""
    custom = _custom_function(again.nodes)
    if custom:
        return None, None, f"{custom} defines a gradient of its own, which need not be the slope"
    trainable = _trainable(subject)
    assert again.loss is not None
    if any(t.dtype != torch.float64 for t in (again.loss, *again.predictions, *trainable.values())):
        return None, None, TOO_COARSE
    told = _along(trainable, again.gradients)
    wide = _differenced(subject, given, again.form, NUDGE)
    if near_slope(wide, told):
        return wide, told, ""
    if not abs(wide - told) > _rounding(given, again):
        return None, None, "numbers are too large for a nudge to be told from rounding"
    # A kink within the nudge (relu, clamp) shows as two nudges that disagree with each other.
    narrow = _differenced(subject, given, again.form, NUDGE / 4)
    if not near_slope(wide, narrow) or _kinked(subject, given, again):
        return None, None, "the loss has a kink close by"
    if _hooked(subject, given):
        return None, None, "gradients that no hook of the subject's changes on their way"
    if _is_straight_through(subject, given):
        return None, None, "a forward that gives no value another one's gradient, straight through"
    if _feeds_back(subject, given):
        return None, None, "a forward that detaches nothing, be it its own predictions to feed back"
    if _kept_in_buffers(subject, given):
        return None, None, "a forward that keeps nothing of its parameters, as spectral norm does"
    if _stopped_in_loss(subject, given, again):
        return None, None, "a loss that detaches nothing itself: its gradient is not its slope"
    if _stopped_in_a_head(subject, given, again):
        return None, None, "a forward that detaches nothing for some of its predictions alone"
    return wide, told, ""


def _hooked(subject: Subject, given: Given) -> bool:
    """Tell whether the subject hangs hooks on parameters or on what forward makes of them."""
    if hooked(subject.module):
        return True
    hung: list[Tensor] = []
    original = Tensor.register_hook

    def register_hook(tensor: Tensor, hook: Any) -> Any:
        hung.append(tensor)
        return original(tensor, hook)  # type: ignore[no-untyped-call]

    Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        _load_values(subject.module, given)
        _forward(subject, given, value_of(given.calls[0].state))
    finally:
        Tensor.register_hook = original  # type: ignore[method-assign]
    return bool(hung)


def _feeds_back(subject: Subject, given: Given) -> bool:
    """Tell whether all that forward detaches is what it predicts: its own next inputs."""
    cut: list[Tensor] = []
    original = Tensor.detach

    def detach(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            cut.append(tensor)
        return original(tensor)

    Tensor.detach = detach  # type: ignore[assignment]
    try:
        _load_values(subject.module, given)
        predictions, _ = _forward(subject, given, value_of(given.calls[0].state))
    finally:
        Tensor.detach = original
    own = [p for p in predictions if p.requires_grad]
    own += [step for p in own for dim in range(min(2, p.dim())) for step in p.unbind(dim)]
    return bool(cut) and all(any(_same_numbers(one, step) for step in own) for one in cut)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and same(one.reshape(other.shape), other)


def _is_straight_through(subject: Subject, given: Given) -> bool:
    """Tell whether forward has a value take another one's gradient, by detaching."""
    _load_values(subject.module, given)
    return takes_anothers_gradient(lambda: _forward(subject, given, value_of(given.calls[0].state)))


@torch.no_grad()
def _kept_in_buffers(subject: Subject, given: Given) -> bool:
    """Tell whether predictions go by what forward makes of its parameters in buffers.

    No gradient goes that way, and none is due. The state is not meant, which may be a buffer.
    """
    kept = Forward(subject).kept
    ends: list[Tensors] = []

    def read(predictions: Sequence[Tensor]) -> float:
        ends.append({n: b.clone() for n, b in subject.module.named_buffers() if n not in kept})
        return 0.0

    _moved_along(subject, given, (-NUDGE, NUDGE), read)
    made = {name for name, value in ends[0].items() if not same(value, ends[1][name])}
    if not made:
        return False
    nudged = {n: _nudged(b) if n in made else b for n, b in given.buffers.items()}
    outcomes = []
    for buffers in (given.buffers, nudged):
        changed = replace(given, buffers=buffers)
        _load_values(subject.module, changed)
        predictions, _ = _forward(subject, changed, value_of(given.calls[0].state))
        outcomes.append(predictions)
    return not all(map(same, *outcomes))


def _stopped_in_loss(subject: Subject, given: Given, again: _Again) -> bool:
    """Tell whether it is the loss that detaches, an advantage say, and not forward.

    Then the slope of the predictions, along the loss's gradient by them, is autograd's word.
    """
    assert again.loss is not None
    _load_values(subject.module, given)
    again = _run(subject, given, float(again.loss.detach()))  # in which nothing was nudged yet
    trainable = _trainable(subject)
    through = _pulled_back(again.predictions, again.direct, trainable)
    if through.keys() != again.gradients.keys() or not all(
        close(g, again.gradients[name]) for name, g in through.items()
    ):
        return False  # parameters are used in the loss itself
    told = _along(trainable, through)
    cotangents = [None if g is None else g.detach() for g in again.direct]

    def linear(predictions: Sequence[Tensor]) -> float:
        pairs = zip(predictions, cotangents, strict=True)
        return sum(float((p * g).sum()) for p, g in pairs if g is not None)

    left, right = _moved_along(subject, given, (-NUDGE, NUDGE), linear)
    return near_slope((right - left) / (2 * NUDGE), told)


def _stopped_in_a_head(subject: Subject, given: Given, again: _Again) -> bool:
    """Tell whether forward detaches for some features of its predictions, and not for others.

    A head on detached features is so on purpose: what cuts the state short cuts it for all.
    """
    assert again.loss is not None
    _load_values(subject.module, given)
    predictions = _run(subject, given, float(again.loss.detach())).predictions
    trainable = _trainable(subject)
    count = predictions[0].shape[-1] if predictions[0].dim() > 1 else 1
    if count < 2 or any(p.dim() < 2 or p.shape[-1] != count for p in predictions):
        return False
    weights = [torch.randn(p.shape[:-1], generator=_fixed()).to(p) for p in predictions]

    def sums(predictions: Sequence[Tensor]) -> Tensor:
        pairs = zip(predictions, weights, strict=True)
        return torch.stack([(p * w.unsqueeze(-1)).flatten(0, -2).sum(0) for p, w in pairs]).sum(0)

    told = [
        _along(trainable, _pulled_back([one], [torch.ones_like(one)], trainable))
        for one in sums(predictions).unbind()
    ]
    left, right = _moved_along(subject, given, (-NUDGE, NUDGE), sums)
    by_values = ((right - left) / (2 * NUDGE)).tolist()
    right_ones = [near_slope(*pair) for pair in zip(by_values, told, strict=True)]
    return any(right_ones) and not all(right_ones)


def _fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _rounding(given: Given, again: _Again) -> float:
    """Return about what rounding of the loss and of nudged parameters does to a slope by values."""
    assert again.loss is not None
    sizes = sum(
        float(g.abs().flatten() @ given.parameters[name].abs().flatten())
        for name, g in again.gradients.items()
    )
    return ROUNDING * (float(again.loss.detach().abs()) + sizes) / NUDGE


def _kinked(subject: Subject, given: Given, again: _Again) -> bool:
    """Tell whether the slopes to both sides differ, and no less the closer they are taken."""
    wide, narrow = (_bend(subject, given, again, nudge) for nudge in (NUDGE, NUDGE / 4))
    return abs(narrow) > max(1e-6, 0.5 * abs(wide))


def _bend(subject: Subject, given: Given, again: _Again, nudge: float) -> float:
    """Return by how much the slope to the right is larger than the one to the left."""
    left, here, right = _losses(subject, given, again.form, (-nudge, 0.0, nudge))
    return (right - 2 * here + left) / nudge


def _directed(
    trainable: Mapping[str, nn.Parameter],
) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """Yield each parameter with its part of one fixed direction: by rows, and by columns.

    The part is the product of the two, which is never made: a parameter may be large.
    """
    generator = _fixed()
    for name, parameter in trainable.items():
        count = len(parameter) if parameter.dim() > 1 else 1
        sizes = count, parameter.numel() // count if count else 0
        rows, columns = (torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes)
        yield name, parameter, rows.to(parameter), columns.to(parameter)


def _along(trainable: Mapping[str, nn.Parameter], gradients: Tensors) -> float:
    """Return the slope along the direction that gradients tell."""
    return sum(
        float(rows @ (_as_matrix(gradients[name], rows) @ columns))
        for name, _, rows, columns in _directed(trainable)
        if name in gradients
    )


def _as_matrix(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.reshape(len(rows), -1) if len(rows) else tensor.reshape(0, 0)


def _differenced(subject: Subject, given: Given, form: Form, nudge: float) -> float:
    left, right = _losses(subject, given, form, (-nudge, nudge))
    return (right - left) / (2 * nudge)


def _losses(subject: Subject, given: Given, form: Form, nudges: Sequence[float]) -> list[float]:
    """Return the loss with all parameters moved so far along the direction."""
    assert given.target is not None

    def loss(predictions: Sequence[Tensor]) -> float:
        return float(_as_trained(subject, given, predictions, form))

    return _moved_along(subject, given, nudges, loss)


@torch.no_grad()
def _moved_along(
    subject: Subject,
    given: Given,
    nudges: Sequence[float],
    measure: Callable[[Sequence[Tensor]], _Measured],
) -> list[_Measured]:
    """Measure the predictions with all parameters moved so far along the direction."""
    measured = []
    trainable = _trainable(subject)
    for nudge in nudges:
        for name, parameter, rows, columns in _directed(trainable):
            start = given.parameters[name]
            moved = torch.addr(_as_matrix(start, rows), rows, columns, alpha=nudge)
            parameter.copy_(moved.reshape(start.shape))
        _load_values(subject.module, given)
        predictions, _ = _forward(subject, given, value_of(given.calls[0].state))
        measured.append(measure(predictions))
    for name, parameter in trainable.items():
        parameter.copy_(given.parameters[name])
    return measured


def _custom_function(nodes: set[Any]) -> str:
    """Name a custom autograd function among the nodes, if there is one."""
    custom = torch.autograd.function.BackwardCFunction
    return next((type(node).__name__ for node in nodes if isinstance(node, custom)), "")


# The update, by the optimizer's own rule ----------------------------------------------------


def _updated(outcome: Outcome, module: nn.Module) -> tuple[tuple[Tensors, ...], str]:
    """Repeat the updates: the same optimizer, settings, memory and gradients.

    A single one, which is the rule, is made of the module's own parameters, to save a copy.
    """
    if any(rule.optimizer is BY_HAND for rule in outcome.rules):
        return (), "an optimizer of torch's: updates are made by hand"
    after: list[Tensors] = []
    parameters = dict(module.named_parameters())
    for rule in outcome.rules:
        try:
            single = len(outcome.rules) == 1 and rule.before.keys() == parameters.keys()
            copies = _loaded(parameters, rule) if single else _cloned(rule)
            apply_rule(rule, copies)
        except Exception as error:  # whatever a stranger's optimizer raises out of its place
            return (), f"{type(rule.optimizer).__name__} could not be repeated ({error})"
        after.append({name: p.detach() for name, p in copies.items()})
        for parameter in copies.values():
            parameter.grad = None
    return tuple(after), ""


def _cloned(rule: Rule) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in rule.before.items()}


@torch.no_grad()
def _loaded(parameters: dict[str, nn.Parameter], rule: Rule) -> dict[str, nn.Parameter]:
    for name, value in rule.before.items():
        parameters[name].copy_(value)
    return parameters


def apply_rule(
    rule: Rule, copies: Mapping[str, nn.Parameter], gradients: Tensors | None = None
) -> Optimizer:
    """Make one update of `copies` by `rule`, in place; return the optimizer that made it."""
    if wraps_another(rule.optimizer):  # whose live memory, and parameters, an update would change
        raise TypeError("it wraps another optimizer")
    if has_hooks(rule.optimizer):
        raise TypeError("hooks of its own may change what it meets and what it leaves")
    handed = rule.handed if gradients is None else gradients
    spares = type(rule.optimizer).__module__.startswith("torch.optim.")  # gradients, in its rule
    groups = []
    memory: dict[Any, Any] = {}
    for group in rule.groups:
        members = [copies[name] for name in group["params"] if name]
        for name in filter(None, group["params"]):
            grad = handed.get(name)
            copies[name].grad = grad if grad is None or spares else grad.clone()
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


def wraps_another(optimizer: Any) -> bool:
    """Tell whether an optimizer keeps another one, and so has a memory besides its own."""
    return any(isinstance(value, Optimizer) for value in vars(optimizer).values())


def has_hooks(optimizer: Any) -> bool:
    """Tell whether hooks run around the steps of this very optimizer, within what torch's see."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(vars(optimizer).get(kind) for kind in kinds)


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
