import re
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler
from torch.utils.data import DataLoader

from tbptt_props.case import Case
from tbptt_props.strategies import cases
from tbptt_ref import closed_form, oracle
from tbptt_ref.module import TruncatedRNN, detached

pytestmark = [
    # Lightning's own call of torch's pytree; nothing a module can do about it.
    pytest.mark.filterwarnings(
        "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
    ),
    # The batches are in memory already; Lightning asks for workers where there are several cores.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Where there is a GPU, it is left alone on purpose.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
]

CLOSE = 1e-12  # float64 against float64, the norm of the gradients summed in another order
LOGGED = 1e-6  # Lightning keeps what is logged in float32

DEFAULT = partial(SGD, lr=0.1)  # what the reference promises where nothing is asked for

UNEVEN = Case(batch=3, steps=7, chunk=3, inputs=2, hidden=4, outputs=2, batches=3, seed=3)
PLAN = [(0, 0, 3), (0, 3, 6), (0, 6, 7), (1, 0, 3), (1, 3, 6), (2, 0, 3), (2, 3, 5)]


class CellLoop(nn.Module):
    """An LSTM cell looped by hand."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs, hidden)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features = []
        for piece in x.unbind(dim=1):
            state = self.cell(piece, state)
            features.append(state[0])
        return torch.stack(features, dim=1), state


class Nested(nn.Module):
    """Two layers whose states are kept in a dict, one of them in a pair."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.low = nn.GRU(inputs, hidden, batch_first=True)
        self.high = nn.LSTM(hidden, hidden, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        state = state or {"low": None, "high": None}
        features, low = self.low(x, state["low"])
        features, high = self.high(features, state["high"])
        return features, {"low": low, "high": high}


CORES: dict[str, Callable[[int, int], nn.Module]] = {
    "rnn": partial(nn.RNN, batch_first=True),
    "gru": partial(nn.GRU, batch_first=True),
    "lstm": partial(nn.LSTM, batch_first=True, num_layers=2),
    "cell loop": CellLoop,
    "nested": Nested,
}
TRAININGS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": partial(SGD, lr=0.1, momentum=0.9)},
    "adam": {"optimizer": partial(Adam, lr=0.01)},
    "clipped": {"optimizer": partial(SGD, lr=0.5), "clip_norm": 0.05},
    "scheduled": {
        "optimizer": partial(SGD, lr=0.5),
        "scheduler": partial(ExponentialLR, gamma=0.5),
    },
    "another loss": {"loss": l1_loss},
}


class Watched(TruncatedRNN):
    """The reference, and a record of its updates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[oracle.Outcome] = []
        self.after: list[dict[str, Tensor]] = []

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        loss, state = super().train_chunk(x, y, state)
        gradients = {name: oracle.value_of(p.grad) for name, p in self.named_parameters()}
        self.seen.append(oracle.Outcome(loss, gradients, oracle.value_of(state)))
        self.after.append({name: oracle.value_of(p) for name, p in self.named_parameters()})
        return loss, state


def watched(case: Case, core: str, **training: Any) -> Watched:
    """Build the reference, its parameters grown from the seed of `case`."""
    model = CORES[core](case.inputs, case.hidden)
    module = Watched(model, nn.Linear(case.hidden, case.outputs), chunk=case.chunk, **training)
    generator = torch.Generator().manual_seed(case.seed)
    for parameter in module.double().parameters():
        nn.init.uniform_(parameter, -0.5, 0.5, generator=generator)
    return module


def fit(module: TruncatedRNN, case: Case) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(case.tensors(), batch_size=None))  # type: ignore[arg-type]
    return trainer


def by_oracle(
    module: TruncatedRNN,
    case: Case,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = mse_loss,
    optimizer: Callable[..., Optimizer] = DEFAULT,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
) -> list[oracle.Update]:
    """Train a copy of `module` in plain PyTorch, taking only its core and its readout from it."""
    copy = deepcopy(module)
    own = optimizer(copy.parameters())

    def forward(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        features, state = copy.core(x, state)
        return copy.readout(features), state

    return oracle.train(
        forward,
        dict(copy.named_parameters()),
        loss,
        own,
        case.tensors(),
        case.chunk,
        scheduler=scheduler(own) if scheduler else None,
        clip_norm=clip_norm,
    )


def assert_same_run(module: Watched, expected: list[oracle.Update], *, within: float = 0.0) -> None:
    """Compare every number of every update: to the bit, unless `within` says otherwise."""
    for found, after, due in zip(module.seen, module.after, expected, strict=True):
        assert_close(found.loss, due.loss, within=within)
        assert_close(found.gradients, due.gradients, within=within)
        assert_close(found.state, due.state, within=within)
        assert_close(after, due.parameters, within=within)


def assert_close(found: Any, expected: Any, *, within: float) -> None:
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("core", CORES)
def test_the_reference_trains_as_the_oracle_does(core: str, training: str) -> None:
    module = watched(UNEVEN, core, **TRAININGS[training])
    expected = by_oracle(module, UNEVEN, **TRAININGS[training])

    fit(module, UNEVEN)

    assert [(each.batch, each.start, each.stop) for each in expected] == PLAN
    assert_same_run(module, expected, within=CLOSE if training == "clipped" else 0.0)


@settings(max_examples=30)  # a fit takes tens of milliseconds
@given(case=cases())
def test_the_reference_trains_as_the_oracle_does_on_every_case(case: Case) -> None:
    module = watched(case, "lstm", **TRAININGS["adam"])
    expected = by_oracle(module, case, **TRAININGS["adam"])

    fit(module, case)

    assert_same_run(module, expected)


def test_the_reference_as_it_is_by_default_trains_as_the_closed_form_does() -> None:
    module = watched(UNEVEN, "rnn")
    parameters = {name: p.detach().numpy().copy() for name, p in module.named_parameters()}
    batches = [(x.numpy(), y.numpy()) for x, y in UNEVEN.tensors()]

    fit(module, UNEVEN)

    expected = closed_form.train(parameters, batches, UNEVEN.chunk, lr=0.1)
    for found, after, due in zip(module.seen, module.after, expected, strict=True):
        assert float(found.loss) == pytest.approx(due.loss, rel=CLOSE)
        close = partial(np.testing.assert_allclose, rtol=CLOSE, atol=CLOSE)
        close(found.state, due.state)
        for name in parameters:
            close(found.gradients[name], due.gradients[name])
            close(after[name], due.parameters[name])


class ForgetsState(Watched):
    """A mistake: every chunk starts from nothing, as if it were the first."""

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        return super().train_chunk(x, y, None)


class UpdatesTwice(Watched):
    """A mistake: each gradient is used for two updates."""

    def train_chunk(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        answer = super().train_chunk(x, y, state)
        optimizer: Any = self.optimizers()
        optimizer.step()
        return answer


@pytest.mark.parametrize("mistaken", [ForgetsState, UpdatesTwice])
def test_a_reference_with_a_mistake_does_not_train_as_the_oracle_does(
    mistaken: type[Watched],
) -> None:
    module = watched(UNEVEN, "gru")
    module.__class__ = mistaken
    expected = by_oracle(module, UNEVEN)

    fit(module, UNEVEN)

    with pytest.raises(AssertionError, match="are not close"):
        assert_same_run(module, expected, within=1e-6)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_no_time_steps_is_refused(chunk: int) -> None:
    message = f"chunk must be at least 1 time step, got chunk={chunk}"

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TruncatedRNN(nn.RNN(1, 1), nn.Linear(1, 1), chunk=chunk)


@pytest.mark.parametrize(
    ("steps", "chunk", "lengths"),
    [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (5, 2, [2, 2, 1]), (3, 1, [1, 1, 1])],
)
def test_chunks_have_k_time_steps_and_the_last_one_the_rest(
    steps: int, chunk: int, lengths: list[int]
) -> None:
    case = Case(batch=2, steps=steps, chunk=chunk, inputs=3, outputs=2)
    (batch,) = case.tensors()

    pairs = list(watched(case, "rnn").chunks(*batch))

    for tensor, pieces in zip(batch, zip(*pairs, strict=True), strict=True):
        assert [piece.shape[1] for piece in pieces] == lengths
        assert torch.equal(torch.cat(pieces, dim=1), tensor)


def test_the_logged_loss_is_the_mean_over_the_whole_sequence() -> None:
    case = Case(batch=2, steps=7, chunk=3, inputs=2, hidden=3)
    ((x, y),) = case.tensors()
    module = watched(case, "lstm", optimizer=partial(SGD, lr=0.0))
    with torch.no_grad():
        whole = float(mse_loss(module(x)[0], y))

    logged = float(fit(module, case).callback_metrics["train_loss"])

    losses = [float(each.loss) for each in module.seen]
    assert logged == pytest.approx(whole, rel=LOGGED)
    assert sum(losses) / len(losses) != pytest.approx(whole, rel=1000 * LOGGED)


def test_gradients_are_clipped_before_the_update_only_where_they_are_too_large() -> None:
    plain, clipped = watched(UNEVEN, "gru"), watched(UNEVEN, "gru", clip_norm=1.0)

    fit(plain, UNEVEN)
    fit(clipped, UNEVEN)

    # The first two gradients are small, so that both are still alike at the third, which is not.
    assert_close(clipped.seen[0].gradients, plain.seen[0].gradients, within=0.0)
    assert_close(clipped.seen[1].gradients, plain.seen[1].gradients, within=0.0)
    assert norm_of(plain.seen[2].gradients) > 1.3
    assert norm_of(clipped.seen[2].gradients) == pytest.approx(1.0, rel=1e-5)


def norm_of(gradients: dict[str, Tensor | None]) -> float:
    return float(torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm())


class Listens(Nested):
    """A core that keeps the states it is handed and the states it hands on."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden)
        self.states: list[tuple[Any, Any]] = []

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, after = super().forward(x, state)
        self.states.append((state, after))
        return features, after


def test_the_state_crosses_a_boundary_as_a_value_and_ends_with_its_batch() -> None:
    core = Listens(UNEVEN.inputs, UNEVEN.hidden)
    fit(TruncatedRNN(core, nn.Linear(UNEVEN.hidden, 2), chunk=UNEVEN.chunk).double(), UNEVEN)

    starts = [state is None for state, _ in core.states]
    assert starts == [start == 0 for _, start, _ in PLAN]
    for (_, before), (state, _) in pairwise(core.states):
        if state is not None:
            assert_close(state, before, within=0.0)
            assert all(tensor.requires_grad for tensor in tensors_in(before))
            assert not any(tensor.requires_grad for tensor in tensors_in(state))


def tensors_in(state: dict[str, Any]) -> list[Tensor]:
    return [state["low"], *state["high"]]


class Pair(NamedTuple):
    """A state as a named tuple."""

    h: Tensor
    c: Tensor


@dataclass
class Memory:
    """A state as a dataclass."""

    slots: list[Tensor]
    age: int


@pytest.mark.parametrize(
    ("build", "read"),
    [
        (lambda a, b: a, lambda s: [s]),
        (lambda a, b: (a, b), list),
        (lambda a, b: [a, [b]], lambda s: [s[0], *s[1]]),
        (lambda a, b: {"a": a, "b": (b, None)}, lambda s: [s["a"], s["b"][0]]),
        (lambda a, b: OrderedDict(b=b, a=a), lambda s: list(s.values())),
        (Pair, list),
        (lambda a, b: Memory([a, b], 3), lambda s: s.slots),
        (lambda a, b: {"pair": Pair(a, b), "memory": [Memory([b], 1)]}, lambda s: [*s["pair"]]),
    ],
)
def test_a_detached_state_keeps_its_nesting_and_its_values_and_no_graph(
    build: Callable[[Tensor, Tensor], Any], read: Callable[[Any], list[Tensor]]
) -> None:
    a, b = (torch.full((2,), float(i), requires_grad=True) * 1 for i in (1, 2))
    state = build(a, b)
    written = repr(state)
    assert "grad_fn" in written

    found = detached(state)

    assert repr(found) == written.replace(", grad_fn=<MulBackward0>", "")
    assert type(found) is type(state)
    for tensor, original in zip(read(found), read(state), strict=True):
        assert torch.equal(tensor, original)
        assert not tensor.requires_grad
        assert original.requires_grad
