"""Every fault trains under a real Trainer, or stops as it should, and none of them is a no-op.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from math import ceil
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tbptt_ref.faults import (
    ADAM,
    AMONG_PROCESSES,
    FAULTS,
    FUSED_ADAM,
    FUSED_MOMENTUM,
    MOMENTUM,
    ON_A_DEVICE,
    UNDER_PRECISION,
    Fault,
    Need,
)
from tbptt_ref.module import TruncatedRNN

pytestmark = [
    # Lightning: its loader of a list needs no workers, and its torch is newer than it knows.
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


@dataclass(frozen=True)
class Problem:
    """What to train on: (B, T) of each batch, and the sizes that a fault is built from."""

    batches: tuple[tuple[int, int], ...] = ((6, 11), (6, 11))
    chunk: int = 3
    inputs: int = 2
    hidden: int = 4
    outputs: int = 3

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [
            (random(generator, b, t, self.inputs), random(generator, b, t, self.outputs))
            for b, t in self.batches
        ]


PLENTY = Problem()  # meets every need but that for a short sequence
SHORT = Problem(batches=((6, 2), (6, 2)))
PROBLEMS = (
    PLENTY,
    SHORT,
    Problem(chunk=1),
    Problem(batches=((6, 3), (6, 3))),
    Problem(batches=((6, 5), (6, 5))),
    Problem(batches=((6, 9), (6, 9))),
    Problem(batches=((1, 11), (1, 11))),
    Problem(batches=((6, 11),)),
    Problem(batches=((6, 11), (4, 11))),
    Problem(batches=((6, 3),)),
)


def met(problem: Problem) -> set[Need]:
    """Return the needs that the problem meets."""
    sequences, steps = zip(*problem.batches, strict=True)
    longest, k = max(steps), problem.chunk
    answers: dict[Need, bool] = {
        "two time steps in a chunk": min(k, longest) > 1,
        "two chunks": longest > k,
        "three chunks": longest > 2 * k,
        "T other than K * K": any(t != k * k for t in steps),
        "a tail": any(t % k for t in steps),
        "a sequence shorter than a chunk": min(steps) < k,
        "two sequences": max(sequences) > 1,
        "two batches": len(steps) > 1,
        "batches of one size": len(set(sequences)) == 1,
        "two updates": sum(ceil(t / k) for t in steps) > 1,
    }
    return {need for need, answer in answers.items() if answer}


NAMED = {fault.name: fault for fault in FAULTS}
SEAMS = {
    "__init__",
    "forward",
    "training_step",
    "chunks",
    "train_chunk",
    "configure_optimizers",
}

AGAIN = "Trying to backward through the graph a second time"
# The first words of what stops the training, for the faults that don't get through it.
STOPS = {
    "NeverDetaches": AGAIN,
    "DetachesOnlyH": AGAIN,
    "ThrowsDetachAway": AGAIN,
    "DetachesTheTuple": "'tuple' object has no attribute 'detach'",
    "DetachesATensorAsATuple": "'tuple' object has no attribute",
    "RunsOnUnderNoGrad": "element 0 of tensors does not require grad",
    "RunsAlongTheBatch": "Expected hidden[0] size",
    "ForgetsManualOptimization": "to use manual_backward, please disable automatic optimization",
    "RefusesShortSequences": "a sequence of 2 time steps has no chunk of 3",
}

# What differs, for the faults that leave the parameters as the reference has them.
SIDE_EFFECTS = {
    "CallsBackwardItself": "backward_passes",
    "TakesTheRawOptimizer": "updates",
    "SumsLossesWithTheirGraphs": "graphs",
    "KeepsLosses": "graphs",
    "KeepsPredictions": "graphs",
    "KeepsStates": "graphs",
    "LeavesResidualsInTheBatch": "batches",
}


@dataclass(frozen=True)
class Seen:
    """What a fit came to."""

    stopped: str  # by which error
    parameters: bytes
    batches: bytes  # as the fit left them
    backward_passes: int  # that Lightning was asked for
    updates: int  # that Lightning counted
    graphs: int  # the most that were alive at an update
    retained: bool  # whether a loss could be back-propagated again at its update


@dataclass
class Watch(Callback):
    """Counts what goes through Lightning, and the graphs alive whenever it updates."""

    backward_passes: int = 0
    graphs: int = 0
    retained: bool = False
    loss: Tensor | None = None
    alive: weakref.WeakSet[Token] = field(default_factory=weakref.WeakSet)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self.backward_passes += 1
        self.loss = loss

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.graphs = max(self.graphs, len(self.alive))
        self.retained |= self.loss is not None and can_go_back(self.loss, module)
        self.loss = None

    def note_graph(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> None:
        """Tie a token to all ends of a chunk's graph: it lives as long as one of them does."""
        token = Token()
        prediction, state = output
        for tensor in (prediction, *(state if isinstance(state, tuple) else ())):
            if tensor.grad_fn is not None:
                tensor.grad_fn.metadata["token"] = token
                self.alive.add(token)


class Token:
    """Something that a set can hold weakly."""


def can_go_back(loss: Tensor, module: nn.Module) -> bool:
    try:
        torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    return True


@cache
def fit(fault: Fault, problem: Problem) -> Seen:
    """Build the fault, train it for an epoch in float64, and say what came of it."""
    module, batches, watch = fault.build(problem).double(), problem.tensors(), Watch()
    draw_parameters(module)
    module.register_forward_hook(watch.note_graph)
    torch.manual_seed(0)  # dropout has no generator of its own
    trainer = quiet_trainer(watch)
    validates = fault.module.validation_step is not LightningModule.validation_step
    validation: Any = DataLoader(batches[:1], batch_size=None) if validates else None  # type: ignore[arg-type]
    stopped = ""
    try:
        trainer.fit(module, DataLoader(batches, batch_size=None), validation)  # type: ignore[arg-type]
    except Warning:
        raise  # one of pytest's errors, not one of the fault's
    except Exception as error:
        stopped = str(error)
    return Seen(
        stopped,
        bits(module.parameters()),
        bits(tensor for batch in batches for tensor in batch),
        watch.backward_passes,
        trainer.global_step,
        watch.graphs,
        watch.retained,
    )


def draw_parameters(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = random(generator, *parameter.shape) / 2


def quiet_trainer(callback: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1,
        inference_mode=False,
        callbacks=[callback],
    )


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def bits(tensors: Iterable[Tensor]) -> bytes:
    """Return the tensors' numbers as bytes, in which even a nan equals itself."""
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


def intact(fault: Fault) -> Fault:
    return replace(fault, module=TruncatedRNN, needs=())


def tells(fault: Fault, problem: Problem) -> bool:
    """Whether the fault stops the training, or makes it come to something else."""
    broken, right = fit(fault, problem), fit(intact(fault), problem)
    effect = SIDE_EFFECTS.get(fault.name, "parameters")
    return bool(broken.stopped) or getattr(broken, effect) != getattr(right, effect)


@pytest.fixture(autouse=True)
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)


@each_fault
def test_a_fault_tells_exactly_where_all_its_needs_are_met(fault: Fault) -> None:
    told = [problem for problem in PROBLEMS if tells(fault, problem)]

    assert told == [problem for problem in PROBLEMS if met(problem).issuperset(fault.needs)]
    assert told


@each_fault
def test_a_fault_trains_to_the_end_or_stops_for_its_own_reason(fault: Fault) -> None:
    problem = SHORT if "a sequence shorter than a chunk" in fault.needs else PLENTY

    stopped = fit(fault, problem).stopped

    assert bool(stopped) == (fault.name in STOPS)
    assert stopped.startswith(STOPS.get(fault.name, ""))


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if fault.optimizer in (FUSED_ADAM, FUSED_MOMENTUM)],
    ids=lambda fault: fault.name,
)
def test_a_fault_that_a_fused_optimizer_hides_is_loud_under_others(fault: Fault) -> None:
    optimizer: Callable[..., Optimizer] = ADAM if fault.optimizer is FUSED_ADAM else MOMENTUM

    loud = fit(replace(fault, optimizer=optimizer), PLENTY)

    assert "has been modified by an inplace operation" in loud.stopped


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_a_fault_with_a_side_effect_trains_to_the_same_parameters(name: str) -> None:
    fault = NAMED[name]

    assert fit(fault, PLENTY).parameters == fit(intact(fault), PLENTY).parameters


@pytest.mark.parametrize("right", dict.fromkeys(map(intact, FAULTS)), ids=lambda _: "built")
def test_the_reference_has_no_side_effect_however_it_is_built(right: Fault) -> None:
    seen = fit(right, PLENTY)

    assert seen == Seen(
        stopped="",
        parameters=seen.parameters,
        batches=bits(tensor for batch in PLENTY.tensors() for tensor in batch),
        backward_passes=8,
        updates=8,
        graphs=1,
        retained=False,
    )


@each_fault
def test_a_fault_overrides_seams_of_the_reference_and_little_else(fault: Fault) -> None:
    overridden = {name for name, value in vars(fault.module).items() if inspect.isfunction(value)}

    assert overridden & SEAMS
    assert overridden <= SEAMS | {"update", "validation_step", "on_before_optimizer_step"}


def test_every_fault_has_a_name_and_a_mistake_of_its_own() -> None:
    assert len(NAMED) == len({fault.mistake for fault in FAULTS}) == len(FAULTS)
    assert TruncatedRNN.__doc__ not in {fault.mistake for fault in FAULTS}


def test_every_mistake_is_said_in_one_line() -> None:
    assert [fault.name for fault in FAULTS if fault.mistake.count("\n")] == []


def test_every_broken_class_is_among_the_faults() -> None:
    classes = TruncatedRNN.__subclasses__()

    elsewhere = (*(fault for _, fault in UNDER_PRECISION), *AMONG_PROCESSES, *ON_A_DEVICE)
    known = (*FAULTS, *elsewhere)

    assert {fault.module for fault in known} == {
        broken for broken in classes if broken.__module__.startswith("tbptt_ref.faults")
    }


def test_the_tables_name_faults_that_exist() -> None:
    assert STOPS.keys() | SIDE_EFFECTS.keys() <= NAMED.keys()


def test_every_need_is_some_faults_and_is_met_by_some_problems_only() -> None:
    assert {need for fault in FAULTS for need in fault.needs} == set(get_args(Need))
    assert set.union(*map(met, PROBLEMS)) == set(get_args(Need))
    assert set.intersection(*map(met, PROBLEMS)) == set()
