"""How subjects are trained: the one module that knows Lightning.

An adapter is a function `(module, batches, watch, skip) -> Exception or None`: it trains on the
batches from number `skip` on, tells `watch` of each, and returns what training raised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from tbptt_props.process import Hung
from tbptt_props.subject import Batches, ObservationError, Subject
from tbptt_props.watch import Training, Watching


def train(
    subject: Subject, batches: Batches, watch: Watching, *, skip: int = 0
) -> BaseException | None:
    """Train the subject's module on the batches from number `skip` on."""
    if subject.disturbed is not None:
        batches = [subject.disturbed(batch) for batch in batches]
    with subject.around(subject) if subject.around else nullcontext():
        return _trained(subject, batches, watch, skip)


def _trained(
    subject: Subject, batches: Batches, watch: Watching, skip: int
) -> BaseException | None:
    module = subject.module
    if subject.train is not None:
        return _with_function(subject.train, module, batches, watch, skip)
    if isinstance(module, pl.LightningModule):
        return _with_lightning(module, batches, watch, skip)
    raise ObservationError(
        f"{type(module).__name__} is no LightningModule: say how it is trained with "
        "Subject(..., train=...), a function of the module and its batches"
    )


# Lightning ----------------------------------------------------------------------------------


def _with_lightning(
    module: pl.LightningModule, batches: Batches, watch: Watching, skip: int
) -> BaseException | None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=DummyLogger(),
        callbacks=[_Teller(watch, skip)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    original = module.training_step
    own = "training_step" in vars(module)
    seen = iter(range(len(batches)))

    @functools.wraps(original)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        index = next(seen)
        if index < skip:
            return None
        watch.batch_started(index, args[0] if args else next(iter(kwargs.values())))
        return original(*args, **kwargs)

    module.training_step = training_step  # type: ignore[method-assign]
    try:
        trainer.fit(module, _Loader(batches))
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns one into the other
            raise error.__context__ from None
        return error
    except (Exception, Hung) as error:
        return error
    finally:
        vars(module).pop("training_step", None)
        if own:
            module.training_step = original  # type: ignore[method-assign]
    return None


class _Loader:
    """Hands out the batches as they are; a bare list would be taken for several loaders."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Teller(pl.Callback):
    """Tells of what goes through Lightning."""

    def __init__(self, watch: Watching, skip: int) -> None:
        self.watch = watch
        self.skip = skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *of_batch: Any
    ) -> None:
        index = of_batch[-1]
        if index >= self.skip:  # by now Lightning, too, has made what updates it makes by itself
            self.watch.batch_ended(index)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress

        def set_updates(count: int) -> None:
            progress.total.completed = progress.total.ready = count

        self.watch.training_begun(
            Training(
                optimizers=trainer.optimizers,
                schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
                updates=lambda: trainer.global_step,
                set_updates=set_updates,
            )
        )

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        self.watch.backward_announced(loss)


# Any function -------------------------------------------------------------------------------


def _with_function(
    function: Callable[[Any, Batches], object],
    module: nn.Module,
    batches: Batches,
    watch: Watching,
    skip: int,
) -> BaseException | None:
    watch.training_begun(Training())
    module.train()
    try:
        told = _Told(batches, watch, skip)
        function(module, told)
        if told.turned_to is not None:
            watch.batch_ended(told.turned_to)
    except (Exception, Hung, SystemExit) as error:
        return error
    return None


class _Told(Sequence[Any]):
    """The batches, telling the watch whenever the loop turns to the next."""

    def __init__(self, batches: Batches, watch: Watching, skip: int) -> None:
        self.batches = batches[skip:]
        self.watch = watch
        self.skip = skip
        self.turned_to: int | None = None  # by index: nothing tells when the loop is done with it

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        batch = self.batches[index]
        if isinstance(index, int):
            at = self.skip + index % len(self.batches)
            if self.turned_to is not None:
                self.watch.batch_ended(self.turned_to)
            self.turned_to = at
            self.watch.batch_started(at, batch)
        return batch

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches, start=self.skip):
            self.watch.batch_started(index, batch)
            yield batch
            self.watch.batch_ended(index)
