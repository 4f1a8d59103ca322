"""What must hold: each property is one claim, a pure function from what was seen to findings.

A property of links looks at one chunk, what was due of it, and the chunk before it; a property of
runs at the whole trace, of which it sees no chunk's tensors. A finding is a violation, or says
why nothing could be judged. No findings on a link means that it was judged and holds there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tbptt_props.compare import close, difference, is_clipped, near, same, worst
from tbptt_props.state import leaves
from tbptt_props.trace import (
    Chunk,
    Difference,
    Finding,
    Given,
    Link,
    NotJudged,
    Outcome,
    Place,
    Rerun,
    Span,
    Tensors,
    Trace,
    Violation,
    spanned,
)

LinkProperty = Callable[[Link], Iterator[Finding]]
RunProperty = Callable[[Trace], Iterator[Finding]]


# Of runs ------------------------------------------------------------------------------------


def training_reaches_the_end(trace: Trace) -> Iterator[Finding]:
    """Training goes through all its batches without raising."""
    if trace.halt:
        found = f"raised {trace.halt.error}"
        if trace.halt.line:
            found += f" at {trace.halt.line}"
        yield Violation(trace.halt.after, found, "trained to the end")


def chunks_tile_the_sequence(trace: Trace) -> Iterator[Finding]:
    """Every time step of every sequence is trained on once, in chunks of the promised length."""
    known = [chunk for chunk in trace.chunks if chunk.span is not None]
    if len(known) < len(trace.chunks):
        yield NotJudged("inputs of forward that are the batch's own, not made from them")
        return
    for batch, due in enumerate(trace.plan):
        chunks = [chunk for chunk in known if chunk.batch == batch]
        if trace.halt and (not chunks or len(chunks) < len(due)):
            # What was not reached is the halt's doing; judge as far as training came.
            due = due[: len(chunks)]
        yield from _tiles(batch, trace, chunks, due)


def no_graph_outlives_its_chunk(trace: Trace) -> Iterator[Finding]:
    """When the next chunk is done, nothing holds a chunk's graph any more."""
    for label in trace.outlived:
        yield Violation(label, "its graph lives on after the next chunk", "gone, and its memory free")
    if trace.watched < 2:
        yield NotJudged("a run of at least two chunks")


def the_batch_is_left_as_it_was(trace: Trace) -> Iterator[Finding]:
    """Training changes nothing in the batch it is handed."""
    for batch, changed in trace.changed:
        found = f"{changed.entry} = {changed.found:.6g} after training on it"
        yield Violation(f"batch {batch}", found, f"{changed.due:.6g} as before")


def one_chunk_is_one_ordinary_update(trace: Trace) -> Iterator[Finding]:
    """A run of a single chunk ends as one update of full backpropagation through time."""
    yield from _ends_alike(trace.one_chunk, bitwise=False)


def a_run_can_be_resumed_at_any_boundary(trace: Trace) -> Iterator[Finding]:
    """A run ends, bit for bit, as the run of its second part from what its first part left."""
    yield from _ends_alike(trace.resumed, bitwise=True)


def a_batch_knows_nothing_of_the_one_before(trace: Trace) -> Iterator[Finding]:
    """Only parameters, buffers and the optimizer's memory pass from one batch to the next."""
    yield from _ends_alike(trace.alone, bitwise=True)


# Of links -----------------------------------------------------------------------------------


def state_crosses_every_boundary(link: Link) -> Iterator[Finding]:
    """A chunk starts from exactly the state in which the chunk before it ended."""
    before, given = link.before, link.chunk.given
    if before is None or given is None or link.chunk.starts_batch:
        yield NotJudged("a case of at least two chunks")
        return
    assert before.outcome is not None
    due = [leaves(state) for state in before.outcome.states]
    if not any(due):
        yield NotJudged("a forward that returns a state")
        return
    found = leaves(given.calls[0].state)
    where = f"{link.chunk}, incoming state"
    if not found:
        yield Violation(where, "none", f"the one {before} ended in")
    elif not any(_same_leaves(found, alternative) for alternative in due):
        yield from _state_differences(where, found, due[-1])


def state_starts_afresh_with_each_batch(link: Link) -> Iterator[Finding]:
    """The first chunk of a batch starts from a state that owes nothing to the batch before."""
    before, given = link.before, link.chunk.given
    if before is None or given is None or not link.chunk.starts_batch:
        yield NotJudged("a case of at least two batches")
        return
    assert before.outcome is not None
    old = [leaf for state in before.outcome.states for leaf in leaves(state).values()]
    for path, leaf in leaves(given.calls[0].state).items():
        row = _row_in_common(leaf, old)
        if row is not None:
            found = f"{float(row[0]):.6g}, a value that {before} ended in"
            yield Violation(f"{link.chunk}, incoming {path}", found, "fresh")


def graph_crosses_no_boundary(link: Link) -> Iterator[Finding]:
    """No path leads from a chunk's loss into the graph of an earlier chunk."""
    outcome = _outcome(link)
    for leak in outcome.leaks:
        into = f"the graph of {leak.into}"
        if leak.through:
            where = f"{link.chunk}, incoming {leak.through}"
            yield Violation(where, f"attached to {into}", "detached")
        else:
            yield Violation(f"{link.chunk}, loss", f"reaches {into}", "cut off from it")
    if link.before is None:
        yield NotJudged("a case of at least two chunks")


def loss_is_the_chunks_own(link: Link) -> Iterator[Finding]:
    """What backward starts from is the loss of the chunk's predictions against its own targets."""
    outcome, due = _outcome(link), link.expected
    if not outcome.complete:
        yield NotJudged("a backward that comes to its end")
    elif due.loss is None:
        yield NotJudged(due.missing or "inputs of forward that are the batch's own")
    elif not near(outcome.loss, due.loss, dtype=_dtype(link)):
        yield Violation(f"{link.chunk}, loss", f"{outcome.loss:.6g}", f"{due.loss:.6g}")
    else:
        yield from _cotangent_differences(link)


def gradients_are_the_chunks_own(link: Link) -> Iterator[Finding]:
    """The gradients are those of the chunk's loss: nothing left over, nothing leaked in."""
    outcome, due = _outcome(link), link.expected
    if not outcome.complete:
        yield NotJudged("a backward that comes to its end")
        return
    if due.missing:
        yield NotJudged(due.missing)
        return
    updated = _updated(outcome)
    for name in sorted(due.gradients.keys() | outcome.gradients.keys()):
        if updated and name not in updated:
            continue  # no optimizer reads it
        yield from _gradient_differences(f"{link.chunk}, gradient of ", name, outcome, due.gradients)
    yield from _changed_on_the_way(link)


def gradients_span_the_whole_chunk(link: Link) -> Iterator[Finding]:
    """Gradients reach back through all time steps of the chunk: they are the loss's true slope."""
    given, due = link.chunk.given, link.expected
    assert given is not None
    for i, call in enumerate(given.calls[1:], start=1):
        if leaves(call.state) and not call.attached:
            yield Violation(
                f"{link.chunk}, state at its call {i + 1} of forward", "detached",
                "attached to the calls before it",
            )
            return
    if due.slope is None or due.autograd_slope is None:
        yield NotJudged(due.slope_unclear or due.missing or "a loss that is known")
    elif not near_slope(due.autograd_slope, due.slope):
        where = f"{link.chunk}, slope of the loss by its gradients"
        yield Violation(where, f"{due.autograd_slope:.6g}", f"{due.slope:.6g} by its values")


def events_come_in_a_legal_order(link: Link) -> Iterator[Finding]:
    """Gradients are clear before backward, which comes after forward and before the update."""
    outcome = _outcome(link)
    order = list(outcome.events)
    if "backward" in order and "update" in order[: order.index("backward")]:
        found = " → ".join(order)
        yield Violation(f"{link.chunk}, events", found, "forward → backward → update")
    dirty = [n for n in outcome.dirty if not _updated(outcome) or n in _updated(outcome)]
    if dirty and outcome.complete:
        yield Violation(
            f"{link.chunk}, gradients before backward",
            f"not clear ({dirty[0]}{f' and {len(dirty) - 1} more' if len(dirty) > 1 else ''})",
            "cleared by zero_grad",
        )
    if outcome.complete and outcome.rules and _cleared(outcome):
        where = f"{link.chunk}, gradients at the update"
        yield Violation(where, "cleared after backward", "those of backward")


def each_chunk_updates_once(link: Link) -> Iterator[Finding]:
    """Each optimizer makes one update per chunk."""
    outcome = _outcome(link)
    if not outcome.complete:
        yield NotJudged("a backward that comes to its end")
        return
    counts = Counter(id(rule.optimizer) for rule in outcome.rules)
    for count in sorted({0} if not counts else {*counts.values()} - {1}):
        yield Violation(f"{link.chunk}, updates", str(count), "1")


def the_update_follows_the_optimizers_rule(link: Link) -> Iterator[Finding]:
    """An update moves each parameter as the optimizer's rule says for these gradients."""
    outcome, due = _outcome(link), link.expected
    if not outcome.rules:
        yield NotJudged("an update")
    elif link.chunk.evaluations > 1:
        yield NotJudged("an optimizer that evaluates its closure once")
    elif due.missing or due.rule_missing:
        yield NotJudged(due.missing or due.rule_missing)
    elif outcome.moved:
        yield NotJudged("parameters that nothing else moved")
    else:
        for wrong in worst(outcome.parameters, due.parameters):
            where = f"{link.chunk}, {wrong.entry} after the update"
            yield Violation(where, f"{wrong.found:.9g}", f"{wrong.due:.9g}")


def nothing_but_the_update_moves_parameters(link: Link) -> Iterator[Finding]:
    """Between updates, all parameters stay bit for bit as they are."""
    for between, moved in _outcome(link).moved:
        found = f"moved {between} from {moved.due:.9g} to {moved.found:.9g}"
        yield Violation(f"{link.chunk}, {moved.entry}", found, "moved by the update alone")


def backward_goes_through_manual_backward(link: Link) -> Iterator[Finding]:
    """Every backward goes through Lightning, which scales and synchronises it where needed."""
    through = _outcome(link).backward_through_lightning
    if through is None:
        yield NotJudged("a LightningModule")
    elif not through:
        where = f"{link.chunk}, backward"
        yield Violation(where, "called past Lightning", "self.manual_backward(loss)")


def updates_go_through_lightnings_optimizer(link: Link) -> Iterator[Finding]:
    """Lightning counts every update, so that global_step, max_steps and checkpoints are right."""
    outcome = _outcome(link)
    counted = outcome.updates_through_lightning
    if counted is None:
        yield NotJudged("a LightningModule")
    elif not outcome.rules:
        yield NotJudged("an update")
    elif counted != len(outcome.rules):
        where = f"{link.chunk}, updates counted by global_step"
        yield Violation(where, str(counted), str(len(outcome.rules)))


# How chunks tile ----------------------------------------------------------------------------


def _tiles(
    batch: int, trace: Trace, chunks: Sequence[Chunk], due: Sequence[Span]
) -> Iterator[Finding]:
    prefix = f"batch {batch}, " if batch else ""
    found = [chunk.span for chunk in chunks]
    if found != list(due):
        yield Violation(f"{prefix}chunks", _listed(found), _listed(due))
        return
    sequences = trace.sizes[batch][0]
    yield from _accounted(f"{prefix}inputs", chunks, due, sequences, lambda c: c.inputs)
    if all(chunk.targets is not None for chunk in chunks):
        yield from _accounted(
            f"{prefix}targets", chunks, due, sequences, lambda c: c.targets or ()
        )


def _accounted(
    what: str,
    chunks: Sequence[Chunk],
    due: Sequence[Span],
    sequences: int,
    places: Callable[[Chunk], Sequence[Place]],
) -> Iterator[Finding]:
    """Account for every (sequence, time step): each is due once, in its own chunk."""
    for chunk, (start, stop) in zip(chunks, due, strict=True):
        used = Counter(places(chunk))
        wanted = {(b, t) for b in range(sequences) for t in range(start, stop)}
        wrong = sorted(p for p in wanted | used.keys() if used[p] != (p in wanted))
        if wrong:
            sequence, step = wrong[0]
            times = used[wrong[0]]
            yield Violation(
                f"{what} of {chunk}, sequence {sequence}, time step {step}",
                f"used {times} {'time' if times == 1 else 'times'}",
                f"used {int(wrong[0] in wanted)} {'time' if wrong[0] in wanted else 'times'}",
            )


def _listed(spans: Sequence[Span | None]) -> str:
    if not spans:
        return "none"
    shown = [spanned(span) for span in spans]
    if len(shown) > 12:
        shown = [*shown[:10], "…", shown[-1]]
    return " ".join(shown)


# How runs end -------------------------------------------------------------------------------


def _ends_alike(rerun: Rerun, *, bitwise: bool) -> Iterator[Finding]:
    if rerun.missing:
        yield NotJudged(rerun.missing)
        return
    if rerun.problem:
        yield Violation(rerun.where, rerun.problem, "the same run again")
        return
    assert rerun.first is not None
    assert rerun.second is not None
    first, second = rerun.first, rerun.second
    for part in ("parameters", "buffers", "memory", "state"):
        one, other = getattr(first, part), getattr(second, part)
        if bitwise and one.keys() != other.keys():
            names = ", ".join(sorted(one.keys() ^ other.keys()))
            yield Violation(rerun.where, f"left {part} in one run only ({names})", "the same")
        for wrong in worst(one, other, bitwise=bitwise):
            where = f"{rerun.where}, {wrong.entry} at the end"
            yield Violation(where, f"{wrong.found:.9g}", f"{wrong.due:.9g}")


# States -------------------------------------------------------------------------------------


def _same_leaves(found: Tensors, due: Tensors) -> bool:
    """Compare leaf by leaf, in order: a pair may travel as a list."""
    ones, others = list(found.values()), list(due.values())
    return len(ones) == len(others) and all(map(same, ones, others))


def _state_differences(where: str, found: Tensors, due: Tensors) -> Iterator[Finding]:
    if len(found) != len(due):
        yield Violation(where, f"{len(found)} tensors", f"the {len(due)} of the chunk before")
        return
    for (path, one), (_, other) in zip(found.items(), due.items(), strict=True):
        if one.shape != other.shape:
            yield Violation(f"{where} {path}", f"shape {tuple(one.shape)}", f"{tuple(other.shape)}")
        elif not same(one, other):
            wrong = difference(path, one, other)
            yield Violation(
                f"{where[: -len(' state')]} {wrong.entry}", f"{wrong.found:.9g}", f"{wrong.due:.9g}"
            )


def _row_in_common(leaf: Tensor, old: Sequence[Tensor]) -> Tensor | None:
    """Return a row, along the last dimension, that `leaf` shares with a tensor from before."""
    if leaf.dim() == 0 or not leaf.is_floating_point():
        return None
    for other in old:
        if other.dim() == 0 or other.shape[-1] != leaf.shape[-1]:
            continue
        rows, olds = leaf.reshape(-1, leaf.shape[-1]), other.reshape(-1, leaf.shape[-1])
        for row in rows:
            if bool(row.any()) and bool((olds == row).all(dim=1).any()):
                return row
    return None


# Gradients ----------------------------------------------------------------------------------


def _outcome(link: Link) -> Outcome:
    assert link.chunk.outcome is not None
    return link.chunk.outcome


def _dtype(link: Link) -> torch.dtype:
    given = link.chunk.given
    return given.calls[0].prediction.dtype if isinstance(given, Given) else torch.float64


def near_slope(one: float, other: float) -> bool:
    """Tell whether autograd's slope is the one of the values, but for what differencing costs."""
    return abs(one - other) <= 1e-8 + 1e-6 * max(abs(one), abs(other))


def _cotangent_differences(link: Link) -> Iterator[Finding]:
    """Compare how the loss depends on each prediction: equal losses need not look at the same."""
    outcome = _outcome(link)
    for found, due in zip(outcome.cotangents, link.expected.cotangents, strict=False):
        if due is not None and found is not None and not close(found, due):
            wrong = difference("prediction", found, due)
            where = f"{link.chunk}, slope of the loss by {wrong.entry}"
            yield Violation(where, f"{wrong.found:.6g}", f"{wrong.due:.6g}")


def _updated(outcome: Outcome) -> frozenset[str]:
    groups = (group for rule in outcome.rules for group in rule.groups)
    return frozenset(name for group in groups for name in group["params"])


def _gradient_differences(
    where: str, name: str, outcome: Outcome, expected: Tensors
) -> Iterator[Finding]:
    found, due = outcome.gradients.get(name), expected.get(name)
    if due is None:
        due = torch.zeros_like(found) if found is not None else None
    if due is None:
        return
    if found is None:
        found = torch.zeros_like(due)
    for wrong in worst({name: found}, {name: due}):
        yield Violation(f"{where}{wrong.entry}", f"{wrong.found:.6g}", f"{wrong.due:.6g}")


def _cleared(outcome: Outcome) -> bool:
    """Tell whether the gradients of backward were gone when the update came."""
    if not any(bool(g.any()) for g in outcome.gradients.values()):
        return False
    updated = [outcome.gradients[n] for n in _updated(outcome) if n in outcome.gradients]
    if not any(bool(g.any()) for g in updated):
        return False
    return not any(bool(g.any()) for rule in outcome.rules for g in rule.handed.values())


def _changed_on_the_way(link: Link) -> Iterator[Finding]:
    """Between backward and update, gradients may be clipped, and nothing else."""
    outcome = _outcome(link)
    if link.chunk.evaluations > 1 or _cleared(outcome):
        return
    for rule in outcome.rules:
        if is_clipped(outcome.gradients, rule.handed):
            continue
        for wrong in _first(worst(rule.handed, {
            name: g for name, g in outcome.gradients.items() if name in _updated(outcome)
            and any(name in group["params"] for group in rule.groups)
        })):
            where = f"{link.chunk}, gradient of {wrong.entry} at the update"
            yield Violation(where, f"{wrong.found:.6g}", f"{wrong.due:.6g} as backward left it")


def _first(differences: Iterator[Difference]) -> Iterator[Difference]:
    for found in differences:
        yield found
        return


OF_RUNS: tuple[RunProperty, ...] = (
    training_reaches_the_end,
    chunks_tile_the_sequence,
    no_graph_outlives_its_chunk,
    the_batch_is_left_as_it_was,
    one_chunk_is_one_ordinary_update,
    a_run_can_be_resumed_at_any_boundary,
    a_batch_knows_nothing_of_the_one_before,
)
OF_LINKS: tuple[LinkProperty, ...] = (
    state_crosses_every_boundary,
    state_starts_afresh_with_each_batch,
    graph_crosses_no_boundary,
    loss_is_the_chunks_own,
    gradients_are_the_chunks_own,
    gradients_span_the_whole_chunk,
    events_come_in_a_legal_order,
    each_chunk_updates_once,
    the_update_follows_the_optimizers_rule,
    nothing_but_the_update_moves_parameters,
    backward_goes_through_manual_backward,
    updates_go_through_lightnings_optimizer,
)
PROPERTIES: tuple[RunProperty | LinkProperty, ...] = (*OF_RUNS, *OF_LINKS)
