"""Loops that update their parameters themselves: right ones break nothing, wrong ones are named.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.func import functional_call, grad_and_value
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.byhand import BY_HAND, Rate
from tbptt_props.trace import Rule

LR = 0.1
RESUMED, ALONE = "a_run_can_be_resumed_at_any_boundary", "a_batch_knows_nothing_of_the_one_before"
Update = Callable[[Sequence[Tensor]], None]
Updating = Callable[[list[nn.Parameter]], Update]
Train = Callable[..., None]

# Three chunks and a shorter one; a single chunk; chunks of one time step in several batches.
CASES = (
    tb.Case(batch=2, steps=7, chunk=2, inputs=2, hidden=3, outputs=2, batches=2, seed=1),
    tb.Case(batch=2, steps=3, chunk=3, inputs=2, hidden=3, outputs=2, seed=2),
    tb.Case(batch=2, steps=3, chunk=1, inputs=1, hidden=2, outputs=1, batches=3, seed=3),
)


class Net(nn.Module):
    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state


class Step(nn.Module):
    """Takes one time step a call, and begins in a state that is learned."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(case.hidden))
        self.cell = nn.GRUCell(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        state = self.cell(x, self.start.expand(len(x), -1) if state is None else state)
        return self.head(state), state


def chunks(batch: tuple[Tensor, Tensor], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(*(part.split(length, dim=1) for part in batch), strict=True)


def subject(
    case: tb.Case, train: Train, *, contract: tb.Contract | None = None, net: Any = Net
) -> tb.Subject:
    def run(module: nn.Module, batches: Any) -> None:
        train(module, batches, case.chunk)

    return tb.Subject(net(case), loss=mse_loss, train=run, contract=contract or tb.Contract())


def judged(train: Train, **how: Any) -> dict[str, str]:
    """Return what each property that is broken says first, on the first case that breaks it."""
    found: dict[str, str] = {}
    for case in CASES:
        report = tb.check(subject(case, train, **how), case)
        for verdict in report.broken:
            found.setdefault(verdict.name, str(verdict.violations[0]))
    return found


def checked(train: Train, case: tb.Case = CASES[0]) -> tb.Report:
    return tb.check(subject(case, train), case)


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# Updates ------------------------------------------------------------------------------------


def in_place(parameters: list[nn.Parameter]) -> Update:
    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(LR * gradient)

    return update


def by_data(parameters: list[nn.Parameter]) -> Update:
    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= LR * gradient

    return update


def all_at_once(parameters: list[nn.Parameter]) -> Update:
    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        torch._foreach_add_([*parameters], [*gradients], alpha=-LR)

    return update


def with_momentum(parameters: list[nn.Parameter]) -> Update:
    speeds = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient, speed in zip(parameters, gradients, speeds, strict=True):
            parameter.sub_(speed.mul_(0.9).add_(gradient), alpha=LR)

    return update


def as_adam(parameters: list[nn.Parameter]) -> Update:
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    count = 0

    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        nonlocal count
        count += 1
        for p, g, mean, square in zip(parameters, gradients, means, squares, strict=True):
            mean.mul_(0.9).add_(g, alpha=0.1)
            square.mul_(0.999).addcmul_(g, g, value=0.001)
            height = (square / (1 - 0.999**count)).sqrt() + 1e-8
            p.sub_(LR * mean / (1 - 0.9**count) / height)

    return update


def at_a_rate(rate: Callable[[int], float]) -> Updating:
    def updating(parameters: list[nn.Parameter]) -> Update:
        count = 0

        @torch.no_grad()
        def update(gradients: Sequence[Tensor]) -> None:
            nonlocal count
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(rate(count) * gradient)
            count += 1

        return update

    return updating


def with_decay(parameters: list[nn.Parameter]) -> Update:
    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.mul_(0.99).sub_(LR * gradient)

    return update


def clipped(parameters: list[nn.Parameter]) -> Update:
    @torch.no_grad()
    def update(gradients: Sequence[Tensor]) -> None:
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(LR * gradient * (0.5 / (norm + 1e-6)).clamp(max=1.0))

    return update


UPDATES: dict[str, Updating] = {
    "in place": in_place,
    "through .data": by_data,
    "all at once": all_at_once,
    "with momentum": with_momentum,
    "as Adam does": as_adam,
    "at a rate that decays": at_a_rate(lambda n: LR * 0.9**n),
    "at a rate that warms up from zero": at_a_rate(lambda n: LR * min(n, 1)),
    "with weight decay": with_decay,
    "clipped": clipped,
}
SIMPLE = {"in place", "through .data", "all at once"}


# Loops --------------------------------------------------------------------------------------


def asking(updating: Updating, *, after: Any = Tensor.detach, retain: bool = False) -> Train:
    """Return a loop that has autograd hand its gradients back."""

    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = updating(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                loss = mse_loss(prediction, y)
                update(torch.autograd.grad(loss, parameters, retain_graph=retain))
                state = after(state)

    return train


def accumulating(
    updating: Updating, *, after: Any = Tensor.detach, clears: bool = True, retain: bool = False
) -> Train:
    """Return a loop that has backward leave its gradients in the parameters."""

    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = updating(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                if clears:
                    module.zero_grad()
                mse_loss(prediction, y).backward(retain_graph=retain)
                update([p.grad for p in parameters if p.grad is not None])
                state = after(state)

    return train


LOOPS: dict[str, Callable[..., Train]] = {"grad": asking, "backward": accumulating}


# What is right ------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("update", UPDATES)
def test_a_right_loop_breaks_nothing_by_whatever_rule_it_updates(update: str, loop: str) -> None:
    train = LOOPS[loop](UPDATES[update])

    assert judged(train) == {}
    report = checked(train)
    assert report["each_chunk_updates_once"].status == "holds"
    assert report["gradients_are_the_chunks_own"].status == "holds"
    assert report["the_update_follows_the_optimizers_rule"].status == "not judged"
    assert report["one_chunk_is_one_ordinary_update"].status == "not judged"
    # A memory that the loop keeps to itself can't be handed on.
    due = "holds" if update in SIMPLE else "not judged"
    assert report["a_run_can_be_resumed_at_any_boundary"].status == due
    assert report["a_batch_knows_nothing_of_the_one_before"].status == due


def in_hooks(*, clears: bool = True) -> Train:
    """Return a loop that updates each parameter as soon as backward is done with it."""

    def use_up(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.data.sub_(LR * parameter.grad)
        if clears:
            parameter.grad = None

    def train(module: nn.Module, batches: Any, length: int) -> None:
        hooks = [p.register_post_accumulate_grad_hook(use_up) for p in module.parameters()]
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                mse_loss(prediction, y).backward()
                state = state.detach()
        for hook in hooks:
            hook.remove()

    return train


def test_updates_in_the_midst_of_backward_break_nothing() -> None:
    assert judged(in_hooks()) == {}
    report = checked(in_hooks())
    assert report["each_chunk_updates_once"].status == "holds"
    assert report[RESUMED].status == "holds"


def test_gradients_that_are_never_cleared_are_named_in_the_midst_of_backward_too() -> None:
    found = judged(in_hooks(clears=False))

    assert found["events_come_in_a_legal_order"].startswith(
        "time steps 2-3, gradients before backward: not clear"
    )


def test_an_update_after_one_in_the_midst_of_backward_is_named() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        def call(x: Tensor, state: Tensor | None) -> Any:
            for parameter in module.parameters():
                parameter.data.mul_(0.99)
            return module(x, state)

        wrapped: Any = call
        wrapped.parameters = module.parameters
        in_hooks()(wrapped, batches, length)

    found = judged(train)

    assert found["nothing_but_the_update_moves_parameters"].startswith("time steps 2-3")
    case = CASES[0]
    violations = tb.check(subject(case, train), case)[
        "nothing_but_the_update_moves_parameters"
    ].violations
    assert any("moved between the update and forward" in str(found) for found in violations)


def by_functional_call(module: nn.Module, batches: Any, length: int) -> None:
    parameters = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    for batch in batches:
        state: Tensor | None = None
        for x, y in chunks(batch, length):
            prediction, state = functional_call(module, parameters, (x, state))
            found = torch.autograd.grad(mse_loss(prediction, y), list(parameters.values()))
            new = zip(parameters.items(), found, strict=True)
            parameters = {name: (p - LR * g).detach().requires_grad_() for (name, p), g in new}
            state = state.detach()


def by_functional_gradients(module: nn.Module, batches: Any, length: int) -> None:
    def loss(parameters: Any, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, state = functional_call(module, parameters, (x, state))
        return mse_loss(prediction, y), state

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    for batch in batches:
        state: Tensor | None = None
        for x, y in chunks(batch, length):
            found, (_, state) = grad_and_value(loss, has_aux=True)(parameters, x, y, state)
            parameters = {name: p - LR * found[name] for name, p in parameters.items()}


def by_functional_gradients_from_zeros(module: nn.Module, batches: Any, length: int) -> None:
    def loss(parameters: Any, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, _ = functional_call(module, parameters, (x, state))
        return mse_loss(prediction, y)

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    for batch in batches:
        for x, y in chunks(batch, length):
            grad_and_value(loss)(parameters, x, y, x.new_zeros(1, len(x), 1))


@pytest.mark.parametrize(
    "train", [by_functional_call, by_functional_gradients, by_functional_gradients_from_zeros]
)
def test_parameters_that_are_kept_outside_the_module_are_refused(train: Train) -> None:
    with pytest.raises(tb.ObservationError, match="Net is called with parameters that are not its"):
        checked(train)


def test_what_an_update_makes_of_gradients_is_not_judged() -> None:
    def twice(parameters: list[nn.Parameter]) -> Update:
        update = in_place(parameters)
        return lambda gradients: (update(gradients), update(gradients))[-1]

    def one_late(parameters: list[nn.Parameter]) -> Update:
        update = in_place(parameters)
        before: list[Sequence[Tensor]] = []

        def late(gradients: Sequence[Tensor]) -> None:
            before.append(gradients)
            update(before[-2:][0])

        return late

    assert judged(asking(twice)) == {}
    assert judged(asking(one_late)) == {}


@pytest.mark.parametrize("loop", LOOPS)
def test_clipping_that_is_promised_is_not_judged_where_it_can_not_be_seen(loop: str) -> None:
    assert judged(LOOPS[loop](clipped), contract=tb.Contract(clip_norm=0.5)) == {}


@pytest.mark.parametrize("loop", LOOPS)
def test_an_update_is_seen_though_the_loop_stops_after_it(loop: str) -> None:
    detached: list[Tensor] = []

    def stop(state: Tensor) -> Tensor:
        detached.append(state.detach())
        if len(detached) == 2:
            raise ValueError("enough")
        return detached[-1]

    report = checked(LOOPS[loop](in_place, after=stop))

    assert {verdict.name for verdict in report.broken} == {"training_reaches_the_end"}


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_not_judged_of_a_loop_without_an_optimizer_says_so(loop: str) -> None:
    needed = "an optimizer of torch's: updates are made by hand"

    report = checked(LOOPS[loop](in_place), CASES[1])
    assert report["the_update_follows_the_optimizers_rule"].missing == needed
    assert report["one_chunk_is_one_ordinary_update"].missing == needed
    assert checked(LOOPS[loop](with_momentum))[RESUMED].missing == (
        "updates by hand that are one multiple of the gradient: others may remember more"
    )


@pytest.mark.parametrize("asked", [True, False])
def test_calls_of_one_time_step_each_and_a_learned_start_break_nothing(asked: bool) -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = in_place(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                predictions = []
                for x_t in x.unbind(1):
                    prediction, state = module(x_t, state)
                    predictions.append(prediction)
                loss = mse_loss(torch.stack(predictions, dim=1), y)
                module.zero_grad()
                if asked:
                    found: Any = torch.autograd.grad(loss, parameters, allow_unused=True)
                else:
                    loss.backward()
                    found = [p.grad for p in parameters]
                pairs = zip(parameters, found, strict=True)
                update([torch.zeros_like(p) if g is None else g for p, g in pairs])
                assert state is not None
                state = state.detach()

    assert judged(train, net=Step) == {}


def test_parameters_that_are_replaced_by_new_ones_break_nothing() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                old = dict(module.named_parameters())
                gradients = torch.autograd.grad(mse_loss(prediction, y), list(old.values()))
                for (name, parameter), gradient in zip(old.items(), gradients, strict=True):
                    owner, _, last = name.rpartition(".")
                    new = nn.Parameter((parameter - LR * gradient).detach())
                    setattr(module.get_submodule(owner), last, new)
                state = state.detach()

    assert judged(train) == {}


def test_gradients_that_are_asked_for_to_be_looked_at_are_no_backward() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = in_place(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                loss = mse_loss(prediction, y)
                torch.autograd.grad(loss, parameters, retain_graph=True)
                module.zero_grad()
                loss.backward()
                update([p.grad for p in parameters if p.grad is not None])
                state = state.detach()

    assert judged(train) == {}


def test_parameters_that_are_left_alone_may_keep_their_gradients() -> None:
    def train(module: Any, batches: Any, length: int) -> None:
        update = in_place(list(module.head.parameters()))
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                module.head.zero_grad()
                mse_loss(prediction, y).backward()
                update([p.grad for p in module.head.parameters()])
                assert state is not None
                state = state.detach()

    assert judged(train) == {}


def once_per_batch(*, asked: bool) -> Train:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = in_place(parameters)
        for batch in batches:
            state: Tensor | None = None
            sums = [torch.zeros_like(p) for p in parameters]
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                found = torch.autograd.grad(mse_loss(prediction, y), parameters)
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
                state = state.detach()
            update(sums)

    def left(module: nn.Module, batches: Any, length: int) -> None:
        update = in_place(list(module.parameters()))
        for batch in batches:
            state: Tensor | None = None
            module.zero_grad()
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                mse_loss(prediction, y).backward()
                state = state.detach()
            update([p.grad for p in module.parameters() if p.grad is not None])

    return train if asked else left


@pytest.mark.parametrize("asked", [True, False])
def test_an_update_per_batch_is_right_if_it_is_promised(asked: bool) -> None:
    assert judged(once_per_batch(asked=asked), contract=tb.Contract(update="batch")) == {}


@pytest.mark.parametrize("asked", [True, False])
def test_an_update_per_batch_is_named_if_it_is_not_promised(asked: bool) -> None:
    found = judged(once_per_batch(asked=asked))

    assert found["each_chunk_updates_once"] == "time steps 2-3, updates: 0, but should be 1"


def test_a_gradient_of_zero_moves_nothing_and_needs_no_update() -> None:
    class Dead(Net):
        def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            prediction, state = super().forward(x, state)
            return (prediction - 100).relu(), state

    report = tb.check(subject(CASES[0], asking(in_place), net=Dead), CASES[0])

    assert report.broken == ()
    assert report["each_chunk_updates_once"].missing == "a gradient that is not zero"


# In Lightning -------------------------------------------------------------------------------


class Lit(LightningModule):
    """Has no optimizer: `configure_optimizers` returns `configured`."""

    def __init__(self, case: tb.Case, configured: Any, *, detaches: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = Net(case)
        self.chunk = case.chunk
        self.configured = configured
        self.detaches = detaches

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.net(x, state)
        return found

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        state: Tensor | None = None
        for x, y in chunks(batch, self.chunk):
            prediction, state = self(x, state)
            self.zero_grad()
            self.manual_backward(mse_loss(prediction, y), retain_graph=not self.detaches)
            for parameter in self.parameters():
                assert parameter.grad is not None
                parameter.data -= LR * parameter.grad
            state = state.detach() if self.detaches else state

    def configure_optimizers(self) -> Any:
        return self.configured


@pytest.mark.parametrize("configured", [None, []])
def test_a_lightning_module_without_an_optimizer_breaks_nothing(configured: Any) -> None:
    for case in CASES:
        report = tb.check(tb.Subject(Lit(case, configured), loss=mse_loss), case)

        assert report.broken == ()
        assert report["each_chunk_updates_once"].status == "holds"
        assert report["updates_go_through_lightnings_optimizer"].missing == (
            "an update by an optimizer"
        )
        assert report["one_chunk_is_one_ordinary_update"].status == "not judged"


@pytest.mark.parametrize("configured", [None, []])
def test_a_lightning_module_without_an_optimizer_is_told_of_its_graph(configured: Any) -> None:
    module = Lit(CASES[0], configured, detaches=False)

    report = tb.check(tb.Subject(module, loss=mse_loss), CASES[0])

    assert {"graph_crosses_no_boundary", "gradients_are_the_chunks_own"} <= {
        verdict.name for verdict in report.broken
    }


# What is wrong ------------------------------------------------------------------------------

OF_THE_GRAPH = {
    "graph_crosses_no_boundary",
    "gradients_are_the_chunks_own",
    "no_graph_outlives_its_chunk",
    RESUMED,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_is_never_detached_is_named(loop: str) -> None:
    found = judged(LOOPS[loop](by_data, after=lambda state: state, retain=True))

    assert found.keys() == OF_THE_GRAPH
    assert found["graph_crosses_no_boundary"] == (
        "time steps 2-3, incoming state: attached to the graph of time steps 0-1, "
        "but should be detached"
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_is_never_detached_is_named_where_it_stops_the_loop(loop: str) -> None:
    found = judged(LOOPS[loop](in_place, after=lambda state: state))

    assert found.keys() == {"graph_crosses_no_boundary", "training_reaches_the_end"}
    assert found["training_reaches_the_end"].startswith("time steps 2-3, in its backward: raised")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_is_dropped_is_named(loop: str) -> None:
    found = judged(LOOPS[loop](in_place, after=lambda state: None))

    assert found.keys() == {"state_crosses_every_boundary", RESUMED}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_state_that_outlives_its_batch_is_named(loop: str) -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        carried: list[Tensor] = []

        def call(x: Tensor, state: Any) -> Any:
            state = carried[-1][:, : len(x)].contiguous() if state is None and carried else state
            prediction, state = module(x, state)
            carried[:] = [state.detach()]
            return prediction, state

        wrapped: Any = call
        wrapped.parameters, wrapped.zero_grad = module.parameters, module.zero_grad
        LOOPS[loop](in_place)(wrapped, batches, length)

    case = replace(CASES[0], seed=2)  # its second batch is no larger
    report = tb.check(subject(case, train), case)

    assert {verdict.name for verdict in report.broken} == {
        "state_starts_afresh_with_each_batch",
        ALONE,
    }


def test_gradients_that_are_never_cleared_are_named() -> None:
    found = judged(accumulating(in_place, clears=False))

    assert found.keys() == {
        "events_come_in_a_legal_order",
        "gradients_are_the_chunks_own",
        RESUMED,
        ALONE,
    }


def only(chosen: Callable[[int], bool]) -> Updating:
    """Leave out updates by their number."""

    def updating(parameters: list[nn.Parameter]) -> Update:
        update, count = in_place(parameters), 0

        def chosen_update(gradients: Sequence[Tensor]) -> None:
            nonlocal count
            if chosen(count):
                update(gradients)
            count += 1

        return chosen_update

    return updating


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("chosen", "where"),
    [
        (lambda n: n % 2 == 0, "time steps 2-3"),
        (lambda n: n % 4 != 3, "time steps 6-6"),
        (lambda n: n % 4 == 3, "time steps 2-3"),
        (lambda n: False, "time steps 2-3"),
    ],
)
def test_an_update_that_is_left_out_is_named(
    loop: str, chosen: Callable[[int], bool], where: str
) -> None:
    report = checked(LOOPS[loop](only(chosen)))

    assert {verdict.name for verdict in report.broken} == {"each_chunk_updates_once"}
    found = report["each_chunk_updates_once"].violations
    assert str(found[0]) == f"{where}, updates: 0, but should be 1"


def test_a_first_chunk_without_an_update_may_have_had_a_rate_of_zero() -> None:
    case = CASES[1]

    report = tb.check(subject(case, asking(only(lambda n: False))), case)

    assert report["each_chunk_updates_once"].missing == (
        "an update that moves parameters: the first one may be at a rate of zero"
    )


def test_a_second_update_from_the_same_graph_is_named() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = by_data(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                loss = mse_loss(prediction, y)
                for retain in (True, False):
                    module.zero_grad()
                    loss.backward(retain_graph=retain)
                    update([p.grad for p in parameters if p.grad is not None])
                state = state.detach()

    found = judged(train)

    assert found["each_chunk_updates_once"] == "time steps 0-1, updates: 2, but should be 1"


def test_an_update_that_comes_a_forward_too_late_is_named() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = by_data(parameters)
        gradients: Sequence[Tensor] = ()
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                if gradients:
                    update(gradients)
                gradients = torch.autograd.grad(mse_loss(prediction, y), parameters)
                state = state.detach()

    found = judged(train)

    assert found["events_come_in_a_legal_order"] == (
        "time steps 2-3, events: forward → update → backward → update, "
        "but should be forward → backward → update"
    )


def test_a_tail_that_is_lost_is_named() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        for batch in batches:
            steps = max(length, batch[0].shape[1] // length * length)
            whole = tuple(part[:, :steps] for part in batch)
            asking(in_place)(module, [whole], length)

    found = judged(train)

    assert found["chunks_tile_the_sequence"] == (
        "chunks: 0-1 2-3 4-5, but should be 0-1 2-3 4-5 6-6"
    )
    assert found.keys() <= {"chunks_tile_the_sequence", RESUMED}


def test_a_loss_that_is_doubled_is_named() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        parameters = list(module.parameters())
        update = in_place(parameters)
        for batch in batches:
            state: Tensor | None = None
            for x, y in chunks(batch, length):
                prediction, state = module(x, state)
                update(torch.autograd.grad(2 * mse_loss(prediction, y), parameters))
                state = state.detach()

    assert judged(train).keys() == {"loss_is_the_chunks_own"}


@pytest.mark.parametrize("loop", LOOPS)
def test_parameters_that_move_between_forward_and_backward_are_named(loop: str) -> None:
    class Moving(Net):
        def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
            found = super().forward(x, state)
            if self.training and torch.is_grad_enabled():
                self.head.bias.data += 0.01
            return found

    report = tb.check(subject(CASES[0], LOOPS[loop](in_place), net=Moving), CASES[0])

    found = str(report["nothing_but_the_update_moves_parameters"].violations[0])
    assert found.startswith("time steps 0-1, head.bias[")
    assert "moved between forward and backward" in found


@pytest.mark.parametrize("loop", LOOPS)
def test_parameters_that_move_before_a_batch_are_named(loop: str) -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        for batch in batches:
            for parameter in module.parameters():
                parameter.data *= 1.01
            LOOPS[loop](in_place)(module, [batch], length)

    found = judged(train)

    assert found.keys() == {"nothing_but_the_update_moves_parameters", RESUMED}


# Where there is an optimizer after all --------------------------------------------------------


def test_an_optimizer_that_is_made_and_bypassed_is_no_update_by_hand() -> None:
    def train(module: nn.Module, batches: Any, length: int) -> None:
        optim.SGD(module.parameters(), lr=LR)
        accumulating(in_place)(module, batches, length)

    report = checked(train)

    assert {verdict.name for verdict in report.broken} == {
        "each_chunk_updates_once",
        "nothing_but_the_update_moves_parameters",
    }
    causes = report["each_chunk_updates_once"].causes
    assert [cause.name for cause in causes] == ["parameters_are_updated_by_hand"]


def test_what_makes_optimizers_is_put_back() -> None:
    before = optim.Optimizer.__init__

    checked(asking(in_place))

    assert optim.Optimizer.__init__ is before


# The rate -----------------------------------------------------------------------------------


def rule(before: Tensor, after: Tensor, gradient: Tensor) -> Rule:
    return Rule(
        optimizer=BY_HAND,
        groups=(),
        memory={},
        handed={"weight": gradient},
        before={"weight": before},
        after={"weight": after},
    )


def test_one_multiple_of_all_gradients_is_a_steady_rate() -> None:
    rate, weight = Rate(), torch.randn(4, 3, dtype=torch.float64)
    for scale in (1.0, 1e-6, 1e3):
        gradient = scale * torch.randn(4, 3, dtype=torch.float64)
        rate.met(rule(weight, weight - 0.3 * gradient, gradient))
        weight = weight - 0.3 * gradient

    assert rate.steady


@pytest.mark.parametrize("memory", [1e-12, 1e-3, 1.0])
def test_what_remembers_a_gradient_has_no_steady_rate(memory: float) -> None:
    rate, weight = Rate(), torch.ones(3, dtype=torch.float64)
    first, second = torch.tensor([[1.0, 2.0, 3.0], [2.0, -1.0, 1.0]], dtype=torch.float64)
    rate.met(rule(weight, weight - 0.5 * first, first))
    assert rate.steady

    rate.met(rule(weight, weight - 0.5 * (second + memory * first), second))

    assert not rate.steady


def test_a_rate_that_changes_is_not_steady_nor_is_one_of_zero() -> None:
    weight, gradient = torch.ones(2), torch.tensor([1.0, 2.0])
    changing, idle = Rate(), Rate()
    changing.met(rule(weight, weight - gradient, gradient))
    changing.met(rule(weight, weight - 0.5 * gradient, gradient))
    idle.idle()

    assert not changing.steady
    assert not idle.steady
