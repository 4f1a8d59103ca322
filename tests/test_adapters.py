"""Loops that know no Lightning are judged by the same properties, through `Subject(train=...)`.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Adam, Optimizer

import tbptt_props as tb

CASE = tb.Case(batch=2, steps=5, chunk=2, inputs=2, hidden=3, batches=2)
Batches = Iterable[tuple[Tensor, Tensor]]
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
FUSED = partial(Adam, lr=0.01, fused=True)  # does not notice that parameters change too early


class Net(nn.Module):
    """A recurrent model as anyone writes it, without a line of Lightning."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run (B, K, I) inputs on from `state`; return (B, K, O) predictions and the new state."""
        features, state = self.rnn(x, state)
        return self.readout(features), state


@dataclass(frozen=True)
class Loop:
    """A plain loop, and the ways in which it may be wrong."""

    chunk: int
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = MOMENTUM
    detaches: bool = True
    retains: bool = False
    clears: bool = True
    keeps_the_tail: bool = True
    carries: bool = True
    resets: bool = True
    steps: bool = True

    def __call__(self, module: Net, batches: Batches) -> None:
        """Train `module` on (B, T, I) inputs and (B, T, O) targets."""
        optimizer = self.optimizer(module.parameters())
        state: Tensor | None = None
        for x, y in batches:
            if self.resets:
                state = None
            for part, target in self.chunks(x, y):
                if self.clears:
                    optimizer.zero_grad()
                prediction, after = module(part, state)
                loss = mse_loss(prediction, target)
                torch.autograd.backward(loss, retain_graph=self.retains)
                if self.steps:
                    optimizer.step()
                if self.carries:
                    state = after.detach() if self.detaches else after

    def chunks(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut both sequences along time into chunks of K time steps, the last one shorter."""
        for start in range(0, x.shape[1], self.chunk):
            stop = start + self.chunk
            if stop <= x.shape[1] or self.keeps_the_tail:
                yield x[:, start:stop], y[:, start:stop]


def subject(case: tb.Case, **loop: Any) -> tb.Subject:
    module = Net(case.inputs, case.hidden, case.outputs)
    return tb.Subject(module, loss=mse_loss, train=Loop(case.chunk, **loop))


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1), MOMENTUM, Adam, FUSED])
def test_a_plain_loop_that_is_right_breaks_nothing_on_any_case(
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> None:
    build = partial(subject, optimizer=optimizer)

    report = tb.verify(build, max_examples=12, seed=0)

    assert [str(violation) for v in report.broken for violation in v.violations] == []


def test_what_only_a_trainer_can_tell_is_not_judged() -> None:
    report = tb.check(subject(CASE), CASE)

    assert report.broken == ()
    assert {verdict.name: verdict.missing for verdict in report.not_judged} == {
        "updates_go_through_lightnings_optimizer": "a LightningModule",
        "one_chunk_is_one_ordinary_update": "a case of one batch and one chunk",
        "a_run_can_be_resumed_at_any_boundary": "the optimizers are not known before training",
        "a_batch_knows_nothing_of_the_one_before": "the optimizers are not known before training",
        "backward_goes_through_manual_backward": "a LightningModule",
        "each_chunk_draws_its_own_randomness": (
            "a forward that draws random numbers, and two chunks"
        ),
    }


MISTAKES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "no detach": (
        {"detaches": False},
        {"graph_crosses_no_boundary", "training_reaches_the_end"},
    ),
    "no detach, and the graph retained": (
        {"detaches": False, "retains": True, "optimizer": FUSED},
        {
            "graph_crosses_no_boundary",
            "gradients_are_the_chunks_own",
            "no_graph_outlives_its_chunk",
        },
    ),
    "no zero_grad": (
        {"clears": False},
        {"gradients_are_the_chunks_own", "events_come_in_a_legal_order"},
    ),
    "no tail": ({"keeps_the_tail": False}, {"chunks_tile_the_sequence"}),
    "no state carried": ({"carries": False}, {"state_crosses_every_boundary"}),
    "no state reset": ({"resets": False}, {"state_starts_afresh_with_each_batch"}),
    "no update": ({"steps": False}, {"each_chunk_updates_once"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_plain_loop_is_named(mistake: str) -> None:
    loop, due = MISTAKES[mistake]

    report = tb.check(subject(CASE, **loop), CASE)

    assert {verdict.name for verdict in report.broken} == due


def test_a_plain_loop_may_promise_to_drop_the_tail() -> None:
    promised = replace(subject(CASE, keeps_the_tail=False), contract=tb.Contract(tail="drop"))

    assert tb.check(promised, CASE).broken == ()


def test_where_a_plain_loop_goes_wrong_is_told_as_for_any_other() -> None:
    report = tb.check(subject(CASE, carries=False), CASE)

    (verdict,) = report.broken
    assert [str(violation) for violation in verdict.violations] == [
        "time steps 2-3, incoming state: none, but should be the one time steps 0-1 ended in",
        "time steps 4-4, incoming state: none, but should be the one time steps 2-3 ended in",
        "batch 1, time steps 2-3, incoming state: none, "
        "but should be the one time steps 0-1 ended in",
        "batch 1, time steps 4-4, incoming state: none, "
        "but should be the one time steps 2-3 ended in",
    ]


def test_a_function_may_number_its_batches() -> None:
    def train(module: Net, batches: Batches) -> None:
        Loop(CASE.chunk)(module, (batch for _, batch in enumerate(batches)))

    report = tb.check(replace(subject(CASE), train=train), CASE)

    assert report.broken == ()
    assert report["chunks_tile_the_sequence"].status == "holds"


def by_index(loop: Loop, module: Net, batches: list[tuple[Tensor, Tensor]]) -> None:
    loop(module, (batches[i] for i in range(len(batches))))


def listed(loop: Loop, module: Net, batches: Batches) -> None:
    loop(module, list(batches))


@pytest.mark.parametrize("turn", [by_index, listed])
def test_a_function_that_does_not_turn_from_batch_to_batch_is_judged_or_told_so(
    turn: Callable[..., None],
) -> None:
    other = replace(subject(CASE), train=partial(turn, Loop(CASE.chunk)))

    told = judged_or_refused(other)

    assert told == "" or "let train take its batches one by one" in told


def judged_or_refused(subject: tb.Subject) -> str:
    """Return why a subject is refused; nothing if it is not, and breaks nothing."""
    try:
        return ", ".join(verdict.name for verdict in tb.check(subject, CASE).broken)
    except tb.ObservationError as refusal:
        return str(refusal)


def one_ahead(loop: Loop, module: Net, batches: Batches) -> None:
    """Train as loaders do that take the next batch before they hand one out."""

    def ahead() -> Iterator[tuple[Tensor, Tensor]]:
        taken = iter(batches)
        current = next(taken)
        for following in taken:
            yield current
            current = following
        yield current

    loop(module, ahead())


@pytest.mark.parametrize("turn", [by_index, listed, one_ahead])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_loop_may_take_its_batches_ahead(turn: Callable[..., None], seed: int) -> None:
    case = replace(CASE, batches=4, batch=4, seed=seed)
    ahead = replace(subject(case), train=partial(turn, Loop(case.chunk)))

    report = tb.check(ahead, case)

    assert report.broken == ()
    assert report["state_starts_afresh_with_each_batch"].status == "holds"


def test_a_single_batch_may_be_taken_ahead() -> None:
    case = replace(CASE, batches=1)
    ahead = replace(subject(case), train=partial(listed, Loop(case.chunk)))

    assert tb.check(ahead, case).broken == ()


def evaluated(module: Net, batches: Batches) -> None:
    with torch.no_grad():
        for x, _ in batches:
            module(x)


def before(loop: Loop, module: Net, batches: Batches) -> None:
    evaluated(module, batches)
    loop(module, batches)


def between(loop: Loop, module: Net, batches: Batches) -> None:
    def evaluating() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield batch
            evaluated(module, list(islice(batches, 1)))

    loop(module, evaluating())


def after(loop: Loop, module: Net, batches: Batches) -> None:
    loop(module, batches)
    evaluated(module, batches)


@pytest.mark.parametrize("turn", [before, between, after])
@pytest.mark.parametrize("sizes", [{"batches": 1, "steps": 3, "chunk": 3}, {"batches": 3}])
def test_a_loop_may_evaluate_on_its_batches(
    turn: Callable[..., None], sizes: dict[str, int]
) -> None:
    case = replace(CASE, **sizes)
    report = tb.check(replace(subject(case), train=partial(turn, Loop(case.chunk))), case)

    assert report.broken == ()
    due = "one_chunk_is_one_ordinary_update" if case.batches == 1 else "chunks_tile_the_sequence"
    assert due in {verdict.name for verdict in report.holds}


@pytest.mark.parametrize("turn", [by_index, listed, one_ahead, before, between, after])
def test_a_mistake_is_named_where_batches_are_taken_ahead(turn: Callable[..., None]) -> None:
    ahead = replace(subject(CASE), train=partial(turn, Loop(CASE.chunk, resets=False)))

    report = tb.check(ahead, CASE)

    (verdict,) = report.broken
    assert verdict.name == "state_starts_afresh_with_each_batch"
    assert str(verdict.violations[0]).startswith("batch 1, time steps 0-1, incoming state: ")


def test_a_batch_that_is_passed_over_is_not_mistaken_for_one_that_is_trained_on() -> None:
    def train(module: Net, batches: Batches) -> None:
        Loop(CASE.chunk)(module, (batch for i, batch in enumerate(batches) if i != 1))

    case = replace(CASE, batches=3)
    report = tb.check(replace(subject(case), train=train), case)

    (verdict,) = report.broken
    (violation,) = verdict.violations
    assert str(violation) == "batch 1, chunks: none, but should be 0-1 2-3 4-4"


def test_a_batch_is_looked_at_where_the_loop_never_asks_for_another() -> None:
    def train(module: Net, batches: Batches) -> None:
        batch = next(iter(batches))
        Loop(CASE.chunk)(module, [batch])
        batch[0].zero_()

    alone = replace(CASE, batches=1)
    report = tb.check(replace(subject(alone), train=train), alone)

    assert [verdict.name for verdict in report.broken] == ["the_batch_is_left_as_it_was"]


def test_a_function_that_trains_nothing_is_refused() -> None:
    idle = replace(subject(CASE), train=lambda module, batches: None)

    with pytest.raises(tb.ObservationError) as refusal:
        tb.check(idle, CASE)

    assert str(refusal.value) == (
        "Net.forward was never called while training: name the call that runs a chunk with "
        "Subject(..., forward='...'), a method or a submodule, and let train take its batches one "
        "by one as it comes to them"
    )


def test_a_function_that_raises_is_a_finding() -> None:
    def train(module: Net, batches: Batches) -> None:
        raise OSError("the disk is full")

    report = tb.check(replace(subject(CASE), train=train), CASE)

    (violation,) = report["training_reaches_the_end"].violations
    assert violation.where == "the start"
    assert violation.found.startswith("raised OSError: the disk is full at ")
    assert violation.found.endswith('raise OSError("the disk is full")')
    assert violation.due == "trained to the end"


def test_a_function_trains_a_copy_and_leaves_the_module_as_it_was() -> None:
    given = subject(CASE)
    before = {name: value.clone() for name, value in given.module.state_dict().items()}

    tb.check(given, CASE)

    after = given.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "forward" not in vars(given.module)
