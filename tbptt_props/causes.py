"""Why a property is likely broken, told by what a run showed, and what to write instead.

A fingerprint is a function that tells whether a run looks as one mistake makes it look; its name
is the cause, its docstring says the mistake and what to try. It sees what was observed of the run
and nothing of the subject: neither its class nor its source.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from tbptt_props.evidence import Evidence, Look, is_near
from tbptt_props.trace import Cause, Chunk, Span

# Of the state ---------------------------------------------------------------------


def state_is_not_detached(seen: Evidence) -> bool:
    """The state is carried into the next chunk with its graph, all of it.

    Try: state = tuple(s.detach() for s in state) after the update; a single tensor's own
    state.detach() returns a new one and leaves the old as it is
    """
    through = [sum(1 for leak in look.leaks if leak.through) for look in seen.looks]
    parts = [look.parts for look in seen.looks]
    return any(through) and all(n in (0, part) for n, part in zip(through, parts, strict=True))


def state_is_detached_in_part(seen: Evidence) -> bool:
    """One part of the state is detached and another is not: an LSTM's state is a pair.

    Try: state = tuple(s.detach() for s in state)
    """
    through = [sum(1 for leak in look.leaks if leak.through) for look in seen.looks]
    return any(0 < n < look.parts for n, look in zip(through, seen.looks, strict=True))


def a_container_is_detached(seen: Evidence) -> bool:
    """The state is a tuple, list or dict of tensors, which has no detach of its own.

    Try: state = tuple(s.detach() for s in state)
    """
    return bool(re.search(r"'\w+' object has no attribute 'detach'", seen.error))


def state_changes_its_type(seen: Evidence) -> bool:
    """The state that is handed on is a tuple or list where forward takes a single tensor.

    Try: state = state.detach(): a GRU's or RNN's state is one tensor, and a loop over it unpacks
    its layers
    """
    found = re.search(r"'(tuple|list)' object has no attribute '(\w+)'", seen.error)
    return found is not None and found[2] != "detach" and bool(seen.looks)


def forward_detaches_within_a_chunk(seen: Evidence) -> bool:
    """Forward cuts the graph within a chunk: it detaches the state, or takes its .data.

    Try: detach the state between chunks alone, in training_step, and not in forward
    """
    return SPAN in seen.broken and not _ungraded(seen)


def features_are_cut_off(seen: Evidence) -> bool:
    """Some parameters never get a gradient: what they make is detached.

    Try: take the detach() or no_grad() out of forward, between those parameters and the prediction
    """
    ungraded = [look.ungraded for look in seen.looks]
    return SPAN in seen.broken and bool(ungraded) and bool(frozenset.intersection(*ungraded))


def forward_runs_under_no_grad(seen: Evidence) -> bool:
    """Some chunks run forward, or part of it, without recording a graph.

    Try: take no_grad(), set_grad_enabled(False) or inference_mode() from around the forward
    """
    lost = SPAN in seen.broken and not features_are_cut_off(seen) and bool(_ungraded(seen))
    return lost or "does not require grad" in seen.error


def state_is_dropped(seen: Evidence) -> bool:
    """No state is handed to forward: a chunk starts as if it were the first.

    Try: prediction, state = self(x, state)
    """
    return _carried_as(seen, "missing")


def state_is_reset(seen: Evidence) -> bool:
    """The state is set back at every boundary to what a sequence starts from.

    Try: make the initial state once a batch, before the loop over chunks
    """
    return _carried_as(seen, "fresh")


def state_is_ignored(seen: Evidence) -> bool:
    """Forward takes a state and does not use it.

    Try: features, state = self.core(x, state)
    """
    return any(look.effect is False for look in seen.looks)


def state_is_not_the_last(seen: Evidence) -> bool:
    """Forward returns another state than the one after the chunk's last time step.

    Try: return the state that the last time step ended in
    """
    return SUMS in seen.broken


def state_is_one_chunk_late(seen: Evidence) -> bool:
    """A chunk starts from the state of two chunks ago.

    Try: hand on the state that forward returned just now, not the one kept before it
    """
    wrong = [look for look in seen.looks if look.carried]
    second = {
        id(look)
        for before, look in pairwise(seen.looks)
        if before.chunk.starts_batch and not look.chunk.starts_batch
    } | {id(look) for look in seen.looks[1:2]}
    late = ({"missing", "fresh"} if id(look) in second else {"older"} for look in wrong)
    return bool(wrong) and all(look.carried & due for look, due in zip(wrong, late, strict=True))


def state_is_never_renewed(seen: Evidence) -> bool:
    """Every chunk starts from the state that the first one ended in.

    Try: prediction, state = self(x, state) in every chunk
    """
    return _carried_as(seen, "first")


def state_is_scaled(seen: Evidence) -> bool:
    """The state is multiplied by a factor on its way to the next chunk.

    Try: state = tuple(s.detach() for s in state), and nothing else
    """
    return _carried_as(seen, "scaled")


def state_is_rounded(seen: Evidence) -> bool:
    """The state passes through a dtype of lower precision on its way to the next chunk.

    Try: keep the state in the dtype that forward returns it in
    """
    return _carried_as(seen, "rounded")


def state_is_rearranged(seen: Evidence) -> bool:
    """The state's numbers change places: sequences or layers get each other's.

    Try: hand the state on as forward returned it; to swap two dimensions, transpose, not reshape
    """
    return _carried_as(seen, "rearranged")


def parts_of_the_state_are_swapped(seen: Evidence) -> bool:
    """The parts of the state are handed on in another order: an LSTM's state is (h, c).

    Try: hand the state on as forward returned it, (h, c)
    """
    return _carried_as(seen, "swapped")


def one_part_of_the_state_stands_for_others(seen: Evidence) -> bool:
    """One part of the state is handed on in place of another: h for c, one layer's for all.

    Try: hand on each part as forward returned it: tuple(s.detach() for s in state)
    """
    return _carried_as(seen, "repeated")


def state_stays_when_sequences_move(seen: Evidence) -> bool:
    """Sequences change places between two chunks, and their states don't go with them.

    Try: sort sequences once, before the first chunk, or index the state as the batch is indexed
    """
    return _carried_as(seen, "unmoved")


def closure_moves_the_state(seen: Evidence) -> bool:
    """A closure that is evaluated again starts from the state that its first evaluation ended in.

    Try: have the closure start from the state before the chunk, and take the new one after the step
    """
    return any(look.repeats_differ for look in seen.looks)


def state_is_carried_in_part(seen: Evidence) -> bool:
    """One part of the state is carried and another is not: an LSTM's state is (h, c).

    Try: hand on both, (h, c)
    """
    return _carried_as(seen, "in part") or any(look.set_back for look in seen.looks)


def state_is_changed_on_the_way(seen: Evidence) -> bool:
    """The state is changed on its way to the next chunk, or made by another forward.

    Try: carry what the chunk's own forward returned, detached and nothing else
    """
    return _carried_as(seen, "otherwise") and not closure_moves_the_state(seen)


def state_outlives_its_batch(seen: Evidence) -> bool:
    """A batch starts from the state of the one before: kept, or written into in place.

    Try: state = None at the start of training_step, and never copy_ into an initial state
    """
    return AFRESH in seen.broken


def core_runs_along_the_batch(seen: Evidence) -> bool:
    """The recurrence runs along the batch: it takes sequences for time steps.

    Try: batch_first=True for inputs (sequences, time steps, features), or x.transpose(0, 1)
    """
    return APART in seen.broken


# Of the chunks -----------------------------------------------------------------------------------


def tail_is_dropped(seen: Evidence) -> bool:
    """Time steps behind the last full chunk are dropped: the tail is a chunk too.

    Try: for x, y in zip(x.split(k, dim=1), y.split(k, dim=1))
    """
    return _cut_as(seen, lambda cut: [s for s in cut.due if _length(s) == cut.chunk]) or _cut_as(
        seen, lambda cut: cut.due[: max(1, cut.steps // cut.chunk)]
    )


def last_chunk_is_dropped(seen: Evidence) -> bool:
    """The loop ends one chunk too early.

    Try: for x, y in zip(x.split(k, dim=1), y.split(k, dim=1))
    """
    return _cut_as(seen, lambda cut: cut.due[:-1])


def tail_is_merged(seen: Evidence) -> bool:
    """The tail is trained on as part of the chunk before it.

    Try: for x, y in zip(x.split(k, dim=1), y.split(k, dim=1))
    """
    return _cut_as(seen, _tail_merged)


def tail_is_padded(seen: Evidence) -> bool:
    """The tail is filled up with rows that are not the batch's own, and trained on with them.

    Try: leave the tail short: x.split(k, dim=1) does, or mask what is padded in the loss
    """
    padded = [look for look in seen.looks if (-1, -1) in look.chunk.inputs]
    short = [s is not None and _length(s) < seen.chunk for s in (p.chunk.span for p in padded)]
    return bool(padded) and all(short)


def cut_from_the_end(seen: Evidence) -> bool:
    """Chunks are counted from the end of the sequence: the first one is short, not the last.

    Try: for x, y in zip(x.split(k, dim=1), y.split(k, dim=1))
    """
    return _cut_as(seen, lambda cut: _spans_of([_length(span) for span in reversed(cut.due)]))


def cut_into_k_chunks(seen: Evidence) -> bool:
    """The length of a chunk is taken for the number of chunks.

    Try: x.split(k, dim=1): chunk(k) and tensor_split(k) make k chunks, not chunks of k
    """
    return _cut_as(seen, _k_chunks) or _cut_as(seen, _k_chunks_rounded_up)


def first_chunk_is_one_too_long(seen: Evidence) -> bool:
    """The first cut comes after K + 1 time steps: it is counted one too far.

    Try: if (t + 1) % k == 0, with t counted from 0
    """
    return _cut_as(seen, lambda cut: _every_k(cut, first=cut.chunk + 1))


def first_chunk_is_one_too_short(seen: Evidence) -> bool:
    """The first cut comes after K - 1 time steps: it comes before the one that is counted.

    Try: if t > 0 and t % k == 0 before time step t, or (t + 1) % k == 0 after it
    """
    return _cut_as(seen, lambda cut: _every_k(cut, first=max(1, cut.chunk - 1)))


def first_chunk_is_left_out(seen: Evidence) -> bool:
    """The first chunk of each batch is not trained on.

    Try: start the loop at time step 0; a burn-in is promised by Contract(lengths=...)
    """
    return bool(seen.trace.chunks) and _cut_as(seen, lambda cut: cut.due[1:])


def every_other_chunk_is_skipped(seen: Evidence) -> bool:
    """Only every second chunk is trained on.

    Try: for t in range(0, x.shape[1], k), not 2 * k
    """
    return _cut_as(seen, lambda cut: cut.due[::2])


def windows_slide(seen: Evidence) -> bool:
    """Chunks start at every time step: windows that slide by one, not by K.

    Try: for t in range(0, x.shape[1], k); x.unfold(1, k, k), not x.unfold(1, k, 1)
    """
    return any(
        _cut_as(seen, functools.partial(_windows, behind=behind)) for behind in (False, True)
    )


def each_batch_is_passed_again(seen: Evidence) -> bool:
    """The loop goes over each batch's chunks several times.

    Try: take the inner loop over epochs out; the Trainer has its own
    """
    return any(_cut_as(seen, lambda cut, n=n: cut.due * n) for n in (2, 3))  # type: ignore[misc]


def cuts_go_on_from_the_batch_before(seen: Evidence) -> bool:
    """Time steps are counted on from batch to batch, and cuts come where that count says.

    Try: count from 0 in each batch
    """
    return _cut_as(seen, lambda cut: _counted_on(seen, cut))


def chunks_overlap(seen: Evidence) -> bool:
    """Every chunk ends with the first time step of the next one, which is trained on twice.

    Try: x[:, t : t + k], without the one more
    """
    return _cut_as(
        seen,
        lambda cut: [
            (t, min(t + cut.chunk + 1, cut.steps)) for t in range(0, cut.steps, cut.chunk)
        ],
    )


def a_time_step_between_chunks_is_skipped(seen: Evidence) -> bool:
    """One time step is left out between any two chunks.

    Try: for t in range(0, x.shape[1], k), not k + 1
    """
    return _cut_as(
        seen,
        lambda cut: [
            (t, min(t + cut.chunk, cut.steps)) for t in range(0, cut.steps, cut.chunk + 1)
        ],
    )


def cut_along_the_batch(seen: Evidence) -> bool:
    """The wrong dimension is cut: K sequences at a time instead of K time steps.

    Try: x.split(k, dim=1), or Subject(..., parts=...) if a batch has time steps first
    """
    few = all(0 < len(look.chunk.lanes) <= seen.chunk for look in seen.looks)
    return few and _cut_as(seen, lambda cut: [(0, cut.steps)] * -(-cut.sequences // cut.chunk))


def the_sequence_is_never_cut(seen: Evidence) -> bool:
    """Whole sequences are trained on: nothing is cut.

    Try: for x, y in zip(x.split(k, dim=1), y.split(k, dim=1))
    """
    rows = [(len(look.chunk.lanes), seen.trace.sizes[look.chunk.batch][0]) for look in seen.looks]
    whole = all(found in (0, due) for found, due in rows)
    truncated = not one_backward_through_the_batch(seen)
    return whole and truncated and _cut_as(seen, lambda cut: [(0, cut.steps)])


def only_the_first_batch_is_cut(seen: Evidence) -> bool:
    """The first batch is cut as promised, and later ones are not.

    Try: leave self.chunk as it is; give what belongs to one batch another name
    """
    return _cut_as(seen, lambda cut: [(0, cut.steps)] if cut.batch else cut.due)


def chunks_run_backwards(seen: Evidence) -> bool:
    """The last chunk is trained on first.

    Try: iterate over the chunks in the order of time
    """
    return _cut_as(seen, lambda cut: cut.due[::-1])


def time_steps_change_places(seen: Evidence) -> bool:
    """The time steps of a chunk are fed in another order than they have.

    Try: feed forward a chunk as it was cut; a shuffle is for sequences, not for their time steps
    """
    return any(chunk.shuffled is not None and chunk.lanes for chunk in seen.trace.chunks)


def first_chunk_is_repeated(seen: Evidence) -> bool:
    """The loop never moves on: it trains on the first chunk over and over.

    Try: x[:, t : t + k], with the t of the loop
    """
    return _cut_as(seen, lambda cut: cut.due[:1] * len(cut.due))


def every_chunk_is_repeated(seen: Evidence) -> bool:
    """Every chunk is trained on twice in a row.

    Try: call the function that trains a chunk once in the loop
    """
    return _cut_as(seen, lambda cut: [span for span in cut.due for _ in range(2)])


def one_backward_through_the_batch(seen: Evidence) -> bool:
    """Losses are summed over a state never detached: nothing is truncated.

    Try: backward, update and state = tuple(s.detach() for s in state) in every chunk of the loop
    """
    whole = [look for look in seen.looks if look.calls == len(look.plan) > 1]
    return bool(whole) and _cut_as(seen, lambda cut: [(0, cut.steps)])


def batch_and_time_are_mixed(seen: Evidence) -> bool:
    """Rows of several sequences stand in one: reshape or view was taken for transpose.

    Try: x.transpose(0, 1) to swap sequences and time steps
    """
    known = [c for c in seen.trace.chunks if c.inputs and (-1, -1) not in c.inputs]
    return any(not c.lanes and len({place[0] for place in c.inputs}) > 1 for c in known)


def targets_are_shifted(seen: Evidence) -> bool:
    """Each time step is scored against another one's target.

    Try: y as the batch has it; shift inputs against targets once, where the batch is made
    """
    return any(_shifted(chunk) for chunk in seen.trace.chunks)


def last_target_of_each_chunk_is_lost(seen: Evidence) -> bool:
    """The last time step of each chunk is left out of the loss, as by a shift inside the chunk.

    Try: shift inputs against targets over the whole sequence, before it is cut
    """
    scored = [look.scored for look in seen.looks]
    lost = [bool(s) and not s[-1] and all(s[:-1]) for s in scored]
    unfed = bool(seen.trace.chunks) and any(
        _cut_as(seen, functools.partial(_one_short, behind=n)) for n in (0, 1)
    )
    return unfed or (LOSS in seen.broken and bool(lost) and all(lost))


def targets_are_in_another_order(seen: Evidence) -> bool:
    """The targets are the chunk's, but in another order than its predictions.

    Try: flatten both alike, as in loss(prediction.flatten(0, 1), y.flatten(0, 1)) of two tensors
    that both have sequences first, or both time; reverse neither
    """
    return LOSS in seen.broken and any(look.reordered for look in seen.looks)


def only_the_last_time_step_is_scored(seen: Evidence) -> bool:
    """Only the last time step of each chunk is in the loss.

    Try: loss(prediction, y), not loss(prediction[:, -1], y[:, -1])
    """
    scored = [look.scored for look in seen.looks if len(look.scored) > 1]
    last = [s[-1] and not any(s[:-1]) for s in scored]
    return LOSS in seen.broken and bool(last) and all(last)


# Of gradients and updates -----------------------------------------------------------------------


def gradients_are_not_cleared(seen: Evidence) -> bool:
    """Gradients of an earlier chunk are still there when backward adds its own.

    Try: optimizer.zero_grad() before every chunk's backward
    """
    return _legal(seen) and not seen.lacks_updates and _dirty(seen) and not _dirty_in_part(seen)


def gradients_are_cleared_in_part(seen: Evidence) -> bool:
    """Some parameters' gradients are cleared before backward, and others' are not.

    Try: optimizer.zero_grad(), or self.zero_grad(), for all parameters that are updated
    """
    return _legal(seen) and not seen.lacks_updates and _dirty(seen) and _dirty_in_part(seen)


def gradients_are_cleared_before_the_update(seen: Evidence) -> bool:
    """zero_grad stands between backward and update: there is nothing to update with.

    Try: optimizer.zero_grad(); self.manual_backward(loss); optimizer.step(), in this order
    """
    return _legal(seen) and any(look.cleared for look in seen.looks)


def an_optimizer_makes_no_update(seen: Evidence) -> bool:
    """Of several optimizers, one makes no update: it is not stepped, or what it has is frozen.

    Try: step() of each optimizer in every chunk, and untoggle_optimizer after toggle_optimizer
    """
    return any(look.left_out for look in seen.looks)


def the_last_group_gets_no_update(seen: Evidence) -> bool:
    """Chunks share updates in groups, and the chunks behind the last full group get none.

    Try: update after the last chunk of a batch as well, whatever its number
    """
    missed = [look.closes and not look.updates for look in seen.looks]
    last = _last_of_each_batch(seen)
    shared = any(not look.closes for look in seen.looks)
    return (
        any(missed) and shared and all(end for miss, end in zip(missed, last, strict=True) if miss)
    )


def no_update_is_made(seen: Evidence) -> bool:
    """No update is made at all.

    Try: optimizer.step() after every chunk's backward
    """
    made = any(seen.updates) or _moved_besides(seen)
    return seen.lacks_updates and not made and not the_scaler_is_gone_round(seen)


def parameters_are_updated_by_hand(seen: Evidence) -> bool:
    """The loop moves the parameters itself, past every optimizer.

    Try: optimizer.step() in place of the subtraction
    """
    return seen.lacks_updates and not any(seen.updates) and _moved_besides(seen)


def two_updates_are_made(seen: Evidence) -> bool:
    """More than one update is made with one gradient.

    Try: one optimizer.step() a chunk
    """
    return _legal(seen) and bool(seen.updates) and min(seen.updates) > 1


def tail_gets_no_update(seen: Evidence) -> bool:
    """A chunk that is shorter than K gets no update.

    Try: optimizer.step() without a condition on the chunk's length
    """
    without = [look.updates == 0 for look in seen.looks]
    short = [_length(look.chunk.span) < seen.chunk for look in seen.looks]
    return seen.lacks_updates and _legal(seen) and without == short


def every_nth_chunk_gets_an_update(seen: Evidence) -> bool:
    """Only every second chunk, or every n-th, gets an update.

    Try: optimizer.step() after every chunk's backward
    """
    first = seen.updates.index(1) if 1 in seen.updates else 0
    due = [int((i + 1) % (first + 1) == 0) for i in range(len(seen.updates))]
    regular = first > 0 and seen.updates == due
    another = _at_the_end_of_each_batch(seen) or the_last_group_gets_no_update(seen)
    return seen.lacks_updates and regular and not another


def one_update_per_batch(seen: Evidence) -> bool:
    """One update is made at the end of each batch, for all its chunks.

    Try: optimizer.step() inside the loop over chunks, after each one's backward
    """
    by_hand = not automatic_optimization_is_on(seen)
    return by_hand and seen.lacks_updates and _at_the_end_of_each_batch(seen)


def one_backward_per_batch(seen: Evidence) -> bool:
    """The chunks' losses are summed for one backward and one update per batch.

    Try: self.manual_backward(loss) and optimizer.step() inside the loop over chunks
    """
    starts = [{start for start, _ in look.plan} for look in seen.looks]
    pieces = [look.chunk.pieces for look in seen.looks]
    return ONCE in seen.broken and any(
        len(cut) > 1 and all(start in due for start, _ in cut)
        for cut, due in zip(pieces, starts, strict=True)
    )


def update_comes_before_backward(seen: Evidence) -> bool:
    """An update comes between a chunk's forward and its backward, with the gradients of before.

    Try: self.manual_backward(loss) first, then optimizer.step()
    """
    order = ("forward", "update", "backward")  # as far as training came
    return all(e == order[: max(2, len(e))] for e in _events_of(seen)) and bool(seen.looks)


def update_waits_for_the_next_chunk(seen: Evidence) -> bool:
    """A chunk's update is made when the next one begins: the last one waits in vain.

    Try: optimizer.step() at the end of the chunk, not at the start of the next
    """
    events = [look.events for look in seen.looks]
    early = events[:1] == [("forward", "update", "backward", "update")]
    return early and events[-1][-1] == "backward"


def forward_runs_ahead_of_the_update(seen: Evidence) -> bool:
    """The next chunk's forward runs before this one's update, with parameters of before.

    Try: finish one chunk, forward, backward and update, before the next one's forward
    """
    late = [look for look in seen.looks if look.events[:2] == ("forward", "update")]
    return (
        bool(late)
        and all(look.events[-1] == "update" for look in late)
        and (not any(look.chunk.starts_batch for look in late))
    )


def optimizer_is_made_anew(seen: Evidence) -> bool:
    """A new optimizer is made for every chunk: it remembers nothing.

    Try: make it once, in configure_optimizers, and take it from self.optimizers()
    """
    return any(look.another_optimizer for look in seen.looks)


def optimizer_forgets(seen: Evidence) -> bool:
    """The optimizer's memory, momentum for one, is emptied between updates.

    Try: leave optimizer.state alone, and load no state into it between chunks
    """
    kept = any(look.remembers for look in seen.looks)
    return RULE in seen.broken and kept and not optimizer_is_made_anew(seen)


def learning_rate_is_zero(seen: Evidence) -> bool:
    """The learning rate is 0 in every update.

    Try: lr above 0, and scheduler.step() if there is a warm-up
    """
    rates = {rate for look in seen.looks for rate in look.rates}
    return LEARNS in seen.broken and rates == {0.0}


def parameters_are_moved_besides(seen: Evidence) -> bool:
    """Something besides the update moves the parameters: clamping, decay, noise, copying.

    Try: leave parameters to the optimizer (weight_decay is one of its settings)
    """
    return any(seen.updates) and _moved_besides(seen)


def gradients_are_scaled(seen: Evidence) -> bool:
    """The gradients are multiplied by a factor between backward and update.

    Try: leave parameter.grad alone; the learning rate is the optimizer's
    """
    factors = {round(look.scaled, 6) for look in seen.looks if look.updates}
    clips = any(look.clips for look in seen.looks)
    return GRADIENTS in seen.broken and not clips and len(factors) == 1 and factors != {1.0}


def gradients_are_changed_on_the_way(seen: Evidence) -> bool:
    """Something besides clipping changes gradients between backward and update: noise, say.

    Try: leave parameter.grad alone, all of it or a part; the learning rates are the optimizer's
    """
    return any(look.altered for look in seen.looks) and not gradients_are_scaled(seen)


def gradients_are_clipped_otherwise(seen: Evidence) -> bool:
    """Gradients are clipped otherwise than promised: by another limit, or a part by itself.

    Try: one call for all parameters of the optimizer, with the limit of the contract:
    clip_grad_norm_(module.parameters(), limit), or self.clip_gradients(...)
    """
    return any(look.misclipped and not look.untouched for look in seen.looks)


def clipping_misses_the_gradients(seen: Evidence) -> bool:
    """Clipping is promised, but comes too early or too late for the update.

    Try: clip between backward and update: self.manual_backward(loss); self.clip_gradients(...)
    """
    promised = [look for look in seen.looks if look.clips and look.updates]
    short = GRADIENTS in seen.broken or ORDINARY in seen.broken
    return short and bool(promised) and all(look.untouched for look in promised)


def backward_goes_past_lightning(seen: Evidence) -> bool:
    """Backward is called on the loss itself, past Lightning's precision and strategy.

    Try: self.manual_backward(loss) in place of loss.backward()
    """
    past = any(look.through is False for look in seen.looks)
    return past and not automatic_optimization_is_on(seen) and not the_scaler_is_gone_round(seen)


def the_scaler_is_gone_round(seen: Evidence) -> bool:
    """Backward is called past Lightning: its scaler for float16 has scaled no loss to divide by.

    Try: self.manual_backward(loss) in place of loss.backward()
    """
    return "_scale is None" in seen.error and any(look.through is False for look in seen.looks)


def update_goes_past_lightning(seen: Evidence) -> bool:
    """The update is made with the bare torch optimizer, which Lightning does not count.

    Try: optimizer = self.optimizers(), with use_pl_optimizer left at True
    """
    return COUNTED in seen.broken and not optimizer_is_made_anew(seen)


def backward_is_called_twice(seen: Evidence) -> bool:
    """Backward runs twice on the same loss: the gradient is doubled.

    Try: one self.manual_backward(loss) a chunk
    """
    twice = [look.events.count("backward") == 2 for look in seen.looks if not look.chunk.turns]
    return any(twice) and all(is_near(look.ratio, 2.0) for look in seen.looks)


def loss_is_scaled(seen: Evidence) -> bool:
    """The loss is multiplied by a factor before backward.

    Try: self.manual_backward(loss), with the loss as it is
    """
    once = [k for k in seen.looks if k.events.count("backward") == 1 or k.chunk.turns]
    ratios = [look.ratio for look in once]
    return (
        bool(ratios) and not is_near(ratios[0], 1.0) and all(is_near(r, ratios[0]) for r in ratios)
    )


def cast_weights_are_kept(seen: Evidence) -> bool:
    """Autocast casts the weights once and keeps them so: later chunks run on those from before.

    Try: with torch.autocast(...) around one chunk's forward and loss, not around the loop; or
    torch.autocast(..., cache_enabled=False)
    """
    reached = [look for look in seen.looks if look.leaks and not any(k.through for k in look.leaks)]
    return bool(reached) and all(look.keeps_casts for look in reached)


def scaled_gradients_are_changed(seen: Evidence) -> bool:
    """Gradients are clipped or changed while they are scaled up, as they are for float16.

    Try: clip in on_before_optimizer_step(self, optimizer): by then Lightning has scaled them down
    again, inside of optimizer.step(); in a loop without it, scaler.unscale_(optimizer) before
    """
    pairs = [(k.loss, k.due) for k in seen.looks if k.autocast == "torch.float16" and k.updates]
    ratios = [loss / due for loss, due in pairs if due and loss / due > 1]
    return bool(ratios) and all(is_near(r, 2.0 ** round(math.log2(r))) for r in ratios)


def the_loss_is_another_one(seen: Evidence) -> bool:
    """Another loss is trained on than the one that the kit was told.

    Try: Subject(..., loss=...) with the very loss of training_step, or that loss there; where the
    loop changes the targets before its loss, leave out loss=, or hand them over so by parts=
    """
    trained = [look for look in seen.looks if "backward" in look.events and look.due is not None]
    another = [math.isnan(look.ratio) for look in trained]  # a mask may make it so in some chunks
    own = [is_near(look.ratio, 1.0) for look in trained]
    return any(another) and all(a or b for a, b in zip(another, own, strict=True))


def loss_is_a_sum(seen: Evidence) -> bool:
    """The loss is the sum over all entries where their mean is due.

    Try: reduction="mean", which does not grow with the chunk
    """
    return _ratios_are(seen, lambda look: float(look.entries))


def loss_is_divided_by_the_number_of_chunks(seen: Evidence) -> bool:
    """The loss is divided by the number of chunks, though each chunk has an update of its own.

    Try: self.manual_backward(loss), not loss / number of chunks
    """
    return _ratios_are(seen, lambda look: 1 / max(1, len(look.plan)))


def tail_is_weighted_by_its_length(seen: Evidence) -> bool:
    """The loss of a chunk shorter than K is divided by K all the same.

    Try: the mean over the time steps that the chunk has
    """
    return _ratios_are(seen, lambda look: _length(look.chunk.span) / seen.chunk)


def losses_are_summed(seen: Evidence) -> bool:
    """Backward runs on the sum of the batch's losses so far, which holds every chunk's graph.

    Try: self.manual_backward(loss) on the chunk's own; total += loss.detach() for the log
    """
    leaks = [leak for look in seen.looks for leak in look.leaks]
    return bool(leaks) and not any(leak.through for leak in leaks) and _running_sums(seen)


# Of what stands beside the loop -------------------------------------------------------------------


def graphs_are_kept(seen: Evidence) -> bool:
    """Losses, predictions or states are collected with their graphs, and keep them alive.

    Try: losses.append(loss.detach()), total += loss.detach()
    """
    return GONE in seen.broken and not any(look.leaks for look in seen.looks)


def no_backward_reaches_forward(seen: Evidence) -> bool:
    """No backward comes to what forward predicted: there is none, or predictions are detached.

    Try: self.manual_backward(loss), of a loss of the predictions as forward returned them
    """
    return not seen.trace.chunks and not seen.error and seen.trace.updates > 0


def backward_runs_again_on_one_graph(seen: Evidence) -> bool:
    """A second backward runs on a chunk's graph, which the first one freed.

    Try: one backward a chunk: of the sum of its losses, and none by hand of a loss that
    training_step returns
    """
    again = "backward through the graph a second time" in seen.error
    return again and bool(seen.looks) and not any(look.leaks for look in seen.looks)


def the_batch_is_overwritten(seen: Evidence) -> bool:
    """An operation in place writes into the batch.

    Try: x = x * 0.5, not x.mul_(0.5) or x *= 0.5
    """
    return BATCH in seen.broken


def the_seed_is_set_in_the_loop(seen: Evidence) -> bool:
    """The random numbers start over in every chunk: a seed is set, or a state of them restored.

    Try: seed_everything once, before training
    """
    return RANDOM in seen.broken


def validation_leaves_its_traces(seen: Evidence) -> bool:
    """A validation in mid-epoch changes what training goes on from: a state kept on the module.

    Try: reset the state at the start of each batch, or put it aside for as long as validation runs
    """
    wrong = _carried_wrongly(seen)
    return seen.trace.validated and (not any(wrong) or _after_validation(seen, wrong))


def eval_mode_is_left_on(seen: Evidence) -> bool:
    """The module was put in eval mode and never back.

    Try: self.train() after whatever needed self.eval()
    """
    return MODE in seen.broken


def automatic_optimization_is_on(seen: Evidence) -> bool:
    """Automatic optimization is left on: Lightning makes one update per batch, by itself.

    Try: self.automatic_optimization = False in __init__, and one update per chunk
    """
    through = [look.through for look in seen.looks]
    by_itself = False in through and through == _last_of_each_batch(seen)
    return by_itself or "automatic_optimization" in seen.error


def something_is_on_another_device(seen: Evidence) -> bool:
    """A state, a mask or a batch lies on another device than the module.

    Try: torch.zeros(..., device=x.device), or x.new_zeros(...), and register_buffer for what the
    module keeps
    """
    return "same device" in seen.error or "not on the expected device" in seen.error


def short_sequences_are_refused(seen: Evidence) -> bool:
    """Training raises on a sequence that is shorter than a chunk.

    Try: train on a short sequence as one short chunk; x.split(k, dim=1) does
    """
    batch = max((chunk.batch for chunk in seen.trace.chunks), default=-1) + 1
    due = seen.trace.plan[batch] if batch < len(seen.trace.plan) else ()
    return bool(seen.error) and len(due) == 1 and _length(due[0]) < seen.chunk


# What fingerprints look for ---------------------------------------------------------------------


def _carried_wrongly(seen: Evidence) -> list[bool]:
    return [bool(look.carried) for look in seen.looks]


def _after_validation(seen: Evidence, wrong: Sequence[bool]) -> bool:
    """Tell whether a state is wrong in the chunk after a validation, and nowhere else."""
    last = max((look.chunk.batch for look in seen.looks), default=0)
    after = [look.chunk.starts_batch and look.chunk.batch == last > 0 for look in seen.looks]
    return seen.trace.validated and list(wrong) == after


def _carried_as(seen: Evidence, way: str) -> bool:
    if _after_validation(seen, _carried_wrongly(seen)):
        return False
    return _all(way, [look.carried for look in seen.looks if look.carried])


def _all(way: str, carried: Sequence[frozenset[str]]) -> bool:
    return bool(carried) and all(way in ways for ways in carried)


def _ungraded(seen: Evidence) -> frozenset[str]:
    """Return the parameters that never have a gradient, or lose that of an earlier chunk."""
    graded: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    for look in seen.looks:
        lost |= look.ungraded & graded
        graded |= look.graded
    never = [look.ungraded for look in seen.looks]
    return lost | (frozenset.intersection(*never) if never else frozenset())


@dataclass(frozen=True)
class Cut:
    """How a batch was due to be cut."""

    batch: int
    sequences: int
    steps: int
    chunk: int
    due: list[Span]


def _cut_as(seen: Evidence, mistake: Callable[[Cut], list[Span]]) -> bool:
    """Tell whether a mistake in cutting leads to what was found, as far as training came."""
    if TILE not in seen.broken or any(chunk.span is None for chunk in seen.trace.chunks):
        return False
    last = max((chunk.batch for chunk in seen.trace.chunks), default=-1)
    reached = [cut for cut in _cuts(seen) if not seen.error or cut.batch <= last]
    as_found = all(_is_cut_so(seen, cut, mistake(cut), last) for cut in reached)
    return as_found and any(mistake(cut) != cut.due for cut in reached)


def _is_cut_so(seen: Evidence, cut: Cut, spans: Sequence[Span], last: int) -> bool:
    chunks = [chunk for chunk in seen.trace.chunks if chunk.batch == cut.batch]
    found = [span for chunk in chunks for span in chunk.cut_as(cut.due)]
    halted = bool(seen.error) and cut.batch == last
    return found == list(spans[: len(found)] if halted else spans)


def _cuts(seen: Evidence) -> Iterator[Cut]:
    for batch, ((sequences, steps), due) in enumerate(
        zip(seen.trace.sizes, seen.trace.plan, strict=True)
    ):
        yield Cut(batch, sequences, steps, seen.chunk, list(due))


def _length(span: Span | None) -> int:
    return span[1] - span[0] if span else 0


def _windows(cut: Cut, *, behind: bool) -> list[Span]:
    """Return the spans that start at every time step, those behind the last full one as well."""
    starts = range(cut.steps if behind else max(1, cut.steps - cut.chunk + 1))
    return [(t, min(t + cut.chunk, cut.steps)) for t in starts]


def _one_short(cut: Cut, behind: int) -> list[Span]:
    """Return chunks without their last time step, of a sequence with `behind` targets more."""
    ends = [(t, min(t + cut.chunk, cut.steps + behind) - 1) for t in range(0, cut.steps, cut.chunk)]
    return [(start, stop) for start, stop in ends if stop > start]


def _counted_on(seen: Evidence, cut: Cut) -> list[Span]:
    before = sum(steps for _, steps in seen.trace.sizes[: cut.batch])
    return _every_k(cut, first=cut.chunk - before % cut.chunk)


def _k_chunks_rounded_up(cut: Cut) -> list[Span]:
    """Return what torch.chunk makes: as many pieces as fit, all but the last of one length."""
    size = -(-cut.steps // cut.chunk)
    return [(t, min(t + size, cut.steps)) for t in range(0, cut.steps, size)]


def _spans_of(lengths: Iterable[int]) -> list[Span]:
    ends = list(accumulate(lengths, initial=0))
    return list(pairwise(ends))


def _every_k(cut: Cut, *, first: int) -> list[Span]:
    ends = [0, *range(first, cut.steps, cut.chunk), cut.steps]
    return list(pairwise(ends))


def _tail_merged(cut: Cut) -> list[Span]:
    if len(cut.due) < 2 or _length(cut.due[-1]) == cut.chunk:
        return cut.due
    return [*cut.due[:-2], (cut.due[-2][0], cut.steps)]


def _k_chunks(cut: Cut) -> list[Span]:
    size, more = divmod(cut.steps, cut.chunk)
    return [s for s in _spans_of([size + (i < more) for i in range(cut.chunk)]) if _length(s)]


def _shifted(chunk: Chunk) -> bool:
    """Tell whether the targets are those of the inputs' neighbours, all one way."""
    if chunk.targets is None or not chunk.inputs or sorted(chunk.targets) == sorted(chunk.inputs):
        return False
    targets = set(chunk.targets)
    return any(
        len({(b, t + by) for b, t in chunk.inputs} - targets) <= len({b for b, _ in chunk.inputs})
        and len(targets) == len(set(chunk.inputs))
        for by in (-1, 1)
    )


def _legal(seen: Evidence) -> bool:
    return all(
        "backward" in e and "update" not in e[: e.index("backward")] for e in _events_of(seen)
    )


def _events_of(seen: Evidence) -> set[tuple[str, ...]]:
    return {look.events for look in seen.looks}


def _dirty(seen: Evidence) -> bool:
    return any(look.dirty for look in seen.looks)


def _dirty_in_part(seen: Evidence) -> bool:
    """Tell whether some gradients of the chunk before were cleared, each time others were not."""
    pairs = [(before, look) for before, look in pairwise(seen.looks) if look.dirty]
    return bool(pairs) and all(before.graded - look.dirty for before, look in pairs)


def _moved_besides(seen: Evidence) -> bool:
    return seen.moved_at_last or any(look.moved for look in seen.looks)


def _at_the_end_of_each_batch(seen: Evidence) -> bool:
    """Tell whether updates come with the last chunk of each batch, and with no other."""
    last = _last_of_each_batch(seen)
    return bool(last) and not all(last) and [bool(n) for n in seen.updates] == last


def _last_of_each_batch(seen: Evidence) -> list[bool]:
    batches = [look.chunk.batch for look in seen.looks]
    return [here != after for here, after in pairwise([*batches, None])]


def _ratios_are(seen: Evidence, due: Callable[[Look], float]) -> bool:
    """Tell whether each loss is what was due times what `due` says, which is not 1 for all."""
    pairs = [(look.ratio, due(look)) for look in seen.looks if look.due is not None]
    return any(not is_near(factor, 1.0) for _, factor in pairs) and all(
        is_near(*pair) for pair in pairs
    )


def _running_sums(seen: Evidence) -> bool:
    total = 0.0
    for look in seen.looks:
        total = (look.due or 0.0) + (0.0 if look.chunk.starts_batch else total)
        if not is_near(look.loss, total):
            return False
    return True


# Naming -----------------------------------------------------------------------------------------

Fingerprint = Callable[[Evidence], bool]
Group = tuple[tuple[str, ...], tuple[Fingerprint, ...]]  # and the properties that they explain


def causes_of(seen: Evidence) -> tuple[Cause, ...]:
    """Return every cause that fits what a run showed, as far as it is about a broken property."""
    if not seen.broken:
        return ()
    found = tuple(
        Cause.told_by(fingerprint, explained)
        for explained, fingerprints in map(_and_the_whole, FINGERPRINTS)
        for fingerprint in fingerprints
        if seen.broken & explained and fingerprint(seen)
    )
    known = any(LOSS in cause.explains for cause in found)
    if LOSS not in seen.broken or known or not the_loss_is_another_one(seen):
        return found
    return (*found, Cause.told_by(the_loss_is_another_one, frozenset({LOSS, *WHOLE})))


def _and_the_whole(group: Group) -> tuple[frozenset[str], tuple[Fingerprint, ...]]:
    explained, fingerprints = group
    return frozenset(explained) | (set() if {*explained} <= SILENT else WHOLE), fingerprints


def likeliest(found: Iterable[Sequence[Cause]], name: str, *, broken: int = 1) -> tuple[Cause, ...]:
    """Return the causes that fit most runs, of those that can break the property `name`.

    Where it is `broken` in so many runs, a cause that fits fewer than half as many is none.
    """
    fits = Counter(cause for causes in found for cause in causes if name in cause.explains)
    most = max(fits.values(), default=0)
    return tuple(cause for cause in fits if fits[cause] == most and 2 * most >= broken)


END = "training_reaches_the_end"
TILE = "chunks_tile_the_sequence"
GONE = "no_graph_outlives_its_chunk"
BATCH = "the_batch_is_left_as_it_was"
LEARNS = "training_moves_the_parameters"
COUNTED = "updates_go_through_lightnings_optimizer"
ORDINARY = "one_chunk_is_one_ordinary_update"
RESUMED = "a_run_can_be_resumed_at_any_boundary"
ALONE = "a_batch_knows_nothing_of_the_one_before"
CROSSES = "state_crosses_every_boundary"
AFRESH = "state_starts_afresh_with_each_batch"
CUT = "graph_crosses_no_boundary"
LOSS = "loss_is_the_chunks_own"
GRADIENTS = "gradients_are_the_chunks_own"
SPAN = "gradients_span_the_whole_chunk"
SUMS = "state_sums_up_the_chunk"
APART = "no_sequence_looks_at_another"
ORDER = "events_come_in_a_legal_order"
ONCE = "each_chunk_updates_once"
RULE = "the_update_follows_the_optimizers_rule"
MOVES = "nothing_but_the_update_moves_parameters"
MANUAL = "backward_goes_through_manual_backward"
MODE = "chunks_are_trained_in_training_mode"
RANDOM = "each_chunk_draws_its_own_randomness"

WHOLE = frozenset({END, ORDINARY, RESUMED, ALONE})  # broken by whatever has an effect on numbers
SILENT = frozenset({MANUAL, COUNTED, GONE, LEARNS})  # broken by what has none

# Which properties each mistake breaks, besides; the special before the general.
FINGERPRINTS: tuple[Group, ...] = (
    (
        (END,),
        (
            a_container_is_detached,
            state_changes_its_type,
            short_sequences_are_refused,
            something_is_on_another_device,
            backward_runs_again_on_one_graph,
        ),
    ),
    ((ONCE, MANUAL), (the_scaler_is_gone_round,)),
    ((TILE, LEARNS), (no_backward_reaches_forward,)),
    ((TILE, GRADIENTS, ORDER, ONCE, MANUAL), (automatic_optimization_is_on,)),
    ((CUT, GONE, GRADIENTS), (state_is_detached_in_part, state_is_not_detached)),
    ((CUT, GONE, GRADIENTS, LOSS), (losses_are_summed, cast_weights_are_kept)),
    ((LOSS, GRADIENTS), (scaled_gradients_are_changed,)),
    (
        (SPAN,),
        (features_are_cut_off, forward_runs_under_no_grad, forward_detaches_within_a_chunk),
    ),
    (
        (CROSSES,),
        (
            state_is_dropped,
            state_is_reset,
            state_is_one_chunk_late,
            state_is_never_renewed,
            parts_of_the_state_are_swapped,
            one_part_of_the_state_stands_for_others,
            state_is_carried_in_part,
            state_stays_when_sequences_move,
            closure_moves_the_state,
            state_is_rounded,
            state_is_scaled,
            state_is_rearranged,
            state_is_changed_on_the_way,
        ),
    ),
    ((CROSSES,), (state_is_ignored,)),
    ((SUMS,), (state_is_not_the_last,)),
    ((APART,), (core_runs_along_the_batch,)),
    ((AFRESH,), (state_outlives_its_batch,)),
    ((TILE, CUT), (one_backward_through_the_batch,)),
    (
        (TILE,),
        (
            tail_is_dropped,
            last_chunk_is_dropped,
            tail_is_merged,
            tail_is_padded,
            cut_from_the_end,
            cut_into_k_chunks,
            the_sequence_is_never_cut,
            only_the_first_batch_is_cut,
            first_chunk_is_one_too_long,
            first_chunk_is_one_too_short,
            first_chunk_is_left_out,
            every_other_chunk_is_skipped,
            windows_slide,
            each_batch_is_passed_again,
            cuts_go_on_from_the_batch_before,
            chunks_overlap,
            a_time_step_between_chunks_is_skipped,
            cut_along_the_batch,
            chunks_run_backwards,
            time_steps_change_places,
            first_chunk_is_repeated,
            every_chunk_is_repeated,
        ),
    ),
    (
        (TILE, LOSS),
        (
            batch_and_time_are_mixed,
            targets_are_shifted,
            last_target_of_each_chunk_is_lost,
            only_the_last_time_step_is_scored,
        ),
    ),
    (
        (LOSS,),
        (
            targets_are_in_another_order,
            backward_is_called_twice,
            loss_is_a_sum,
            loss_is_divided_by_the_number_of_chunks,
            tail_is_weighted_by_its_length,
            loss_is_scaled,
        ),
    ),
    (
        (ORDER, GRADIENTS, ONCE),
        (
            update_waits_for_the_next_chunk,
            forward_runs_ahead_of_the_update,
            update_comes_before_backward,
            gradients_are_cleared_in_part,
            gradients_are_not_cleared,
            gradients_are_cleared_before_the_update,
            one_update_per_batch,
            every_nth_chunk_gets_an_update,
            the_last_group_gets_no_update,
        ),
    ),
    (
        (ONCE,),
        (
            one_backward_per_batch,
            tail_gets_no_update,
            two_updates_are_made,
            an_optimizer_makes_no_update,
        ),
    ),
    ((ONCE, MOVES), (parameters_are_updated_by_hand,)),
    ((ONCE,), (no_update_is_made,)),
    ((MOVES,), (parameters_are_moved_besides,)),
    (
        (GRADIENTS,),
        (
            clipping_misses_the_gradients,
            gradients_are_clipped_otherwise,
            gradients_are_scaled,
            gradients_are_changed_on_the_way,
        ),
    ),
    ((RULE, COUNTED), (optimizer_is_made_anew,)),
    ((RULE,), (optimizer_forgets,)),
    ((COUNTED,), (update_goes_past_lightning,)),
    ((LEARNS,), (learning_rate_is_zero,)),
    ((MANUAL,), (backward_goes_past_lightning,)),
    ((GONE,), (graphs_are_kept,)),
    ((BATCH,), (the_batch_is_overwritten,)),
    ((RANDOM,), (the_seed_is_set_in_the_loop,)),
    ((MODE,), (eval_mode_is_left_on,)),
    ((CROSSES, AFRESH, ORDER, GRADIENTS, MODE), (validation_leaves_its_traces,)),
)
