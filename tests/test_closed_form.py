import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tbptt_props.case import Case
from tbptt_props.strategies import cases
from tbptt_ref.closed_form import Activation, Array, forward, one_chunk, one_scalar_chunk, train

CLOSE = 1e-12  # float64 against float64, sums in another order
STEP = 1e-30  # of the complex-step derivative: nothing is subtracted, so it can be this small


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=CLOSE, atol=CLOSE)


def grown(case: Case) -> dict[str, Array]:
    i, h, o = case.inputs, case.hidden, case.outputs
    generator = np.random.default_rng(case.seed)
    shapes: dict[str, tuple[int, ...]] = {
        "core.weight_ih_l0": (h, i),
        "core.weight_hh_l0": (h, h),
        "core.bias_ih_l0": (h,),
        "core.bias_hh_l0": (h,),
        "readout.weight": (o, h),
        "readout.bias": (o,),
    }
    return {name: generator.uniform(-1, 1, shape) for name, shape in shapes.items()}


def numpy_batches(case: Case) -> list[tuple[Array, Array]]:
    return [(x.numpy(), y.numpy()) for x, y in case.tensors()]


def entering_state(case: Case) -> Array:
    return np.random.default_rng(case.seed + 1).standard_normal((case.batch, case.hidden))


ONES = {
    "core.weight_ih_l0": np.ones((1, 1)),
    "core.weight_hh_l0": np.ones((1, 1)),
    "core.bias_ih_l0": np.zeros(1),
    "core.bias_hh_l0": np.zeros(1),
    "readout.weight": np.ones((1, 1)),
    "readout.bias": np.zeros(1),
}
# Two time steps of a running sum, 1 and 3, that should both have been 0.
X, Y = np.array([[[1.0], [2.0]]]), np.zeros((1, 2, 1))


def scalars(gradients: dict[str, Array]) -> list[float]:
    return [gradients[name].item() for name in ONES]


def test_one_chunk_of_two_time_steps_is_what_it_is_on_paper() -> None:
    (update,) = train(ONES, [(X, Y)], 2, activation="linear", lr=0.5)

    assert (update.batch, update.start, update.stop) == (0, 0, 2)
    assert update.loss == (1 + 9) / 2
    # e = 1, 3 and δ = 1 + 3, 3
    assert scalars(update.gradients) == [4 * 1 + 3 * 2, 4 * 0 + 3 * 1, 7, 7, 1 * 1 + 3 * 3, 4]
    assert scalars(update.parameters) == [-4, -0.5, -3.5, -3.5, -4, -2]
    assert update.state.tolist() == [[[3]]]


def test_two_chunks_of_one_time_step_are_what_they_are_on_paper() -> None:
    first, second = train(ONES, [(X, Y)], 1, activation="linear", lr=0.0)

    assert (second.batch, second.start, second.stop) == (0, 1, 2)
    assert (first.loss, second.loss) == (1, 9)
    assert scalars(first.gradients) == [2, 0, 2, 2, 2, 2]
    # The state that comes in, 1, counts as data: it has a weight but no past.
    assert scalars(second.gradients) == [12, 6, 6, 6, 18, 6]
    assert second.state.tolist() == [[[3]]]


def test_momentum_adds_up_over_updates_and_batches() -> None:
    case = Case(batch=2, steps=3, chunk=2, inputs=2, hidden=3, outputs=1, batches=2)
    before = {name: value.copy() for name, value in grown(case).items()}

    updates = train(grown(case), numpy_batches(case), case.chunk, lr=0.1, momentum=0.9)

    assert [(each.batch, each.start, each.stop) for each in updates] == [
        (0, 0, 2),
        (0, 2, 3),
        (1, 0, 2),
        (1, 2, 3),
    ]
    for name, value in before.items():
        g = [update.gradients[name] for update in updates]
        weights = [1 + 0.9 + 0.9**2 + 0.9**3, 1 + 0.9 + 0.9**2, 1 + 0.9, 1.0]
        moved = sum(0.1 * weight * each for weight, each in zip(weights, g, strict=True))
        assert_close(updates[-1].parameters[name], value - moved)


def test_nothing_given_is_changed() -> None:
    case = Case(batch=2, steps=5, chunk=2, hidden=2)
    parameters, batches = grown(case), numpy_batches(case)

    train(parameters, batches, case.chunk, momentum=0.9)

    for name, value in grown(case).items():
        np.testing.assert_array_equal(parameters[name], value)
    np.testing.assert_array_equal(batches[0], numpy_batches(case)[0])


@pytest.mark.parametrize("activation", ["linear", "tanh"])
@given(case=cases(batches=1))
def test_the_gradient_is_the_slope_of_the_values_along_any_direction(
    activation: Activation, case: Case
) -> None:
    ((x, y),) = numpy_batches(case)
    parameters, state, direction = grown(case), entering_state(case), along(case)
    nudged = {name: parameters[name] + 1j * STEP * direction[name] for name in parameters}
    h: Any = forward(nudged, x, state, activation)
    error = h[:, 1:] @ nudged["readout.weight"].T + nudged["readout.bias"] - y
    complex_loss = np.mean(error**2)

    loss, gradients, _ = one_chunk(parameters, x, y, state, activation)

    slope = sum(np.vdot(gradients[name], direction[name]) for name in gradients)
    assert_close(loss, complex_loss.real)
    assert_close(slope, complex_loss.imag / STEP)


def along(case: Case) -> dict[str, Array]:
    generator = np.random.default_rng(case.seed + 2)
    return {name: generator.standard_normal(value.shape) for name, value in grown(case).items()}


@given(case=cases(batches=1, inputs=1, hidden=1, outputs=1))
def test_recursion_and_sums_without_recursion_agree(case: Case) -> None:
    ((x, y),) = numpy_batches(case)
    parameters, state = grown(case), entering_state(case)

    loss, gradients, after = one_chunk(parameters, x, y, state, "linear")
    expected, sums, due = one_scalar_chunk(parameters, x, y, state)

    assert_close(loss, expected)
    assert_close(after, due)
    assert sums.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.shape == sums[name].shape
        assert_close(gradient, sums[name])


def test_sums_without_recursion_hold_where_nothing_is_remembered() -> None:
    parameters = ONES | {"core.weight_hh_l0": np.zeros((1, 1))}

    _, gradients, _ = one_chunk(parameters, X, Y, np.ones((1, 1)), "linear")
    _, sums, _ = one_scalar_chunk(parameters, X, Y, np.ones((1, 1)))

    # h = 1, 2 and e = 1, 2; dW = δ_1 · 1 + δ_2 · h_1
    assert scalars(gradients) == scalars(sums) == [5, 3, 3, 3, 5, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1 time step, got chunk=0"),
        ({"batches": []}, "batches must hold at least 1 batch, got batches=[]"),
        (
            {"activation": "relu"},
            "activation must be one of linear, tanh, got activation='relu'",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_rule_and_its_value(
    change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"parameters": ONES, "batches": [(X, Y)], "chunk": 1}

    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(**arguments | change)
