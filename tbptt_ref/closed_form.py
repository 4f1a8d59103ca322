"""Truncated backpropagation through time in NumPy, derived by hand: what referees the oracle.

The model, in torch's layout (`nn.RNN` of one layer, `batch_first=True`, then `nn.Linear`), with f
the identity or tanh, U = core.weight_ih_l0, W = core.weight_hh_l0, b = core.bias_ih_l0 +
core.bias_hh_l0, V = readout.weight, c = readout.bias:

    h_t = f(U x_t + W h_{t-1} + b)        o_t = V h_t + c

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
U (H, I), W (H, H), b (H), V (O, H), c (O), x_t (B, I), h_t (B, H), o_t and y_t (B, O).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Activation = Literal["linear", "tanh"]

# f, and its slope written in f's own value.
FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "linear": (lambda z: z, np.ones_like),
    "tanh": (np.tanh, lambda h: 1 - h**2),
}


@dataclass(frozen=True, eq=False)  # two arrays have no single answer to ==
class Update:
    """One update: the chunk it learned from, and what came of it."""

    batch: int
    start: int  # the chunk's first time step in its batch
    stop: int  # the time step after its last
    loss: float
    gradients: dict[str, Array]
    state: Array  # (1, B, H) after the chunk, from the parameters before the update
    parameters: dict[str, Array]  # after the update


def train(
    parameters: Mapping[str, Array],
    batches: Sequence[tuple[Array, Array]],
    chunk: int,
    *,
    activation: Activation = "tanh",
    lr: float = 0.1,
    momentum: float = 0.0,
) -> list[Update]:
    """Return every update of a run, in order; `parameters` and `batches` stay as they are.

    The state is data where it enters a chunk: no δ comes from the chunk after (see `backward`).
    With g the chunk's gradient, v = 0 at first, an update is

        v ← momentum · v + g        θ ← θ - lr · v

    Args:
        parameters: by their names in `nn.RNN` and `nn.Linear`, after `core.` and `readout.`.
        batches: inputs (B, T, I) and targets (B, T, O) of each batch; each starts from zeros.
        chunk: K, the time steps trained on together; the last chunk of a batch may be shorter.
        activation: f.
        lr: the learning rate.
        momentum: of stochastic gradient descent, as torch counts it.

    Raises:
        ValueError: `chunk` is below 1, there is no batch, or f has another name.
    """
    _require(batches, chunk, activation)
    parameters = {name: np.array(value, dtype=np.float64) for name, value in parameters.items()}
    velocity = {name: np.zeros_like(value) for name, value in parameters.items()}
    updates: list[Update] = []
    for index, (x, y) in enumerate(batches):
        state = np.zeros((len(x), len(parameters["core.weight_hh_l0"])))
        for start in range(0, x.shape[1], chunk):
            stop = min(start + chunk, x.shape[1])
            piece = x[:, start:stop], y[:, start:stop]
            loss, gradients, state = one_chunk(parameters, *piece, state, activation)
            velocity = {name: momentum * velocity[name] + g for name, g in gradients.items()}
            parameters = {name: parameters[name] - lr * v for name, v in velocity.items()}
            updates.append(Update(index, start, stop, loss, gradients, state[None], parameters))
    return updates


def one_chunk(
    parameters: Mapping[str, Array], x: Array, y: Array, state: Array, activation: Activation
) -> tuple[float, dict[str, Array], Array]:
    """Return loss, gradients and outgoing state (B, H) of one chunk entered with `state` (B, H).

    The loss is torch's `mse_loss`, the mean over all B·K·O entries, so that

        L = 1/(BKO) Σ_t |o_t - y_t|²        e_t = ∂L/∂o_t = 2/(BKO) (o_t - y_t)

    and, with δ_t = ∂L/∂z_t at z_t = U x_t + W h_{t-1} + b from `backward`, sums over t and over B:

        dU = Σ δ_t x_tᵀ    dW = Σ δ_t h_{t-1}ᵀ    db = Σ δ_t    dV = Σ e_t h_tᵀ    dc = Σ e_t

    In dW the first h_{t-1} is `state`: at K = 1 dW is not zero.
    """
    h = forward(parameters, x, state, activation)
    error = h[:, 1:] @ parameters["readout.weight"].T + parameters["readout.bias"] - y
    e = 2 / error.size * error
    delta = backward(parameters, h[:, 1:], e, activation)
    gradients = {
        "core.weight_ih_l0": np.einsum("bth,bti->hi", delta, x),
        "core.weight_hh_l0": np.einsum("bth,btg->hg", delta, h[:, :-1]),
        "core.bias_ih_l0": delta.sum(axis=(0, 1)),
        "core.bias_hh_l0": delta.sum(axis=(0, 1)),
        "readout.weight": np.einsum("bto,bth->oh", e, h[:, 1:]),
        "readout.bias": e.sum(axis=(0, 1)),
    }
    return float(np.mean(error**2)), gradients, h[:, -1]


def forward(
    parameters: Mapping[str, Array], x: Array, state: Array, activation: Activation
) -> Array:
    """Return h (B, K + 1, H) of h_t = f(U x_t + W h_{t-1} + b), from h_0 = `state` (B, H) on."""
    f, _ = FUNCTIONS[activation]
    bias = parameters["core.bias_ih_l0"] + parameters["core.bias_hh_l0"]
    h = [state]
    for t in range(x.shape[1]):
        z = x[:, t] @ parameters["core.weight_ih_l0"].T + h[-1] @ parameters["core.weight_hh_l0"].T
        h.append(f(z + bias))
    return np.stack(h, axis=1)


def backward(parameters: Mapping[str, Array], h: Array, e: Array, activation: Activation) -> Array:
    """Return δ (B, K, H) from h (B, K, H) and e (B, K, O) of the same chunk, last time step first.

    z_t acts on the loss through o_t and through z_{t+1}, by way of h_t = f(z_t):

        δ_t = f'(z_t) ⊙ (Vᵀ e_t + Wᵀ δ_{t+1})

    with f' = 1 for the identity and 1 - h_t² for tanh. After the chunk's last time step there is
    nothing, δ_{K+1} = 0: that is the truncation.
    """
    _, slope = FUNCTIONS[activation]
    delta = np.zeros_like(h)
    later = np.zeros_like(h[:, 0])
    for t in reversed(range(h.shape[1])):
        pull = e[:, t] @ parameters["readout.weight"] + later @ parameters["core.weight_hh_l0"]
        later = delta[:, t] = slope(h[:, t]) * pull
    return delta


def one_scalar_chunk(
    parameters: Mapping[str, Array], x: Array, y: Array, state: Array
) -> tuple[float, dict[str, Array], Array]:
    """Answer as `one_chunk` does for I = H = O = 1 and f the identity, with no recursion at all.

    Unrolled from s = `state`, with a = W, w = U, u_q = w x_q + b and t, q = 1 ... K:

        h_t = aᵗ s + Σ_{q≤t} a^{t-q} u_q
        ∂h_t/∂a = t a^{t-1} s + Σ_{q<t} (t-q) a^{t-q-1} u_q
        ∂h_t/∂w = Σ_{q≤t} a^{t-q} x_q        ∂h_t/∂b = Σ_{q≤t} a^{t-q}

    and, for o_t = v h_t + c, dθ = Σ e_t v ∂h_t/∂θ for θ in a, w, b.
    """
    a, w, v = (float(parameters[name].item()) for name in SCALARS)
    b = parameters["core.bias_ih_l0"] + parameters["core.bias_hh_l0"]
    x, y = x[:, :, 0], y[:, :, 0]  # (B, K)
    t = np.arange(1, x.shape[1] + 1)
    lag = t[:, None] - t  # (t, q)
    powers = np.where(lag >= 0, a ** np.maximum(lag, 0.0), 0.0)
    slopes = np.where(lag > 0, lag * a ** np.maximum(lag - 1.0, 0.0), 0.0)
    h = state * a**t + (w * x + b) @ powers.T
    error = v * h + parameters["readout.bias"] - y
    e = 2 / error.size * error
    dh_da = state * t * a ** (t - 1.0) + (w * x + b) @ slopes.T
    db = np.sum(e * v * powers.sum(axis=1))
    gradients = {
        "core.weight_ih_l0": np.sum(e * v * (x @ powers.T)),
        "core.weight_hh_l0": np.sum(e * v * dh_da),
        "core.bias_ih_l0": db,
        "core.bias_hh_l0": db,
        "readout.weight": np.sum(e * h),
        "readout.bias": np.sum(e),
    }
    shaped = {name: np.reshape(g, parameters[name].shape) for name, g in gradients.items()}
    return float(np.mean(error**2)), shaped, h[:, -1:]


SCALARS = ("core.weight_hh_l0", "core.weight_ih_l0", "readout.weight")


def _require(batches: Sequence[tuple[Array, Array]], chunk: int, activation: str) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 time step, got chunk={chunk}")
    if not batches:
        raise ValueError(f"batches must hold at least 1 batch, got batches={batches!r}")
    if activation not in FUNCTIONS:
        names = ", ".join(FUNCTIONS)
        raise ValueError(f"activation must be one of {names}, got activation={activation!r}")
