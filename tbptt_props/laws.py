"""Three black-box laws: what obeys them on all inputs, and makes each chunk's update, is TBPTT.

One chunk is one ordinary update. A run is the run of its second part, from what its first part
left. A batch knows nothing of the one before but parameters, buffers and the optimizer's memory.
The first is held against plain autograd; the other two hold the subject against itself, in fresh
objects and at equal shapes, so that they need no tolerance.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tbptt_props.again import put_buffer
from tbptt_props.attributes import plain_attributes
from tbptt_props.batch import Batch
from tbptt_props.case import Case
from tbptt_props.compare import (
    clipped,
    close,
    is_clipped,
    rounded_to,
    same,
    same_leaves,
    worst,
)
from tbptt_props.contract import Contract
from tbptt_props.device import repeats_itself
from tbptt_props.forward import Arguments, Forward
from tbptt_props.layout import joined, lies_across
from tbptt_props.optimizers import rates_of
from tbptt_props.places import span_of
from tbptt_props.precision import SKIPPED, overflowed, rounding
from tbptt_props.process import Watchdog, randomness, set_randomness
from tbptt_props.rederivation import rederive
from tbptt_props.rules import apply_rule, wraps_another
from tbptt_props.state import leaves, map_tensors, same_layout, value_of
from tbptt_props.subject import Subject, resolve
from tbptt_props.trace import (
    CHAINED,
    HOOKED,
    LOSS_DRAWS,
    REWORKED,
    RUN_AGAIN,
    RUN_FOR_EACH,
    Chunk,
    Ending,
    Rerun,
    Rule,
    Span,
    Tensors,
    time_dimension,
)
from tbptt_props.train import train
from tbptt_props.watch import Training, Watch

Fresh = Callable[[], Subject]
Counts = Mapping[int | str, Any]  # arguments that may count, by position or name
LATEST = 4  # boundaries at which a run may be resumed


@dataclass(frozen=True)
class Checkpoint:
    """All that a run may hand on at one moment, as data."""

    batch: int
    start: int  # the time step at which to go on
    parameters: Tensors
    buffers: Tensors
    attributes: Mapping[str, Mapping[str, Any]]
    trainable: frozenset[str]  # parameters that want a gradient as the batch begins
    graded: frozenset[str]  # parameters that have a gradient, be it zero
    memory: tuple[Any, ...]  # state of each optimizer
    schedules: tuple[Any, ...]
    randomness: Any
    updates: int
    state: Any = None
    handed: bool = False
    filled: bool = False  # forward fills the state that it is handed in place
    layout: Any = None  # of the inputs with which to go on
    x: Any = None  # those inputs
    others: Any = None  # the other arguments of the call that goes on
    counts: Sequence[Counts] = ()  # those of them that count, of the batch's calls after that one
    one_each: bool = False  # whether there is a target for each sequence, be it T numbers long
    thorough: bool = False  # whether what the loop itself sets anew is overridden by that call
    kept: Mapping[str, Any] = field(default_factory=dict)  # tensors in attributes, all batch long
    before_hooks: Checkpoint | None = None  # the same before the module's own hooks draw, say


@dataclass
class Bookmarks:
    """Where in a run to leave a checkpoint, and the checkpoints left there."""

    plan: Sequence[Sequence[Span]]
    case: Case
    contract: Contract = field(default_factory=Contract)
    boundary: Checkpoint | None = None
    counts: list[Counts] = field(default_factory=list)  # of the batch's calls after the boundary
    began: Mapping[str, Any] | None = None  # tensors in attributes at the batch's first call
    reset: Checkpoint | None = None
    before_hooks: Checkpoint | None = None  # that of the module, as the batch begins
    trainable: frozenset[str] = frozenset()  # as the batch under way began
    loss: float | None = None  # of the chunk that goes on from the boundary
    predictions: tuple[Tensor | None, ...] = ()  # and what it is the loss of
    slopes: tuple[Tensor | None, ...] = ()  # its gradient by these
    where: tuple[int, int] | None = field(init=False)  # batch and time step of the boundary

    def __post_init__(self) -> None:
        """Choose the boundary: one of the last few of the last batch that has one.

        The last few, because the second run costs what it trains; and what an earlier chunk left
        behind that it should not have is still there.
        """
        self.where = None
        for batch in range(len(self.plan) - 1, -1, -1):
            starts = self._starts(self.plan[batch])[-LATEST:]
            if starts:
                self.where = (batch, starts[self.case.seed % len(starts)])
                return

    def _starts(self, plan: Sequence[Span]) -> list[int]:
        """Return where chunks start that come right after an update: nothing is left over there."""
        return [
            start
            for index, (start, _) in enumerate(plan)
            if index
            and self.contract.updates_after(index - 1, len(plan))
            and self._is_planned_alike(plan, index)
        ]

    def _is_planned_alike(self, plan: Sequence[Span], index: int) -> bool:
        """Tell whether the rest of a sequence is due to be trained on alike, taken by itself."""
        if self.contract.weight != "sum":
            return False  # by shares of the whole sequence
        if not callable(self.contract.lengths):
            return True
        start = plan[index][0]
        rest = tuple((first - start, stop - start) for first, stop in plan[index:])
        return self.contract.plan(self.case, rest[-1][1]) == rest

    def watch(self, watch: Watch) -> None:
        """Leave the checkpoints while `watch` is on."""
        watch.before_call = self._before_call
        watch.before_batch = self._before_batch
        watch.before_hooks = self._before_hooks
        watch.keeps_first = len(self.plan) == 1 and len(self.plan[0]) == 1

    def _before_call(self, watch: Watch, places: Tensor | None, arguments: Arguments) -> None:
        if self.where is None or watch.underway.index != self.where[0]:
            return
        if self.boundary:
            self.counts.append(_counts(arguments))
            return
        if self.began is None:
            self.began = _tensors_kept(watch)
        if watch.open:
            return
        span = span_of(places)
        if places is None or span is None or span[0] != self.where[1]:
            return
        state = _left(watch, places, arguments.state)
        left = _checkpoint(watch, self.where[1], state, arguments.has_state)
        x, others = value_of((arguments.x, arguments.others))
        now = {name: leaves(value) for name, value in _tensors_kept(watch).items()}
        kept = {n: v for n, v in self.began.items() if n in now and same_leaves(leaves(v), now[n])}
        left = replace(left, trainable=self.trainable, kept=kept)
        self.boundary = replace(left, layout=_layout(arguments.x), x=x, others=others)

    def ended(self, chunk: Chunk) -> None:
        """Note what came of the chunk that goes on from the boundary."""
        assert chunk.given is not None
        assert chunk.outcome is not None
        if self.loss is None and chunk.span and (chunk.batch, chunk.span[0]) == self.where:
            self.loss = chunk.outcome.loss
            self.predictions = tuple(call.prediction for call in chunk.given.calls)
            self.slopes = chunk.outcome.cotangents

    def _before_hooks(self, watch: Watch, index: int) -> None:
        if 0 < index == len(self.plan) - 1:
            self.before_hooks = _checkpoint(watch, 0)

    def _before_batch(self, watch: Watch) -> None:
        self.trainable = _trainable(watch.module)
        if 0 < watch.underway.index == len(self.plan) - 1:
            self.reset = replace(_checkpoint(watch, 0), before_hooks=self.before_hooks)


def _checkpoint(watch: Watch, start: int, state: Any = None, handed: bool = False) -> Checkpoint:
    parameters = dict(watch.module.named_parameters())
    return Checkpoint(
        batch=watch.underway.index,
        start=start,
        parameters={
            name: _shared(watch.parameters.known.get(name), parameter)
            for name, parameter in parameters.items()
        },
        buffers={name: b.detach().clone() for name, b in watch.module.named_buffers()},
        attributes=_numbers_and_text(watch.module),
        trainable=_trainable(watch.module),
        graded=frozenset(
            n for n, p in parameters.items() if p.grad is not None and not p.grad.is_sparse
        ),
        memory=tuple(_copied(o.state_dict()) for o in watch.training.optimizers),
        schedules=tuple(_copied(s.state_dict()) for s in watch.training.schedulers),
        randomness=randomness(),
        updates=watch.training.updates() if watch.training.updates else 0,
        state=map_tensors(same_layout, state),
        handed=handed,
        filled=watch.forward.fills,
    )


def _copied(remembered: Any) -> Any:
    """Copy what an optimizer or a scheduler remembers, be there a loss with its graph in it."""
    attached = [leaf for leaf in leaves(remembered).values() if not leaf.is_leaf]
    return copy.deepcopy(remembered, {id(leaf): leaf.detach().clone() for leaf in attached})


def _trainable(module: nn.Module) -> frozenset[str]:
    return frozenset(n for n, p in module.named_parameters() if p.requires_grad)


def _layout(x: Any) -> Any:
    """Return how inputs lie in memory, on which the order of a kernel's sums may depend."""
    return [leaf.stride() for leaf in leaves(x).values()]


def _left(watch: Watch, places: Tensor, handed: Any) -> Any:
    """Return the state that the first part of a run left: the one that is handed on, if it may be.

    Where it is another one, what the first part's forward returned is due in its place.
    """
    found = leaves(handed)
    flagged = watch.subject.contract.carry == "flagged"  # then it may start afresh anywhere
    ended = [] if flagged else watch.ended_in(places)
    if any(same_leaves(found, leaves(state)) for state in ended):
        return handed
    due = leaves(ended[-1]) if ended else {}
    alike = [leaf.shape for leaf in found.values()] == [leaf.shape for leaf in due.values()]
    return ended[-1] if due and (alike or not found) else handed


def _shared(known: Tensor | None, parameter: Tensor) -> Tensor:
    """Take a copy that exists already, if it is one: parameters are large."""
    if known is not None and same(parameter, known):
        return known
    return parameter.detach().clone()


def _numbers_and_text(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return counters and settings; tensors are what a run must not smuggle on."""
    return {
        part: {k: v for k, v in attributes.items() if isinstance(v, (bool, int, float, str))}
        for part, attributes in plain_attributes(module).items()
    }


def _public(attributes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave private attributes out."""
    return {
        part: {key: value for key, value in held.items() if not key.startswith("_")}
        for part, held in attributes.items()
    }


def _tensors_kept(watch: Watch) -> dict[str, Any]:
    """Copy what a module and its parts keep in attributes: tensors that have no gradient."""
    buffers = dict(watch.module.named_buffers())
    kept = {name: v for name, v in watch.forward.candidates().items() if name not in buffers}
    graphs = {
        name
        for name in kept
        for leaf in leaves(resolve(watch.module, name)).values()
        if leaf.requires_grad
    }
    return {name: value for name, value in kept.items() if leaves(value) and name not in graphs}


def ending(
    module: nn.Module, training: Training, state: Any, rates: Sequence[float] = ()
) -> Ending:
    """Write down what a run left, without a copy: nobody trains on."""
    names = {id(p): name for name, p in module.named_parameters()}
    memory: dict[str, Tensor] = {}
    for i, optimizer in enumerate(training.optimizers):
        for parameter, remembered in optimizer.state.items():
            prefix = f"{type(optimizer).__name__}[{i}].{names.get(id(parameter), '?')}"
            memory.update(leaves(remembered, prefix))
    return Ending(
        parameters=_detached(dict(module.named_parameters())),
        buffers=_detached(dict(module.named_buffers())),
        memory=_detached(memory),
        state=_detached(leaves(state)),
        rates={"lr": torch.tensor(rates)},
    )


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


# A run against the run of its second part -----------------------------------------------------


def resumed(
    fresh: Callable[[], Subject],
    batches: Sequence[Batch],
    marks: Bookmarks,
    first: Ending,
    watch: Watch,
) -> Rerun:
    """Run on from a boundary in fresh objects."""
    if marks.where is None:
        return Rerun("", missing=_NO_BOUNDARY[watch.subject.contract.adds_up])
    batch, start = marks.where
    where = f"{f'batch {batch}, ' if batch else ''}from time step {start} on"
    if watch.subject.contract.carry == "custom" or watch.subject.contract.context:
        return Rerun(where, missing="a contract by which a chunk starts where the one before ended")
    if any(chunk.reworked for chunk in watch.closed):
        return Rerun(where, missing=REWORKED)
    if any(chunk.turns for chunk in watch.closed):
        return Rerun(where, missing="calls of forward that run all sequences of the batch")
    unknown = _unknown_memory(watch)
    if unknown:
        return Rerun(where, missing=unknown)
    if len({trained for i, trained in watch.trained if i == batch}) > 1:
        # Optimizers take turns, by a count of the loop's own.
        return Rerun(where, missing="chunks that all train the same parameters")
    if marks.boundary is None:
        if any(chunk.span is None for chunk in watch.closed):
            return Rerun(where, missing="inputs of forward are not the batch's own")
        padding = batches[batch].padding
        if all((sequence, start) in padding for sequence in range(len(batches[batch].inputs))):
            return Rerun(where, missing="a boundary at which some sequence goes on")
        return Rerun(where, problem="no chunk starts there", due="one to go on with")
    left = replace(marks.boundary, one_each=watch.closing.one_each, counts=marks.counts)
    heard = _Heard()
    rerun = _rerun(fresh, batches, left, first, where, heard)
    if not _alike(rerun) and any(chunk.alternates for chunk in watch.closed):
        return Rerun(where, missing=RUN_FOR_EACH)
    if not _alike(rerun) and any(chunk.copies for chunk in watch.closed):
        return Rerun(where, missing=RUN_AGAIN)
    if not _alike(rerun) and any(chunk.followed for chunk in watch.closed):
        return Rerun(where, missing=_OWN_INPUTS)  # drawn by the loop, or made of a whole sequence
    if not _alike(rerun) and watch.subject.loss is None and heard.is_another_loss(marks):
        return Rerun(where, missing=_OWN_LOSS)  # of the state that came in, say
    return rerun


@dataclass
class _Heard:
    """What a run predicted, the loss's gradient by it, and the losses it had, in their order."""

    predictions: list[Tensor] = field(default_factory=list)
    slopes: dict[int, Tensor] = field(default_factory=dict)  # by the prediction's index
    losses: list[float] = field(default_factory=list)

    def predicted(self, prediction: Any) -> None:
        """Note what a call of forward predicts, and be told of the gradient by it."""
        pair = joined(prediction)
        if pair is None:
            return
        if isinstance(prediction, Tensor) and prediction.requires_grad:
            take = functools.partial(self._take, len(self.predictions))
            prediction.register_hook(take)  # type: ignore[no-untyped-call]
        self.predictions.append(pair[0].detach().clone())

    def _take(self, index: int, slope: Tensor) -> None:
        before = self.slopes.get(index)
        self.slopes[index] = slope.detach().clone() if before is None else before + slope.detach()

    def is_another_loss(self, marks: Bookmarks) -> bool:
        """Tell whether the first chunk is predicted alike, and has another loss nevertheless."""
        count = len(marks.predictions)
        alike = 0 < count <= len(self.predictions) and all(
            one is not None and same(other, one)
            for one, other in zip(marks.predictions, self.predictions, strict=False)
        )
        slopes = [(self.slopes.get(i), slope) for i, slope in enumerate(marks.slopes)]
        sloped = all(a is None or b is None or same(a, b) for a, b in slopes)
        told = [total for total in accumulate(self.losses) if total == marks.loss]
        return alike and bool(self.losses) and not (told and sloped)


def _unknown_memory(watch: Watch) -> str:
    """Say why not all is known that updates go by; '' where it is."""
    if any(map(wraps_another, watch.training.optimizers)):
        return "optimizers that keep all their memory as torch's do: one wraps another"
    if not watch.by_hand:
        return "" if watch.training.optimizers else "the optimizers are not known before training"
    if watch.subject.contract.adds_up or not watch.rate.steady:
        return "updates by hand that are one multiple of the gradient: others may remember more"
    return ""


_OWN_INPUTS = "inputs of forward that are the batch's own"
_IN_ORDER = "sequences in the same order in the second run, which sorts or shuffles them"
_OWN_LOSS = "a loss of predictions and targets: it goes by something that the loop keeps itself"
_CONTEXT = "arguments of forward that the loop makes of no more than the chunk's own inputs"
_OWN_UPDATES = "a contract by which a batch has its updates for itself"
_NO_BOUNDARY = {
    False: "a case of at least two chunks",
    True: "a case with a boundary right after an update",
}


def alone(
    fresh: Callable[[], Subject],
    batches: Sequence[Batch],
    marks: Bookmarks,
    first: Ending,
    watch: Watch,
) -> Rerun:
    """Run the last batch in fresh objects."""
    where = f"batch {len(batches) - 1}"
    if len(batches) < 2:
        return Rerun(where, missing="a case of at least two batches")
    if not watch.subject.contract.planned:
        return Rerun(where, missing="lengths of chunks that are known before")
    if watch.subject.contract.carry != "within":
        return Rerun(where, missing="a contract by which each batch starts afresh")
    if not watch.subject.contract.alone:
        return Rerun(where, missing=_OWN_UPDATES)
    unknown = _unknown_memory(watch)
    if unknown:
        return Rerun(where, missing=unknown)
    if marks.reset is None:
        return Rerun(where, missing="training did not get to the last batch")
    return _rerun(fresh, batches, marks.reset, first, where)


def _rerun(
    fresh: Callable[[], Subject],
    batches: Sequence[Batch],
    left: Checkpoint,
    first: Ending,
    where: str,
    heard: _Heard | None = None,
) -> Rerun:
    # A view has the strides that the chunks of the first run had, and kernels may sum in another
    # order for others; but a loop may be unable to take a view, or copy it first. Either will do.
    cut = _cut(batches, left, lambda part: part)
    if cut is None:
        return Rerun(where, missing=_UNCLEAR)
    rerun = _gone_on(fresh(), cut, left, first, where, heard)
    if left.start and not _alike(rerun):
        contiguous = _cut(batches, left, torch.Tensor.contiguous)
        # Nor may a loop know that it goes on: it tells forward to start, and counts from zero.
        rerun = _gone_on(fresh(), contiguous or cut, left, first, where)
        if not _alike(rerun):
            rerun = _thoroughly(fresh, batches, left, first, where) or rerun
    public = _public(left.attributes)
    if not _alike(rerun) and public != left.attributes:
        # A private number may belong to a list that starts empty, or be where a loop is by now.
        anew = _cut(batches, left, lambda part: part) or cut
        again = _gone_on(fresh(), anew, replace(left, attributes=public), first, where)
        rerun = again if _alike(again) else rerun
    if not _alike(rerun) and not _at_the_same_rates(rerun):
        return Rerun(where, missing="learning rates that no count of the loop's own goes into")
    if not left.start or _alike(rerun):
        return rerun
    shorter = (_cut(batches, left, lambda part: part) or cut)[left.batch].lengths_cut(left.start)
    if shorter is None:
        return rerun
    cut[left.batch] = shorter
    again = _gone_on(fresh(), cut, left, first, where)
    return again if _alike(again) else Rerun(where, missing=_UNCLEAR)


def _thoroughly(
    fresh: Fresh, batches: Sequence[Batch], left: Checkpoint, first: Ending, where: str
) -> Rerun | None:
    """Go on with what the loop itself sets anew overridden: at last, what it draws once a batch."""
    for kept in ({}, left.kept) if left.kept else ({},):
        cut = _cut(batches, left, lambda part: part)
        assert cut is not None  # it could be cut before
        again = _gone_on(fresh(), cut, replace(left, thorough=True, kept=kept), first, where)
        if _alike(again):
            return again
    return None


_UNCLEAR = "batches of which it is clear how to cut them along time"


def _cut(
    batches: Sequence[Batch], left: Checkpoint, change: Callable[[Tensor], Tensor]
) -> list[Batch] | None:
    copies: list[Batch | None] = [batch.copied() for batch in batches]
    whole = copies[left.batch]
    if left.start and whole is not None:
        copies[left.batch] = whole.cut(left.start, change, one_each=left.one_each)
    cut = [batch for batch in copies if batch is not None]
    return cut if len(cut) == len(batches) else None


def _gone_on(
    subject: Subject,
    batches: Sequence[Batch],
    left: Checkpoint,
    first: Ending,
    where: str,
    heard: _Heard | None = None,
) -> Rerun:
    longest = max(b.inputs.shape[1] for b in batches)
    going_on = _GoingOn(subject, left, heard or _Heard(), longest=longest)
    wholes = [batch.whole for batch in batches]
    with (
        going_on.forward.replaced(going_on.called),
        going_on.noting_rates(),
        going_on.noting_losses(),
    ):
        error = going_on.watchdog.over(lambda: train(subject, wholes, going_on, skip=left.batch))
    if going_on.missing:
        return Rerun(where, missing=going_on.missing)
    if error is not None:
        return Rerun(where, problem=f"the fresh run raised {type(error).__name__}: {error}")
    if left.start and _is_reordered(going_on.x, left.x):
        return Rerun(where, missing=_IN_ORDER)  # the state that it went on from is in another
    made_anew = left.start and not _same_context(going_on.others, left.others)
    second = ending(subject.module, going_on.training, going_on.state, going_on.rates)
    bitwise = going_on.layout == left.layout and repeats_itself(subject.device)
    rerun = Rerun(where, first, second, bitwise=bitwise)
    return Rerun(where, missing=_CONTEXT) if made_anew and not _alike(rerun) else rerun


def _is_reordered(found: Any, due: Any) -> bool:
    """Tell whether inputs are those that are due, with the sequences in another order."""
    if not isinstance(found, Tensor) or not isinstance(due, Tensor) or found.shape != due.shape:
        return False
    if same(found, due):
        return False
    return any(
        sorted(_rows(found, dim)) == sorted(_rows(due, dim)) for dim in range(min(2, due.dim()))
    )


def _same_context(found: Any, due: Any) -> bool:
    """Tell whether further arguments have the numbers that are due; flags may be otherwise."""
    ones, others = leaves(found), leaves(due)
    return ones.keys() != others.keys() or all(
        same(ones[path], leaf) for path, leaf in others.items() if leaf.is_floating_point()
    )


def _counts(arguments: Arguments) -> Counts:
    """Return the arguments that may count time steps, or chunks: numbers, and tensors of integers.

    A flag counts nothing, and may tell forward to start afresh.
    """
    rest, named = arguments.others
    every: list[tuple[int | str, Any]] = [*enumerate(rest), *named.items()]
    return {place: value_of(value) for place, value in every if _may_count(value)}


def _may_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _counted_on(arguments: Arguments, due: Counts) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the further arguments of a call, counted from where the first run's were."""

    def counted(place: int | str, value: Any) -> Any:
        return due[place] if place in due and _is_a_shift(value, due[place]) else value

    rest, named = arguments.others
    return (
        tuple(counted(place, value) for place, value in enumerate(rest)),
        {name: counted(name, value) for name, value in named.items()},
    )


def _is_a_shift(found: Any, due: Any) -> bool:
    """Tell whether both may count, each of their numbers by as much as the others."""
    if not isinstance(found, Tensor) or not isinstance(due, Tensor):
        return _may_count(found) and type(found) is type(due)
    alike = _may_count(found) and (found.dtype, found.shape) == (due.dtype, due.shape)
    return alike and found.numel() > 0 and bool((due - found == (due - found).flatten()[0]).all())


def _rows(x: Tensor, dim: int) -> list[list[float]]:
    return [row.flatten().tolist() for row in x.unbind(dim)]


def _alike(rerun: Rerun) -> bool:
    if rerun.first is None or rerun.second is None:
        return False
    parts = ("parameters", "buffers", "memory", "state")
    pairs = [(getattr(rerun.first, part), getattr(rerun.second, part)) for part in parts]
    return all(
        one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
        for one, other in pairs
    )


def _at_the_same_rates(rerun: Rerun) -> bool:
    """Tell whether the updates of a second run had the learning rates of those it repeats."""
    if rerun.first is None or rerun.second is None:
        return True
    rates = rerun.second.rates["lr"]
    return torch.equal(rerun.first.rates["lr"][-len(rates) :] if len(rates) else rates, rates)


class _GoingOn:
    """Starts a fresh run from a checkpoint."""

    def __init__(self, subject: Subject, left: Checkpoint, heard: _Heard, *, longest: int) -> None:
        self.subject = subject
        self.heard = heard
        self.module = subject.module
        self.forward = Forward(subject)
        self.forward.fills = left.filled
        self.left = left
        self.training = Training()
        self.loaded = False
        self.over = False  # the batch that it starts in
        self.entered: dict[str, Tensor] | None = None
        self.counts = iter(left.counts)
        self.layout: Any = None
        self.x: Any = None
        self.others: Any = None
        self.state: Any = None
        self.rates: list[float] = []
        self.missing = ""
        self.watchdog = Watchdog(subject.patience, longest=longest)

    @contextlib.contextmanager
    def noting_rates(self) -> Iterator[None]:
        """Note the learning rate of each update within the block."""

        def note(optimizer: Any, *called: Any) -> None:
            if any(optimizer is known for known in self.training.optimizers):
                self.rates += rates_of(optimizer)

        noting = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            noting.remove()

    @contextlib.contextmanager
    def noting_losses(self) -> Iterator[None]:
        """Note the loss of each backward within the block."""
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            self.heard.losses.append(sum(float(root.detach().sum()) for root in roots))
            original(tensors, *args, **kwargs)

        torch.autograd.backward = backward
        try:
            yield
        finally:
            torch.autograd.backward = original

    def training_begun(self, training: Training) -> None:
        self.training = training

    def hooks_come(self, index: int) -> None:
        if index == self.left.batch and self.left.before_hooks is not None:
            self._load(self.left.before_hooks)

    def batch_started(self, index: int, batch: Any) -> None:
        self.watchdog.turned()
        self.state = None
        self.over = self.loaded
        if not self.loaded:
            self.loaded = True
            self._load(self.left)

    def batch_ended(self, index: int) -> None:
        """Nothing to note."""

    def backward_announced(self, loss: Tensor) -> None:
        """Nothing to note."""

    @torch.no_grad()
    def _load(self, left: Checkpoint) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.copy_(left.parameters[name])
            parameter.requires_grad_(name in left.trainable)
            parameter.grad = torch.zeros_like(parameter) if name in left.graded else None
        self._set_buffers(left)
        self._set_attributes(left)
        self._remind(left)
        self.training.set_updates(left.updates)
        set_randomness(left.randomness)

    def _remind(self, left: Checkpoint) -> None:
        """Have optimizers and schedulers remember what those of the first run did."""
        try:
            for optimizer, memory in zip(self.training.optimizers, left.memory, strict=True):
                optimizer.load_state_dict(copy.deepcopy(memory))
            for scheduler, kept in zip(self.training.schedulers, left.schedules, strict=True):
                scheduler.load_state_dict(copy.deepcopy(kept))
        except ValueError as error:  # parameters were added to them while they trained
            self.missing = f"optimizers that are in the end what they were at first ({error})"
            raise

    @torch.no_grad()
    def _set_buffers(self, left: Checkpoint) -> None:
        for name, buffer in self.module.named_buffers():
            if name in left.buffers:
                put_buffer(self.module, name, buffer, left.buffers[name])

    def _set_attributes(self, left: Checkpoint) -> None:
        for name, part in self.module.named_modules():
            vars(part).update(left.attributes.get(name, {}))

    def _set_rates(self) -> None:
        """Set learning rates and the like to what they were when the call came."""
        for optimizer, memory in zip(self.training.optimizers, self.left.memory, strict=True):
            for group, then in zip(optimizer.param_groups, memory["param_groups"], strict=True):
                group.update({name: value for name, value in then.items() if name != "params"})

    def _starts(self, arguments: Arguments) -> bool:
        """Tell whether a call is the first one, or a closure's repetition of it."""
        if not self.left.start or self.over:
            return False
        handed = leaves((arguments.x, arguments.state))
        if self.entered is None:
            self.layout = _layout(arguments.x)
            self.x, self.others = value_of((arguments.x, arguments.others))
            if self.left.thorough:
                self._set_buffers(self.left)
                self._set_attributes(self.left)
                self.forward.put_back(self.left.kept)
                self._set_rates()
            self.entered = {path: leaf.detach().clone() for path, leaf in handed.items()}
            set_randomness(self.left.randomness)
        again = handed.keys() == self.entered.keys() and all(
            same(leaf.detach(), self.entered[path]) for path, leaf in handed.items()
        )
        return again and self.left.handed

    def called(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run forward, the first time from the checkpoint's state."""
        if not torch.is_grad_enabled() or not self.module.training:
            return original(*args, **kwargs)
        arguments = self.forward.arguments(args, kwargs)
        self.watchdog.called(arguments.x)
        going_on = self.entered is not None and not self.over
        due = next(self.counts, {}) if going_on else {}
        if self._starts(arguments):
            if self.left.thorough:
                arguments = replace(arguments, others=value_of(self.left.others))
            arguments = replace(arguments, state=map_tensors(same_layout, self.left.state))
            args, kwargs = self.forward.put(arguments, arguments.state)
        elif self.left.thorough and due:
            arguments = replace(arguments, others=_counted_on(arguments, due))
            args, kwargs = self.forward.handed_over(arguments)
        returned = original(*args, **kwargs)
        found = self.forward.came_out(returned, arguments)
        if found is not None:
            self.state = value_of(found[1])
            self.heard.predicted(found[0])
        return returned


# One chunk against one ordinary update --------------------------------------------------------


def one_chunk(
    fresh: Callable[[], Subject],
    batches: Sequence[Batch],
    marks: Bookmarks,
    first: Ending,
    watch: Watch,
) -> Rerun:
    """Make one ordinary update on a whole batch, which is due where the plan is a single chunk."""
    where = "the whole sequence"
    if not _is_one_chunk(marks, watch):
        return Rerun(where, missing="a case of one batch and one chunk")
    if watch.subject.loss is None:
        return Rerun(where, missing="a loss")
    chunk = watch.first
    if chunk is None or chunk.given is None or chunk.outcome is None or chunk.span is None:
        return Rerun(where, missing="no chunk of the batch's own was observed")
    met = chunk.outcome.rules
    rules = [_as_set(rule, met) for rule in watch.initial_rules] or list(met)
    if watch.by_hand:
        return Rerun(where, missing="an optimizer of torch's: updates are made by hand")
    if not rules:
        return Rerun(where, missing="the optimizers are not known")
    contract = watch.subject.contract
    if not contract.alone:
        return Rerun(where, missing=_OWN_UPDATES)
    if overflowed(chunk):
        return Rerun(where, missing=SKIPPED)
    if chunk.evaluations > 1:
        return Rerun(where, missing="an update by gradients of a single evaluation")
    if chunk.outcome.chained:
        return Rerun(where, missing=CHAINED)
    if any(run.alternates for run in watch.closed):
        return Rerun(where, missing=RUN_FOR_EACH)
    if chunk.followed:
        return Rerun(where, missing=_OWN_INPUTS)
    if chunk.padded:
        return Rerun(where, missing="inputs of forward that are the batch's own, without padding")
    stop = marks.plan[0][0][1]  # without what is left out
    whole = batches[0].copied().cut(0, stop=stop, one_each=watch.closing.one_each)
    if whole is None:
        return Rerun(where, missing=_UNCLEAR)
    of_whole = _of_whole(whole, chunk, one_each=watch.closing.one_each)
    due = rederive(fresh(), of_whole, slope=False, mixing=False)
    if due.missing or due.loss is None:
        unknown = "targets of which it is clear how they are laid out"
        return Rerun(where, missing=due.missing or (LOSS_DRAWS if due.loss_draws else unknown))
    if due.hooked:
        return Rerun(where, missing=HOOKED)
    beside = {n: g for n, g in chunk.outcome.gradients.items() if n in chunk.outcome.besides}
    of_loss = {**due.gradients, **beside}  # a probe's loss, say, is for the loop to know
    gradients = _up_to_rounding(chunk, of_loss)
    if gradients is None and not contract.clips:
        return Rerun(where, missing="gradients are clipped, and the contract does not say how")
    if contract.clips and chunk.given.autocast == torch.float16:
        return Rerun(where, missing="a precision without a scaler: it scales what is clipped")
    try:
        second = _ordinary(chunk, gradients or of_loss, due.state, rules, contract)
    except Exception as error:  # whatever a stranger's optimizer raises out of its place
        return Rerun(where, missing=f"one update could not be made ({error})")
    # Of an optimizer that is not known from outside, no memory is known at the end either.
    known = second if watch.training.optimizers else replace(second, memory={})
    return Rerun(where, first, known)


def _met_by(rule: Rule, chunk: Chunk) -> Tensors | None:
    """Return the gradients that an optimizer's update of the chunk met."""
    assert chunk.outcome is not None
    met = (r.handed for r in chunk.outcome.rules if r.optimizer is rule.optimizer)
    return next(met, None)


def _up_to_rounding(chunk: Chunk, due: Tensors) -> Tensors | None:
    """Take the gradients that were found for those that are due, where they are close to them.

    An update may make much of what was rounded. A scaler may have scaled them up for backward, and
    down again. Zeros that were not found are no gradient: of a prediction that the loss leaves out.
    None where they were clipped on their way.
    """
    given, outcome, span = chunk.given, chunk.outcome, chunk.span
    assert given is not None
    assert outcome is not None
    assert span is not None
    handed = {name: g for rule in outcome.rules for name, g in rule.handed.items()}
    with rounded_to(rounding(given.autocast), span[1] - span[0]):
        scaled = bool(handed) and not any(worst(handed, {n: due[n] for n in handed if n in due}))
        found = handed if scaled else outcome.gradients
        near = {
            n: found[n] if n in found and close(found[n], g) else g
            for n, g in due.items()
            if n in found or bool(g.any())
        }
    if not scaled and any(is_clipped(outcome.gradients, rule.handed) for rule in outcome.rules):
        return None
    return near


def _as_set(rule: Rule, met: Sequence[Rule]) -> Rule:
    """Return the rule with the settings that its update met: a loop may warm a rate up."""
    settings = (later.groups for later in met if later.optimizer is rule.optimizer)
    return replace(rule, groups=next(settings, rule.groups))


def _is_one_chunk(marks: Bookmarks, watch: Watch) -> bool:
    """Tell whether a single chunk was due: where lengths are drawn, it may have been several."""
    if [len(plan) for plan in marks.plan] != [1] or marks.plan[0][0][0]:
        return False
    return watch.subject.contract.planned or len(watch.closed) == 1


def _of_whole(batch: Batch, chunk: Chunk, *, one_each: bool) -> Chunk:
    """Return `chunk` as it would be if it had been the whole batch, laid out as its inputs were."""
    given, outcome = chunk.given, chunk.outcome
    assert given is not None
    assert outcome is not None
    called = given.calls[0].x
    if len(given.calls) == 1 and isinstance(called, Tensor):
        swapped = time_dimension(chunk) == 0
        x, target = _in_rows(chunk.lanes, batch)
        if called.dim() < x.dim() and x.shape[1] == 1:  # forward takes one time step, without time
            x, target = _laid_out(lambda t: t[:, 0], x, target)
        elif x.dim() == 2 and called.dim() == 3 and called.shape[-1] == 1:  # as a single feature
            x = (x.transpose(0, 1) if swapped else x).unsqueeze(-1)
            target = (
                _laid_out(lambda t: t.transpose(0, 1), batch.inputs, target)[1]
                if swapped
                else target
            )
        elif swapped:
            x, target = _laid_out(lambda t: t.transpose(0, 1), x, target)
        if lies_across(given.calls[0].prediction, x.shape):
            target = _laid_out(lambda t: t.transpose(0, 1), x, target)[1]
        calls = (replace(given.calls[0], x=x),)
        given = replace(given, calls=calls, target=given.target if one_each else target)
    return replace(chunk, given=given, outcome=replace(outcome, cotangents=(), rules=()))


def _in_rows(lanes: Sequence[int], batch: Batch) -> tuple[Tensor, Any]:
    """Return inputs and targets, with the sequences in the order in which the loop put them."""
    count = len(batch.inputs)
    if [*lanes] == [*range(count)] or sorted(lanes) != [*range(count)]:
        return batch.inputs, batch.targets
    rows = [*lanes]
    targets = map_tensors(lambda t: t[rows] if t.shape[:1] == (count,) else t, batch.targets)
    return batch.inputs[rows], targets


def _laid_out(change: Callable[[Tensor], Tensor], x: Tensor, target: Any) -> tuple[Tensor, Any]:
    """Change inputs (B, T, ...) and what of the targets has time steps as well."""
    return change(x), map_tensors(lambda t: change(t) if t.shape[:2] == x.shape[:2] else t, target)


def _met_by_the_update(chunk: Chunk) -> Tensors:
    """Return the parameters as forward left them, which itself may hold rows of some short."""
    assert chunk.given is not None
    assert chunk.outcome is not None
    rules = chunk.outcome.rules
    return rules[0].before if rules and not chunk.outcome.moved else chunk.given.parameters


def _ordinary(
    chunk: Chunk, gradients: Tensors, state: Any, rules: Sequence[Rule], contract: Contract
) -> Ending:
    assert chunk.given is not None
    assert chunk.outcome is not None
    # Not judged: parameters that no optimizer owns or that are frozen, and those that a learned
    # initial state or a context comes from, for their gradient takes a way that is the loop's own,
    # as does that of a loss besides, on what is detached.
    owned = {name for rule in rules for group in rule.groups for name in group["params"]}
    judged = (owned & chunk.given.trainable) - chunk.given.feeding - chunk.outcome.besides
    copies = {n: nn.Parameter(p.clone()) for n, p in _met_by_the_update(chunk).items()}
    names = {id(parameter): name for name, parameter in copies.items()}
    memory: dict[str, Tensor] = {}
    for i, rule in enumerate(rules):
        members = {name for group in rule.groups for name in group["params"]}
        own = {name: g for name, g in gradients.items() if name in members}
        met = _met_by(rule, chunk)
        handed = clipped(own, norm=contract.clip_norm, value=contract.clip_value, met=met)
        optimizer = apply_rule(rule, copies, handed)
        for parameter, remembered in optimizer.state.items():
            name = names.get(id(parameter), "")
            if name in judged:
                prefix = f"{type(rule.optimizer).__name__}[{i}].{name}"
                memory.update(leaves(remembered, prefix))
    parameters = {name: p for name, p in copies.items() if name in judged}
    return Ending(_detached(parameters), {}, memory, _detached(leaves(state)))
