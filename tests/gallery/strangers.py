"""More loops as strangers write them, each told of as shortly as its author would.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import tbptt_props as tb

Build = Callable[[tb.Case], tb.Subject]


class Loop(LightningModule):
    """A recurrent core, a readout, and a loop of the textbook's; heirs change what is theirs."""

    core: nn.Module
    readout: nn.Module

    def __init__(self, case: tb.Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.core = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(features), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state = None
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            state = self.train_on(x, y, state)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        opt.zero_grad()
        self.manual_backward(loss)
        self.before_the_update(opt)
        opt.step()
        self.after_the_update()
        return self.cut(state)

    def before_the_update(self, opt: Any) -> None:
        """Leave the gradients as they are."""

    def after_the_update(self) -> None:
        """Leave it at that."""

    def cut(self, state: Any) -> Any:
        return state.detach()

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


def seeded(build: Build) -> Build:
    """Return what builds the same module again from the same case."""

    def subject(case: tb.Case) -> tb.Subject:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            return build(case)

    return subject


def told(loop: type[Loop], **wiring: Any) -> Build:
    return lambda case: tb.Subject(loop(case), **{"loss": F.mse_loss, **wiring})


class NoiseOnTheState(Loop):
    """Noise is added to the state that comes in."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        noisy = None if state is None else state + 0.1 * torch.randn_like(state)
        return super().forward(x, noisy)


class SpectralNormOfTheCore(Loop):
    """A parametrization makes a weight of the core anew with every call, from a buffer."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        parametrizations.spectral_norm(self.core, "weight_hh_l0")


class ClipsByHand(Loop):
    """Gradients are shrunk to the very norm."""

    def before_the_update(self, opt: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for gradient in gradients if norm > 0.1 else []:
            gradient.mul_(0.1 / norm)


class FeaturesFirst(Loop):
    """Batches are (B, I, T), predictions (B, O, K), as of a convolution."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(x.transpose(1, 2), state)
        return prediction.transpose(1, 2), state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state = None
        for x, y in zip(*(part.split(self.k, dim=-1) for part in batch), strict=True):
            state = self.train_on(x, y, state)


def features_first(case: tb.Case) -> list[Any]:
    return [tuple(t.transpose(1, 2).contiguous() for t in pair) for pair in case.tensors()]


class FlatPredictions(Loop):
    """Forward returns (B * K, O), and the loop flattens the targets, too."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(x, state)
        return prediction.flatten(0, 1), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target.reshape(prediction.shape))


class SqueezedPredictions(Loop):
    """A single output comes without a dimension for it."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.readout = nn.Linear(case.hidden, 1)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(x, state)
        return prediction.squeeze(-1), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target[..., 0])


class MeanAndVariance(Loop):
    """Two heads make a pair of predictions."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.spread = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return (self.readout(features), self.spread(features)), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return unlikelihood(prediction, target)


def unlikelihood(prediction: Any, target: Tensor) -> Tensor:
    mean, log_variance = prediction
    value: Tensor = (log_variance + (target - mean) ** 2 / log_variance.exp()).mean()
    return value


class Divergence(MeanAndVariance):
    """Forward returns a prediction, a number that its loss adds, and the state."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        (mean, log_variance), state = super().forward(x, state)
        return mean, (log_variance.exp() - log_variance).mean(), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        opt.zero_grad()
        prediction, divergence, state = self(x, state)
        self.manual_backward(diverging((prediction, divergence), y))
        opt.step()
        return state.detach()


def diverging(prediction: Any, target: Tensor) -> Tensor:
    mean, divergence = prediction
    value: Tensor = F.mse_loss(mean, target) + 0.1 * divergence
    return value


class ActorAndCritic(Loop):
    """The critic is a head on features that it is not to change; the predictions are a dict."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.critic = nn.Linear(case.hidden, 1)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        value = self.critic(features.detach()).squeeze(-1)
        return {"action": self.readout(features), "value": value}, state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_actor_and_critic(prediction, target)


def of_actor_and_critic(prediction: Any, target: Tensor) -> Tensor:
    of_critic = F.mse_loss(prediction["value"], target.sum(-1))
    return F.mse_loss(prediction["action"], target) + 0.5 * of_critic


class OwnSchedule(Loop):
    """The module keeps a scheduler that Lightning is not told of, and steps it every chunk."""

    schedule: optim.lr_scheduler.OneCycleLR

    def configure_optimizers(self) -> Any:
        optimizer = optim.Adam(self.parameters())
        self.schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=1000)
        return optimizer

    def after_the_update(self) -> None:
        self.schedule.step()


class ScheduledByFraction(Loop):
    """The schedule goes by how much of the batch is done, as torch's documentation has it."""

    def configure_optimizers(self) -> Any:
        optimizer = optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        schedule: Any = self.lr_schedulers()
        state = None
        chunks = [*zip(*(part.split(self.k, dim=1) for part in batch), strict=True)]
        for i, (x, y) in enumerate(chunks):
            state = self.train_on(x, y, state)
            schedule.step(batch_idx + i / len(chunks))


class Holder:
    """Has room for a state."""

    def __init__(self) -> None:
        self.state: Any = None


class StateInAHolder(Loop):
    """The state is kept by an object of a class of one's own."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.holder = Holder()

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        prediction, self.holder.state = super().forward(x, self.holder.state)
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.holder.state = None
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(self.loss(self(x), y))
            opt.step()
            self.holder.state = self.cut(self.holder.state)


class Store:
    """Has room for the states of several layers, by name."""

    def __init__(self) -> None:
        self.states: dict[str, Any] = {}


class StateInAStore(Loop):
    """The state is kept in a dictionary of such an object, which is empty at first."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.store = Store()

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        states = self.store.states
        prediction, states["core"] = super().forward(x, states.get("core"))
        return prediction

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.store.states.clear()
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(self.loss(self(x), y))
            opt.step()
            states = self.store.states
            states["core"] = self.cut(states["core"])


class StoreHandedOver(Loop):
    """Forward is handed such an object and hands it back."""

    def forward(self, x: Tensor, store: Any = None) -> Any:
        prediction, store.states["core"] = super().forward(x, store.states.get("core"))
        return prediction, store

    def training_step(self, batch: Any, batch_idx: int) -> None:
        store = Store()
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            store = self.train_on(x, y, store)

    def cut(self, state: Any) -> Any:
        state.states["core"] = state.states["core"].detach()
        return state


class StoreIsEmptied(StoreHandedOver):
    """The object is emptied with each chunk."""

    def cut(self, state: Any) -> Any:
        return Store()


class StoreKeepsItsGraph(StateInAStore):
    """The state in the dictionary keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class HolderDropsIt(StateInAHolder):
    """The object forgets the state with each chunk."""

    def cut(self, state: Any) -> Any:
        return None


class HolderKeepsItsGraph(StateInAHolder):
    """The state in the object keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class Adversarial(Loop):
    """A discriminator has an optimizer of its own, toggled, and a backward past forward."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.judge = nn.Linear(case.outputs, 1)

    def configure_optimizers(self) -> Any:
        makers = [*self.core.parameters(), *self.readout.parameters()]
        return optim.Adam(makers, lr=0.01), optim.Adam(self.judge.parameters(), lr=0.01)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        optimizers: Any = self.optimizers()
        makes, judges = optimizers
        made, state = self(x, state)
        for opt, loss in (
            (makes, lambda: F.softplus(-self.judge(made)).mean()),
            (judges, lambda: (self.judge(made.detach()) - self.judge(y)).mean()),
        ):
            self.toggle_optimizer(opt)
            opt.zero_grad()
            self.manual_backward(loss())
            opt.step()
            self.untoggle_optimizer(opt)
        return state.detach()


class TakesTurns(Loop):
    """Two optimizers take turns, chunk by chunk; the other's parameters are frozen."""

    def configure_optimizers(self) -> Any:
        of_core = optim.SGD(self.core.parameters(), lr=0.1)
        return of_core, optim.Adam(self.readout.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state: Any = None
        optimizers: Any = self.optimizers()
        chunks = zip(*(part.split(self.k, dim=1) for part in batch), strict=True)
        for i, (x, y) in enumerate(chunks):
            opt = optimizers[i % 2]
            self.toggle_optimizer(opt)
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            self.untoggle_optimizer(opt)
            state = state.detach()


class CallsItself(Loop):
    """The loop is a recursion, in which losses live until it returns."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.go_on([*zip(*(part.split(self.k, dim=1) for part in batch), strict=True)], None)

    def go_on(self, chunks: list[Any], state: Any) -> None:
        if not chunks:
            return
        opt: Any = self.optimizers()
        prediction, state = self(chunks[0][0], state)
        loss = self.loss(prediction, chunks[0][1])
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        self.go_on(chunks[1:], state.detach())


class Checkpointed(Loop):
    """Activations are computed again by a reentrant checkpoint."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.embed = nn.Linear(case.inputs, case.hidden)
        self.core = nn.GRU(case.hidden, case.hidden, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is None:
            state = x.new_zeros(1, len(x), self.core.hidden_size)  # type: ignore[call-overload]
        features, state = checkpoint(self.core, self.embed(x), state, use_reentrant=True)
        return self.readout(features), state


class Metric(nn.Module):
    """A mean over a batch, kept in buffers."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))


class Metered(Loop):
    """A metric starts afresh with each batch."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.metric = Metric()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.metric.total.zero_()
        super().training_step(batch, batch_idx)

    def after_the_update(self) -> None:
        self.metric.total += 1


class CellInTheLoop(Loop):
    """There is no forward: the loop calls a cell once a time step."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTMCell(case.inputs, case.hidden)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        steps = [*zip(*(part.unbind(1) for part in batch), strict=True)]
        state, losses = None, []
        for t, (x, y) in enumerate(steps, start=1):
            state = self.core(x, state)
            losses.append(F.mse_loss(self.readout(state[0]), y))
            if t % self.k == 0 or t == len(steps):
                opt.zero_grad()
                self.manual_backward(torch.stack(losses).mean())
                opt.step()
                state, losses = self.cut(state), []

    def cut(self, state: Any) -> Any:
        return tuple(part.detach() for part in state)


class CellResets(CellInTheLoop):
    """The cell's state is set back with each chunk."""

    def cut(self, state: Any) -> Any:
        return tuple(map(torch.zeros_like, state))


class CellKeepsItsMemory(CellInTheLoop):
    """Of the cell's state the output is detached, and the memory is not."""

    def cut(self, state: Any) -> Any:
        return state[0].detach(), state[1]


class CutsInForward(Loop):
    """Forward is handed whole sequences and detaches the state after every K time steps."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        predictions = []
        for piece in torch.split(x, self.k, dim=1):
            prediction, state = super().forward(piece, self.between(state))
            predictions.append(prediction)
        return torch.cat(predictions, dim=1), state

    def between(self, state: Any) -> Any:
        return None if state is None else state.detach()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.train_on(x, y, None)


class CutsNowhere(CutsInForward):
    """Forward has pieces, but hands the state on with its graph."""

    def between(self, state: Any) -> Any:
        return state


class ReturnsAllStates(Loop):
    """Forward returns the state after each time step; the loop takes the last one."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, _ = self.core(x, state)
        return self.readout(features), features

    def cut(self, state: Any) -> Any:
        return state[:, -1].unsqueeze(0).detach()


class ReturnsAllTakesFirst(ReturnsAllStates):
    """The loop takes the state after the first time step."""

    def cut(self, state: Any) -> Any:
        return state[:, 0].unsqueeze(0).detach()


class SparseGradients(Loop):
    """An embedding has sparse gradients, and an optimizer for such."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.embed = nn.Embedding(9, case.hidden, sparse=True)
        self.core = nn.GRU(case.hidden, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, 9)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(self.embed(x), state)
        return prediction.transpose(1, 2), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch[:, :-1], batch[:, 1:]), batch_idx)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        optimizers: Any = self.optimizers()
        prediction, state = self(x, state)
        for opt in optimizers:
            opt.zero_grad()
        self.manual_backward(self.loss(prediction, y))
        for opt in optimizers:
            opt.step()
        return state.detach()

    def configure_optimizers(self) -> Any:
        rest = [*self.core.parameters(), *self.readout.parameters()]
        return optim.SparseAdam(list(self.embed.parameters())), optim.Adam(rest)


def tokens(case: tb.Case) -> list[Any]:
    generator = torch.Generator().manual_seed(case.seed)
    return [torch.randint(9, (b, t + 1), generator=generator) for b, t in case.sizes()]


class SortedByContent(Loop):
    """The batch is sorted by what it holds before it is cut; features are dropped out."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        order = batch[1][:, 0, 0].argsort()
        super().training_step([part[order] for part in batch], batch_idx)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(F.dropout(features, 0.5)), state


class ShuffledAnew(Loop):
    """The order of the sequences is drawn once a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        order = torch.randperm(len(batch[0]))
        super().training_step([part[order] for part in batch], batch_idx)


class FeaturesBesides(Loop):
    """Forward returns the features of which its prediction is made: their size has a cost."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return (self.readout(features), features), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return regularised(prediction, target)


def regularised(prediction: Any, target: Tensor) -> Tensor:
    value: Tensor = F.mse_loss(prediction[0], target) + 0.5 * prediction[1].pow(2).mean()
    return value


class FeaturesByStep(FeaturesBesides):
    """Forward runs a single time step, and its features are the state."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRUCell(case.inputs, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = self.core(x, state)
        return (self.readout(state), state), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        made = []
        for step in x.unbind(1):
            prediction, state = self(step, state)
            made.append(prediction)
        opt.zero_grad()
        heads = [torch.stack(head, dim=1) for head in zip(*made, strict=True)]
        self.manual_backward(self.loss(heads, y))
        opt.step()
        return state.detach()


class HeadForTheLog(MeanAndVariance):
    """The loss leaves one of the heads out, as it is told."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_the_first(prediction, target)


def of_the_first(prediction: Any, target: Tensor) -> Tensor:
    return F.mse_loss(prediction[0], target)


class PredictsItsFeatures(MeanAndVariance):
    """One head is to come close to what is a constant for the loss: forward has detached it."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.spread = nn.Linear(case.hidden, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        cost = (features.detach() ** 2).mean()
        return (self.readout(features), self.spread(features), features.detach(), cost), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return self_supervised(prediction, target)


def self_supervised(prediction: Any, target: Tensor) -> Tensor:
    mean, guess, features, cost = prediction
    value: Tensor = F.mse_loss(mean, target) + 0.1 * F.mse_loss(guess, features) + 0.1 * cost
    return value


class FrozenAverage(Loop):
    """An average of the readout's parameters is frozen, but the optimizer got all there are."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.average = nn.Linear(case.hidden, case.outputs).requires_grad_(False)

    @torch.no_grad()
    def after_the_update(self) -> None:
        pairs = zip(self.average.parameters(), self.readout.parameters(), strict=True)
        for mean, parameter in pairs:
            mean.lerp_(parameter, 0.1)


class Style(Loop):
    """Forward is handed what the loop makes of a parameter, anew for each chunk."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.style = nn.Parameter(torch.zeros(case.hidden))

    def forward(self, x: Tensor, state: Any = None, style: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(features + style), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        prediction, state = self(x, state, torch.tanh(self.style))
        opt.zero_grad()
        self.manual_backward(self.loss(prediction, y))
        self.before_the_update(opt)
        opt.step()
        return self.cut(state)


class ContextOfTheWhole(Loop):
    """Forward is handed a context that is made of the whole batch, without its graph."""

    def forward(self, x: Tensor, state: Any = None, context: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(features) + context, state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        context, state = batch[0].mean((1, 2), keepdim=True), None
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            prediction, state = self(x, state, context)
            opt.zero_grad()
            self.manual_backward(self.loss(prediction, y))
            opt.step()
            state = self.cut(state)


# What is wrong: one mistake each.


class StyleAttached(Style):
    """The state keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class StyleHalved(Style):
    """The gradients of the readout are halved."""

    def before_the_update(self, opt: Any) -> None:
        for parameter in self.readout.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5


class StateDroppedBesidesAContext(ContextOfTheWhole):
    """The state is not handed on."""

    def cut(self, state: Any) -> Any:
        return None


class FrozenForTheMove(Loop):
    """The readout is frozen for as long as it takes to shrink it."""

    def after_the_update(self) -> None:
        self.readout.requires_grad_(False)
        for parameter in self.readout.parameters():
            parameter.mul_(0.99)
        self.readout.requires_grad_(True)


class FrozenAfterwards(Loop):
    """... and stays frozen until the next chunk."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        self.readout.requires_grad_(True)
        state = super().train_on(x, y, state)
        self.readout.requires_grad_(False)
        for parameter in self.readout.parameters():
            parameter.mul_(0.99)
        return state


class FeaturesAttached(FeaturesBesides):
    """The features are regularised, and the state keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class FeaturesForgotten(FeaturesBesides):
    """The features are detached before their size is regularised."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return regularised((prediction[0], prediction[1].detach()), target)


class FeaturesHalved(FeaturesBesides):
    """The gradients of what makes the features are halved."""

    def before_the_update(self, opt: Any) -> None:
        for parameter in self.core.parameters():
            assert parameter.grad is not None
            parameter.grad *= 0.5


class TargetsStay(Loop):
    """The inputs are put in another order, and the targets stay."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        super().training_step((x.flip(0), y), batch_idx)


class OneHeadForgotten(MeanAndVariance):
    """The loss leaves one of the heads out."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return unlikelihood((prediction[0], torch.zeros_like(prediction[1])), target)


class HeadsAttached(MeanAndVariance):
    """Two heads, and the state keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class BothHeadsCutOff(ActorAndCritic):
    """Both heads are on detached features."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        features = features.detach()
        value = self.critic(features).squeeze(-1)
        return {"action": self.readout(features), "value": value}, state


class RecursionAttached(CallsItself):
    """The recursion hands the state on with its graph."""

    def go_on(self, chunks: list[Any], state: Any) -> None:
        if chunks:
            opt: Any = self.optimizers()
            prediction, state = self(chunks[0][0], state)
            opt.zero_grad()
            self.manual_backward(self.loss(prediction, chunks[0][1]), retain_graph=True)
            opt.step()
            self.go_on(chunks[1:], state)


class LossesKeptByRecursion(CallsItself):
    """The recursion leaves its losses in a list."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.kept: list[Tensor] = []

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        self.kept.append(F.mse_loss(prediction, target))
        return self.kept[-1]


class JudgeNotCleared(Adversarial):
    """The discriminator's gradients are never cleared."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        optimizers: Any = self.optimizers()
        makes, judges = optimizers
        made, state = self(x, state)
        makes.zero_grad()
        self.manual_backward(F.softplus(-self.judge(made)).mean())
        makes.step()
        self.manual_backward((self.judge(made.detach()) - self.judge(y)).mean())
        judges.step()
        return state.detach()


class ClipsToAnother(ClipsByHand):
    """Gradients are shrunk to half the norm that was promised."""

    def before_the_update(self, opt: Any) -> None:
        super().before_the_update(opt)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class NoisyStateDropped(NoiseOnTheState):
    """The state is not handed on."""

    def cut(self, state: Any) -> Any:
        return None


def shifted(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids[:, :-1], ids[:, 1:]


OF_A_LOSS = {
    "gradients_span_the_whole_chunk",
    "loss_is_the_chunks_own",
    "one_chunk_is_one_ordinary_update",
}

# Each with what may be not judged of it on any case, besides what needs random numbers.
RIGHT: dict[str, tuple[Build, set[str]]] = {
    "noise_on_the_state": (told(NoiseOnTheState), {"state_sums_up_the_chunk"}),
    "spectral_norm_of_the_core": (told(SpectralNormOfTheCore), set()),
    "clips_by_hand": (told(ClipsByHand, contract=tb.Contract(clip_norm=0.1)), set()),
    "features_first": (
        told(
            FeaturesFirst,
            batches=features_first,
            parts=lambda b: (b[0].transpose(1, 2), b[1].transpose(1, 2)),
        ),
        {
            "no_sequence_looks_at_another",
            "one_chunk_is_one_ordinary_update",
            "state_sums_up_the_chunk",
        },
    ),
    "flat_predictions": (told(FlatPredictions), {"state_sums_up_the_chunk"}),
    "squeezed_predictions": (
        lambda case: tb.Subject(
            SqueezedPredictions(case),
            loss=F.mse_loss,
            batches=lambda case: [(x, y[..., :1].clone()) for x, y in case.tensors()],
        ),
        set(),
    ),
    "mean_and_variance": (told(MeanAndVariance, loss=unlikelihood), set()),
    "divergence": (
        told(Divergence, loss=diverging, outputs=lambda out: (out[:2], out[2])),
        {"state_sums_up_the_chunk"},
    ),
    "actor_and_critic": (
        told(ActorAndCritic, loss=of_actor_and_critic),
        {"gradients_span_the_whole_chunk"},
    ),
    "own_schedule": (told(OwnSchedule), set()),
    "scheduled_by_fraction": (told(ScheduledByFraction), set()),
    "state_in_a_holder": (told(StateInAHolder), set()),
    "state_in_a_store": (told(StateInAStore), set()),
    "store_handed_over": (told(StoreHandedOver), set()),
    "adversarial": (
        told(Adversarial, loss=None),
        OF_A_LOSS,
    ),
    "takes_turns": (told(TakesTurns), {"a_run_can_be_resumed_at_any_boundary"}),
    "calls_itself": (told(CallsItself), set()),
    "checkpointed": (told(Checkpointed), {"gradients_span_the_whole_chunk"}),
    "metered": (told(Metered), set()),
    "cell_in_the_loop": (told(CellInTheLoop), {*OF_A_LOSS, "state_sums_up_the_chunk"}),
    "cuts_in_forward": (
        told(CutsInForward, contract=tb.Contract(update="batch")),
        {"a_run_can_be_resumed_at_any_boundary", "state_crosses_every_boundary"},
    ),
    "returns_all_states": (told(ReturnsAllStates), {"state_sums_up_the_chunk"}),
    "sparse_gradients": (
        told(SparseGradients, loss=F.cross_entropy, batches=tokens, parts=shifted),
        {
            "one_chunk_is_one_ordinary_update",
            "state_sums_up_the_chunk",
            "the_update_follows_the_optimizers_rule",
        },
    ),
    "sorted_by_content": (told(SortedByContent), {"state_sums_up_the_chunk"}),
    "shuffled_anew": (told(ShuffledAnew), set()),
    "features_besides": (told(FeaturesBesides, loss=regularised), set()),
    "features_by_step": (
        told(FeaturesByStep, loss=regularised),
        {"state_sums_up_the_chunk"},
    ),
    "head_for_the_log": (told(HeadForTheLog, loss=of_the_first), set()),
    "style": (told(Style), {"state_sums_up_the_chunk"}),
    "context_of_the_whole": (told(ContextOfTheWhole), {"state_sums_up_the_chunk"}),
    "frozen_average": (told(FrozenAverage), set()),
    "predicts_its_features": (
        told(PredictsItsFeatures, loss=self_supervised),
        {"gradients_span_the_whole_chunk", "state_sums_up_the_chunk"},
    ),
}

# Each with the property that says it best; others may be broken by the same mistake.
WRONG: dict[str, tuple[Build, str]] = {
    "cell_resets": (told(CellResets), "state_crosses_every_boundary"),
    "cell_keeps_its_memory": (told(CellKeepsItsMemory), "graph_crosses_no_boundary"),
    "cuts_nowhere": (
        told(CutsNowhere, contract=tb.Contract(update="batch")),
        "chunks_tile_the_sequence",
    ),
    "returns_all_takes_first": (told(ReturnsAllTakesFirst), "state_crosses_every_boundary"),
    "one_head_forgotten": (told(OneHeadForgotten, loss=unlikelihood), "loss_is_the_chunks_own"),
    "heads_attached": (told(HeadsAttached, loss=unlikelihood), "graph_crosses_no_boundary"),
    "both_heads_cut_off": (
        told(BothHeadsCutOff, loss=of_actor_and_critic),
        "gradients_span_the_whole_chunk",
    ),
    "recursion_attached": (told(RecursionAttached), "graph_crosses_no_boundary"),
    "losses_kept_by_recursion": (told(LossesKeptByRecursion), "no_graph_outlives_its_chunk"),
    "judge_not_cleared": (told(JudgeNotCleared, loss=None), "events_come_in_a_legal_order"),
    "clips_to_another": (
        told(ClipsToAnother, contract=tb.Contract(clip_norm=0.1)),
        "gradients_are_the_chunks_own",
    ),
    "holder_drops_it": (told(HolderDropsIt), "state_crosses_every_boundary"),
    "holder_keeps_its_graph": (told(HolderKeepsItsGraph), "graph_crosses_no_boundary"),
    "noisy_state_dropped": (told(NoisyStateDropped), "state_crosses_every_boundary"),
    "targets_stay": (told(TargetsStay), "loss_is_the_chunks_own"),
    "features_attached": (told(FeaturesAttached, loss=regularised), "graph_crosses_no_boundary"),
    "features_forgotten": (told(FeaturesForgotten, loss=regularised), "loss_is_the_chunks_own"),
    "features_halved": (told(FeaturesHalved, loss=regularised), "gradients_are_the_chunks_own"),
    "frozen_for_the_move": (told(FrozenForTheMove), "nothing_but_the_update_moves_parameters"),
    "frozen_afterwards": (told(FrozenAfterwards), "nothing_but_the_update_moves_parameters"),
    "store_is_emptied": (told(StoreIsEmptied), "state_crosses_every_boundary"),
    "store_keeps_its_graph": (told(StoreKeepsItsGraph), "graph_crosses_no_boundary"),
    "style_attached": (told(StyleAttached), "graph_crosses_no_boundary"),
    "style_halved": (told(StyleHalved), "gradients_are_the_chunks_own"),
    "state_dropped_besides_a_context": (
        told(StateDroppedBesidesAContext),
        "state_crosses_every_boundary",
    ),
}
