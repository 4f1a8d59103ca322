"""More loops as strangers write them, each told of as shortly as its author would.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
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


# What is wrong: one mistake each.


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


class MemoryOfTheChunk(Loop):
    """A memory is written once a chunk, of all its features."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, _ = self.core(x, state)
        return self.readout(features), self.summed_up(features).unsqueeze(0)

    def summed_up(self, features: Tensor) -> Tensor:
        return features.mean(dim=1)


class LargestOfTheChunk(MemoryOfTheChunk):
    """That memory is the largest value of each feature, be it the last time step's or not."""

    def summed_up(self, features: Tensor) -> Tensor:
        return features.amax(dim=1)


class MemoryOfAllButTheLast(MemoryOfTheChunk):
    """That memory leaves the last time step out."""

    def summed_up(self, features: Tensor) -> Tensor:
        return features[:, : max(1, features.shape[1] - 1)].mean(dim=1)


class PaddedByZeros(Loop):
    """A causal convolution, which sees zeros before each chunk."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.convolution = nn.Conv1d(case.inputs, case.inputs, 3)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        seen = self.convolution(F.pad(x.transpose(1, 2), (2, 0)))
        return super().forward(torch.tanh(seen).transpose(1, 2), state)


class TicksOnceAChunk(Loop):
    """A slow cell ticks at the end of a chunk, and counts; the fast one is told its state."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.slow = nn.GRUCell(case.hidden, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        zeros = x.new_zeros(len(x), self.slow.hidden_size)
        slow, fast, ticks = state or (zeros, None, x.new_zeros(()))
        features, fast = self.core(x, fast)
        prediction = self.readout(features + slow.unsqueeze(1))
        return prediction, (self.slow(fast[0], slow), fast, ticks + 1)

    def cut(self, state: Any) -> Any:
        return tuple(part.detach() for part in state)


class StraightThrough(Loop):
    """Features are rounded, and have the gradient of those that are not."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(self.rounded(features)), state

    def rounded(self, features: Tensor) -> Tensor:
        return features + (features.round() - features).detach()


class StraightThroughTheOtherWay(StraightThrough):
    def rounded(self, features: Tensor) -> Tensor:
        return features.round().detach() - features.detach() + features


class HardGumbel(StraightThrough):
    """One feature is chosen, by torch's own straight-through estimator."""

    def rounded(self, features: Tensor) -> Tensor:
        return F.gumbel_softmax(features, hard=True)


class BracketTooWide(StraightThrough):
    """What the difference is added to is detached as well."""

    def rounded(self, features: Tensor) -> Tensor:
        return (features + (features.tanh() - features)).detach()


class SkipsALayer(Loop):
    """A second layer is skipped by chance, as Python's own generator has it."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.second = nn.GRU(case.hidden, case.hidden, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        lower, upper = state or (None, x.new_zeros(1, len(x), self.second.hidden_size))
        features, lower = self.core(x, lower)
        if self.chance() < 0.5:
            deeper, upper = self.second(features, upper)
            features = features + deeper
        return self.readout(features), (lower, upper)

    def chance(self) -> float:
        return random.random()

    def cut(self, state: Any) -> Any:
        return tuple(part.detach() for part in state)


class SkipsALayerByNumpy(SkipsALayer):
    def chance(self) -> float:
        return float(np.random.random())


class SkipsAndDropsTheState(SkipsALayer):
    """The state of the layer that may be skipped is dropped."""

    def cut(self, state: Any) -> Any:
        return state[0].detach(), torch.zeros_like(state[1])


class ChangeCosts(Loop):
    """How far the state goes from where it came in is a part of the loss."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        prediction, after = self(x, state)
        loss = F.mse_loss(prediction, y)
        if state is not None:
            loss = loss + (after - state).pow(2).mean()
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return self.cut(after)


class ChangeCostsAttached(ChangeCosts):
    """The state is handed on with its graph."""

    def cut(self, state: Any) -> Any:
        return state


class Distilled(Loop):
    """A teacher, whose state the loop keeps, has a say in the loss."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.teacher = nn.GRU(case.inputs, case.outputs, batch_first=True).requires_grad_(False)
        self.taught: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.taught = None
        super().training_step(batch, batch_idx)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        shown, self.taught = self.teacher(x, self.taught)
        return super().train_on(x, y + shown, state)


class MixedLosses(Loop):
    """How two losses are mixed is drawn once a batch."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.share = float(torch.rand(()))
        super().training_step(batch, batch_idx)

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        plain, turned = F.mse_loss(prediction, target), F.mse_loss(prediction, target.flip(0))
        return self.share * plain + (1 - self.share) * turned


class Backwards(Loop):
    """Sequences are run over from their ends."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(tuple(part.flip(1) for part in batch), batch_idx)


class BackwardsAnew(Backwards):
    """Each chunk starts afresh."""

    def cut(self, state: Any) -> Any:
        return None


def turned(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0].flip(1), batch[1].flip(1)


class FeedsItselfDetached(Loop):
    """What is predicted is a part of the next input, as a constant."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRUCell(case.inputs + case.outputs, case.hidden)
        self.sizes = case.hidden, case.outputs

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, last = state or (x.new_zeros(len(x), size) for size in self.sizes)
        predictions = []
        for now in x.unbind(1):
            h = self.core(torch.cat([now, last], dim=1), self.kept(h))
            predictions.append(self.readout(h))
            last = predictions[-1].detach()
        return torch.stack(predictions, dim=1), (h, last)

    def kept(self, h: Tensor) -> Tensor:
        return h

    def cut(self, state: Any) -> Any:
        return tuple(part.detach() for part in state)


class FeedsItselfAndDetachesAll(FeedsItselfDetached):
    """The state is detached at every time step as well."""

    def kept(self, h: Tensor) -> Tensor:
        return h.detach()


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
    "memory_of_the_chunk": (told(MemoryOfTheChunk), {"state_sums_up_the_chunk"}),
    "largest_of_the_chunk": (told(LargestOfTheChunk), {"state_sums_up_the_chunk"}),
    "padded_by_zeros": (told(PaddedByZeros), {"state_sums_up_the_chunk"}),
    "ticks_once_a_chunk": (told(TicksOnceAChunk), {"state_sums_up_the_chunk"}),
    "straight_through": (told(StraightThrough), {"gradients_span_the_whole_chunk"}),
    "straight_through_the_other_way": (
        told(StraightThroughTheOtherWay),
        {"gradients_span_the_whole_chunk"},
    ),
    "hard_gumbel": (told(HardGumbel), {"state_sums_up_the_chunk"}),
    "skips_a_layer": (told(SkipsALayer), {"state_sums_up_the_chunk"}),
    "skips_a_layer_by_numpy": (told(SkipsALayerByNumpy), {"state_sums_up_the_chunk"}),
    "change_costs": (
        told(ChangeCosts, loss=None),
        {*OF_A_LOSS, "a_run_can_be_resumed_at_any_boundary"},
    ),
    "distilled": (
        told(Distilled, loss=None),
        {*OF_A_LOSS, "a_run_can_be_resumed_at_any_boundary"},
    ),
    "mixed_losses": (told(MixedLosses, loss=None), OF_A_LOSS),
    "backwards": (
        told(Backwards, parts=turned),
        {"a_run_can_be_resumed_at_any_boundary"},
    ),
    "feeds_itself_detached": (told(FeedsItselfDetached), set()),
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
        {"no_sequence_looks_at_another", "state_sums_up_the_chunk"},
    ),
    "actor_and_critic": (
        told(ActorAndCritic, loss=of_actor_and_critic),
        {"gradients_span_the_whole_chunk"},
    ),
    "own_schedule": (told(OwnSchedule), set()),
    "scheduled_by_fraction": (told(ScheduledByFraction), set()),
    "state_in_a_holder": (told(StateInAHolder), set()),
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
    "memory_of_all_but_the_last": (told(MemoryOfAllButTheLast), "state_sums_up_the_chunk"),
    "bracket_too_wide": (told(BracketTooWide), "gradients_span_the_whole_chunk"),
    "skips_and_drops_the_state": (told(SkipsAndDropsTheState), "state_crosses_every_boundary"),
    "change_costs_attached": (told(ChangeCostsAttached, loss=None), "graph_crosses_no_boundary"),
    "backwards_anew": (told(BackwardsAnew, parts=turned), "state_crosses_every_boundary"),
    "feeds_itself_and_detaches_all": (
        told(FeedsItselfAndDetachesAll),
        "gradients_span_the_whole_chunk",
    ),
    "noisy_state_dropped": (told(NoisyStateDropped), "state_crosses_every_boundary"),
}
