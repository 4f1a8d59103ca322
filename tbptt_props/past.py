"""The chunks gone by: where their graphs lie among all of autograd's nodes, and which live on."""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tbptt_props.graph import any_within
from tbptt_props.lines import calls_itself
from tbptt_props.live import Canary, LiveCall, LiveChunk
from tbptt_props.trace import Chunk, Leak

_REACHED = 9  # chunks that a leak into them is told of by name: the last ones


@dataclass(frozen=True)
class _Gone:
    """Where the graph of a chunk lies."""

    opened: int
    closed: int  # by its last call of forward: what follows until backward makes its loss
    begun: int  # its backward
    label: str


@dataclass(frozen=True)
class _Graph:
    batch: int
    label: str
    canaries: list[weakref.ref[Canary]]

    @property
    def alive(self) -> bool:
        return any(canary() is not None for canary in self.canaries)


class Past:
    """What is left of the chunks gone by in what comes after them."""

    def __init__(self) -> None:
        """Begin before the first chunk."""
        self.horizon = -1  # nodes up to here belong to chunks gone by
        self.outlived: list[str] = []  # chunks whose graph was alive when it was due to be gone
        self._gone: list[_Gone] = []
        self._graphs: list[_Graph] = []

    def add(self, live: LiveChunk, chunk: Chunk) -> None:
        """Take in a chunk that is over; with one that `alternates`, it is the one before."""
        last, label = live.calls[-1], str(chunk)
        gone = _Gone(live.calls[0].opened, last.closed, live.begun, label)
        self._gone = [*self._gone[1 - _REACHED :], gone]
        self.run_again(live)
        canaries = [canary for call in live.calls for canary in call.canaries]
        if chunk.alternates:
            canaries += self._graphs.pop().canaries
        self._graphs.append(_Graph(live.batch, label, canaries))

    def run_again(self, live: LiveChunk) -> None:
        """Take the calls that a chunk had so far for gone by: it is run once more."""
        self.horizon = max(self.horizon, live.calls[-1].closed)

    def is_behind(self, numbers: list[int]) -> bool:
        """Tell whether anything of a chunk gone by is among nodes, by their sorted `numbers`."""
        return any_within(numbers, 0, self.horizon)

    def leaks(self, calls: Sequence[LiveCall], numbers: list[int]) -> tuple[Leak, ...]:
        """Find the paths from a loss's nodes into those of chunks gone by."""
        if not bisect_left(numbers, self.horizon):
            return ()
        reached = [gone for gone in self._gone if any_within(numbers, gone.opened, gone.closed)]
        known = tuple(gone.label for gone in reached)
        summed = any(any_within(numbers, gone.closed, gone.begun) for gone in reached)
        into = ", ".join(known) or "an earlier chunk"
        paths = [
            path
            for call in calls
            for path, oldest in call.attached.items()
            if oldest < self.horizon
        ]
        return tuple(Leak(through, into, known, summed) for through in paths or [""])

    def look(self, let_go: Callable[[], None], *, batch: int | None = None) -> None:
        """Look whether graphs live on that are due to be gone: all but the last one, of `batch`.

        The last chunk of the batch before may be held until this one is done, as by a metric that
        is logged once a batch: there is never more than one such. What the trainer itself holds,
        `let_go` makes it let go of.
        """
        others = sum(batch not in (None, graph.batch) for graph in self._graphs)
        due = self._graphs[others:-1]
        if _any_alive(due):
            let_go()
        if _any_alive(due) and not self.outlived:
            gc.collect(1)  # only a cycle may be holding it, which is nobody's mistake
        if _any_alive(due) and not self.outlived:
            gc.collect()
        if _any_alive(due) and calls_itself():
            return  # its locals are there until it returns: looked at again at the batch's end
        self.outlived.extend(graph.label for graph in due if graph.alive)
        self._graphs = [*self._graphs[:others], *self._graphs[-1:]]


def _any_alive(graphs: Sequence[_Graph]) -> bool:
    return any(graph.alive for graph in graphs)
