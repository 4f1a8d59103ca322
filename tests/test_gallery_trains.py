"""The gallery's loops train; the right ones end where a loop written here ends, the wrong do not.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypedDict, cast

import pytest
import torch
from gallery.broken import BROKEN
from gallery.correct import CORRECT, DEFAULT_DTYPE, NOTES, Build, Loss
from gallery.other_shapes import OTHER, Batches
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, Dataset

from tbptt_props.case import Case

pytestmark = [
    # Lightning 2.6 walks its loaders with a pytree call that torch has since renamed.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # What follows is what strangers do: it is theirs, and right or wrong for other reasons.
    pytest.mark.filterwarnings(r"ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`"),
]

SEVERAL = Case(batch=3, steps=7, chunk=3, inputs=2, hidden=4, outputs=3, batches=2, seed=1)
SHORT = Case(batch=2, steps=3, chunk=5, inputs=1, hidden=3, outputs=2, batches=2, seed=3)
SMALLEST = Case()
MANY = replace(SEVERAL, steps=12, chunk=2)


class Tolerance(TypedDict):
    rtol: float
    atol: float


# Sums in another order, in float64 and in float32; Adam makes much of small differences.
DOUBLE: Tolerance = {"rtol": 1e-9, "atol": 1e-11}
SINGLE: Tolerance = {"rtol": 1e-3, "atol": 1e-5}


@dataclass(frozen=True)
class Recipe:
    """In what a loop that is right differs from the plainest one, so far as numbers show it."""

    call: Callable[[Any, Tensor, Any], tuple[Tensor, Any]] = lambda m, x, state: m(x, state)
    start: Callable[[Any, Tensor], Any] = lambda module, x: None
    clip: Callable[[list[nn.Parameter]], object] = lambda parameters: None
    after: Callable[[Any, list[Any]], object] = lambda module, optimizers: None  # every update
    schedule: str = "never"  # or after every "update", or every "batch"
    carries: bool = False  # from batch to batch
    configure: Callable[[Any], Any] = lambda module: module.configure_optimizers()


def turned(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call a module that is time-major on (B, K, I)."""
    prediction, state = module(x.transpose(0, 1), state)
    return prediction.transpose(0, 1), state


def one_time_step_each(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call a module that takes (B, I) on (B, K, I)."""
    predictions = []
    for x_t in x.unbind(1):
        prediction, state = module(x_t, state)
        predictions.append(prediction)
    return torch.stack(predictions, 1), state


def in_turn(core: str, readout: str) -> Callable[[Any, Tensor, Any], tuple[Tensor, Any]]:
    """Call a module by its two parts."""

    def call(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        features, state = getattr(module, core)(x, state)
        return getattr(module, readout)(features), state

    return call


def noise(module: Any, x: Tensor) -> Tensor:
    return torch.randn(1, x.size(0), module.gru.hidden_size, dtype=x.dtype)


def learned(module: Any, x: Tensor) -> Any:
    return module.start.expand(-1, x.size(0), -1).contiguous()


def average(module: Any) -> None:
    for pair in ((module.average[0], module.gru), (module.average[1], module.out)):
        for slow, fast in zip(*(part.parameters() for part in pair), strict=True):
            slow.data = slow.data + 0.1 * (fast.data - slow.data)


def clamp(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clip(-0.3, 0.3)


def decay(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.8


PLAINEST = Recipe()
RECIPES = {
    "time_major_sequences": Recipe(call=turned),
    "time_major_chunks": Recipe(call=turned),
    "one_step_forward": Recipe(call=one_time_step_each),
    "random_start": Recipe(start=noise),
    "micro_batches_summed": Recipe(start=learned),
    "noise_of_default_dtype": Recipe(start=noise),
    "scheduler_per_update": Recipe(schedule="update"),
    "scheduler_per_batch": Recipe(schedule="batch"),
    "clip_gradients": Recipe(clip=lambda parameters: clip_grad_norm_(parameters, 0.1)),
    "clip_grad_norm": Recipe(clip=lambda parameters: clip_grad_norm_(parameters, 0.25)),
    "averaged_weights": Recipe(after=lambda module, optimizers: average(module)),
    "clamped_weights": Recipe(after=lambda module, optimizers: clamp(module)),
    "learning_rate_by_hand": Recipe(after=lambda module, optimizers: decay(optimizers[0])),
    "clip_grad_value": Recipe(clip=lambda parameters: clip_grad_value_(parameters, 0.05)),
}


def hand_made(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run HandMadeRNN with its graph left whole."""
    h = x.new_zeros(x.size(0), module.hidden_size) if state is None else state
    features = []
    for x_t in x.unbind(1):
        h = module.cell(x_t, h)
        features.append(h)
    return module.h2o(torch.stack(features, 1)), h


def with_embedding(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    embedded = module.embed(x)
    features, state = module.rnn(embedded, state)
    return module.head(torch.cat([embedded, features], -1)), state


# Where the mistake is in forward, what forward should have done.
REPAIRS = {
    "detaches_every_time_step": Recipe(call=hand_made),
    "detaches_features": Recipe(call=in_turn("backbone", "classifier")),
    "core_under_no_grad": Recipe(call=with_embedding),
    "forward_ignores_state": Recipe(call=in_turn("rnn", "proj")),
    "wrong_end_of_the_features": Recipe(call=in_turn("rnn", "out")),
    "flattened_two_ways": Recipe(call=turned),
    "updates_by_hand": Recipe(configure=lambda m: optim.SGD(m.parameters(), lr=0.1)),
}

RAISES = {
    "micro_states_attached": "backward through the graph a second time",
    "never_detached": "backward through the graph a second time",
    "retains_graph": "modified by an inplace operation",
    "only_hidden_detached": "backward through the graph a second time",
    "detach_not_assigned": "backward through the graph a second time",
    "batch_first_forgotten": r"Expected hidden\[0\] size",
    "tuple_of_layers": "'tuple' object has no attribute 'dim'",
    "old_lightning_strict": "missing 1 required positional argument: 'hiddens'",
    "manual_forgotten": "disable automatic optimization",
}
LEAKS = ("losses_kept", "running_loss", "outputs_retained")
ONLY_BOOKKEEPING = ("raw_optimizer",)


def unroll_cell(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run StateInCell without the buffer it keeps its state in."""
    h = x.new_zeros(x.size(0), module.core.cell.hidden_size) if state is None else state
    features = []
    for x_t in x.unbind(1):
        h = module.core.cell(x_t, h)
        features.append(h)
    return module.net[1](torch.stack(features, 1)), h


def unroll_pair(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run DataclassOnSelf without the attribute it keeps its state in."""
    zeros = x.new_zeros(x.size(0), module.cell.hidden_size)
    h, c = (zeros, zeros) if state is None else state
    features = []
    for x_t in x.unbind(1):
        h, c = module.cell(x_t, (h, c))
        features.append(h)
    return module.head(torch.stack(features, 1)), (h, c)


def unroll_layers(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Run ResetState without the attributes it keeps its states in."""
    states = [None, None] if state is None else list(state)
    features = []
    for x_t in x.unbind(1):
        for i, layer in enumerate(module.layers):
            x_t = states[i] = layer.cell(x_t, states[i])
        features.append(x_t)
    return module.out(torch.stack(features, 1)), states


def with_positions(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    state, start = (None, 0) if state is None else state
    positions = torch.arange(start, start + x.size(1), dtype=x.dtype)
    features, state = module.rnn(x + 0.1 * positions[:, None], state)
    return module.head(features), (state, start + x.size(1))


def of_three(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call a module that takes h and c apart."""
    prediction, *state = module(x, *(module.init_hidden(x) if state is None else state))
    return prediction, state


def model_output(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    out = module(x, past=state)
    return out.logits, out.past


def dict_output(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    out = module(x, state)
    return out["logits"], out["past"]


def masked(module: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Call a module that takes the mask that `with_mask` put beside the inputs."""
    prediction, state = module(x[..., :-1], x[..., -1], state)
    return prediction, state


def with_mask(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    return [(torch.cat([x, done.unsqueeze(-1)], -1), y) for x, y, done in batches]


def repeated_target(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    return [(x, y[:, None].expand(-1, x.size(1), -1)) for x, y in batches]


def last_target(prediction: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.mse_loss(prediction, y[:, -1])


WIRING = {
    "state_on_self": Recipe(call=in_turn("lstm", "fc")),
    "state_in_cell": Recipe(call=unroll_cell),
    "no_forward": Recipe(call=in_turn("lstm", "head")),
    "state_first": Recipe(call=in_turn("rnn", "out")),
    "dict_output": Recipe(call=dict_output),
    "time_major_batches": Recipe(call=turned),
    "episode_mask": Recipe(call=masked),
    "stream": Recipe(carries=True),
    "stream_of_chunks": Recipe(carries=True),
    "triple": Recipe(call=of_three),
    "dataclass_on_self": Recipe(call=unroll_pair),
    "dict_on_self": Recipe(call=in_turn("rnn", "head")),
    "dict_in_place": Recipe(call=in_turn("rnn", "head")),
    "positions": Recipe(call=with_positions),
    "reset_state": Recipe(call=unroll_layers),
    "two_attributes": Recipe(call=in_turn("lstm", "linear")),
    "state_returned_too": Recipe(call=in_turn("lstm", "fc")),
    "reset_flag": Recipe(call=in_turn("lstm", "fc")),
    "state_by_name": Recipe(call=lambda m, x, state: m(x, state=state)),
    "any_names": Recipe(call=lambda m, x, state: m(x, state=state)),
    "model_output": Recipe(call=model_output),
    "core_runs_chunks": Recipe(call=lambda m, x, state: m.core(x, state)),
    "next_input": Recipe(call=turned),
    "plain_pytorch": Recipe(
        configure=lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    ),
    "within_backward": Recipe(configure=lambda m: optim.SGD(m.parameters(), lr=0.1)),
    "fabric": Recipe(configure=lambda m: optim.Adam(m.parameters(), lr=0.01)),
}

# Where batches are no (x, y), what they amount to.
PAIRS: dict[str, Callable[[Case, Batches], list[tuple[Tensor, Tensor]]]] = {
    "chunk_per_batch": lambda case, _: case.tensors(),
    "dict_batches": lambda case, _: case.tensors(),
    "time_major_batches": lambda case, _: case.tensors(),
    "shifted_tokens": lambda _, batches: [(ids[:, :-1], ids[:, 1:]) for ids in batches],
    "target_per_sequence": lambda _, batches: repeated_target(batches),
    "episode_mask": lambda _, batches: with_mask(batches),
    "named_batches": lambda case, _: case.tensors(),
    "frames": lambda _, batches: [(video[:, :-1], video[:, 1:]) for video in batches],
    "next_input": lambda _, batches: [
        (x[:-1].transpose(0, 1), x[1:].transpose(0, 1)) for x in batches
    ],
}

# Not by one update a chunk of K time steps, from inputs that are one tensor.
BY_ANOTHER_PLAN = {
    "update_per_sequence",
    "summed_losses",
    "accumulates_two",
    "accumulates_batches",
    "trainer_accumulates",
    "mean_of_two",
    "random_lengths",
    "growing_lengths",
    "pair_of_inputs",
    "ragged",
    "packed",
    "takes_packed",
    "burn_in",
    "truncates_in_forward",
    "zoneout",
    "windows",
    "stepwise_windows",
    "last_chunk",
    "speaker_ids",
    "running_average",
    "warmed_up",
    "penalized",
    "looks_ahead",
    "unfreezes",
    "spectrally_normed",
    "clips_in_backward",
    "clips_units",
    "whole_chunks",
    "embeds_outside",
    "masked_tail",
    "flat_tokens",
    "locked_dropout",
    "loss_in_forward",
    "single_feature",
    "takes_the_iterator",
    "state_in_slots",
}


# --------------------------------------------------------------------------- training, two ways


def fit(module: LightningModule, batches: Batches) -> Trainer:
    """Train as users do, quietly; the loader's seed comes from no global generator."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = cast("Dataset[Any]", batches)
    trainer.fit(module, DataLoader(data, batch_size=None, generator=torch.Generator()))
    return trainer


def train_plainly(
    module: Any, loss: Loss, batches: Iterable[Any], chunk: int, recipe: Recipe
) -> None:
    """Learn from (B, T, .) pairs, K time steps at a time, with none of the subject's loop."""
    optimizers, schedulers = configured(recipe.configure(module))
    state = None
    for x, y in batches:
        state = state if recipe.carries else recipe.start(module, x)
        for first in range(0, x.size(1), chunk):
            steps = slice(first, first + chunk)
            state = update(module, loss, optimizers, (x[:, steps], y[:, steps]), state, recipe)
            recipe.after(module, optimizers)
            if recipe.schedule == "update":
                schedulers[0].step()
        if recipe.schedule == "batch":
            schedulers[0].step()


def update(
    module: Any, loss: Loss, optimizers: list[Any], batch: Any, state: Any, recipe: Recipe
) -> Any:
    """Make one update; return the state before it, as values."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    ends = []

    def differentiate() -> Tensor:
        prediction, end = recipe.call(module, batch[0], state)
        ends.append(values(end))
        value = loss(prediction, batch[1])
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        recipe.clip(parameters)
        return value

    evaluates_again = isinstance(optimizers[0], optim.LBFGS)
    if evaluates_again:
        optimizers[0].step(differentiate)
    else:
        differentiate()
        for optimizer in optimizers:
            optimizer.step()
    return ends[0]


def values(state: Any) -> Any:
    """Copy a state of any nesting, without its past."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: values(leaf) for key, leaf in state.items()}
    if is_dataclass(state):
        return replace(state, **{f.name: values(getattr(state, f.name)) for f in fields(state)})  # type: ignore[type-var]
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*map(values, state))
    return type(state)(map(values, state)) if isinstance(state, (list, tuple)) else state


def configured(answer: Any) -> tuple[list[Any], list[Any]]:
    """Sort what `configure_optimizers` returned into optimizers and schedulers."""
    if isinstance(answer, dict):
        scheduler = answer.get("lr_scheduler")
        return [answer["optimizer"]], [scheduler["scheduler"]] if scheduler else []
    if isinstance(answer, tuple):
        return answer
    return (answer if isinstance(answer, list) else [answer]), []


def seeded(case: Case, run: Callable[[], Any]) -> Any:
    """Run with the global generator at the case's seed, and put it back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return run()


def in_dtype(batches: Batches, dtype: torch.dtype) -> Batches:
    return [tuple(tensor.to(dtype) for tensor in batch) for batch in batches]


def trained_both_ways(
    build: Build, recipe: Recipe, case: Case, dtype: torch.dtype = torch.float64
) -> tuple[LightningModule, LightningModule]:
    """Return a module that its own loop has trained, and its twin, which the plain loop has."""
    (subject, loss), (twin, _) = (seeded(case, lambda: build(case)) for _ in range(2))
    batches = in_dtype(case.tensors(), dtype)
    seeded(case, lambda: fit(subject.to(dtype), batches))
    seeded(case, lambda: train_plainly(twin.to(dtype), loss, batches, case.chunk, recipe))
    return subject, twin


def assert_close(one: nn.Module, other: nn.Module, tolerance: Tolerance) -> None:
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)


def difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between two modules' parameters and buffers."""
    ours, theirs = one.state_dict(), other.state_dict()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def by_name(entries: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(entries))


# ------------------------------------------------------------------------- those that are right


@pytest.mark.parametrize("case", [SEVERAL, SHORT, SMALLEST], ids=["several", "short", "smallest"])
@by_name(name for name in CORRECT if name not in DEFAULT_DTYPE)
def test_a_right_loop_ends_where_a_plain_loop_over_its_forward_ends(name: str, case: Case) -> None:
    subject, twin = trained_both_ways(CORRECT[name], RECIPES.get(name, PLAINEST), case)

    assert_close(subject, twin, DOUBLE)


@by_name(CORRECT)
def test_a_right_loop_is_right_in_single_precision_too(name: str) -> None:
    recipe = RECIPES.get(name, PLAINEST)
    subject, twin = trained_both_ways(CORRECT[name], recipe, SEVERAL, torch.float32)

    assert_close(subject, twin, SINGLE)


@by_name(CORRECT)
def test_a_right_loop_moves_every_parameter_that_it_does_not_freeze(name: str) -> None:
    (subject, _), (start, _) = (seeded(SEVERAL, lambda: CORRECT[name](SEVERAL)) for _ in range(2))

    fit(subject, in_dtype(SEVERAL.tensors(), torch.float32))

    before = dict(start.named_parameters())
    still = {n for n, p in subject.named_parameters() if torch.equal(p, before[n])}
    frozen = {n for n, p in subject.named_parameters() if not p.requires_grad}
    assert still <= frozen


@by_name(CORRECT)
def test_a_right_loop_keeps_no_graph_longer_than_the_next_chunk(name: str) -> None:
    subject, _ = seeded(MANY, lambda: CORRECT[name](MANY))

    # Twice the chunk, because some call forward once for every time step.
    assert most_graphs_alive(subject) <= 2 * MANY.chunk


def most_graphs_alive(module: LightningModule) -> int:
    """Train, and count at every forward how many forwards' graphs are still there."""
    forward = module.forward
    tokens: list[weakref.ref[Any]] = []
    counts = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        outputs = forward(*args, **kwargs)
        if outputs[0].grad_fn is not None:
            outputs[0].grad_fn.metadata["token"] = token = Token()
            tokens.append(weakref.ref(token))
            counts.append(sum(token() is not None for token in tokens))
        return outputs

    module.forward = watched  # type: ignore[method-assign]  # a hook would miss self.forward(...)
    fit(module, in_dtype(MANY.tensors()[:1], torch.float32))
    return max(counts)


class Token:
    """Lives as long as the graph node that it is put on."""


def test_every_remark_is_about_a_loop_that_is_there() -> None:
    assert CORRECT.keys() >= {*NOTES, *DEFAULT_DTYPE, *RECIPES}
    assert BROKEN.keys() >= {*RAISES, *LEAKS, *ONLY_BOOKKEEPING, *REPAIRS}
    assert OTHER.keys() >= {*WIRING, *PAIRS, *BY_ANOTHER_PLAN}


# ------------------------------------------------------------------------- those that are wrong


@by_name(name for name in BROKEN if name not in {*RAISES, *LEAKS, *ONLY_BOOKKEEPING})
def test_a_wrong_loop_ends_elsewhere(name: str) -> None:
    subject, twin = trained_both_ways(BROKEN[name][1], REPAIRS.get(name, PLAINEST), SEVERAL)

    assert difference(subject, twin) > 1e-6


@by_name(RAISES)
def test_a_wrong_loop_raises(name: str) -> None:
    module, _ = seeded(SEVERAL, lambda: BROKEN[name][1](SEVERAL))

    with pytest.raises(Exception, match=RAISES[name]):
        fit(module.double(), SEVERAL.tensors())


@by_name(LEAKS)
def test_a_leak_keeps_every_chunks_graph(name: str) -> None:
    subject, _ = seeded(MANY, lambda: BROKEN[name][1](MANY))

    assert most_graphs_alive(subject) == MANY.steps // MANY.chunk


def test_a_raw_optimizer_leaves_lightnings_count_at_zero() -> None:
    raw, _ = BROKEN["raw_optimizer"][1](SEVERAL)
    wrapped, _ = CORRECT["forward_zero_backward_step"](SEVERAL)

    counts = [fit(m.double(), SEVERAL.tensors()).global_step for m in (raw, wrapped)]

    assert counts == [0, 6]


@by_name([*LEAKS, *ONLY_BOOKKEEPING])
def test_what_no_number_shows_ends_where_a_plain_loop_ends(name: str) -> None:
    subject, twin = trained_both_ways(BROKEN[name][1], PLAINEST, SEVERAL)

    assert_close(subject, twin, DOUBLE)


def test_every_wrong_loop_says_what_is_wrong_in_its_own_words() -> None:
    sentences = [sentence for sentence, _ in BROKEN.values()]

    assert len(set(sentences)) == len(BROKEN)
    assert all(len(sentence.split()) >= 5 for sentence in sentences)


# ------------------------------------------------------------------- right, but wired otherwise


@by_name(name for name in OTHER if name not in BY_ANOTHER_PLAN)
def test_a_loop_wired_otherwise_ends_where_a_plain_loop_ends(name: str) -> None:
    _, build = OTHER[name]
    subject, twin = (seeded(SEVERAL, lambda: build(SEVERAL)) for _ in range(2))
    module: Any = subject.module.double()
    loss = last_target if name == "target_per_sequence" else subject.loss
    pairs = PAIRS[name](SEVERAL, subject.batches) if name in PAIRS else subject.batches
    recipe = WIRING.get(name, PLAINEST)

    (subject.train or fit)(module, subject.batches)
    train_plainly(twin.module.double(), loss, pairs, SEVERAL.chunk, recipe)

    assert_close(module, twin.module, DOUBLE)


@by_name(["ragged", "packed"])
def test_a_masked_loss_leaves_out_what_is_behind_a_sequences_end(name: str) -> None:
    _, build = OTHER[name]
    subject, twin = (seeded(SEVERAL, lambda: build(SEVERAL)) for _ in range(2))
    module: Any = twin.module.double()
    optimizer = module.configure_optimizers()

    fit(subject.module.double(), subject.batches)
    for x, y, lengths in twin.batches:
        state, start = None, 0
        for piece, due in zip(*(part.split(SEVERAL.chunk, dim=1) for part in (x, y)), strict=True):
            left = lengths - start
            extra = [left.clamp(1, piece.shape[1])] if name == "packed" else []
            prediction, state = module(piece, *extra, values(state))
            errors = [
                error
                for row, length in zip((prediction - due).square().mean(-1), left, strict=True)
                for error in row[: max(0, int(length))]
            ]
            optimizer.zero_grad()
            (torch.stack(errors).mean() if errors else 0 * prediction.sum()).backward()
            optimizer.step()
            start += piece.shape[1]

    assert_close(subject.module, module, DOUBLE)


def test_an_update_per_sequence_follows_the_mean_over_all_its_time_steps() -> None:
    _, build = OTHER["update_per_sequence"]
    subject, twin = (seeded(SEVERAL, lambda: build(SEVERAL)) for _ in range(2))
    module: Any = twin.module.double()
    optimizer = module.configure_optimizers()

    fit(subject.module.double(), subject.batches)
    for x, y in twin.batches:
        state, predictions = None, []
        for piece in x.split(SEVERAL.chunk, dim=1):
            prediction, state = module(piece, values(state))
            predictions.append(prediction)
        optimizer.zero_grad()
        twin.loss(torch.cat(predictions, dim=1), y).backward()
        optimizer.step()

    assert_close(subject.module, module, DOUBLE)
