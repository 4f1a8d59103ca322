"""The slope of a chunk's loss, from its values alone, in float64: no gradient has a say in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tbptt_props.again import (
    Again,
    Form,
    as_trained,
    fixed,
    forward_again,
    load,
    load_values,
    nudged,
    pulled_back,
    run_again,
    trainable_of,
)
from tbptt_props.compare import close, near_slope, same
from tbptt_props.embeddings import EVERY, Rows, off_their_slope
from tbptt_props.forward import Forward
from tbptt_props.graph import hooked, nodes_behind
from tbptt_props.state import map_tensors, value_of
from tbptt_props.subject import Subject
from tbptt_props.surrogate import takes_anothers_gradient
from tbptt_props.trace import Given, Tensors

NUDGE = 1e-5  # central differences in float64: truncation error near NUDGE² = 1e-10
ROUNDING = 1e-15  # a few of float64's units in the last place
TOO_COARSE = "values in less than float64 are too coarse to difference"
Off = Mapping[int, set[Rows]]  # of parameters by id, which rows are left out of the direction
_Measured = TypeVar("_Measured")


def slopes_in_float64(
    subject: Subject, given: Given, again: Again
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
        load(module, wide)
        return _slopes(subject, wide, run_again(subject, wide, 0.0, again.form))
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


def _slopes(subject: Subject, given: Given, again: Again) -> tuple[float | None, float | None, str]:
    """Difference the loss along one direction, and take autograd's word for the same."""
    custom = _custom_function(again.nodes)
    if custom:
        return None, None, f"{custom} defines a gradient of its own, which need not be the slope"
    trainable = trainable_of(subject)
    assert again.loss is not None
    if any(t.dtype != torch.float64 for t in (again.loss, *again.predictions, *trainable.values())):
        return None, None, TOO_COARSE
    off = _off_the_line(again)
    if off is None:
        return None, None, "embeddings of parameters as they are, whose gradients are their slopes"
    told = _along(trainable, off, again.gradients)
    wide = _differenced(subject, given, again.form, off, NUDGE)
    if near_slope(wide, told):
        return wide, told, ""
    if not abs(wide - told) > _rounding(given, again):
        return None, None, "numbers are too large for a nudge to be told from rounding"
    # A kink within the nudge (relu, clamp) shows as two nudges that disagree with each other.
    narrow = _differenced(subject, given, again.form, off, NUDGE / 4)
    if not near_slope(wide, narrow) or _kinked(subject, given, again, off):
        return None, None, "the loss has a kink close by"
    if _hooked(subject, given):
        return None, None, "gradients that no hook of the subject's changes on their way"
    if _is_straight_through(subject, given):
        return None, None, "a forward that gives no value another one's gradient, straight through"
    if _feeds_back(subject, given):
        return None, None, "a forward that detaches nothing, be it its own predictions to feed back"
    if _kept_in_buffers(subject, given, off):
        return None, None, "a forward that keeps nothing of its parameters, as spectral norm does"
    if _stopped_in_loss(subject, given, again, off):
        return None, None, "a loss that detaches nothing itself: its gradient is not its slope"
    if _stopped_in_a_head(subject, given, again, off):
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
        load_values(subject.module, given)
        forward_again(subject, given, value_of(given.calls[0].state))
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
        load_values(subject.module, given)
        predictions, _ = forward_again(subject, given, value_of(given.calls[0].state))
    finally:
        Tensor.detach = original
    own = [p for p in predictions if p.requires_grad]
    own += [step for p in own for dim in range(min(2, p.dim())) for step in p.unbind(dim)]
    return bool(cut) and all(any(_same_numbers(one, step) for step in own) for one in cut)


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and same(one.reshape(other.shape), other)


def _is_straight_through(subject: Subject, given: Given) -> bool:
    """Tell whether forward has a value take another one's gradient, by detaching."""
    load_values(subject.module, given)
    return takes_anothers_gradient(
        lambda: forward_again(subject, given, value_of(given.calls[0].state))
    )


@torch.no_grad()
def _kept_in_buffers(subject: Subject, given: Given, off: Off) -> bool:
    """Tell whether predictions go by what forward makes of its parameters in buffers.

    No gradient goes that way, and none is due. The state is not meant, which may be a buffer.
    """
    kept = Forward(subject).kept
    ends: list[Tensors] = []

    def read(predictions: Sequence[Tensor]) -> float:
        ends.append({n: b.clone() for n, b in subject.module.named_buffers() if n not in kept})
        return 0.0

    _moved_along(subject, given, off, (-NUDGE, NUDGE), read)
    made = {name for name, value in ends[0].items() if not same(value, ends[1][name])}
    if not made:
        return False
    others = {n: nudged(b) if n in made else b for n, b in given.buffers.items()}
    outcomes = []
    for buffers in (given.buffers, others):
        changed = replace(given, buffers=buffers)
        load_values(subject.module, changed)
        predictions, _ = forward_again(subject, changed, value_of(given.calls[0].state))
        outcomes.append(predictions)
    return not all(map(same, *outcomes))


def _stopped_in_loss(subject: Subject, given: Given, again: Again, off: Off) -> bool:
    """Tell whether it is the loss that detaches, an advantage say, and not forward.

    Then the slope of the predictions, along the loss's gradient by them, is autograd's word.
    """
    assert again.loss is not None
    load_values(subject.module, given)
    again = run_again(subject, given, float(again.loss.detach()))  # in which nothing was nudged yet
    trainable = trainable_of(subject)
    through = pulled_back(again.predictions, again.direct, trainable)
    if through.keys() != again.gradients.keys() or not all(
        close(g, again.gradients[name]) for name, g in through.items()
    ):
        return False  # parameters are used in the loss itself
    told = _along(trainable, off, through)
    cotangents = [None if g is None else g.detach() for g in again.direct]

    def linear(predictions: Sequence[Tensor]) -> float:
        pairs = zip(predictions, cotangents, strict=True)
        return sum(float((p * g).sum()) for p, g in pairs if g is not None)

    left, right = _moved_along(subject, given, off, (-NUDGE, NUDGE), linear)
    return near_slope((right - left) / (2 * NUDGE), told)


def _stopped_in_a_head(subject: Subject, given: Given, again: Again, off: Off) -> bool:
    """Tell whether forward detaches for some features of its predictions, and not for others.

    A head on detached features is so on purpose: what cuts the state short cuts it for all.
    """
    assert again.loss is not None
    load_values(subject.module, given)
    predictions = run_again(subject, given, float(again.loss.detach())).predictions
    trainable = trainable_of(subject)
    count = predictions[0].shape[-1] if predictions[0].dim() > 1 else 1
    if count < 2 or any(p.dim() < 2 or p.shape[-1] != count for p in predictions):
        return False
    weights = [torch.randn(p.shape[:-1], generator=fixed()).to(p) for p in predictions]

    def sums(predictions: Sequence[Tensor]) -> Tensor:
        pairs = zip(predictions, weights, strict=True)
        return torch.stack([(p * w.unsqueeze(-1)).flatten(0, -2).sum(0) for p, w in pairs]).sum(0)

    told = [
        _along(trainable, off, pulled_back([one], [torch.ones_like(one)], trainable))
        for one in sums(predictions).unbind()
    ]
    left, right = _moved_along(subject, given, off, (-NUDGE, NUDGE), sums)
    by_values = ((right - left) / (2 * NUDGE)).tolist()
    right_ones = [near_slope(*pair) for pair in zip(by_values, told, strict=True)]
    return any(right_ones) and not all(right_ones)


def _rounding(given: Given, again: Again) -> float:
    """Return about what rounding of the loss and of nudged parameters does to a slope by values."""
    assert again.loss is not None
    sizes = sum(
        float(g.abs().flatten() @ given.parameters[name].abs().flatten())
        for name, g in again.gradients.items()
    )
    return ROUNDING * (float(again.loss.detach().abs()) + sizes) / NUDGE


def _kinked(subject: Subject, given: Given, again: Again, off: Off) -> bool:
    """Tell whether the slopes to both sides differ, and no less the closer they are taken."""
    wide, narrow = (_bend(subject, given, again, off, nudge) for nudge in (NUDGE, NUDGE / 4))
    return abs(narrow) > max(1e-6, 0.5 * abs(wide))


def _bend(subject: Subject, given: Given, again: Again, off: Off, nudge: float) -> float:
    """Return by how much the slope to the right is larger than the one to the left."""
    left, here, right = _losses(subject, given, again.form, off, (-nudge, 0.0, nudge))
    return (right - 2 * here + left) / nudge


def _off_the_line(again: Again) -> Off | None:
    """Return what of the parameters is left out of the direction: what no slope is to be told of.

    That is what an embedding gives a gradient of its own, and what forward itself writes into, as
    an embedding's `max_norm=` does: no nudge of it need come through.
    """
    found = off_their_slope(again.nodes if again.loss is None else nodes_behind([again.loss]))
    return None if found is None else {**found, **{at: {EVERY} for at in again.written}}


def _directed(
    trainable: Mapping[str, nn.Parameter], off: Off
) -> Iterator[tuple[str, nn.Parameter, Tensor, Tensor]]:
    """Yield each parameter with its part of one fixed direction: by rows, and by columns.

    The part is the product of the two, which is never made: a parameter may be large.
    """
    generator = fixed()
    for name, parameter in trainable.items():
        count = len(parameter) if parameter.dim() > 1 else 1
        sizes = count, parameter.numel() // count if count else 0
        rows, columns = (torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes)
        for left_out in off.get(id(parameter), ()):
            rows[left_out] = 0.0
        yield name, parameter, rows.to(parameter), columns.to(parameter)


def _along(trainable: Mapping[str, nn.Parameter], off: Off, gradients: Tensors) -> float:
    """Return the slope along the direction that gradients tell."""
    return sum(
        float(rows @ (_as_matrix(gradients[name], rows) @ columns))
        for name, _, rows, columns in _directed(trainable, off)
        if name in gradients
    )


def _as_matrix(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.reshape(len(rows), -1) if len(rows) else tensor.reshape(0, 0)


def _differenced(subject: Subject, given: Given, form: Form, off: Off, nudge: float) -> float:
    left, right = _losses(subject, given, form, off, (-nudge, nudge))
    return (right - left) / (2 * nudge)


def _losses(
    subject: Subject, given: Given, form: Form, off: Off, nudges: Sequence[float]
) -> list[float]:
    """Return the loss with all parameters moved so far along the direction."""
    assert given.target is not None

    def loss(predictions: Sequence[Tensor]) -> float:
        return float(as_trained(subject, given, predictions, form))

    return _moved_along(subject, given, off, nudges, loss)


@torch.no_grad()
def _moved_along(
    subject: Subject,
    given: Given,
    off: Off,
    nudges: Sequence[float],
    measure: Callable[[Sequence[Tensor]], _Measured],
) -> list[_Measured]:
    """Measure the predictions with all parameters moved so far along the direction."""
    measured = []
    trainable = trainable_of(subject)
    for nudge in nudges:
        for name, parameter, rows, columns in _directed(trainable, off):
            start = given.parameters[name]
            moved = torch.addr(_as_matrix(start, rows), rows, columns, alpha=nudge)
            parameter.copy_(moved.reshape(start.shape))
        load_values(subject.module, given)
        predictions, _ = forward_again(subject, given, value_of(given.calls[0].state))
        measured.append(measure(predictions))
    for name, parameter in trainable.items():
        parameter.copy_(given.parameters[name])
    return measured


def _custom_function(nodes: set[Any]) -> str:
    """Name a custom autograd function among the nodes, if there is one."""
    custom = torch.autograd.function.BackwardCFunction
    return next((type(node).__name__ for node in nodes if isinstance(node, custom)), "")
