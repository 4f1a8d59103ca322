"""What must hold of processes that train one model together, each on sequences of its own.

Each property is a pure function from what the processes told to findings, as in `properties`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tbptt_props.compare import close, worst
from tbptt_props.trace import Cause, Finding, NotJudged, Tensors, Violation


@dataclass(frozen=True)
class Update:
    """An update as one process came to it."""

    chunk: str  # the last one before it
    own: Tensors | None  # the gradients of the process's own loss, worked out anew
    met: Tensors  # those that backward left
    missing: str = ""  # why the own ones are not known


@dataclass(frozen=True)
class Told:
    """What one process told of its training."""

    updates: tuple[Update, ...] = ()
    parameters: Tensors = field(default_factory=dict)  # at the end
    halt: str = ""  # what it raised
    gone: bool = False  # it ended without a word
    waits: str = ""  # where it was when nobody moved any more
    backwards: int = 0  # how many it began


Processes = Sequence[Told]  # by rank
GroupProperty = Callable[[Processes], Iterator[Finding]]


def processes_reach_the_end_together(told: Processes) -> Iterator[Finding]:
    """Training ends in all processes: none raises, and none is left waiting for the others."""
    # One that is gone is the reason, where others raise that they lost it.
    for rank, one in sorted(enumerate(told), key=lambda ranked: not ranked[1].gone):
        if one.halt:
            yield Violation(f"process {rank}", f"raised {one.halt}", "trained to the end")
    waiting = [rank for rank, one in enumerate(told) if one.waits]
    if waiting and not any(one.halt for one in told):
        counts = " and ".join(str(one.backwards) for one in told)
        where = f"process {waiting[0]}, {told[waiting[0]].waits}"
        found = f"waits for the others, after {counts} backward passes"
        yield Violation(where, found, "as many in each process")


def processes_share_their_gradients(told: Processes) -> Iterator[Finding]:
    """Before each update, gradients are the mean of what each process has by itself."""
    steps = list(zip(*(one.updates for one in told), strict=False))
    if not steps:
        yield NotJudged("an update in each process")
    for number, updates in enumerate(steps):
        missing = next((u.missing for u in updates if u.own is None), "")
        if missing:
            yield NotJudged(missing)
            continue
        due = _mean([u.own or {} for u in updates])
        for rank, update in enumerate(updates):
            found = {name: g for name, g in update.met.items() if name in due}
            for wrong in worst(found, due):
                own = _of_its_own(update)
                where = f"process {rank}, {update.chunk}, gradient of {wrong.entry} at update"
                value, mean = wrong.told
                found_ = f"{value}, its own alone" if own else value
                yield Violation(f"{where} {number}", found_, f"{mean}, the mean of all processes")
                return


def processes_end_with_the_same_parameters(told: Processes) -> Iterator[Finding]:
    """All processes end with the same parameters, bit for bit."""
    if not all(one.parameters for one in told):
        yield NotJudged("training that ends in all processes")
        return
    for rank, one in enumerate(told[1:], start=1):
        for wrong in worst(one.parameters, told[0].parameters, bitwise=True):
            found, due = wrong.told
            where = f"process {rank}, {wrong.entry} at the end"
            yield Violation(where, found, f"{due}, as in process 0")
            return


OF_GROUPS: tuple[GroupProperty, ...] = (
    processes_reach_the_end_together,
    processes_share_their_gradients,
    processes_end_with_the_same_parameters,
)


def _mean(gradients: Sequence[Tensors]) -> Tensors:
    """Return the mean over the processes; one in which a parameter has no gradient has zeros."""
    names = {name: g for some in gradients for name, g in some.items()}
    return {
        name: torch.stack([some.get(name, torch.zeros_like(g)) for some in gradients]).mean(dim=0)
        for name, g in names.items()
    }


def _of_its_own(update: Update) -> bool:
    own = update.own or {}
    met = [(update.met[name], g) for name, g in own.items() if name in update.met]
    return bool(met) and all(close(found, due) for found, due in met)


# Causes -------------------------------------------------------------------------------------


def backward_is_not_synchronised(told: Processes) -> bool:
    """Backward leaves each process its own gradients: nothing is averaged.

    Try: self.manual_backward(loss), outside of no_sync and block_backward_sync, in each chunk; in a
    loop without Lightning, call the wrapped model, ddp(x, state), and not ddp.module(x, state)
    """
    updates = [update for one in told for update in one.updates]
    return bool(updates) and all(map(_of_its_own, updates))


def some_backwards_are_not_synchronised(told: Processes) -> bool:
    """Some chunks are averaged over the processes and others are not.

    Try: no_sync and block_backward_sync around chunks only whose update is still to come
    """
    own = [_of_its_own(update) for one in told for update in one.updates]
    return any(own) and not all(own)


def numbers_of_chunks_differ(told: Processes) -> bool:
    """A process makes another number of backward passes than the others, who wait for it.

    Try: agree on the number of chunks, as by an all_reduce of the longest length, and pad with a
    mask; don't skip a chunk for what one process sees in it
    """
    waiting = any(one.waits for one in told) and not any(one.halt for one in told)
    return waiting and len({one.backwards for one in told}) > 1


def processes_go_by_numbers_of_their_own(told: Processes) -> bool:
    """Gradients are shared, but each process makes an update of its own of them.

    Try: have what goes into the update be the same everywhere, a loss by
    self.log(..., sync_dist=True) or self.all_gather(...), before a rate or a scheduler goes by it
    """
    steps = list(zip(*(one.updates for one in told), strict=True))
    pairs = [(u.met[n], g) for first, *rest in steps for n, g in first.met.items() for u in rest]
    return bool(pairs) and all(close(found, due) for found, due in pairs)


_END, _GRADIENTS, _PARAMETERS = (p.__name__ for p in OF_GROUPS)
CAUSES: tuple[tuple[Callable[[Processes], bool], frozenset[str]], ...] = (
    (numbers_of_chunks_differ, frozenset({_END})),
    (backward_is_not_synchronised, frozenset({_GRADIENTS, _PARAMETERS})),
    (some_backwards_are_not_synchronised, frozenset({_GRADIENTS, _PARAMETERS})),
    (processes_go_by_numbers_of_their_own, frozenset({_PARAMETERS})),
)


def causes_among(told: Processes, name: str) -> tuple[Cause, ...]:
    """Return the first mistake that would show as this did, and break the property `name`."""
    for fits, explains in CAUSES:
        if name in explains and fits(told):
            return (Cause.told_by(fits, explains),)
    return ()
