"""Subject and case in, trace out: trains for real, and writes down what was seen."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from tbptt_props import laws
from tbptt_props.batch import Batch, Parts
from tbptt_props.case import Case
from tbptt_props.compiling import graphed_in
from tbptt_props.device import unavailable
from tbptt_props.lines import is_the_users, shown
from tbptt_props.precision import dtype_of, overflowed
from tbptt_props.process import Hung, undisturbed
from tbptt_props.state import leaves
from tbptt_props.subject import (
    ObservationError,
    Subject,
    WiringError,
    held_to_be_one,
    require,
)
from tbptt_props.trace import Chunk, Halt, Rerun, Span, Trace
from tbptt_props.train import configured, train, validates
from tbptt_props.watch import Watch

_Result = TypeVar("_Result")
Fresh = Callable[[], Subject]  # makes the subject anew, sharing nothing with the one before


def observe(subject: Subject, case: Case) -> Trace:
    """Train a copy of the subject's module on `case`; return what it was seen to do.

    All tensors of all chunks are kept, so that memory grows with the number of chunks; `check`
    judges each chunk as it ends, and keeps none.

    Raises:
        ObservationError: the run cannot be described; the message says what is needed.
        TypeError: `subject` is no Subject, `case` no Case, or the batches are no list.
        ValueError: the batches are empty, of an impossible shape, or not finite.
    """
    require(subject, case)
    chunks: list[Chunk] = []

    def attempt(fresh: Fresh) -> Trace:
        chunks.clear()
        with observing(case, dtype_of(subject.precision), subject.device):
            return run(fresh, case, chunks.append)

    return replace(rewired(subject.copied, attempt), chunks=tuple(chunks))


def rewired(fresh: Fresh, attempt: Callable[[Fresh], _Result]) -> _Result:
    """Attempt it on the subject as it was told, then as it is found to be wired."""
    try:
        return attempt(fresh)
    except WiringError as error:
        if not error.instead:
            raise
        instead = dict(error.instead)
    return rewired(lambda: replace(fresh(), **instead), attempt)


@contextmanager
def observing(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Iterator[None]:
    """Run the block as subjects are run: seeded from the case, quiet, and without a trace.

    Raises:
        ObservationError: there is no such device here.
    """
    missing = unavailable(device)
    if missing:
        raise ObservationError(f"training on {device} needs {missing}")
    with undisturbed(dtype=dtype, seed=case.seed, device=device):
        yield


def run(fresh: Fresh, case: Case, hand_on: Callable[[Chunk], None]) -> Trace:
    """Train a fresh subject, hand on each chunk as it ends, and run the laws' second runs."""

    def anew() -> Subject:
        return made_ready(fresh)

    diverged: list[str] = []
    skipped: list[int] = []

    def looked_at(chunk: Chunk) -> None:
        if overflowed(chunk):
            skipped.append(chunk.index)
        else:
            diverged.extend(_not_finite(chunk))
        marks.ended(chunk)
        hand_on(chunk)

    subject = anew()
    batches = batches_of(subject, case)
    plan = tuple(subject.contract.plan(case, b.inputs.shape[1]) for b in batches)
    marks = laws.Bookmarks(plan, case, subject.contract)
    watch = Watch(subject, batches, looked_at, plan=plan)
    marks.watch(watch)
    with watch.on():
        copies = [batch.copied().whole for batch in batches]
        validation = _validation(subject, case, batches)
        error = watch.watchdog.over(lambda: train(subject, copies, watch, validation=validation))
        halt = _halt(error, watch)
        error = None  # its traceback holds the loop's frames, and with them its graphs
        watch.finished(halted=halt is not None)
    if watch.problem is not None:
        raise watch.problem
    _refuse_float16(subject, halt)
    _refuse_capture(halt)
    _refuse_unknown_state(subject, watch)
    if halt is None:
        _refuse_automatic(subject, watch, plan)
        _refuse_cuts_in_forward(subject, watch, plan)
    if not watch.closed:
        _refuse_unseen(subject, watch, lenient=halt is not None or _small(case, plan))
    trace = Trace(
        sizes=tuple((b.inputs.shape[0], b.inputs.shape[1]) for b in batches),
        plan=plan,
        planned=subject.contract.planned,
        context=subject.contract.context,
        padding=tuple(batch.padding for batch in batches),
        chunks=tuple(watch.closed),
        halt=halt,
        outlived=tuple(dict.fromkeys(watch.past.outlived)),
        watched=watch.watched,
        updates=watch.updates,
        moved_apart=watch.moved_apart,
        counted=watch.lightning_updates() if watch.lightning_updates else None,
        changed=tuple(watch.underway.changed),
        skipped=len(skipped),
        diverged=next(iter(diverged), ""),
        validated=bool(validation),
    )
    return trace if halt else _with_reruns(trace, anew, batches, marks, watch)


def _validation(subject: Subject, case: Case, batches: Sequence[Batch]) -> list[Any]:
    """Return what to validate on before the last batch: in every second case, that batch itself.

    In the others nothing is, so that it can be told what is its doing.
    """
    asked = subject.validates and subject.train is None and validates(subject.module)
    if not asked or len(batches) < 2 or case.seed & 2:
        return []
    return [batches[-1].copied().whole]


def made_ready(fresh: Fresh) -> Subject:
    """Make the subject anew, in the dtype of the run, with a loss that answers for itself."""
    subject = fresh()
    _refuse_graphs(subject)
    configured(subject.module)
    subject.module.to(device=subject.device, dtype=torch.get_default_dtype())
    loss = subject.loss
    return subject if loss is None else replace(subject, loss=held_to_be_one(loss))


def _not_finite(chunk: Chunk) -> Iterator[str]:
    """Say what of a chunk's numbers is infinite, or no number."""
    assert chunk.outcome is not None
    if not math.isfinite(chunk.outcome.loss):
        yield f"finite numbers: the loss of {chunk} is {chunk.outcome.loss}"
    for name, gradient in chunk.outcome.gradients.items():
        if not bool(gradient.isfinite().all()):
            yield f"finite numbers: the gradient of {name} in {chunk} is not finite"


def _with_reruns(
    trace: Trace, fresh: Fresh, batches: Sequence[Batch], marks: laws.Bookmarks, watch: Watch
) -> Trace:
    if trace.diverged:
        unequal = Rerun("", missing=trace.diverged)  # infinities are equal whatever they come from
        return replace(trace, one_chunk=unequal, resumed=unequal, alone=unequal)
    if watch.moved_afterwards():
        unknown = Rerun("", missing="parameters that nothing changes after the last batch")
        return replace(trace, one_chunk=unknown, resumed=unknown, alone=unknown)
    first = laws.ending(watch.module, watch.training, watch.last_state, watch.rates)
    return replace(
        trace,
        one_chunk=laws.one_chunk(fresh, batches, marks, first, watch),
        resumed=laws.resumed(fresh, batches, marks, first, watch),
        alone=laws.alone(fresh, batches, marks, first, watch),
    )


def batches_of(subject: Subject, case: Case) -> list[Batch]:
    """Return the batches of `case` in the dtype of the run, after making sure they are usable.

    Raises:
        TypeError: they are no list.
        ValueError: there are none, one does not hold inputs and targets, or is empty, its parts do
            not go together, or not finite.
    """
    # A state that goes on from batch to batch needs as many sequences in each.
    alike = case if subject.contract.carry == "within" else replace(case, seed=case.seed & ~1)
    made: Any = alike.tensors() if subject.batches is None else subject.batches(case)
    if not isinstance(made, Iterable):
        raise TypeError(f"batches must return a list of pairs of tensors, got {_kind(made)}")
    batches = list(made)
    if not batches:
        raise ValueError("batches must hold at least one batch, got none")
    return [_usable(i, batch, subject.parts) for i, batch in enumerate(batches)]


def _usable(index: int, whole: Any, parts: Parts | None) -> Batch:
    name = f"batches[{index}]"
    if parts is None and len(leaves(whole)) < 2:
        raise ValueError(
            f"{name} must hold inputs and targets, got {_told(whole)}: say which parts of it they "
            "are with Subject(..., parts=...)"
        )
    try:
        batch = Batch.of(whole, parts)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
        due = f"{name} must be what parts takes apart, but parts raised {raised}"
        raise ValueError(due) from error
    _require_finite(name, batch)
    return batch.converted(torch.get_default_dtype())


def _require_finite(name: str, batch: Batch) -> None:
    x, targets = batch.inputs, leaves(batch.targets, "targets")
    for y in targets.values():
        by_step = y.shape[:2] == x.shape[:2]
        if y.dim() < 1 or len(y) != len(x) or (y.dim() > 2 and not by_step):
            raise ValueError(
                f"{name} must have inputs (B, T, ...) and targets (B, T, ...) of the same B and T, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
    if not x.numel() or not all(y.numel() for y in targets.values()):
        raise ValueError(f"{name} must not be empty, got inputs {tuple(x.shape)}")
    for part, tensor in (("inputs", x), *targets.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity among its {part}")


def _told(whole: Any) -> str:
    """Say what a batch is that holds no inputs and targets."""
    if not isinstance(whole, (tuple, list)):
        return _kind(whole)
    return " and ".join(map(_kind, whole)) if len(whole) == 2 else f"{len(whole)} parts"


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _small(case: Case, plan: Sequence[Sequence[Span]]) -> bool:
    """Tell whether a loop may have found nothing to train on, which is a finding.

    It may drop all but whole chunks, or shift its targets inside a chunk of one time step.
    """
    return case.chunk == 1 or all(len(chunks) <= 1 for chunks in plan)


def _refuse_automatic(subject: Subject, watch: Watch, plan: Sequence[Sequence[Span]]) -> None:
    """Refuse a module that leaves the update to Lightning, where one for each chunk is promised."""
    automatic = getattr(subject.module, "automatic_optimization", False)
    whole = _is_uncut(watch, plan) and not subject.contract.adds_up
    if automatic and subject.train is None and whole:
        raise ObservationError(
            f"{type(subject.module).__name__} trains by automatic optimization, one update a "
            "batch: set self.automatic_optimization = False and make one update per chunk in "
            "training_step; or, if forward cuts the sequence itself and one update for all of its "
            "chunks is meant, promise that with Contract(update='batch')"
        )


def _refuse_float16(subject: Subject, halt: Halt | None) -> None:
    """Refuse a precision for which this device has no kernels: that is nobody's mistake."""
    words = ("could not create a primitive", "not implemented for 'Half'")
    if halt and subject.precision == "16-mixed" and any(word in halt.error for word in words):
        raise ObservationError(
            f"{type(subject.module).__name__} can't be trained in 16-mixed on the CPU, which lacks "
            f"a kernel for float16 ({halt.error}): it needs CUDA, or precision='bf16-mixed'"
        )


def _refuse_graphs(subject: Subject) -> None:
    """Refuse what replays a CUDA graph: it reads the memory in which parameters once lay."""
    graphed = graphed_in(subject.module)
    if graphed:
        raise ObservationError(
            f"{type(subject.module).__name__}.{graphed} replays a CUDA graph, which runs on the "
            "very memory and lengths that it was captured with, and on no copy of the module: "
            "judge it without make_graphed_callables; torch.compile(core, mode='reduce-overhead') "
            "can be judged as it is"
        )


def _refuse_capture(halt: Halt | None) -> None:
    """Refuse a loop that captures a CUDA graph itself: looking at numbers breaks the capture."""
    if halt and "captur" in halt.error and "CUDA" in halt.error:
        raise ObservationError(
            f"a loop can't be watched while it captures a CUDA graph ({halt.error}): judge it "
            "without"
        )


def _is_uncut(watch: Watch, plan: Sequence[Sequence[Span]]) -> bool:
    return len(watch.closed) <= len(plan) < sum(map(len, plan))


def _refuse_cuts_in_forward(subject: Subject, watch: Watch, plan: Sequence[Sequence[Span]]) -> None:
    """Refuse a forward that is handed whole sequences and cuts them itself: its layer runs chunks.

    Its pieces are to be judged, and not the call that makes them.
    """
    if watch.layer and watch.layer_cuts and _is_uncut(watch, plan):
        raise WiringError(
            f"{type(subject.module).__name__}.{subject.forward} is handed whole sequences and cuts "
            "them itself: name the call that runs a chunk with Subject(..., forward='...'), a "
            "method or a submodule",
            {"forward": watch.layer, "loss": None},
        )


def _refuse_unseen(subject: Subject, watch: Watch, *, lenient: bool) -> None:
    """Refuse a run in which there was nothing to describe."""
    kind = type(subject.module).__name__
    instead = watch.layer if watch.layer_calls else None
    if not watch.calls_ever and (instead or not lenient):
        raise WiringError(
            f"{kind}.{subject.forward} was never called while training: name the call that runs a "
            "chunk with Subject(..., forward='...'), a method or a submodule"
            + (
                ", and let train take its batches one by one as it comes to them"
                if subject.train
                else ""
            ),
            {"forward": instead, "loss": None} if instead else {},  # it returns no prediction
        )


def _refuse_unknown_state(subject: Subject, watch: Watch) -> None:
    """Refuse a state that is nowhere, once forward was called."""
    unknown = [name for name in watch.forward.kept if name not in watch.forward.met]
    if watch.calls_ever and unknown:
        raise ObservationError(
            f"state={unknown[0]!r} is neither an argument of {type(subject.module).__name__}."
            f"{subject.forward} nor an attribute of the module's"
        )


def _halt(error: BaseException | None, watch: Watch) -> Halt | None:
    if error is None or watch.problem is not None:
        return None
    text = f"{type(error).__name__}: {_first_sentence(str(error))}".strip(": ")
    if isinstance(error, Hung) and watch.watchdog.barked:
        text = str(error)
    return Halt(error=text, after=watch.now(), line=_line(error))


def _first_sentence(text: str) -> str:
    """Return what an error says first; torch's go on for a paragraph."""
    lines = text.strip().splitlines()
    return lines[0].split(". ")[0].split(" (or ")[0][:200] if lines else ""


def _line(error: BaseException) -> str:
    """Name the user's own line in which the error came up: neither a library's nor ours."""
    tb = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in tb if is_the_users(frame.filename)]
    if not frames:
        return ""
    return shown((frames[-1].filename, frames[-1].lineno or 0), frames[-1].line)
