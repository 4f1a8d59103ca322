import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from tbptt_props.case import Case
from tbptt_props.strategies import cases
from tbptt_ref import closed_form, oracle
from tbptt_ref.closed_form import Activation, Array

CLOSE = 1e-12  # float64 against float64, sums in another order; the worst of 1,200 cases is 1.2e-15
SEEN = 1e-6  # a mistake moves the numbers far more than rounding can
LR, MOMENTUM = 0.01, 0.5  # small: where training diverges, rounding grows with everything else

UNEVEN = Case(batch=3, steps=7, chunk=3, inputs=2, hidden=4, outputs=2, batches=3, seed=3)

Forward = Callable[[Tensor, Any], tuple[Tensor, Any]]


class LinearRNN(nn.Module):
    """`nn.RNN` without its tanh."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden, inputs))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden, hidden))
        self.bias_ih_l0 = nn.Parameter(torch.empty(hidden))
        self.bias_hh_l0 = nn.Parameter(torch.empty(hidden))

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(len(x), len(self.bias_hh_l0)) if state is None else state[0]
        features = []
        for piece in linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(dim=1):
            h = piece + linear(h, self.weight_hh_l0, self.bias_hh_l0)
            features.append(h)
        return torch.stack(features, dim=1), h[None]


def model(case: Case, activation: Activation = "tanh") -> tuple[Forward, dict[str, nn.Parameter]]:
    """Return the forward of the model that the closed form describes, and its parameters."""
    core = nn.RNN(case.inputs, case.hidden, batch_first=True)
    readout = nn.Linear(case.hidden, case.outputs)
    parts = {"tanh": core, "linear": LinearRNN(case.inputs, case.hidden)}
    both = nn.ModuleDict({"core": parts[activation], "readout": readout}).double()
    both.load_state_dict({name: torch.from_numpy(value) for name, value in grown(case).items()})

    def forward(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        features, state = both["core"](x, state)
        return readout(features), state

    return forward, dict(both.named_parameters())


def grown(case: Case) -> dict[str, Array]:
    """Grow parameters under which no state grows from time step to time step."""
    i, h, o = case.inputs, case.hidden, case.outputs
    generator = np.random.default_rng(case.seed)
    bound = 0.7 / h**0.5
    shapes: dict[str, tuple[int, ...]] = {
        "core.weight_ih_l0": (h, i),
        "core.weight_hh_l0": (h, h),
        "core.bias_ih_l0": (h,),
        "core.bias_hh_l0": (h,),
        "readout.weight": (o, h),
        "readout.bias": (o,),
    }
    return {name: generator.uniform(-bound, bound, shape) for name, shape in shapes.items()}


def by_oracle(
    case: Case,
    activation: Activation = "tanh",
    *,
    chunk: int | None = None,
    spoil: Callable[[Forward], Forward] = lambda forward: forward,
) -> list[oracle.Update]:
    forward, parameters = model(case, activation)
    optimizer = SGD(parameters.values(), lr=LR, momentum=MOMENTUM)
    length = chunk or case.chunk
    return oracle.train(spoil(forward), parameters, mse_loss, optimizer, case.tensors(), length)


def by_hand(case: Case, activation: Activation = "tanh") -> list[closed_form.Update]:
    batches = [(x.numpy(), y.numpy()) for x, y in case.tensors()]
    return closed_form.train(
        grown(case), batches, case.chunk, activation=activation, lr=LR, momentum=MOMENTUM
    )


def difference(found: Any, expected: Any) -> float:
    """Return the greatest difference of two arrays, relative to the largest entry or to 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return np.inf
    scale = max(1.0, float(np.max(np.abs(expected))))
    return float(np.nan_to_num(np.max(np.abs(found - expected)) / scale, nan=np.inf))


def worst_difference(
    found: Sequence[oracle.Update], expected: Sequence[closed_form.Update]
) -> tuple[float, str]:
    """Return the greatest difference between any two numbers of two runs, and where it is."""
    plan, due = ([(each.batch, each.start, each.stop) for each in run] for run in (found, expected))
    if plan != due:
        return np.inf, f"plan: {plan}, but should be {due}"
    return max(
        (difference(numbers[what], others[what]), f"batch {batch} from {start} to {stop}: {what}")
        for (batch, start, stop), one, other in zip(plan, found, expected, strict=True)
        for numbers, others in [(numbers_of(one), numbers_of(other))]
        for what in numbers | others
    )


def numbers_of(update: oracle.Update | closed_form.Update) -> dict[str, Any]:
    numbers = {"loss": update.loss, "state": update.state}
    numbers |= {f"gradient of {name}": value for name, value in update.gradients.items()}
    return numbers | {f"{name} after": value for name, value in update.parameters.items()}


@pytest.mark.parametrize("activation", ["linear", "tanh"])
@given(case=cases())
def test_oracle_and_closed_form_agree_on_every_number_of_every_case(
    activation: Activation, case: Case
) -> None:
    worst, where = worst_difference(by_oracle(case, activation), by_hand(case, activation))

    assert worst <= CLOSE, f"{where}: differs by {worst:.2g}"


@pytest.mark.parametrize("wrong", [UNEVEN.chunk - 1, UNEVEN.chunk + 1])
def test_a_chunk_length_off_by_one_shows_in_the_plan_and_in_every_parameter(wrong: int) -> None:
    found, expected = by_oracle(UNEVEN, chunk=wrong), by_hand(UNEVEN)

    assert worst_difference(found, expected)[1].startswith("plan: ")
    for name, value in expected[-1].parameters.items():
        assert difference(found[-1].parameters[name], value) > SEEN


def forgets_state(forward: Forward) -> Forward:
    return lambda x, state: forward(x, None)


def cuts_every_time_step(forward: Forward) -> Forward:
    def spoilt(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        predictions = []
        for piece in torch.split(x, 1, dim=1):
            prediction, state = forward(piece, None if state is None else state.detach())
            predictions.append(prediction)
        return torch.cat(predictions, dim=1), state

    return spoilt


def hands_on_an_earlier_state(forward: Forward) -> Forward:
    def spoilt(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        prediction, after = forward(x, state)
        return prediction, forward(x[:, :-1], state)[1] if x.shape[1] > 1 else after

    return spoilt


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (forgets_state, "batch 0 from 3 to 6: "),
        (cuts_every_time_step, "batch 0 from 0 to 3: gradient of core."),
        (hands_on_an_earlier_state, "batch 0 from 0 to 3: state"),
    ],
)
def test_a_wrong_run_is_seen_where_it_goes_wrong(
    spoil: Callable[[Forward], Forward], where: str
) -> None:
    runs = zip(by_oracle(UNEVEN, spoil=spoil), by_hand(UNEVEN), strict=True)

    worst = (worst_difference([found], [expected]) for found, expected in runs)
    size, first = next(pair for pair in worst if pair[0] > CLOSE)
    assert size > SEEN
    assert first.startswith(where)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_chunk_is_one_ordinary_update() -> None:
    case = Case(batch=2, steps=5, chunk=8, inputs=3, hidden=4, outputs=2)
    ((x, y),), (forward, parameters) = case.tensors(), model(case)
    optimizer = Adam(parameters.values())
    prediction, state = forward(x, None)
    loss = mse_loss(prediction, y)
    torch.autograd.backward(loss)
    optimizer.step()

    forward, same = model(case)
    (update,) = oracle.train(forward, same, mse_loss, Adam(same.values()), [(x, y)], case.chunk)

    assert_same(update.loss, loss.detach())
    assert_same(update.state, state.detach())
    assert_same(update.gradients, {name: each.grad for name, each in parameters.items()})
    assert_same(update.parameters, {name: each.detach() for name, each in parameters.items()})


@given(case=cases(batches=1).filter(lambda case: case.steps > case.chunk))
def test_a_run_is_the_run_of_its_second_part_from_what_its_first_part_left(case: Case) -> None:
    ((x, y),), (forward, parameters) = case.tensors(), model(case)
    adam = Adam(parameters.values())
    whole = oracle.train(forward, parameters, mse_loss, adam, [(x, y)], case.chunk)
    cut = case.chunk * (len(whole) // 2)

    forward, parameters = model(case)
    adam = Adam(parameters.values())
    head = x[:, :cut], y[:, :cut]
    parts = oracle.train(forward, parameters, mse_loss, adam, [head], case.chunk)
    forward, fresh = model(case)
    for name, parameter in fresh.items():
        parameter.data = parameters[name].detach().clone()
    resumed = Adam(fresh.values())
    resumed.load_state_dict(deepcopy(adam.state_dict()))
    tail, state = (x[:, cut:], y[:, cut:]), parts[-1].state
    parts += oracle.train(forward, fresh, mse_loss, resumed, [tail], case.chunk, state=state)

    for found, expected in zip(parts, whole, strict=True):
        assert_same(numbers_of(found), numbers_of(expected))


@pytest.mark.parametrize("share", [1 / 3, 3])
def test_gradients_are_clipped_as_torch_clips_them(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 2)]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    most = share * float(torch.cat(gradients).norm())
    nn.utils.clip_grad_norm_(parameters, most)

    found = oracle.clipped({"a": gradients[0], "none": None, "b": gradients[1]}, most)

    assert list(found) == ["a", "none", "b"]
    assert found["none"] is None
    torch.testing.assert_close(found["a"], parameters[0].grad, rtol=CLOSE, atol=0)
    torch.testing.assert_close(found["b"], parameters[1].grad, rtol=CLOSE, atol=0)


def test_the_scheduler_steps_after_every_update() -> None:
    case = Case(steps=5, chunk=2)
    forward, parameters = model(case)
    sgd = SGD(parameters.values(), lr=1.0)
    halving = ExponentialLR(sgd, gamma=0.5)

    oracle.train(forward, parameters, mse_loss, sgd, case.tensors(), case.chunk, scheduler=halving)

    assert sgd.param_groups[0]["lr"] == 0.5**3


def test_an_optimizer_that_evaluates_a_chunk_repeatedly_is_given_the_same_chunk() -> None:
    case = Case(batch=3, steps=4, chunk=2, inputs=2, hidden=3)
    ((x, y),), (forward, parameters) = case.tensors(), model(case)
    head = x[:, :2], y[:, :2]
    before = oracle.differentiate(forward, parameters, mse_loss, *head, None)
    lbfgs = LBFGS(parameters.values(), max_iter=5)

    (update,) = oracle.train(forward, parameters, mse_loss, lbfgs, [head], case.chunk)

    assert_same(update.loss, before.loss)
    assert_same(update.state, before.state)
    assert_same(update.gradients, before.gradients)
    after = oracle.differentiate(forward, parameters, mse_loss, *head, None)
    assert after.loss < 0.9 * before.loss


def test_a_parameter_that_is_frozen_or_not_reached_has_no_gradient_and_stays() -> None:
    case = Case(steps=3, chunk=2)
    forward, parameters = model(case)
    parameters["core.bias_hh_l0"].requires_grad_(False)
    parameters["spare"] = nn.Parameter(torch.ones(2))
    before = {name: parameters[name].detach().clone() for name in ("core.bias_hh_l0", "spare")}
    decaying = SGD(parameters.values(), lr=0.1, weight_decay=0.1)

    updates = oracle.train(forward, parameters, mse_loss, decaying, case.tensors(), case.chunk)

    for name, value in before.items():
        assert [update.gradients[name] for update in updates] == [None, None]
        assert_same(updates[-1].parameters[name], value)


class WritesIntoGradients(SGD):
    """An optimizer that leaves nothing of the gradients it was given."""

    def step(self, closure: Any = None) -> Any:
        answer = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.zero_()
        return answer


def writes_into_states(forward: Forward) -> Forward:
    """Leave nothing of the state that was handed in, nor of the one handed out before."""
    handed_out: list[Tensor] = []

    def spoilt(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        prediction, after = forward(x, None if state is None else state.clone())
        for tensor in [*handed_out, *([] if state is None else [state])]:
            tensor.detach().zero_()
        handed_out[:] = [after]
        return prediction, after

    return spoilt


def test_nothing_recorded_changes_afterwards() -> None:
    forward, parameters = model(UNEVEN)
    sgd = WritesIntoGradients(parameters.values(), lr=LR, momentum=MOMENTUM)
    batches, chunk = UNEVEN.tensors(), UNEVEN.chunk

    found = oracle.train(writes_into_states(forward), parameters, mse_loss, sgd, batches, chunk)

    worst, where = worst_difference(found, by_hand(UNEVEN))
    assert worst <= CLOSE, where


def test_the_parameters_it_was_given_are_trained() -> None:
    forward, parameters = model(UNEVEN)
    adam = Adam(parameters.values())

    updates = oracle.train(forward, parameters, mse_loss, adam, UNEVEN.tensors(), UNEVEN.chunk)

    for name, parameter in parameters.items():
        assert torch.equal(updates[-1].parameters[name], parameter)
        assert not torch.equal(updates[0].parameters[name], parameter)


class Pair(NamedTuple):
    """A state as a named tuple."""

    h: Tensor
    c: Any


@dataclass(frozen=True)
class Memory:
    """A state that refuses assignment."""

    slots: list[Tensor]
    age: int


def test_a_state_keeps_its_nesting_and_its_values_but_neither_graph_nor_memory() -> None:
    a, b, c, d = (
        torch.full((2,), i, dtype=torch.float64, requires_grad=True) * 1 for i in range(4)
    )
    state = OrderedDict(pair=Pair(a, (b, None)), memory=Memory([c], 3), d=d)

    copied = oracle.value_of(state)

    assert repr(copied) == repr(state).replace(", grad_fn=<MulBackward0>", "")
    found = [copied["pair"].h, copied["pair"].c[0], copied["memory"].slots[0], copied["d"]]
    for tensor, original in zip(found, (a, b, c, d), strict=True):
        assert tensor.data_ptr() != original.data_ptr()
        assert original.requires_grad


def test_a_state_it_cannot_see_into_is_refused() -> None:
    message = "state must be made of tensors in tuples, lists, dicts and dataclasses, got set: {1}"

    with pytest.raises(ValueError, match=exactly(message)):
        oracle.value_of([torch.zeros(1), {1}])


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def of_sizes(*sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(size, dtype=torch.float64) for size in sizes)


SAME_SIZES = "must be inputs and targets of the same B and T, T at least 1, got sizes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 time step, got chunk=0"),
        ({"batches": []}, "batches must hold at least 1 batch, got batches=[]"),
        (
            {"batches": [of_sizes((2, 3, 1), (2, 3, 1)), of_sizes((2, 3, 1), (2, 4, 1))]},
            f"batches[1] {SAME_SIZES} (2, 3) and (2, 4)",
        ),
        (
            {"batches": [of_sizes((2, 0, 1), (2, 0, 1))]},
            f"batches[0] {SAME_SIZES} (2, 0) and (2, 0)",
        ),
        ({"batches": [of_sizes((2,), (2,))]}, f"batches[0] {SAME_SIZES} (2,) and (2,)"),
        (
            {"forward": lambda x, state: x},
            "forward must return a pair (prediction, state), got Tensor",
        ),
        (
            {"forward": lambda x, state: (x, state, state)},
            "forward must return a pair (prediction, state), got tuple of 3",
        ),
        (
            {"loss": lambda prediction, y: prediction - y},
            "loss must return a scalar tensor, got Tensor of shape (2, 1, 1)",
        ),
        ({"loss": lambda prediction, y: 0.5}, "loss must return a scalar tensor, got float"),
        (
            {"optimizer": SGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1)},
            "optimizer must hold only what parameters names (core.weight_ih_l0, "
            "core.weight_hh_l0, core.bias_ih_l0, core.bias_hh_l0, readout.weight, readout.bias), "
            "got others of shapes [(3, 2)]",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_rule_and_its_value(
    change: dict[str, Any], message: str
) -> None:
    case = Case(batch=2, steps=3, chunk=1)
    forward, parameters = model(case)
    arguments: dict[str, Any] = {
        "forward": forward,
        "parameters": parameters,
        "loss": mse_loss,
        "optimizer": SGD(parameters.values(), lr=0.1),
        "batches": case.tensors(),
        "chunk": case.chunk,
    }

    with pytest.raises(ValueError, match=exactly(message)):
        oracle.train(**arguments | change)


def imported_by(module: str) -> set[str]:
    """Return the top-level packages a fresh interpreter has loaded after importing `module`."""
    program = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    python, root = [sys.executable, "-c", program], Path(__file__).parents[1]
    run = subprocess.run(python, cwd=root, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("tbptt_ref", {*LIGHTNING, "torch"}),
        ("tbptt_ref.closed_form", {*LIGHTNING, "torch"}),
        ("tbptt_ref.oracle", LIGHTNING),
    ],
)
def test_no_witness_imports_what_it_is_to_be_compared_with(module: str, absent: set[str]) -> None:
    assert not imported_by(module) & absent


def test_an_import_of_torch_or_lightning_would_be_seen() -> None:
    assert {"tbptt_ref", "lightning", "torch"} <= imported_by("tbptt_ref.module")
