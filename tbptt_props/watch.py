"""Watches a module being trained, from outside: what its loop calls, in what order, on what.

Knows torch, but neither Lightning nor any property. Nothing of the subject is edited: its forward
is wrapped on the instance, autograd's two entry points and the optimizers' hooks on the process,
and everything comes off again.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from tbptt_props.attributes import plain_attributes
from tbptt_props.batch import Batch
from tbptt_props.byhand import BY_HAND, Rate
from tbptt_props.closing import Closing
from tbptt_props.compare import same, same_leaves
from tbptt_props.device import drawn
from tbptt_props.forward import Arguments, Forward
from tbptt_props.graph import (
    any_within,
    lets_gradients_through,
    mark,
    marked,
    nodes_behind,
    numbers_behind,
    sequence_number,
    variables_past,
)
from tbptt_props.layout import joined
from tbptt_props.lines import users_line
from tbptt_props.live import Canary, LiveCall, LiveChunk, Snapshot, joined_places, turns_of
from tbptt_props.optimizers import Optimizers, Step, rates_of
from tbptt_props.parameters import Parameters, stands
from tbptt_props.past import Past
from tbptt_props.places import lanes_of
from tbptt_props.precision import autocast_in_force, keeps_casts
from tbptt_props.process import Hung, Watchdog, drawn_to, randomness
from tbptt_props.refusals import Refusals
from tbptt_props.scaling import divided, is_told_to_skip, scale_of, scalers_watched
from tbptt_props.standin import Original, standing_in
from tbptt_props.state import leaves, value_of
from tbptt_props.subject import ObservationError, Subject
from tbptt_props.trace import (
    Call,
    Chunk,
    Kind,
    Rule,
    Span,
    Tensors,
    updated_by,
)
from tbptt_props.underway import Underway

_PREDICTION = "tbptt prediction"  # marks its node in the graph
_STATE = "tbptt state"


@dataclass
class Training:
    """What is trained with, as far as whoever trains knows it."""

    optimizers: Sequence[Optimizer] = ()
    schedulers: Sequence[Any] = ()
    updates: Callable[[], int] | None = None  # as the trainer counts them
    set_updates: Callable[[int], None] = field(default=lambda count: None)
    let_go: Callable[[], None] = field(default=lambda: None)  # of graphs the trainer itself holds


class Watching(Protocol):
    """What an adapter tells of a training under way."""

    def training_begun(self, training: Training) -> None:
        """Note what is trained with."""

    def hooks_come(self, index: int) -> None:
        """Note that a module's own hooks are about to be called, as batch `index` begins."""

    def batch_started(self, index: int, batch: Any) -> None:
        """Note that training turns to batch `index`, as the loop gets it."""

    def batch_ended(self, index: int) -> None:
        """Note that the loop is done with batch `index`."""

    def backward_announced(self, loss: Tensor) -> None:
        """Note that a backward on `loss` goes through the trainer."""


@dataclass
class _Asked:
    """Gradients that were asked for; if an update follows, that was the backward."""

    calls: list[LiveCall]
    cotangents: list[Tensor | None]
    numbers: list[int]
    loss: float
    returned: Tensors  # those by parameters
    spent: bool  # no other backward can come: the graph is gone
    besides: frozenset[str]  # parameters that the loss reaches past the predictions


class Watch:
    """Writes down, chunk by chunk, what a module's training does; hands each on when it is over."""

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Batch],
        hand_on: Callable[[Chunk], None],
        *,
        plan: Sequence[Sequence[Span]] = (),
    ) -> None:
        """Watch `subject` on `batches`, of which pristine copies are kept, and `plan` is due."""
        self.subject = subject
        self.plan = plan
        self.module = subject.module
        self.device = torch.device(subject.device).type
        self.hand_on = hand_on
        pristine = [batch.copied().moved(subject.device) for batch in batches]
        self.closing = Closing(subject, pristine, plan)
        self.forward = Forward(subject)
        self.underway = Underway(subject, pristine, self._elsewhere)
        self.refusals = Refusals(subject, self.forward, self.underway)
        self.parameters = Parameters(self.module)
        self.optimizers = Optimizers(self.parameters)
        self.open: list[LiveCall] = []
        self.current: LiveChunk | None = None
        self.closed: list[Chunk] = []
        self.past = Past()
        self.early: list[tuple[object, Rule]] = []
        self.beside: dict[str, Tensor] = {}  # gradients by losses on what the next chunk detached
        self.added: set[str] = set()  # those of them that were added to what stood there
        self.halted = False
        self.watched = 0
        self.rates: list[float] = []  # of updates, in their order
        self.trained: set[tuple[int, frozenset[str]]] = set()  # parameters, by batch and chunk
        self.fresh_batch = False
        self.in_this_batch = 0  # chunks
        self.problem: BaseException | None = None
        self.announced: list[int] = []
        self.lightning_updates: Callable[[], int] | None = None
        self.updates = 0
        self.moved_apart = False  # by an update that came before any chunk's backward
        self.tentative: _Asked | None = None
        self.moved_by_hand: set[str] = set()
        self.rate = Rate()  # of updates by hand
        self.calls_ever = 0
        self.layer = _only_layer(self.module) if subject.forward == "forward" else None
        self.layer_calls = 0
        self.layer_cuts = 0
        self.in_forward: int | None = None  # calls of the layer by the forward under way
        self.last_state: Any = None
        self.last_filled: Any = None  # what was handed over, and filled, if that may be the state
        self.initial_state: Any = None
        self.busy = False
        self.used_up: dict[str, Tensor] | None = None  # gradients, in the midst of a backward
        self.gathered: dict[LiveCall, Tensor] | None = None
        self.thread = threading.get_ident()
        self.before_call: Callable[[Watch, Tensor | None, Any], None] | None = None
        self.before_batch: Callable[[Watch], None] | None = None
        self.before_hooks: Callable[[Watch, int], None] | None = None
        self.training = Training()
        self.initial_rules: list[Rule] = []
        self.keeps_first = False
        self.first: Chunk | None = None  # kept with its tensors, for a run of one chunk
        longest = max((batch.inputs.shape[1] for batch in pristine), default=0)
        self.watchdog = Watchdog(subject.patience, longest=longest)

    # What an adapter tells ------------------------------------------------------------------

    def hooks_come(self, index: int) -> None:
        """Note that a module's own hooks are about to be called, as batch `index` begins."""
        if self.before_hooks:
            self.before_hooks(self, index)

    def batch_started(self, index: int, batch: Any) -> None:
        """Note that training turns to batch `index`, as the loop gets it."""
        self.watchdog.turned()
        self._drop_open_calls()
        self.underway.begin(index, batch)
        self.fresh_batch = True
        self.in_this_batch = 0
        self.closing.batch_started()
        self.last_state = None  # a batch of which nothing is trained on ends in none
        if self.before_batch:
            self.before_batch(self)

    def batch_ended(self, index: int) -> None:
        """Note that the loop is done with batch `index`."""
        self._look_at_parameters(f"the end of batch {index}")
        self._drop_open_calls()
        self._close_current()
        self.past.look(self.training.let_go)
        self.underway.end(index)

    def backward_announced(self, loss: Tensor) -> None:
        """Note that Lightning is about to run backward on `loss`."""
        self.announced.append(id(loss))

    def finished(self, *, halted: bool = False) -> None:
        """Note that training is over, in whatever way; `halted` if it raised."""
        with self._own_code():
            self._note_update_by_hand()
        self._drop_open_calls()
        self.halted = halted
        self._close_current()

    def moved_afterwards(self) -> bool:
        """Tell whether parameters moved when training was over: to their average, say."""
        return bool(self.parameters.moved())

    def training_begun(self, training: Training) -> None:
        """Note what is trained with, and the rules by which its optimizers update."""
        self.training = training
        self.optimizers.told = training.optimizers
        self.lightning_updates = training.updates
        self._note_moves("training began")
        if self.keeps_first:
            self.initial_rules = [self._rule(optimizer) for optimizer in training.optimizers]

    def now(self) -> str:
        """Say how far training has got."""
        chunk = self.current
        if chunk is not None:
            return f"{chunk}, {'after' if chunk.complete else 'in'} its backward"
        if self.open:
            return f"batch {self.underway.index}, after a forward"
        return f"batch {self.underway.index}" if self.underway.index >= 0 else "the start"

    def ended_in(self, places: Tensor) -> list[Any]:
        """Return the states that the chunk before ended in, if its rows are those at `places`."""
        chunk = self.current
        if chunk is None or lanes_of(chunk.places) != lanes_of(places):
            return []
        return list(chunk.ended_in)

    # What is wrapped ------------------------------------------------------------------------

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Watch within the block."""
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.forward.replaced(self._called))
            undo.enter_context(self.underway.following())
            if self.layer is not None:
                layer = self.module.get_submodule(self.layer)
                undo.enter_context(standing_in(layer, "forward", _after(self._count_layer)))
            for name, layer in _bidirectional(self.module):
                look = functools.partial(self._refuse_backward_state, name)
                undo.enter_context(standing_in(layer, "forward", _after(look)))
            undo.enter_context(self._wrapped_autograd("backward", self._backward))
            undo.enter_context(self._wrapped_autograd("grad", self._grad))
            undo.enter_context(self.optimizers.noticed())
            undo.enter_context(scalers_watched(self._before_dividing))
            undo.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            undo.callback(register_optimizer_step_post_hook(self._after_step).remove)
            yield

    def _count_layer(self, args: Any, kwargs: Any) -> None:
        """Count the calls of the only layer, and those in which forward cuts its state itself."""
        self.layer_calls += 1
        if self.in_forward is not None and torch.is_grad_enabled() and not self.busy:
            handed = leaves(args[1] if len(args) > 1 else kwargs.get("hx")).values()
            attached = [leaf for leaf in handed if leaf.requires_grad]
            self.layer_cuts += bool(self.in_forward and handed and not attached)
            self.in_forward += 1

    def _refuse_backward_state(self, name: str, args: Any, kwargs: Any) -> None:
        """Refuse a layer whose backward direction goes on from the state of the chunk before."""
        if self._elsewhere() or not torch.is_grad_enabled() or not self.underway.begun:
            return
        handed = leaves(args[1] if len(args) > 1 else kwargs.get("hx")).values()
        # Of each layer the forward direction comes first: only the other one has no past to go on.
        rows = [row for leaf in handed for row in leaf[1::2].flatten(0, -2)]
        if any(bool(row.any()) and _has_row(leaves(self.last_state), row) for row in rows):
            raise self._fail(
                f"{type(self.module).__name__}'s {name or 'recurrent layer'} is bidirectional, and "
                "its backward direction starts from a state that the chunk before ended in: it "
                "runs against time, so that this state is not its past. Truncate a core with "
                "bidirectional=False, or hand on h[0::2] alone and start h[1::2] from zeros"
            )

    def _elsewhere(self) -> bool:
        return self.busy or threading.get_ident() != self.thread

    def _called(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._elsewhere() or not torch.is_grad_enabled() or not self.underway.begun:
            return original(*args, **kwargs)
        return self._forward(original, args, kwargs)

    @contextlib.contextmanager
    def _wrapped_autograd(
        self, name: str, watched: Callable[[functools.partial[Any], list[Tensor]], Any]
    ) -> Iterator[None]:
        original = getattr(torch.autograd, name)

        @functools.wraps(original)
        def entry(*args: Any, **kwargs: Any) -> Any:
            roots = args[0] if args else kwargs.get("tensors", kwargs.get("outputs"))
            roots = [roots] if isinstance(roots, Tensor) else list(roots or ())
            if self._elsewhere() or not roots:
                return original(*args, **kwargs)
            return watched(functools.partial(original, *args, **kwargs), roots)

        setattr(torch.autograd, name, entry)
        try:
            yield
        finally:
            setattr(torch.autograd, name, original)

    # Forward --------------------------------------------------------------------------------

    def _forward(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._own_code():
            arguments = self.forward.arguments(args, kwargs)
            before = {} if self.calls_ever else self.forward.candidates()
            self.calls_ever += 1
            self.watchdog.called(arguments.x)
            self._refuse(arguments, handed=bool(args) or self.forward.inputs in kwargs)
            live = self._opened(arguments)
        if self.calls_ever == 1:
            self.initial_state = live.call.state
        live.opened = sequence_number()
        self.in_forward = 0
        returned = original(*args, **kwargs)
        self.in_forward = None
        live.closed = sequence_number()
        torchs, *others = live.snapshot.randomness
        live.randomness = drawn(), *others  # forwards hardly draw from those, which are large
        live.drew = not torch.equal(live.randomness[0], torchs)
        predicted, after = self._came_out(returned, arguments, before)
        with self._own_code():
            self._note_state(live, after, arguments)
            self._note_prediction(live, returned, predicted, after)
        return returned

    def _refuse(self, arguments: Arguments, *, handed: bool) -> None:
        """Refuse what can't be judged of a call that is about to be made."""
        self.refusals.parameters()
        if self.calls_ever == 1 or not self.forward.inputs:
            self.refusals.inputs(arguments, handed=handed)
        if self.calls_ever == 1:
            self.refusals.a_state(arguments)
            self._begin_anew()
        calls = self.current.calls if self.current is not None else []
        earlier = [call.call.state_after for call in calls]
        self.refusals.handed_on(arguments, self.last_state, self.last_filled, earlier)

    def _note_state(self, live: LiveCall, after: Any, arguments: Arguments) -> None:
        """Write down the state in which a call ends, and mark it in the graph."""
        self.last_state = value_of(after)
        guessed = not self.subject.state and len(self.forward.handed) == 1
        filled = guessed and not self.subject.outputs and arguments.was_filled
        self.last_filled = value_of(arguments.state) if filled else None
        parts = leaves(after)
        live.handed_on = frozenset(path for path in parts if parts[path].grad_fn)
        for leaf in parts.values():
            mark(leaf, _STATE)

    def _note_prediction(self, live: LiveCall, returned: Any, predicted: Any, after: Any) -> None:
        """Write down what a call predicts, and look after its graph, if it has one."""
        pair = joined(predicted)
        assert pair is not None  # or it would not have come out
        state = leaves(after).values()
        live.call = replace(
            live.call,
            prediction=pair[0].detach(),
            nest=pair[1],
            is_state=any(predicted is leaf for leaf in state),
            state_after=self.last_state,
            way=replace(live.call.way, filled=self.forward.fills),
        )
        if pair[0].grad_fn is None:
            return
        # What `outputs` made of it may not be behind what the loop keeps.
        raw = [*leaves(returned).values()] if self.subject.outputs else []
        self._look_after(live, predicted, (*state, *raw))
        if pair[1] is None or not _makes_any(leaves(predicted).values(), raw):
            self._be_told(live, predicted)
        self.open.append(live)

    def _opened(self, arguments: Arguments) -> LiveCall:
        """Write down what a call of forward starts from."""
        places = self.underway.places(arguments.x)
        followed = places is None and self.underway.lineage is not None
        places = self.underway.followed(arguments.x) if places is None else places
        self._note_update_by_hand()
        if self.before_call:
            self.before_call(self, places, arguments)
        if not self.optimizers.moving:
            self._note_moves("forward")
        state = arguments.state
        attached = {path: leaf for path, leaf in leaves(state).items() if leaf.grad_fn}
        oldest = {path: min(numbers_behind([leaf]), default=0) for path, leaf in attached.items()}
        return LiveCall(
            training=self.module.training,
            call=Call(
                x=value_of(arguments.x),
                state=value_of(state),
                others=value_of(arguments.others),
                attached=bool(attached),
                handed=arguments.has_state,
                way=arguments.way,
            ),
            snapshot=self._snapshot(),
            places=places,
            attached=oldest,
            feeding=self._feeding((state, arguments.others)),
            embedding=self._feeding(arguments.x),
            step=self.optimizers.token,
            line=users_line(),
            followed=followed,
        )

    def _feeding(self, arguments: Any) -> frozenset[str]:
        """Name the parameters that attached arguments are made from: a learned initial state."""
        attached = [leaf for leaf in leaves(arguments).values() if leaf.requires_grad]
        found = {id(leaf) for leaf in attached if leaf.is_leaf}
        for node in nodes_behind([leaf for leaf in attached if leaf.grad_fn is not None]):
            variable = getattr(node, "variable", None)
            if variable is not None:
                found.add(id(variable))
        return frozenset(self.parameters.names[i] for i in found if i in self.parameters.names)

    def _came_out(
        self, returned: Any, arguments: Arguments, before: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        with self._kept_refusal():
            found = self.refusals.pair(returned, arguments)
        if found is not None and (
            arguments.has_state or self.calls_ever > 1 or self.forward.parameters[1:]
        ):
            return found
        with self._own_code():
            # What comes back as it goes in is the state, whatever averages forward keeps besides.
            several = self.forward.returns_several_predictions(arguments, returned)
            guessed = () if several else self.forward.guess(before, arguments, returned)
            if found is not None and not guessed:
                return found
            layer = self.layer if self.layer_calls else None
            raise self.refusals.no_pair(returned, guessed=guessed, several=several, layer=layer)

    def _fail(self, message: str) -> ObservationError:
        """Keep the error too, for a loop that swallows exceptions."""
        self.problem = ObservationError(message)
        return self.problem

    def _snapshot(self) -> Snapshot:
        """Write down what forward may depend on; the parameters only if they are not known yet."""
        return Snapshot(
            parameters=self.parameters.known,
            buffers={name: b.detach().clone() for name, b in self.module.named_buffers()},
            trainable=self.parameters.trainable(),
            attributes=plain_attributes(self.module),
            randomness=randomness(),
            autocast=autocast_in_force(self.device),
            keeps_casts=keeps_casts(self.device),
        )

    def _note_moves(self, until: str) -> None:
        self.parameters.look(until, self.optimizers.trains)

    def _begin_anew(self) -> None:
        """Take the parameters as they are for those that training begins with.

        They may have been drawn, or loaded, once all was there to be trained.
        """
        if not self.updates:
            self._note_moves("forward")
            self.parameters.taken_moves()

    # Backward -------------------------------------------------------------------------------

    def _backward(self, run: functools.partial[Any], roots: list[Tensor]) -> Any:
        self.watchdog.fed()
        with self._own_code():
            self._look_before_backward()
            numbers = numbers_behind(roots)
            through = bool(self.announced) and self.announced[-1] in map(id, roots)
            self.announced.clear()
            self.tentative = None
            chunk = self._chunk_of(numbers)
            if chunk is not None:
                chunk.besides |= self._besides(roots)
                chunk.scale = scale_of(roots)
            self._note_what_was_cleared()
        if chunk is None:
            return self._past_forward(run, numbers)
        slopes = _slopes_handed(run, roots)
        loss = sum(map(self._loss_of, roots, slopes))
        if self.lightning_updates is not None:
            chunk.through_lightning = through and chunk.through_lightning is not False
        before, drawn_at = len(chunk.events), drawn_to()
        with self._gathering() as gathered, self._catching_gradients() as caught:
            result = run()
        with self._own_code():
            if chunk.evaluations == 1:
                _add_up_cotangents(gathered)
                chunk.loss += loss
                chunk.drawn_to = drawn_at
                _note_slopes(chunk, roots, slopes)
                moved = self.parameters.moved() if self.by_hand and caught else caught.keys()
                used = {n: g for n, g in caught.items() if n in moved}
                self._take_gradients(chunk, used)
                self._take_beside(chunk)
                chunk.complete = True
                chunk.let_through = self._lets_through(chunk, roots)
            chunk.note_line("backward", users_line())
            chunk.events.insert(before, "backward")  # updates may have been made by its hooks
            self._note_update_by_hand()  # a hook may have made it in the midst of backward
        return result

    def _lets_through(self, chunk: LiveChunk, roots: list[Tensor]) -> bool:
        """Tell whether a call without a gradient can have none but for want of a part in the loss.

        Asked only where there is such a call.
        """
        several = len(chunk.calls) > 1 and self.subject.contract.adds_up
        if not several or all(call.has_slope for call in chunk.calls):
            return False
        return lets_gradients_through(roots, [(c.opened, c.closed) for c in chunk.calls])

    def _note_what_was_cleared(self) -> None:
        """Take what was cleared since a chunk's first backward for clear: a second loss follows."""
        chunk = self.current
        if chunk is not None and chunk.complete:
            chunk.dirty = tuple(n for n in chunk.dirty if self.parameters.has_gradient(n))

    def _past_forward(self, run: Callable[[], Any], numbers: list[int]) -> Any:
        """Run a backward that comes to no prediction: a discriminator's, on what is detached.

        The gradients that it leaves are not of the chunk's loss, and no mistake. It is the chunk's
        that comes next if this one has had the update by them.
        """
        chunk = self.current
        anew = not self.past.is_behind(numbers)  # nothing of a chunk gone by is behind it
        over = chunk is None or chunk.complete
        if not over or not anew or self.subject.contract.adds_up or not self.underway.begun:
            return run()
        with self._own_code():
            before = self.parameters.gradients()
        result = run()
        with self._own_code():
            after = self.parameters.gradients(handed=before)
            left = {n: g for n, g in after.items() if g is not before.get(n)}
            if chunk is None or self._is_updated(chunk, left):
                self.added |= {n for n in left.keys() - self.beside if stands(before.get(n))}
                self.beside.update(left)
            else:
                chunk.gradients = {**chunk.gradients, **left}
                chunk.besides |= frozenset(left)
        return result

    def _is_updated(self, chunk: LiveChunk, names: Iterable[str]) -> bool:
        """Tell whether all optimizers that own any of the parameters made the chunk's update."""
        owners = self.optimizers.owners(names)
        return bool(owners) and all(id(owner) in chunk.updated_by for owner in owners)

    def _besides(self, roots: list[Tensor]) -> frozenset[str]:
        """Name the parameters that a loss that is not known reaches past all predictions."""
        if self.subject.loss is not None:
            return frozenset()
        past = variables_past(roots, _PREDICTION)
        return frozenset(self.parameters.names[i] for i in past if i in self.parameters.names)

    @contextlib.contextmanager
    def _catching_gradients(self) -> Iterator[dict[str, Tensor]]:
        """Catch gradients on their way into parameters, where a hook may use them up by hand."""
        caught: dict[str, Tensor] = {}
        with contextlib.ExitStack() as undo:
            for name, parameter in self.module.named_parameters():
                if self.by_hand and parameter.requires_grad:
                    catch = functools.partial(caught.__setitem__, name)
                    undo.callback(parameter.register_hook(catch).remove)  # type: ignore[no-untyped-call]
            self.used_up = caught
            yield caught
            self.used_up = None

    def _take_gradients(self, chunk: LiveChunk, used: Tensors) -> None:
        """Copy the gradients that backward left; those that stood before are not the chunk's."""
        chunk.gradients = {**self.parameters.gradients(), **used}
        if chunk.standing:
            chunk.left = chunk.gradients
            chunk.gradients = {
                name: g - chunk.standing[name] if name in chunk.standing else g
                for name, g in chunk.left.items()
            }

    def _take_beside(self, chunk: LiveChunk) -> None:
        """Take what losses on what the chunk detached have left, before its own did, for besides.

        By what an update went by already, it went before the chunk's own loss added to it.
        """
        beside, self.beside, self.added = self.beside, {}, set()
        updated = updated_by(chunk.rules)
        chunk.besides |= beside.keys()
        chunk.gradients = {**chunk.gradients, **{n: g for n, g in beside.items() if n in updated}}

    def _grad(self, run: functools.partial[Any], roots: list[Tensor]) -> Any:
        """Watch a call that returns gradients: if an update follows, it was the backward."""
        self.watchdog.fed()
        with self._own_code():
            self._look_before_backward()
            numbers = numbers_behind(roots)
            calls = [c for c in self.open if any_within(numbers, c.opened, c.closed)]
        with self._gathering() as gathered:
            besides = self._besides(roots)
            try:
                result = run()
            except Exception:
                with self._own_code():
                    self._chunk_of(numbers)  # which paths its loss has is worth knowing
                raise
        with self._own_code():
            if calls:
                returned, spent = self._asked_for(run, result)
                self.tentative = _Asked(
                    calls=calls,
                    cotangents=[gathered.get(call) for call in calls],
                    numbers=numbers,
                    loss=sum(float(root.detach().sum()) for root in roots),
                    returned=returned,
                    spent=spent,
                    besides=besides,
                )
        return result

    def _asked_for(self, run: functools.partial[Any], result: Any) -> tuple[Tensors, bool]:
        """Return the gradients that a call returned, by parameter, and whether no other can."""
        asked = inspect.signature(run.func).bind(*run.args, **run.keywords).arguments
        inputs = asked["inputs"]
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        names = {id(p): name for name, p in self.module.named_parameters()}
        returned = {
            names[id(wanted)]: gradient.detach().clone()
            for wanted, gradient in zip(inputs, result, strict=False)
            if id(wanted) in names and gradient is not None
        }
        retained = asked.get("retain_graph")
        kept = asked.get("create_graph", False) if retained is None else retained
        return returned, bool(returned) and not kept

    @contextlib.contextmanager
    def _gathering(self) -> Iterator[dict[LiveCall, Tensor]]:
        """Gather the loss's gradient by each prediction while autograd runs."""
        self.gathered = {}
        try:
            yield self.gathered
        finally:
            self.gathered = None

    def _look_after(self, live: LiveCall, predicted: Any, after: Iterable[Tensor]) -> None:
        """Hang canaries into the graph of a call, and mark its predictions."""
        predictions = list(leaves(predicted).values())
        for tensor in (*predictions, *after):
            if tensor.grad_fn is not None:
                canary = Canary()
                mark(tensor, "tbptt", canary)
                live.canaries.append(weakref.ref(canary))
        for prediction in predictions:
            if prediction.grad_fn is not None:
                mark(prediction, _PREDICTION)

    def _be_told(self, live: LiveCall, predicted: Any) -> None:
        """Be told of the loss's gradient by the predictions of a call."""
        for index, prediction in enumerate(leaves(predicted).values()):
            if prediction.grad_fn is not None:
                take = functools.partial(self._take_cotangent, live, index)
                prediction.register_hook(take)  # type: ignore[no-untyped-call]

    def _take_cotangent(self, live: LiveCall, index: int, cotangent: Tensor) -> None:
        gathered, nest = self.gathered, live.call.nest
        if gathered is None or self.busy:
            return
        before, taken = gathered.get(live), torch.clone(cotangent.detach())
        if nest is not None:
            assert live.call.prediction is not None
            taken = nest.slopes(index, taken, live.call.prediction.shape[:-1])
        gathered[live] = taken if before is None else before + taken

    def _take_tentative(self) -> None:
        """Begin a chunk from gradients that were asked for and not accumulated by backward."""
        asked, self.tentative = self.tentative, None
        if asked is None or not all(call in self.open for call in asked.calls):
            return
        current = self.current
        before = {} if self._opens() or current is None else current.left or current.gradients
        chunk = self._chunk_of(asked.numbers)
        if chunk is None:
            return
        for call, cotangent in zip(asked.calls, asked.cotangents, strict=True):
            call.cotangent = cotangent
        chunk.events.append("backward")
        chunk.dirty = ()  # they were put in the place of whatever was there
        chunk.loss = asked.loss
        chunk.besides |= asked.besides
        if self.by_hand:
            chunk.gradients, chunk.returned, chunk.standing = asked.returned, True, {}
        elif self.subject.contract.adds_up and asked.returned:
            self._add_up(chunk, asked.returned, before)
        else:
            chunk.gradients = self.parameters.gradients()
        self._take_beside(chunk)
        chunk.complete = True
        if self.lightning_updates is not None:
            chunk.through_lightning = False

    def _add_up(self, chunk: LiveChunk, returned: Tensors, before: Tensors) -> None:
        """Take the gradients that a loop was handed, which it adds up itself for an update."""
        chunk.gradients, chunk.returned, chunk.standing = returned, True, before
        both = before.keys() & returned.keys()
        chunk.left = {**before, **returned, **{n: before[n] + returned[n] for n in both}}

    def _take_spent(self) -> None:
        """Take gradients that were asked for, and can't be again, where an update comes later."""
        if self.subject.contract.adds_up and self.tentative is not None and self.tentative.spent:
            self._take_tentative()

    @contextlib.contextmanager
    def _kept_refusal(self) -> Iterator[None]:
        """Keep a refusal too, for a loop that swallows exceptions."""
        try:
            yield
        except ObservationError as refusal:
            self.problem = refusal
            raise

    @contextlib.contextmanager
    def _own_code(self) -> Iterator[None]:
        """Keep what goes wrong in here, and count no time: both are no fault of the subject's."""
        with self.watchdog.resting():
            try:
                yield
            except Hung:
                raise
            except BaseException as error:
                self.problem = error
                raise

    def _loss_of(self, root: Tensor, slope: Tensor | None) -> float:
        """Return what a root of backward adds to the loss: as much as it is handed for it."""
        if _is_state(root):
            return 0.0  # its slope is handed on from the loss of a later call
        if slope is not None:
            return float((root.detach() * slope.detach()).sum())
        if root.numel() != 1:
            raise self._fail(
                f"the loss must be a scalar, got a tensor of shape {tuple(root.shape)}"
            )
        return float(root.detach())

    def _chunk_of(self, numbers: list[int]) -> LiveChunk | None:
        """Find the chunk that a backward through these nodes belongs to; begin one if need be."""
        reached = [c for c in self.open if any_within(numbers, c.opened, c.closed)]
        step = self.optimizers.token
        if not reached:
            within = self.current and any(
                any_within(numbers, c.opened, c.closed) for c in self.current.calls
            )
            return self.current if within else None
        # Calls that came before and were not reached were never trained on: a metric, say.
        last = self.open.index(reached[-1])
        self.open = [c for c in self.open[last + 1 :] if c not in reached]
        if self._is_evaluated_again(reached, step) and self.current is not None:
            self.current.evaluations += 1
            self.current.states.append(reached[-1].call.state_after)
            self.current.repeats.append(reached[0].call.state)
            self.past.run_again(self.current)
            return self.current
        if self._is_other_sequences_turn(reached) and self.current is not None:
            return self._go_on_with(self.current, reached, numbers)
        return self._begin_chunk(reached, numbers, step)

    def _go_on_with(self, chunk: LiveChunk, calls: list[LiveCall], numbers: list[int]) -> LiveChunk:
        """Take further calls for a part of the current chunk."""
        chunk.calls = [*chunk.calls, *calls]
        chunk.events.extend("forward" for _ in calls)
        chunk.leaks += self.past.leaks(calls, numbers)
        chunk.mode = chunk.mode and all(call.training for call in calls)
        chunk.besides |= frozenset().union(*(call.embedding for call in calls))
        chunk.complete = False
        return chunk

    def _is_evaluated_again(self, calls: list[LiveCall], step: object | None) -> bool:
        """Tell whether a closure runs the current chunk once more, and not the next one."""
        if self.current is None:
            return False
        one, other = self.current.places, joined_places(calls)
        if step is not None and self.current.step is step:
            return one is None or other is None or torch.equal(one, other)
        if one is None or other is None or not torch.equal(one, other):
            return False
        return self._is_tried_elsewhere(self.current, calls)

    def _is_tried_elsewhere(self, chunk: LiveChunk, calls: list[LiveCall]) -> bool:
        """Tell whether a chunk is run again because its update is due to gradients from elsewhere.

        So it is where the parameters were moved up the slope after its backward (SAM).
        """
        before, now = chunk.calls[0], calls[0]
        if chunk.rules or not chunk.complete or self.subject.contract.adds_up:
            return False
        if not same_leaves(leaves(before.call.state), leaves(now.call.state)):
            return False
        there = now.snapshot.parameters
        moved = not same_leaves(before.snapshot.parameters, there)
        return moved and not any(map(self.parameters.has_gradient, self.parameters.names.values()))

    def _is_other_sequences_turn(self, calls: list[LiveCall]) -> bool:
        """Tell whether calls run the current chunk's time steps of sequences it has not had yet.

        They share its update: a part of the batch has a backward after the other.
        """
        chunk = self.current
        if chunk is None or chunk.rules or self.early or chunk.batch != self.underway.index:
            return False
        return bool(turns_of([*chunk.calls, *calls]))

    def _begin_chunk(
        self, calls: list[LiveCall], numbers: list[int], step: object | None
    ) -> LiveChunk:
        followed = self.parameters.taken_moves()
        self._close_current(calls)
        events: list[Kind] = ["forward"] * len(calls)
        early, self.early = self.early, []
        ahead = any(not self._goes_by_beside(rule) for _, rule in early)
        if ahead or any(call.interrupted for call in calls):
            events.append("update")
        chunk = LiveChunk(
            batch=self.underway.index,
            calls=calls,
            events=events,
            starts_batch=self.fresh_batch,
            step=step,
            leaks=self.past.leaks(calls, numbers),
            begun=sequence_number(),
            index=self.in_this_batch,
            dirty=tuple(
                name
                for name, p in self.module.named_parameters()
                if name in self.added or (name not in self.beside and stands(p.grad))
            ),
            rules=[rule for _, rule in early],
            mode=all(call.training for call in calls),
            updated_by=[id(optimizer) for optimizer, _ in early],
            moved=followed,
            states=[calls[-1].call.state_after],
            besides=frozenset().union(*(call.embedding for call in calls)),
        )
        chunk.note_line("forward", calls[0].line)
        if self.subject.contract.adds_up and not self._opens():
            chunk.standing = {n: g for n, g in self.parameters.gradients().items() if g.any()}
            chunk.dirty = ()
        self.fresh_batch = False
        self.in_this_batch += 1
        self.current = chunk
        return chunk

    def _opens(self) -> bool:
        """Tell whether an update is due before the chunk that begins, or nothing."""
        index = self.in_this_batch
        return self.subject.contract.opens(index, index + 1, self.underway.index)

    # Update ---------------------------------------------------------------------------------

    def _before_dividing(self, optimizer: Optimizer) -> None:
        """Note whether a scaler is about to divide the very gradients that backward left."""
        chunk = self.current
        if self._elsewhere() or chunk is None:
            return
        left, names = chunk.left or chunk.gradients, {*self.optimizers.owned(optimizer)}
        now = self.parameters.gradients(handed=left)
        intact = all(g is left.get(name) for name, g in now.items() if name in names)
        chunk.divided = intact and chunk.divided is not False

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if self._elsewhere() or not self.optimizers.owned(optimizer) or is_told_to_skip(optimizer):
            return None
        step = self.optimizers.enter(optimizer)
        if step is None:
            return None
        with self._own_code():
            return self._began(step, args, kwargs)

    def _began(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Look at an update that begins; return the arguments to call it with, if others."""
        self.watchdog.fed()
        if any(step.optimizer is known for known in self.training.optimizers):
            self.rates += rates_of(step.optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            step.rules.append(self._rule(step.optimizer))
            return None
        self._note_moves("the update")

        def watched_closure() -> Any:
            if not step.rules:
                self.parameters.take()  # the update may go up the slope before it asks for it
            result = closure()
            if not step.rules:  # what comes after is moved by the update itself
                step.rules.append(self._rule(step.optimizer))
            return result

        if len(args) > 1:
            return (args[0], watched_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": watched_closure}

    def _rule(self, optimizer: Optimizer) -> Rule:
        """Write down what an update is about to go by."""
        self._take_tentative()
        self._note_moves("the update")
        self._forget_what_came_back()
        names = set(self.optimizers.owned(optimizer))
        known = (self.current.left or self.current.gradients) if self.current else None
        gradients = self.parameters.gradients(handed=known)
        if self.used_up is not None:  # a hook of backward's makes the update, and may clear them
            self.used_up.update({n: g for n, g in gradients.items() if n in names})
        return Rule(
            optimizer=optimizer,
            groups=self.optimizers.groups(optimizer),
            memory=self.optimizers.memory(optimizer),
            handed={n: divided(optimizer, g) for n, g in gradients.items() if n in names},
            before=self.parameters.known,
        )

    def _forget_what_came_back(self) -> None:
        """Take no move for one that was undone before the update, the chunk being run in between.

        What is taken off again comes back but for rounding.
        """
        chunk = self.current
        if chunk is None or chunk.evaluations == 1 or not self.parameters.moves:
            return
        if self.parameters.came_back_to(chunk.calls[0].snapshot.parameters):
            self.parameters.taken_moves()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step = None if self._elsewhere() else self.optimizers.leave(optimizer)
        if step is not None:
            with self._own_code():
                self._ended(step)

    def _ended(self, step: Step) -> None:
        """Look at what an update has made of the parameters, and give it to its chunk."""
        optimizer = step.optimizer
        rule = step.rules[-1] if step.rules else self._rule(optimizer)
        if vars(optimizer).get("_optimizer_step_pre_hooks"):  # which come after torch's own
            met = self.parameters.gradients(handed=rule.handed)
            changed = {n: divided(optimizer, met[n]) for n in rule.handed if n in met}
            rule = replace(rule, handed={**rule.handed, **changed})
        self.updates += 1
        self.optimizers.remember(optimizer)
        self.parameters.take()
        self._attribute(optimizer, replace(rule, after=self.parameters.known))

    def _goes_by_beside(self, rule: Rule) -> bool:
        """Tell whether an update goes by nothing but losses on what the next chunk detached."""
        by = {name for name, gradient in rule.handed.items() if stands(gradient)}
        return bool(by) and by <= self.beside.keys()

    def _attribute(self, optimizer: object, rule: Rule) -> None:
        """Give the update to the chunk it belongs to: the last one with a backward, as a rule."""
        chunk = self.current
        if self._goes_by_beside(rule):
            self._put_off(optimizer, rule)
            return
        if chunk and id(optimizer) not in chunk.updated_by:
            for call in self.open:
                call.interrupted = True
        elif self.open or chunk is None:
            for call in self.open:
                call.interrupted = True
            self._put_off(optimizer, rule)
            return
        chunk.events.append("update")
        if optimizer is not BY_HAND:  # which is noticed only later
            chunk.note_line("update", users_line())
        chunk.rules.append(rule)
        chunk.updated_by.append(id(optimizer))
        chunk.moved.extend(self.parameters.taken_moves())

    def _put_off(self, optimizer: object, rule: Rule) -> None:
        """Keep an update for the chunk whose backward comes next, if one does."""
        self.early.append((optimizer, rule))
        moved = (not same(rule.after[name], before) for name, before in rule.before.items())
        self.moved_apart = self.moved_apart or any(moved)

    # An update by hand ----------------------------------------------------------------------

    @property
    def by_hand(self) -> bool:
        """Whether no optimizer of torch's is known to train the module."""
        return not self.optimizers.any_known

    def _look_at_parameters(self, until: str) -> None:
        self._note_update_by_hand()
        self._note_moves(until)

    def _look_before_backward(self) -> None:
        """Tell what moved before a backward from the update that may follow it."""
        if self.by_hand:
            self._look_at_parameters("backward")
        else:
            self._take_spent()

    def _note_update_by_hand(self) -> None:
        """Take what has moved since a chunk's backward for the update that nobody announced."""
        if not self.by_hand:
            self._take_spent()
            return
        moved = self.parameters.moved()
        if moved or (self.tentative is not None and self.tentative.spent):
            self._take_tentative()
        chunk = self.current
        if not moved or chunk is None or not chunk.complete or chunk.events[-1] != "backward":
            return
        self.moved_by_hand |= moved
        before = self.parameters.known
        self.parameters.take()
        rule = Rule(
            optimizer=BY_HAND,
            groups=({"params": sorted(self.moved_by_hand)},),
            memory={},
            handed=chunk.left or chunk.gradients,
            before=before,
            after=self.parameters.known,
        )
        self.rate.met(rule)
        self._attribute(BY_HAND, rule)

    def _note_idleness(self, live: LiveChunk) -> None:
        """Note a chunk without an update by hand: one that moves nothing can't be seen."""
        if not self.by_hand or live.rules or not live.complete:
            return
        if not any(bool(g.any()) for g in (live.left or live.gradients).values()):
            live.idle = "a gradient that is not zero"
            return
        self.rate.idle()
        if not self.moved_by_hand and not self.closed:
            live.idle = "an update that moves parameters: the first one may be at a rate of zero"

    # The end of a chunk ---------------------------------------------------------------------

    def _drop_open_calls(self) -> None:
        self.open = []

    def _close_current(self, following: Sequence[LiveCall] = ()) -> None:
        live, self.current = self.current, None
        if live is None:
            return
        with self._own_code():
            self._note_idleness(live)
            chunk = self.closing.chunk(
                live,
                initial=self.initial_state,
                optimizers=self.optimizers.each_owned(live.calls[0].snapshot.trainable),
                halted=self.halted,
                following=following,
            )
            self.in_this_batch -= chunk.alternates
            self.past.add(live, chunk)
            if self.keeps_first and not self.closed:
                self.first = chunk
            self.closed.append(chunk.slim())
            self.watched += 1
            self.trained.add((live.batch, live.calls[0].snapshot.trainable))
            del live
            if not self.halted:  # what was under way when training raised is still held
                self.past.look(self.training.let_go, batch=chunk.batch)
            self.busy = True
            try:
                self.hand_on(chunk)
            finally:
                self.busy = False


def _after(look: Callable[[Any, Any], None]) -> Callable[[Original, Any, Any], Any]:
    """Return what looks at the arguments of a call before it makes the call."""

    def called(original: Original, args: Any, kwargs: Any) -> Any:
        look(args, kwargs)
        return original(*args, **kwargs)

    return called


def _only_layer(module: nn.Module) -> str | None:
    """Name the module's one recurrent layer or cell of torch's, if it has just one."""
    kinds = (nn.RNNBase, nn.RNNCellBase)
    layers = [name for name, m in module.named_modules() if isinstance(m, kinds) and name]
    return layers[0] if len(layers) == 1 else None


def _bidirectional(module: nn.Module) -> list[tuple[str, nn.RNNBase]]:
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.RNNBase)]
    return [(name, layer) for name, layer in layers if layer.bidirectional]


def _has_row(tensors: Tensors, row: Tensor) -> bool:
    return any(
        leaf.dim() > 0 and leaf.shape[-1:] == row.shape and bool((leaf == row).all(dim=-1).any())
        for leaf in tensors.values()
    )


def _slopes_handed(run: functools.partial[Any], roots: list[Tensor]) -> list[Tensor | None]:
    """Return with which slope backward starts from each of its roots, where it is handed any."""
    asked = inspect.signature(run.func).bind(*run.args, **run.keywords).arguments
    handed = asked.get("grad_tensors")
    slopes = [handed] if handed is None or isinstance(handed, Tensor) else list(handed)
    return [*slopes, *(None for _ in roots[len(slopes) :])]


def _note_slopes(
    chunk: LiveChunk, roots: Sequence[Tensor], slopes: Sequence[Tensor | None]
) -> None:
    """Note whether backward starts from the slope of a loss, or of a state, that it is handed."""
    handed = [root for root, slope in zip(roots, slopes, strict=True) if slope is not None]
    chunk.by_slope = chunk.by_slope or any(root.dim() > 0 for root in handed)
    chunk.chained = chunk.chained or any(map(_is_state, handed))


def _add_up_cotangents(gathered: Mapping[LiveCall, Tensor]) -> None:
    """Add what a backward brought to each call's prediction to what those before it did."""
    for call, cotangent in gathered.items():
        call.cotangent = cotangent if call.cotangent is None else call.cotangent + cotangent


def _makes_any(predictions: Iterable[Tensor], raw: Sequence[Tensor]) -> bool:
    """Tell whether a prediction is none that forward returned: the loop has another one instead.

    The loss's slope by it is not known. Beside those that are, it would be taken for zero.
    """
    own = {id(tensor) for tensor in raw}
    return bool(raw) and any(id(prediction) not in own for prediction in predictions)


def _is_state(root: Tensor) -> bool:
    return bool(marked(root, _STATE)) and not marked(root, _PREDICTION)
