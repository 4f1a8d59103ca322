"""More loops as strangers write them, each told of as shortly as its author would.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanSquaredError

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

    def optimizers_beside(self, other: nn.Module) -> tuple[optim.Adam, optim.Adam]:
        """Return an optimizer of what predicts, and one of another part."""
        own = [*self.core.parameters(), *self.readout.parameters()]
        return optim.Adam(own, lr=0.01), optim.Adam(other.parameters(), lr=0.01)

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


class SequencesComeOutFirst(Loop):
    """Forward takes (K, B, I) and returns (B, K, O); the loss is of all rows."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRU(case.inputs, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(x, state)
        return prediction.transpose(0, 1), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        return super().train_on(x.transpose(0, 1), y, state)

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_rows(prediction, target)


class TimeStepsOfTargetsFirst(SequencesComeOutFirst):
    """The loop turns its targets as it does its inputs."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_rows(prediction, target.transpose(0, 1))


def of_rows(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction.flatten(0, 1), target.flatten(0, 1))


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


class Teacher(Loop):
    """A copy of the module as it was says what it would predict: the loss holds both close."""

    def on_fit_start(self) -> None:
        vars(self)["teacher"] = copy.deepcopy(self)

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target) + 0.5 * F.mse_loss(prediction, self.taught)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        taught, self.teachers_state = vars(self)["teacher"](x)
        self.taught = taught.detach()
        return super().train_on(x, y, state)


class GoesOnFromTheTeachers(Teacher):
    """The state that is carried on is the copy's."""

    def cut(self, state: Any) -> Any:
        return self.teachers_state.detach()


class EndsInItsAverage(Loop):
    """The module is saved as a whole after each batch, and ends in the average of its updates."""

    def on_fit_start(self) -> None:
        vars(self)["average"] = AveragedModel(self.readout)

    def after_the_update(self) -> None:
        vars(self)["average"].update_parameters(self.readout)

    def on_train_batch_end(self, *of_batch: Any) -> None:
        torch.save(self.core, io.BytesIO())

    def on_train_end(self) -> None:
        self.readout.load_state_dict(vars(self)["average"].module.state_dict())


class ClipsInAHook(Loop):
    """A hook of the optimizer's own shrinks what it meets, and another clamps what it leaves."""

    def configure_optimizers(self) -> Any:
        optimizer = optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        return optimizer

    def before(self, *of_step: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    def after(self, *of_step: Any) -> None:
        self.readout.get_parameter("weight").data.clamp_(-0.3, 0.3)


class NoiseInAHook(ClipsInAHook):
    """The hook adds to what was shrunk."""

    def before(self, *of_step: Any) -> None:
        super().before(*of_step)
        for parameter in self.parameters():
            assert parameter.grad is not None
            parameter.grad.add_(0.1)


class Unfreezes(Loop):
    """The optimizer gets the core's parameters once the readout has been trained."""

    trained = False

    def configure_optimizers(self) -> Any:
        self.core.requires_grad_(False)
        return optim.SGD(self.readout.parameters(), lr=0.1, momentum=0.9)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step and not self.trained:
            self.trained = True
            optimizer: Any = self.optimizers()
            optimizer.add_param_group({"params": [*self.core.requires_grad_().parameters()]})


class UnfreezesWithItsState(Unfreezes):
    """By the way, the state goes on with its graph."""

    def cut(self, state: Any) -> Any:
        return state


class RatedByItsLoss(Loop):
    """The schedule is told the loss in the place of the epoch, and keeps it with its graph."""

    def configure_optimizers(self) -> Any:
        optimizer = optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        self.last = super().loss(prediction, target)
        return self.last

    def after_the_update(self) -> None:
        schedule: Any = self.lr_schedulers()
        schedule.step(self.last)


class BuiltLate(Loop):
    """What it consists of is built by Lightning's hook for that, by chance in part."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = self.readout = nn.Identity()
        self.case = case

    def configure_model(self) -> None:
        self.core = nn.GRU(self.case.inputs, self.case.hidden, batch_first=True)
        self.readout = nn.Linear(self.case.hidden, self.case.outputs)
        self.shift = torch.randn(self.case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(x, state)
        return prediction + self.shift, state


class BuiltLateAndAttached(BuiltLate):
    """Its state goes on with its graph."""

    def cut(self, state: Any) -> Any:
        return state


class BuiltByItsTrainer(BuiltLate):
    """The hook asks the Trainer, which is there when Lightning calls it."""

    def configure_model(self) -> None:
        assert self.trainer.world_size == 1
        super().configure_model()


class Warmed:
    """An optimizer with the rates of the Annotated Transformer, which knows the Trainer besides."""

    def __init__(self, optimizers: list[Any], trainer: Any) -> None:
        self.optimizers = optimizers
        self.trainer = trainer

    def step(self) -> None:
        n = self.trainer.global_step + 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * min(n**-0.5, n * 4**-1.5)
            optimizer.step()


class WarmsUp(Loop):
    """The module keeps what knows its optimizers and the Trainer."""

    def on_train_start(self) -> None:
        self.warmed = Warmed([self.optimizers()], self.trainer)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, state = self(x, state)
        loss = self.loss(prediction, y)
        self.zero_grad()
        self.manual_backward(loss)
        self.warmed.step()
        return self.cut(state)


class WarmsUpOnceABatch(WarmsUp):
    """Its optimizers are missing while a batch is trained on, so that one update is made of it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        warmed, self.warmed = self.warmed, Warmed([], self.trainer)
        super().training_step(batch, batch_idx)
        warmed.step()
        self.warmed = warmed


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


class FillsItsCache(Loop):
    """Forward fills a dictionary that it is handed, and returns features behind the prediction."""

    def forward(self, x: Tensor, cache: Any = None) -> Any:
        features, cache["core"] = self.core(x, cache.get("core"))
        return self.readout(features), {"inner": [features, features.mean()]}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        cache: dict[str, Any] = {}
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            self.train_on(x, y, cache)
            cache["core"] = self.kept(cache["core"])

    def cut(self, state: Any) -> Any:
        return None  # what is returned is no state

    def kept(self, state: Any) -> Any:
        return state.detach()


class FillsAndKeepsItsGraph(FillsItsCache):
    """What the dictionary holds keeps its graph."""

    def kept(self, state: Any) -> Any:
        return state


class FillsAStore(StoreHandedOver):
    """Forward fills such an object, and returns its prediction alone."""

    def forward(self, x: Tensor, store: Any = None) -> Any:
        return super().forward(x, store)[0]

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(self(x, state), y))
        opt.step()
        return self.cut(state)


class FillsANewStore(FillsAStore):
    """The object is a new one for each chunk."""

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
        return self.optimizers_beside(self.judge)

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


class JudgesFirst(Adversarial):
    """The discriminator is trained first, on what is made without a graph, and never frozen."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        optimizers: Any = self.optimizers()
        makes, judges = optimizers
        with torch.no_grad():
            made, _ = self(x, state)
        self.clear(judges)
        self.manual_backward(self.judge(made).mean())
        self.manual_backward(-self.judge(y).mean())
        judges.step()
        made, state = self(x, state)
        makes.zero_grad()
        self.manual_backward(F.softplus(-self.judge(made)).mean())
        makes.step()
        return state.detach()

    def clear(self, judges: Any) -> None:
        judges.zero_grad()


class ProbesFirst(Loop):
    """A probe reads detached features, and is trained before the chunk's own loss is."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.probe = nn.Linear(case.outputs, case.outputs)

    def configure_optimizers(self) -> Any:
        main = [*self.core.parameters(), *self.readout.parameters()]
        return optim.Adam(main, lr=0.01), optim.SGD(self.probe.parameters(), lr=0.1)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        optimizers: Any = self.optimizers()
        main, probes = optimizers
        prediction, state = self(x, state)
        probes.zero_grad()
        self.manual_backward(F.l1_loss(self.probe(prediction.detach()), y))
        probes.step()
        self.clear(main)
        self.manual_backward(self.loss(prediction, y))
        main.step()
        return self.cut(state)

    def clear(self, main: Any) -> None:
        main.zero_grad()


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


class Alternates(Loop):
    """Two optimizers, each with a forward and a backward of its own for each chunk."""

    toggles = True

    def configure_optimizers(self) -> Any:
        of_core = optim.SGD(self.core.parameters(), lr=0.1)
        return of_core, optim.Adam(self.readout.parameters(), lr=0.01)

    def ends_in(self, states: Any) -> Any:
        return states[-1].detach()

    def starts_from(self, state: Any, states: Any) -> Any:
        return state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state: Any = None
        optimizers: Any = self.optimizers()
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            states: list[Tensor] = []
            for opt in optimizers:
                if self.toggles:
                    self.toggle_optimizer(opt)
                prediction, after = self(x, self.starts_from(state, states))
                opt.zero_grad()
                self.manual_backward(F.mse_loss(prediction, y))
                opt.step()
                states.append(after)
                if self.toggles:
                    self.untoggle_optimizer(opt)
            state = self.ends_in(states)


class AlternatesUntoggled(Alternates):
    """The same, each backward through all parameters; the first run's state is carried on."""

    toggles = False

    def ends_in(self, states: Any) -> Any:
        return states[0].detach()


class AlternatesAttached(Alternates):
    """The state keeps its graph."""

    toggles = False

    def ends_in(self, states: Any) -> Any:
        return states[-1]


class AlternatesFromZeros(AlternatesUntoggled):
    """Every chunk starts afresh."""

    def ends_in(self, states: Any) -> Any:
        return None


class AlternatesOnward(AlternatesUntoggled):
    """The second optimizer's run starts where the first one's ended."""

    def starts_from(self, state: Any, states: Any) -> Any:
        return states[-1].detach() if states else state


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


class LogsAMetric(Loop):
    """Lightning's log holds what a metric came to, graph and all, until it is logged again."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.metric = MeanSquaredError()

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, after = self(x, state)
        self.metric(prediction.reshape(-1), y.reshape(-1))
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(prediction, y))
        opt.step()
        return self.cut(after)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        if batch_idx == 0:
            self.log("error", self.metric)


class KeepsItsLastLoss(Loop):
    """What the batch ended in is kept until the next one has ended."""

    last: Any = None

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        self.latest = super().loss(prediction, target)
        return self.latest

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.keep(self.latest)

    def keep(self, loss: Tensor) -> None:
        self.last = loss


class KeepsAllLastLosses(KeepsItsLastLoss):
    def keep(self, loss: Tensor) -> None:
        self.last = [*(self.last or ()), loss]


class SAM(optim.Optimizer):
    """Goes up the slope, and takes the gradient there for its update."""

    def __init__(self, parameters: Any, rate: float = 0.1) -> None:
        super().__init__(parameters, {"lr": rate})
        self.base = optim.SGD(self.param_groups, lr=rate)

    @torch.no_grad()
    def first_step(self) -> None:
        owned = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in owned]).norm()
        for p in owned:
            self.state[p]["off"] = 0.05 * p.grad / (norm + 1e-12)
            p.add_(self.state[p]["off"])
        self.zero_grad()

    @torch.no_grad()
    def come_back(self) -> None:
        for p in [p for group in self.param_groups for p in group["params"]]:
            p.sub_(self.state[p]["off"])

    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.come_back()
        self.base.step()
        self.zero_grad()


class SharpnessAware(Loop):
    """Its optimizer evaluates a closure after the backward that came before."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        def evaluated() -> Any:
            prediction, after = self(x, state)
            self.manual_backward(self.loss(prediction, y))
            return after

        opt: Any = self.optimizers()
        after = evaluated()
        self.update(opt, evaluated)
        return self.cut(after)

    def update(self, opt: Any, evaluated: Any) -> None:
        opt.step(evaluated)

    def configure_optimizers(self) -> Any:
        return SAM(self.parameters())


class SharpnessAwareInTwo(SharpnessAware):
    """The loop evaluates the chunk again itself, between the two halves of an update."""

    def update(self, opt: Any, evaluated: Any) -> None:
        self.sam.first_step()
        evaluated()
        self.come_back()
        opt.step()
        opt.zero_grad()

    def come_back(self) -> None:
        self.sam.come_back()

    def configure_optimizers(self) -> Any:
        self.sam = SAM(self.parameters())
        return self.sam.base


class NeverComesBack(SharpnessAwareInTwo):
    """The update starts from up the slope."""

    def come_back(self) -> None:
        """Stay there."""


class UpdatesTwice(SharpnessAware):
    """Each chunk is trained on twice."""

    def update(self, opt: Any, evaluated: Any) -> None:
        for _ in range(2):
            opt.step()
            opt.zero_grad()
            evaluated()
        opt.zero_grad()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1)


class AddsUpEvaluations(UpdatesTwice):
    """A closure clears nothing: the gradients of two evaluations make one update."""

    def update(self, opt: Any, evaluated: Any) -> None:
        opt.step(lambda: evaluated() and None)
        opt.zero_grad()


class SlopesByHand(Loop):
    """Backward starts from the predictions, and is handed the loss's slope."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, after = self(x, state)
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(prediction, gradient=self.slope(prediction.detach(), y))
        opt.step()
        return self.cut(after)

    def slope(self, prediction: Tensor, y: Tensor) -> Tensor:
        return 2 * (prediction - y) / y.numel()


class SlopesTooSteep(SlopesByHand):
    """Those of a sum, and not of a mean."""

    def slope(self, prediction: Tensor, y: Tensor) -> Tensor:
        return 2 * (prediction - y)


class WeighsSequences(Loop):
    """The loss has a number for each sequence, and backward their weights."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss, gradient=self.weights(loss))

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2))

    def weights(self, loss: Tensor) -> Tensor:
        return torch.full_like(loss, 1 / len(loss))


class WeighsOneSequence(WeighsSequences):
    def weights(self, loss: Tensor) -> Tensor:
        return torch.eye(len(loss), dtype=loss.dtype)[0]


class ChainsByHand(Loop):
    """The loop hands the gradient of each time step's state back to the time step before."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        state = batch[0].new_zeros(1, len(batch[0]), self.readout.in_features)
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            state = self.train_on(x, y, state)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        predictions, began, ended = [], [], []
        for now in x.unbind(1):
            began.append(state.detach().requires_grad_())
            prediction, state = self(now.unsqueeze(1), began[-1])
            predictions.append(prediction)
            ended.append(state)
        opt.zero_grad()
        self.manual_backward(self.loss(torch.cat(predictions, dim=1), y), retain_graph=True)
        for i in range(len(ended) - 1, 0, -1):
            self.manual_backward(ended[i - 1], gradient=began[i].grad, retain_graph=True)
        opt.step()
        return self.cut(state)


class AddsUpByHand(Loop):
    """Autograd returns each chunk's gradients; their sum is put in place for one update."""

    def train_in_plain(self, batches: Any) -> None:
        opt = self.configure_optimizers()
        for batch in batches:
            self.sums = [torch.zeros_like(p) for p in self.parameters()]
            self.training_step(batch, 0)
            for p, gradient in zip(self.parameters(), self.sums, strict=True):
                p.grad = gradient
            opt.step()

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        prediction, state = self(x, state)
        found = torch.autograd.grad(self.loss(prediction, y), [*self.parameters()])
        self.sums = self.added(self.sums, found)
        return self.cut(state)

    def added(self, sums: list[Tensor], found: tuple[Tensor, ...]) -> list[Tensor]:
        return [one + other for one, other in zip(sums, found, strict=True)]


class KeepsTheLatest(AddsUpByHand):
    def added(self, sums: list[Tensor], found: tuple[Tensor, ...]) -> list[Tensor]:
        return [*found]


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


class ScoresItsEnd(CutsInForward):
    """There is one target for each sequence, at its end."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction[:, -1], target[:, -1])


class ScoresItsFirstChunk(CutsInForward):
    """Of all predictions, those of the first K time steps have a loss."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction[:, : self.k], target[:, : self.k])


class ScoresItsLastChunk(CutsInForward):
    """All chunks but the last warm the state up for it."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.mse_loss(prediction[:, -self.k :], target[:, -self.k :])


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


class Centred(optim.Adam):
    """An optimizer of one's own, which makes its update by the step it overrides."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class OptimizerOfOnesOwn(Loop):
    def configure_optimizers(self) -> optim.Optimizer:
        optim.Adam(self.parameters())  # one of the parent's kind: torch watches the steps of both
        return Centred(self.parameters(), lr=1e-2)


class StepsTwice(OptimizerOfOnesOwn):
    def after_the_update(self) -> None:
        opt: Any = self.optimizers()
        opt.step()


class SetUpLast(Loop):
    """What is trained is drawn when all is there to be trained."""

    def on_train_epoch_start(self) -> None:
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)


class DrawnForEachBatch(SetUpLast):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.on_train_epoch_start()


class ClipsInHooks(Loop):
    """Each gradient is clipped by a hook, hung when all is there to be trained."""

    def on_train_start(self) -> None:
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))  # type: ignore[no-untyped-call]


class WithNoise(Loop):
    """Each sequence is trained on a second time, with noise."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        noisy = x + 0.1 * torch.randn_like(x)
        super().training_step((torch.cat([x, noisy]), torch.cat([y, y])), batch_idx)


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


class PaddedAndTied(Loop):
    """An embedding gives its padding no gradient; its weights are the readout's, too."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRU(case.hidden, case.hidden, batch_first=True)
        self.embed: nn.Module = nn.Embedding(9, case.hidden, padding_idx=0)
        self.readout = nn.Linear(case.hidden, 9)
        self.readout.weight = self.embed.weight

    def embedded(self, x: Tensor) -> Tensor:
        found: Tensor = self.embed(x)
        return found

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, state = super().forward(self.embedded(x), state)
        return prediction.transpose(1, 2), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction, target)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch[:, :-1], batch[:, 1:]), batch_idx)


class PaddedAndCutShort(PaddedAndTied):
    """Its features are detached."""

    def embedded(self, x: Tensor) -> Tensor:
        return super().embedded(x).detach()


class PaddedByTheCall(PaddedAndTied):
    """The padding is told in the call alone."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.embed = nn.Embedding(9, case.hidden)

    def embedded(self, x: Tensor) -> Tensor:
        weight: Any = self.embed.weight
        return F.embedding(x, weight, padding_idx=0)


class BagsHeldShort(PaddedAndTied):
    """Forward holds a bag's rows short, and their gradients are divided by how many come."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.readout = nn.Linear(case.hidden, 9)
        self.embed = nn.EmbeddingBag(9, case.hidden, max_norm=1.0, scale_grad_by_freq=True)

    def embedded(self, x: Tensor) -> Tensor:
        pairs = torch.stack([x, x.clamp(max=3)], dim=-1).flatten(0, 1)
        return super().embedded(pairs).view(*x.shape, -1)


class CodebookOfAverages(Loop):
    """Features are quantised by averages of them, in a buffer that forward moves on."""

    codes: Tensor

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.register_buffer("codes", torch.randn(5, case.hidden))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        nearest = torch.cdist(features.flatten(0, 1), self.codes).argmin(dim=-1)
        quantised = self.codes[nearest].view_as(features)
        with torch.no_grad():
            self.codes.index_copy_(0, nearest[:1], 0.9 * quantised[:1, 0] + 0.1 * features[:1, 0])
        commitment = F.mse_loss(features, quantised.detach())
        return (self.readout(features + (quantised - features).detach()), commitment), state

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return committed(prediction, target)


class CodebookWithoutState(CodebookOfAverages):
    """The state is dropped between chunks."""

    def cut(self, state: Any) -> Any:
        return None


def committed(prediction: Any, target: Tensor) -> Tensor:
    distance: Tensor = prediction[1]
    return F.mse_loss(prediction[0], target) + 0.25 * distance


class NoiseOnTargets(Loop):
    """The loss draws noise on its targets, as label smoothing by hand does."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return on_noisy_targets(prediction, target)


class NoiseOnTargetsTurned(NoiseOnTargets):
    """The targets are of other time steps."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return super().loss(prediction, target.flip(1))


class NoiseOnTargetsByNumpy(Loop):
    """It is numpy that draws it; the loop draws some more in between."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        np.random.random(2)
        return on_numpys_noise(prediction, target)


class NoiseOnTargetsByStep(Loop):
    """Each time step has a forward and a loss of its own, which draws."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRUCell(case.inputs, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = self.core(F.dropout(x, 0.2), state)
        return self.readout(state), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        losses = []
        for inputs, target in zip(x.unbind(1), y.unbind(1), strict=True):
            prediction, state = self(inputs, state)
            losses.append(on_noisy_targets(prediction, target))
        opt.zero_grad()
        self.manual_backward(torch.stack(losses).mean())
        opt.step()
        return state.detach()


def on_noisy_targets(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target + 0.1 * torch.randn_like(target))


def on_numpys_noise(prediction: Tensor, target: Tensor) -> Tensor:
    noise = torch.as_tensor(np.random.random(target.shape))
    return F.mse_loss(prediction, target + 0.1 * noise.to(target))


class BagsShrink(BagsHeldShort):
    """The loop shrinks them besides."""

    def after_the_update(self) -> None:
        with torch.no_grad():
            self.embed.get_parameter("weight").mul_(0.99)


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


class CutBesideAverages(Loop):
    """Features are normed over the batch, and running averages of them kept, by which nothing goes.

    Forward runs a chunk as two halves and cuts the state between them.
    """

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.norm = nn.BatchNorm1d(case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features = []
        for half in x.chunk(2, dim=1):
            feature, state = self.core(half, None if state is None else state.detach())
            features.append(feature)
        normed = self.norm(torch.cat(features, dim=1).mT).mT
        return self.readout(normed), state


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


class FlatBesideFeatures(FeaturesBesides):
    """Forward returns (B * K, O) beside (B, K, H): the kit is told how to unflatten the first."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        (prediction, features), state = super().forward(x, state)
        return prediction.flatten(0, 1), features, state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        flat, features, state = self(x, state)
        opt.zero_grad()
        self.manual_backward(self.loss((flat, features), y.flatten(0, 1)))
        opt.step()
        return state.detach()


class FlatBesideForgotten(FlatBesideFeatures):
    """The features are detached before their size is regularised."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return regularised((prediction[0], prediction[1].detach()), target)


def unflattened(out: Any) -> Any:
    flat, features, state = out
    return (flat.unflatten(0, features.shape[:2]), features), state


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


class JudgesFirstNotCleared(JudgesFirst):
    """The discriminator, trained first, is still left what the generator's loss added."""

    def clear(self, judges: Any) -> None:
        pass


class ProbesFirstNotCleared(ProbesFirst):
    """All but the probe's gradients are never cleared."""

    def clear(self, main: Any) -> None:
        pass


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


class LoopFeedsBackDetached(Loop):
    """The loop calls forward at every time step, and feeds its prediction back as a constant."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.GRUCell(case.inputs + case.outputs, case.hidden)
        self.sizes = case.hidden, case.outputs

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, last = state or (x.new_zeros(len(x), size) for size in self.sizes)
        h = self.core(torch.cat([x, last], dim=1), h)
        prediction = self.readout(h)
        return prediction, (h, prediction)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        predictions = []
        for now in x.unbind(1):
            prediction, state = self(now, state and self.between_calls(state))
            predictions.append(prediction)
        opt.zero_grad()
        self.manual_backward(F.mse_loss(torch.stack(predictions, dim=1), y))
        opt.step()
        return tuple(part.detach() for part in state)

    def between_calls(self, state: Any) -> Any:
        return state[0], state[1].detach()


class LoopDetachesWhatItKeeps(LoopFeedsBackDetached):
    """It feeds its prediction back with its graph, and detaches the rest."""

    def between_calls(self, state: Any) -> Any:
        return state[0].detach(), state[1]


class CutsAsTheFirstBatch(Loop):
    """Where chunks start is worked out once: the end of a longer batch is never come to."""

    starts: tuple[int, ...] = ()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.starts = self.starts or tuple(range(0, x.shape[1], self.k))
        state = None
        for t in (t for t in self.starts if t < x.shape[1]):
            state = self.train_on(x[:, t : t + self.k], y[:, t : t + self.k], state)


class ShortensItsChunks(Loop):
    """A sequence shorter than a chunk makes all chunks to come as short."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.k = min(self.k, batch[0].shape[1])
        super().training_step(batch, batch_idx)


class CountsTimeSteps(Loop):
    """The state is a pair of a tensor and a plain number: how many time steps there were."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.position = nn.Parameter(torch.randn(100, case.inputs))

    def forward(self, x: Tensor, state: Any = None) -> Any:
        h, done = state or (None, 0)
        after = done + x.shape[1]
        prediction, h = super().forward(x + self.position[done:after], h)
        return prediction, (h, after)

    def cut(self, state: Any) -> Any:
        return state[0].detach(), state[1]


class LoopCounts(CountsTimeSteps):
    """The number is the loop's to change: forward hands it back as it came."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        prediction, (h, after) = super().forward(x, state)
        self.done = after
        return prediction, (h, after - x.shape[1])

    def cut(self, state: Any) -> Any:
        return state[0].detach(), self.done


class CountsEachChunk(CountsTimeSteps):
    """The number is set back with each chunk."""

    def cut(self, state: Any) -> Any:
        return state[0].detach(), 0


class HandedItsPosition(Loop):
    """The loop tells forward how many time steps there were; a table has a row for each."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.position = nn.Parameter(torch.randn(100, case.inputs))

    def forward(self, x: Tensor, state: Any = None, done: int = 0) -> Any:
        return super().forward(x + self.position[done : done + x.shape[1]], state)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        state, done = state or (None, 0)
        prediction, state = self(x, state, done)
        opt.zero_grad()
        self.manual_backward(self.loss(prediction, y))
        opt.step()
        return self.cut(state), done + x.shape[1]


class HandedItsPositionAlone(HandedItsPosition):
    """Its position is all that is handed on."""

    def cut(self, state: Any) -> Any:
        return None


class MaskOfTheBatch(Loop):
    """Variational dropout: a hook draws by how much features are scaled, for a whole batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.mask = 0.5 + torch.rand(len(batch[0]), 1, 1)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(features * self.mask), state


class MaskThatFades(MaskOfTheBatch):
    """It is halved from chunk to chunk: a state that no forward is handed."""

    def after_the_update(self) -> None:
        self.mask = self.mask / 2


class WarmsUpPrivately(Loop):
    """A private number says how many updates there were; forward goes by it."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self._updates = 0

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state)
        return self.readout(features * min(1.0, 0.2 * (1 + self._updates))), state

    def after_the_update(self) -> None:
        self._updates += 1


class ForgetsPrivately(WarmsUpPrivately):
    """By that number, every second chunk starts afresh."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(x, None if self._updates % 2 else state)


class ProbeOfItsFeatures(Loop):
    """A probe learns from detached features, by a loss and an optimizer of its own."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.probe = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        self.features, state = self.core(x, state)
        return self.readout(self.features), state

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt, of_probe = self.optimizers()  # type: ignore[attr-defined]
        prediction, state = self(x, state)
        opt.zero_grad()
        self.manual_backward(self.loss(prediction, y))
        opt.step()
        of_probe.zero_grad()
        self.manual_backward(F.l1_loss(self.probe(self.features.detach()), y))
        of_probe.step()
        del self.features
        return self.cut(state)

    def configure_optimizers(self) -> Any:
        return self.optimizers_beside(self.probe)


class ProbeAndAttached(ProbeOfItsFeatures):
    """Features are detached, and the state is not."""

    def cut(self, state: Any) -> Any:
        return state


class StartsFromTheSession(Loop):
    """A chunk's own LSTM starts from the h of a session, which goes on, and from no c."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.session = nn.GRUCell(case.hidden, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = x.new_zeros(len(x), self.session.hidden_size) if state is None else state
        features, (h, _) = self.core(x, (state[None], torch.zeros_like(state)[None]))
        return self.readout(features), self.session(h[0], state)


class HasNoC(Loop):
    """An LSTM goes on with its h, and with no c; h alone is the state."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTM(case.inputs, case.hidden, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        both = None if state is None else (state, torch.zeros_like(state))
        features, (h, _) = self.core(x, both)
        return self.readout(features), h


class LosesItsC(HasNoC):
    """Both are the state; forward makes c anew."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        both = None if state is None else (state[0], torch.zeros_like(state[1]))
        features, state = self.core(x, both)
        return self.readout(features), state

    def cut(self, state: Any) -> Any:
        return tuple(part.detach() for part in state)


class StartsItsCFromItsH(LosesItsC):
    """Both are the state; forward takes h for both."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.core(x, state and (state[0], state[0]))
        return self.readout(features), state


class LosesTheHOfItsCell(LosesItsC):
    """The same of a cell that is run time step by time step, and of h."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTMCell(case.inputs, case.hidden)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is not None:
            state = torch.zeros_like(state[0]), state[1]
        features = []
        for step in x.unbind(1):
            state = self.core(step, hx=state)
            features.append(state[0])
        return self.readout(torch.stack(features, 1)), state


class EvaluatesTwice(Loop):
    """Two evaluations of each chunk drop other units; both are to be right, and alike (R-Drop)."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return super().forward(F.dropout(x, 0.3), state)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        one, other, state = self.both(x, state)
        loss = self.loss(one, y) + self.loss(other, y) + self.loss(one, other)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return self.cut(state)

    def both(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        (one, after), (other, _) = self(x, state), self(x, state)
        return one, other, after


class EvaluatesCopies(EvaluatesTwice):
    """The two evaluations are one, of a batch in which every sequence is there twice."""

    def both(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        twice = None if state is None else torch.cat([state, state], dim=1)
        prediction, state = self(torch.cat([x, x]), twice)
        return *prediction.chunk(2), state.chunk(2, dim=1)[0]


class EvaluatesTwiceFromZeros(EvaluatesTwice):
    """The state is set to zeros after each chunk."""

    def cut(self, state: Any) -> Any:
        return torch.zeros_like(state)


class EvaluatesTwiceAttached(EvaluatesTwice):
    """The state keeps its graph."""

    def cut(self, state: Any) -> Any:
        return state


class EvaluatesTwiceForNothing(EvaluatesTwice):
    """Both evaluations are one and the same."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return Loop.forward(self, x, state)


def shifted(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids[:, :-1], ids[:, 1:]


OF_TOKENS: dict[str, Any] = {"loss": F.cross_entropy, "batches": tokens, "parts": shifted}
OF_A_LOSS = {
    "gradients_span_the_whole_chunk",
    "loss_is_the_chunks_own",
    "one_chunk_is_one_ordinary_update",
}
OF_A_CHUNK_RUN_ONCE = OF_A_LOSS | {
    "gradients_are_the_chunks_own",
    "no_sequence_looks_at_another",
    "state_sums_up_the_chunk",
    "the_update_follows_the_optimizers_rule",
}

IN_PLAIN: dict[str, Any] = {
    "train": lambda module, batches: module.train_in_plain(batches),
    "contract": tb.Contract(update="batch"),
}


class NamesItsStates(Loop):
    """Two cores' states in a dictionary, which the loop names otherwise: forward knows both."""

    taken = "lower", "above"

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.upper = nn.GRU(case.hidden, case.hidden, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        lower, upper = self.taken
        features, low = self.core(x, (state or {}).get(lower))
        features, up = self.upper(features, (state or {}).get(upper))
        return self.readout(features), {"lower": low, "upper": up}

    def cut(self, state: Any) -> Any:
        return {"lower": state["lower"].detach(), "above": state["upper"].detach()}


class MisnamesAState(NamesItsStates):
    taken = "lower", "upper"


WASHOUT = 3


class WashedOut(Loop):
    """The first time steps only warm the state up; nothing of a shorter sequence is trained on."""

    washout = WASHOUT

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch[0].shape[1] <= self.washout:
            return
        with torch.no_grad():
            _, state = self(batch[0][:, : self.washout])
        rest = (part[:, self.washout :].split(self.k, dim=1) for part in batch)
        for x, y in zip(*rest, strict=True):
            state = self.train_on(x, y, state)


class WashedOutTooShortly(WashedOut):
    washout = WASHOUT - 2


def behind_the_washout(kind: type[WashedOut]) -> Build:
    def build(case: tb.Case) -> tb.Subject:
        def lengths(steps: int) -> list[tuple[int, int]]:
            return [(t, min(t + case.chunk, steps)) for t in range(WASHOUT, steps, case.chunk)]

        return tb.Subject(kind(case), loss=F.mse_loss, contract=tb.Contract(lengths=lengths))

    return build


class CalledOtherwise(Loop):
    """Calls its forward in a way of its own."""

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        opt: Any = self.optimizers()
        prediction, state = self.run(x, state)
        loss = self.loss(prediction, y)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return self.cut(state)

    def run(self, x: Tensor, state: Any) -> Any:
        return self(x, state)


class StateComesFirst(CalledOtherwise):
    def forward(self, state: Any, inputs: Tensor) -> Any:  # type: ignore[override]
        features, state = self.core(inputs, state)
        return self.readout(features), state

    def run(self, x: Tensor, state: Any) -> Any:
        return self(state, x)


class ZerosComeFirst(StateComesFirst):
    """Starts from zeros, and hands all over by name."""

    def run(self, x: Tensor, state: Any) -> Any:
        core: Any = self.core
        start = torch.zeros(1, len(x), core.hidden_size)
        return self(state=start if state is None else state, inputs=x)


class FirstStateDropped(StateComesFirst):
    def run(self, x: Tensor, state: Any) -> Any:
        return self(None, x)


class AllByName(CalledOtherwise):
    """The first call is without a state."""

    def forward(self, **given: Any) -> Any:  # type: ignore[override]
        features, state = self.core(given["inputs"], given.get("state"))
        return self.readout(features), state

    def run(self, x: Tensor, state: Any) -> Any:
        return self(inputs=x) if state is None else self(inputs=x, state=state)


class StateByNameFirst(AllByName):
    def run(self, x: Tensor, state: Any) -> Any:
        return self(state=state, inputs=x)


class NamedStateDropped(AllByName):
    def run(self, x: Tensor, state: Any) -> Any:
        return self(inputs=x, state=None)


class Gated(CalledOtherwise):
    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTM(case.inputs, case.hidden, batch_first=True)

    def cut(self, state: Any) -> Any:
        return [part.detach() for part in state]


class StatesApart(Gated):
    """As many states as there are come in behind the inputs, and out behind the prediction."""

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        features, after = self.core(x, states or None)
        return self.readout(features), *after

    def run(self, x: Tensor, state: Any) -> Any:
        prediction, *state = self(x, *(state or ()))
        return prediction, state


class StatesBehindTargets(StatesApart):
    """Forward takes the targets as well, as that of Transformer-XL's authors does."""

    def forward(self, x: Tensor, y: Tensor, *states: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, *states)

    def train_on(self, x: Tensor, y: Tensor, state: Any) -> Any:
        self.y = y
        return super().train_on(x, y, state)

    def run(self, x: Tensor, state: Any) -> Any:
        prediction, *state = self(x, self.y, *(state or ()))
        return prediction, state


class StatesOfParts(StatesBehindTargets):
    """Two sequences run at a time, with states of their own; all share an update."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        states: dict[int, Any] = {}
        for x, y in zip(*(part.split(self.k, dim=1) for part in batch), strict=True):
            opt.zero_grad()
            for i in range(0, len(x), 2):
                self.y = y[i : i + 2].clone()
                prediction, state = self.run(x[i : i + 2].clone(), states.get(i))
                loss = self.loss(prediction, self.y) * len(self.y) / len(y)
                self.manual_backward(loss)
                states[i] = self.cut(state)
            opt.step()


class FlatParts(StatesOfParts):
    """Time comes first, and forward returns (K * B, O)."""

    def __init__(self, case: tb.Case) -> None:
        super().__init__(case)
        self.core = nn.LSTM(case.inputs, case.hidden)

    def run(self, x: Tensor, state: Any) -> Any:
        return super().run(x.transpose(0, 1), state)

    def forward(self, x: Tensor, y: Tensor, *states: Tensor) -> Any:  # type: ignore[override]
        prediction, *after = super().forward(x, y, *states)
        return prediction.flatten(0, 1), *after

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_all(prediction, target.transpose(0, 1))


class FlatPartsBySequence(FlatParts):
    """The targets lie flat, too, but with sequences before time."""

    def loss(self, prediction: Any, target: Tensor) -> Tensor:
        return of_all(prediction, target)


def paired(out: Any) -> Any:
    return out[0], out[1:]


def of_all(prediction: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(prediction, target.reshape(prediction.shape))


class SecondStateOfPartsDropped(StatesOfParts):
    """Each part goes on from the first of its states alone."""

    def cut(self, state: Any) -> Any:
        return [state[0].detach(), torch.zeros_like(state[1])]


class OneOfTheStatesAttached(StatesApart):
    def cut(self, state: Any) -> Any:
        return [state[0].detach(), state[1]]


class StatesByName(Gated):
    def forward(self, x: Tensor, **states: Tensor) -> Any:  # type: ignore[override]
        before = (states["h"], states["c"]) if states else None
        features, (h, c) = self.core(x, before)
        return self.readout(features), {"h": h, "c": c}

    def run(self, x: Tensor, state: Any) -> Any:
        return self(x, **(state or {}))

    def cut(self, state: Any) -> Any:
        return {name: part.detach() for name, part in state.items()}


class OneByNameAttached(StatesByName):
    def cut(self, state: Any) -> Any:
        return {**super().cut(state), "h": state["h"]}


OF_AN_UPDATE_IN_TWO = {
    "one_chunk_is_one_ordinary_update",
    "the_update_follows_the_optimizers_rule",
}
OF_A_MODULE_THAT_IS_BUILT = OF_A_LOSS | {
    "a_batch_knows_nothing_of_the_one_before",
    "a_run_can_be_resumed_at_any_boundary",
    "gradients_are_the_chunks_own",
    "no_sequence_looks_at_another",
    "state_sums_up_the_chunk",
    "the_update_follows_the_optimizers_rule",
    "training_moves_the_parameters",
    "updates_go_through_lightnings_optimizer",
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
    "loop_feeds_back_detached": (told(LoopFeedsBackDetached), {"state_sums_up_the_chunk"}),
    "flat_predictions": (told(FlatPredictions), {"state_sums_up_the_chunk"}),
    "sequences_come_out_first": (
        told(SequencesComeOutFirst, loss=of_rows),
        {"state_sums_up_the_chunk"},
    ),
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
    "clips_in_a_hook": (
        told(ClipsInAHook, contract=tb.Contract(clip_norm=0.1)),
        {"one_chunk_is_one_ordinary_update", "the_update_follows_the_optimizers_rule"},
    ),
    "unfreezes": (told(Unfreezes), set()),
    "built_late": (told(BuiltLate), set()),
    "built_by_its_trainer": (told(BuiltByItsTrainer), OF_A_MODULE_THAT_IS_BUILT),
    "warms_up": (told(WarmsUp), set()),
    "teacher": (told(Teacher, loss=None), OF_A_LOSS),
    "ends_in_its_average": (
        told(EndsInItsAverage),
        {"a_batch_knows_nothing_of_the_one_before", "a_run_can_be_resumed_at_any_boundary"},
    ),
    "state_in_a_holder": (told(StateInAHolder), set()),
    "state_in_a_store": (told(StateInAStore), set()),
    "store_handed_over": (told(StoreHandedOver), set()),
    "adversarial": (
        told(Adversarial, loss=None),
        OF_A_LOSS,
    ),
    "judges_first": (
        told(JudgesFirst, loss=None),
        {*OF_A_LOSS, "a_run_can_be_resumed_at_any_boundary"},
    ),
    "probes_first": (told(ProbesFirst), set()),
    "takes_turns": (told(TakesTurns), {"a_run_can_be_resumed_at_any_boundary"}),
    "starts_from_the_session": (told(StartsFromTheSession), {"state_sums_up_the_chunk"}),
    "alternates": (
        told(Alternates),
        {"a_run_can_be_resumed_at_any_boundary", "one_chunk_is_one_ordinary_update"},
    ),
    "alternates_untoggled": (
        told(AlternatesUntoggled),
        {"a_run_can_be_resumed_at_any_boundary", "one_chunk_is_one_ordinary_update"},
    ),
    "calls_itself": (told(CallsItself), set()),
    "checkpointed": (told(Checkpointed), {"gradients_span_the_whole_chunk"}),
    "metered": (told(Metered), set()),
    "logs_a_metric": (told(LogsAMetric), set()),
    "slopes_by_hand": (told(SlopesByHand), set()),
    "weighs_sequences": (told(WeighsSequences), set()),
    "chains_by_hand": (
        told(ChainsByHand),
        {"one_chunk_is_one_ordinary_update", "state_sums_up_the_chunk"},
    ),
    "adds_up_by_hand": (
        told(AddsUpByHand, **IN_PLAIN),
        {
            "a_batch_knows_nothing_of_the_one_before",
            "a_run_can_be_resumed_at_any_boundary",
            "backward_goes_through_manual_backward",
            "updates_go_through_lightnings_optimizer",
        },
    ),
    "sharpness_aware": (
        told(SharpnessAware),
        OF_AN_UPDATE_IN_TWO
        | {"a_batch_knows_nothing_of_the_one_before", "a_run_can_be_resumed_at_any_boundary"},
    ),
    "sharpness_aware_in_two": (told(SharpnessAwareInTwo), OF_AN_UPDATE_IN_TWO),
    "keeps_its_last_loss": (told(KeepsItsLastLoss), set()),
    "cell_in_the_loop": (told(CellInTheLoop), {*OF_A_LOSS, "state_sums_up_the_chunk"}),
    "cuts_in_forward": (
        told(CutsInForward, contract=tb.Contract(update="batch")),
        {"a_run_can_be_resumed_at_any_boundary", "state_crosses_every_boundary"},
    ),
    "scores_its_end": (
        told(ScoresItsEnd, loss=None, contract=tb.Contract(update="batch")),
        OF_A_LOSS | {"a_run_can_be_resumed_at_any_boundary", "state_crosses_every_boundary"},
    ),
    "scores_its_last_chunk": (
        told(ScoresItsLastChunk, loss=None, contract=tb.Contract(update="batch")),
        OF_A_LOSS | {"a_run_can_be_resumed_at_any_boundary", "state_crosses_every_boundary"},
    ),
    "returns_all_states": (told(ReturnsAllStates), {"state_sums_up_the_chunk"}),
    "optimizer_of_ones_own": (told(OptimizerOfOnesOwn), set()),
    "set_up_last": (told(SetUpLast), set()),
    "clips_in_hooks": (
        told(ClipsInHooks),
        {"gradients_are_the_chunks_own", "one_chunk_is_one_ordinary_update"},
    ),
    "with_noise": (
        told(WithNoise),
        {
            "a_run_can_be_resumed_at_any_boundary",
            "chunks_tile_the_sequence",
            "gradients_span_the_whole_chunk",
            "loss_is_the_chunks_own",
            "no_sequence_looks_at_another",
            "one_chunk_is_one_ordinary_update",
            "state_sums_up_the_chunk",
        },
    ),
    "sparse_gradients": (
        told(SparseGradients, loss=F.cross_entropy, batches=tokens, parts=shifted),
        {
            "one_chunk_is_one_ordinary_update",
            "state_sums_up_the_chunk",
            "the_update_follows_the_optimizers_rule",
        },
    ),
    "padded_and_tied": (told(PaddedAndTied, **OF_TOKENS), {"state_sums_up_the_chunk"}),
    "padded_by_the_call": (told(PaddedByTheCall, **OF_TOKENS), {"state_sums_up_the_chunk"}),
    "bags_held_short": (told(BagsHeldShort, **OF_TOKENS), {"state_sums_up_the_chunk"}),
    "noise_on_targets": (told(NoiseOnTargets, loss=on_noisy_targets), set()),
    "noise_on_targets_by_numpy": (
        told(NoiseOnTargetsByNumpy, loss=on_numpys_noise),
        {
            "gradients_are_the_chunks_own",
            "loss_is_the_chunks_own",
            "one_chunk_is_one_ordinary_update",
        },
    ),
    "noise_on_targets_by_step": (
        told(NoiseOnTargetsByStep, loss=on_noisy_targets),
        {"one_chunk_is_one_ordinary_update", "state_sums_up_the_chunk"},
    ),
    "codebook_of_averages": (
        told(CodebookOfAverages, loss=committed),
        {"gradients_span_the_whole_chunk", "state_sums_up_the_chunk"},
    ),
    "codebook_told_the_state": (
        told(CodebookOfAverages, loss=committed, state="state"),
        {"gradients_span_the_whole_chunk", "state_sums_up_the_chunk"},
    ),
    "sorted_by_content": (told(SortedByContent), {"state_sums_up_the_chunk"}),
    "shuffled_anew": (told(ShuffledAnew), set()),
    "features_besides": (told(FeaturesBesides, loss=regularised), set()),
    "features_by_step": (
        told(FeaturesByStep, loss=regularised),
        {"state_sums_up_the_chunk"},
    ),
    "flat_beside_features": (
        told(FlatBesideFeatures, loss=regularised, outputs=unflattened),
        set(),
    ),
    "head_for_the_log": (told(HeadForTheLog, loss=of_the_first), set()),
    "style": (told(Style), {"state_sums_up_the_chunk"}),
    "context_of_the_whole": (told(ContextOfTheWhole), {"state_sums_up_the_chunk"}),
    "frozen_average": (told(FrozenAverage), set()),
    "predicts_its_features": (
        told(PredictsItsFeatures, loss=self_supervised),
        {"gradients_span_the_whole_chunk", "state_sums_up_the_chunk"},
    ),
    "state_comes_first": (told(StateComesFirst), set()),
    "zeros_come_first": (told(ZerosComeFirst), set()),
    "all_by_name": (told(AllByName), set()),
    "all_by_name_as_told": (told(AllByName, state="state"), set()),
    "state_by_name_first": (told(StateByNameFirst), set()),
    "states_apart": (told(StatesApart), set()),
    "states_apart_as_told": (told(StatesApart, state="states"), set()),
    "states_put_together": (told(StatesApart, outputs=lambda out: (out[0], out[1:])), set()),
    "states_behind_targets": (told(StatesBehindTargets), {"state_sums_up_the_chunk"}),
    "states_of_parts": (told(StatesOfParts, outputs=paired), {"state_sums_up_the_chunk"}),
    "flat_parts": (told(FlatParts, loss=of_all, outputs=paired), {"state_sums_up_the_chunk"}),
    "states_by_name": (told(StatesByName), set()),
    "counts_time_steps": (told(CountsTimeSteps), set()),
    "loop_counts": (told(LoopCounts), {"state_sums_up_the_chunk"}),
    "mask_of_the_batch": (told(MaskOfTheBatch), set()),
    "warms_up_privately": (told(WarmsUpPrivately), set()),
    "probe_of_its_features": (told(ProbeOfItsFeatures), set()),
    "handed_its_position": (told(HandedItsPosition), {"state_sums_up_the_chunk"}),
    "fills_its_cache": (told(FillsItsCache), set()),
    "fills_a_store": (told(FillsAStore), set()),
    "evaluates_twice": (told(EvaluatesTwice, loss=None), OF_A_CHUNK_RUN_ONCE),
    "evaluates_copies": (
        told(EvaluatesCopies, loss=None),
        OF_A_CHUNK_RUN_ONCE,
    ),
    "names_its_states": (told(NamesItsStates), {"state_sums_up_the_chunk"}),
    "washed_out": (
        behind_the_washout(WashedOut),
        {"a_run_can_be_resumed_at_any_boundary", "one_chunk_is_one_ordinary_update"},
    ),
}

# Each with the property that says it best; others may be broken by the same mistake.
WRONG: dict[str, tuple[Build, str]] = {
    "scores_its_first_chunk": (
        told(ScoresItsFirstChunk, loss=None, contract=tb.Contract(update="batch")),
        "chunks_tile_the_sequence",
    ),
    "cut_beside_averages": (told(CutBesideAverages), "gradients_span_the_whole_chunk"),
    "misnames_a_state": (told(MisnamesAState), "state_crosses_every_boundary"),
    "washed_out_too_shortly": (
        behind_the_washout(WashedOutTooShortly),
        "chunks_tile_the_sequence",
    ),
    "cuts_as_the_first_batch": (told(CutsAsTheFirstBatch), "chunks_tile_the_sequence"),
    "shortens_its_chunks": (told(ShortensItsChunks), "chunks_tile_the_sequence"),
    "second_state_of_parts_dropped": (
        told(SecondStateOfPartsDropped, outputs=paired),
        "state_crosses_every_boundary",
    ),
    "flat_parts_by_sequence": (
        told(FlatPartsBySequence, loss=of_all, outputs=paired),
        "loss_is_the_chunks_own",
    ),
    "first_state_dropped": (told(FirstStateDropped), "state_crosses_every_boundary"),
    "named_state_dropped": (told(NamedStateDropped), "state_crosses_every_boundary"),
    "one_of_the_states_attached": (told(OneOfTheStatesAttached), "graph_crosses_no_boundary"),
    "one_by_name_attached": (told(OneByNameAttached), "graph_crosses_no_boundary"),
    "counts_each_chunk": (told(CountsEachChunk), "state_crosses_every_boundary"),
    "mask_that_fades": (told(MaskThatFades), "a_run_can_be_resumed_at_any_boundary"),
    "forgets_privately": (told(ForgetsPrivately), "state_crosses_every_boundary"),
    "probe_and_attached": (told(ProbeAndAttached), "graph_crosses_no_boundary"),
    "handed_its_position_alone": (told(HandedItsPositionAlone), "state_crosses_every_boundary"),
    "twice_from_zeros": (
        told(EvaluatesTwiceFromZeros, loss=None),
        "state_crosses_every_boundary",
    ),
    "twice_attached": (told(EvaluatesTwiceAttached, loss=None), "graph_crosses_no_boundary"),
    "twice_for_nothing": (told(EvaluatesTwiceForNothing, loss=None), "chunks_tile_the_sequence"),
    "has_no_c": (told(HasNoC), "state_crosses_every_boundary"),
    "loses_its_c": (told(LosesItsC), "state_crosses_every_boundary"),
    "starts_its_c_from_its_h": (told(StartsItsCFromItsH), "state_crosses_every_boundary"),
    "loses_the_h_of_its_cell": (told(LosesTheHOfItsCell), "state_crosses_every_boundary"),
    "alternates_attached": (told(AlternatesAttached), "graph_crosses_no_boundary"),
    "alternates_from_zeros": (told(AlternatesFromZeros), "state_crosses_every_boundary"),
    "alternates_onward": (told(AlternatesOnward), "state_crosses_every_boundary"),
    "cell_resets": (told(CellResets), "state_crosses_every_boundary"),
    "cell_keeps_its_memory": (told(CellKeepsItsMemory), "graph_crosses_no_boundary"),
    "cuts_nowhere": (
        told(CutsNowhere, contract=tb.Contract(update="batch")),
        "chunks_tile_the_sequence",
    ),
    "steps_twice": (told(StepsTwice), "each_chunk_updates_once"),
    "drawn_for_each_batch": (told(DrawnForEachBatch), "nothing_but_the_update_moves_parameters"),
    "returns_all_takes_first": (told(ReturnsAllTakesFirst), "state_crosses_every_boundary"),
    "one_head_forgotten": (told(OneHeadForgotten, loss=unlikelihood), "loss_is_the_chunks_own"),
    "heads_attached": (told(HeadsAttached, loss=unlikelihood), "graph_crosses_no_boundary"),
    "both_heads_cut_off": (
        told(BothHeadsCutOff, loss=of_actor_and_critic),
        "gradients_span_the_whole_chunk",
    ),
    "recursion_attached": (told(RecursionAttached), "graph_crosses_no_boundary"),
    "keeps_all_last_losses": (told(KeepsAllLastLosses), "no_graph_outlives_its_chunk"),
    "never_comes_back": (told(NeverComesBack), "nothing_but_the_update_moves_parameters"),
    "updates_twice": (told(UpdatesTwice), "chunks_tile_the_sequence"),
    "adds_up_evaluations": (told(AddsUpEvaluations), "chunks_tile_the_sequence"),
    "slopes_too_steep": (told(SlopesTooSteep), "loss_is_the_chunks_own"),
    "weighs_one_sequence": (told(WeighsOneSequence), "loss_is_the_chunks_own"),
    "keeps_the_latest": (told(KeepsTheLatest, **IN_PLAIN), "gradients_are_the_chunks_own"),
    "losses_kept_by_recursion": (told(LossesKeptByRecursion), "no_graph_outlives_its_chunk"),
    "judge_not_cleared": (told(JudgeNotCleared, loss=None), "events_come_in_a_legal_order"),
    "judges_first_not_cleared": (
        told(JudgesFirstNotCleared, loss=None),
        "events_come_in_a_legal_order",
    ),
    "probes_first_not_cleared": (told(ProbesFirstNotCleared), "events_come_in_a_legal_order"),
    "clips_to_another": (
        told(ClipsToAnother, contract=tb.Contract(clip_norm=0.1)),
        "gradients_are_the_chunks_own",
    ),
    "built_late_and_attached": (told(BuiltLateAndAttached), "graph_crosses_no_boundary"),
    "noise_in_a_hook": (
        told(NoiseInAHook, contract=tb.Contract(clip_norm=0.1)),
        "gradients_are_the_chunks_own",
    ),
    "unfreezes_with_its_state": (told(UnfreezesWithItsState), "graph_crosses_no_boundary"),
    "rated_by_its_loss": (told(RatedByItsLoss), "no_graph_outlives_its_chunk"),
    "warms_up_once_a_batch": (told(WarmsUpOnceABatch), "each_chunk_updates_once"),
    "goes_on_from_the_teachers": (
        told(GoesOnFromTheTeachers, loss=None),
        "state_crosses_every_boundary",
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
    "loop_detaches_what_it_keeps": (
        told(LoopDetachesWhatItKeeps),
        "gradients_span_the_whole_chunk",
    ),
    "noisy_state_dropped": (told(NoisyStateDropped), "state_crosses_every_boundary"),
    "time_steps_of_targets_first": (
        told(TimeStepsOfTargetsFirst, loss=of_rows),
        "loss_is_the_chunks_own",
    ),
    "targets_stay": (told(TargetsStay), "loss_is_the_chunks_own"),
    "features_attached": (told(FeaturesAttached, loss=regularised), "graph_crosses_no_boundary"),
    "features_forgotten": (told(FeaturesForgotten, loss=regularised), "loss_is_the_chunks_own"),
    "flat_beside_forgotten": (
        told(FlatBesideForgotten, loss=regularised, outputs=unflattened),
        "gradients_are_the_chunks_own",
    ),
    "features_halved": (told(FeaturesHalved, loss=regularised), "gradients_are_the_chunks_own"),
    "frozen_for_the_move": (told(FrozenForTheMove), "nothing_but_the_update_moves_parameters"),
    "frozen_afterwards": (told(FrozenAfterwards), "nothing_but_the_update_moves_parameters"),
    "fills_and_keeps_its_graph": (told(FillsAndKeepsItsGraph), "graph_crosses_no_boundary"),
    "fills_a_new_store": (told(FillsANewStore), "state_crosses_every_boundary"),
    "store_is_emptied": (told(StoreIsEmptied), "state_crosses_every_boundary"),
    "store_keeps_its_graph": (told(StoreKeepsItsGraph), "graph_crosses_no_boundary"),
    "style_attached": (told(StyleAttached), "graph_crosses_no_boundary"),
    "style_halved": (told(StyleHalved), "gradients_are_the_chunks_own"),
    "state_dropped_besides_a_context": (
        told(StateDroppedBesidesAContext),
        "state_crosses_every_boundary",
    ),
    "padded_and_cut_short": (
        told(PaddedAndCutShort, **OF_TOKENS),
        "gradients_span_the_whole_chunk",
    ),
    "noise_on_targets_turned": (
        told(NoiseOnTargetsTurned, loss=on_noisy_targets),
        "loss_is_the_chunks_own",
    ),
    "codebook_without_state": (
        told(CodebookWithoutState, loss=committed),
        "state_crosses_every_boundary",
    ),
    "bags_shrink": (told(BagsShrink, **OF_TOKENS), "nothing_but_the_update_moves_parameters"),
}
