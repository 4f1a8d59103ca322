"""Loops that are as right as those in `correct`, wired in ways that have to be told.

Each comes with the batches it trains on and, where it is no LightningModule, with what trains it.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning as L  # noqa: N812 -- as in Lightning's own examples
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from gallery.correct import Batch
from tbptt_props.case import Case

Batches = list[Any]


@dataclass(frozen=True)
class Unusual:
    """What a loop trains, by what loss, on what; `train` is None where a Trainer's fit does it.

    `loss` is None where it takes more than predictions and targets, and is not told.
    """

    module: nn.Module
    loss: Callable[[Tensor, Any], Tensor] | None
    batches: Batches
    train: Callable[[Any, Batches], None] | None = None


# ---------------------------------------------------------------------------- where the state is


class StateOnSelf(LightningModule):
    """The state is an attribute: `forward` takes inputs and returns predictions, nothing else."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = bptt
        self.lstm = nn.LSTM(n_in, n_hid, batch_first=True)
        self.fc = nn.Linear(n_hid, n_out)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.lstm(x, self.hidden)
        prediction: Tensor = self.fc(out)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.hidden = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            loss = F.mse_loss(self(x), y)
            self.manual_backward(loss)
            opt.step()
            self.hidden = tuple(h.detach() for h in self.hidden)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class StateInCell(LightningModule):
    """A submodule keeps the state in a buffer and offers `reset` and `detach_state`."""

    class Cell(nn.Module):
        h: Tensor

        def __init__(self, n_in: int, n_hid: int) -> None:
            super().__init__()
            self.cell = nn.GRUCell(n_in, n_hid)
            self.register_buffer("h", torch.zeros(0, n_hid), persistent=False)

        def reset(self, batch_size: int) -> None:
            self.h = self.h.new_zeros(batch_size, self.h.size(-1))

        def detach_state(self) -> None:
            self.h = self.h.detach()

        def forward(self, x: Tensor) -> Tensor:
            outs = []
            for t in range(x.size(1)):
                self.h = self.cell(x[:, t], self.h)
                outs.append(self.h)
            return torch.stack(outs, dim=1)

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.core = self.Cell(case.inputs, case.hidden)
        self.net = nn.Sequential(self.core, nn.Linear(case.hidden, case.outputs))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        self.core.reset(x.size(0))
        for i in range(0, x.size(1), self.k):
            self.core.detach_state()
            loss = F.mse_loss(self(x[:, i : i + self.k]), y[:, i : i + self.k])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


class NoForward(L.LightningModule):
    """Calls its parts in `training_step`, as Lightning's documentation does."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chunk_len = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        hiddens: Any = None
        for xc, yc in zip(x.split(self.chunk_len, 1), y.split(self.chunk_len, 1), strict=True):
            features, hiddens = self.lstm(xc, hiddens)
            loss = F.mse_loss(self.head(features), yc)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            hiddens = [h.detach() for h in hiddens]

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class StateFirst(LightningModule):
    """A method of its own name, which takes the state first and returns it first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.length = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)

    def unroll(self, carry: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        ys, carry = self.rnn(inputs, carry)
        return carry, self.out(ys)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        carry: Any = None
        for x, y in zip(*(b.split(self.length, dim=1) for b in batch), strict=True):
            carry, prediction = self.unroll(carry, x)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            carry = carry.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class DictOutput(LightningModule):
    """Everything that `forward` says comes in one dict."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.length = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, past: Any = None) -> dict[str, Tensor]:
        features, last = self.rnn(x, past)
        return {"logits": self.out(features), "features": features, "past": last}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        past = None
        for x, y in zip(*(b.split(self.length, dim=1) for b in batch), strict=True):
            outputs = self(x, past=past)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(outputs["logits"], y))
            opt.step()
            past = outputs["past"].detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class Triple(LightningModule):
    """`forward` takes h and c apart, and returns them apart."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.fc = nn.Linear(case.hidden, case.outputs)

    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = x.new_zeros(1, x.size(0), self.lstm.hidden_size)
        return zeros, zeros.clone()

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, (h, c) = self.lstm(x, (h, c))
        return self.fc(out), h, c

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h, c = self.init_hidden(batch[0])
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h, c = self(x, h, c)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            h, c = h.detach(), c.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class DataclassOnSelf(LightningModule):
    """The state is a dataclass in an attribute, made anew in each chunk."""

    @dataclass
    class Memory:
        h: Tensor
        c: Tensor

        def detached(self) -> "DataclassOnSelf.Memory":
            return DataclassOnSelf.Memory(self.h.detach(), self.c.detach())

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.truncate = case.chunk
        self.cell = nn.LSTMCell(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)
        self.memory: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.memory is None:
            zeros = x.new_zeros(x.size(0), self.cell.hidden_size)
            self.memory = self.Memory(zeros, zeros)
        outs = []
        for x_t in x.unbind(1):
            h, c = self.cell(x_t, (self.memory.h, self.memory.c))
            self.memory = self.Memory(h, c)
            outs.append(self.head(h))
        return torch.stack(outs, dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        xs, ys = batch
        opt: Any = self.optimizers()
        self.memory = None
        for i in range(0, xs.size(1), self.truncate):
            if self.memory is not None:
                self.memory = self.memory.detached()
            opt.zero_grad()
            loss = F.mse_loss(self(xs[:, i : i + self.truncate]), ys[:, i : i + self.truncate])
            self.manual_backward(loss)
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


class DictOnSelf(LightningModule):
    """The state is a dict in a private attribute, emptied for each batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)
        self._state: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out, h = self.rnn(x, self._state.get("h"))
        self._state = {"h": h}
        prediction: Tensor = self.head(out)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self._state = {}
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self._state = {name: value.detach() for name, value in self._state.items()}

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class DictInPlace(DictOnSelf):
    """The dict stays the same one: its entry is written over, and taken out for each batch."""

    def forward(self, x: Tensor) -> Tensor:
        out, self._state["h"] = self.rnn(x, self._state.get("h"))
        prediction: Tensor = self.head(out)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self._state.clear()
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self._state["h"] = self._state["h"].detach()


class ResetState(LightningModule):
    """Layers in a list, each with its own h; `reset_state` forgets, `detach_state` cuts."""

    class Layer(nn.Module):
        def __init__(self, n_in: int, n_hid: int) -> None:
            super().__init__()
            self.cell = nn.GRUCell(n_in, n_hid)
            self.reset_state()

        def reset_state(self) -> None:
            self.h: Tensor | None = None

        def detach_state(self) -> None:
            if self.h is not None:
                self.h = self.h.detach()

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.cell(x, self.h)
            return self.h

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tbptt_steps = case.chunk
        sizes = (case.inputs, case.hidden, case.hidden)
        self.layers = nn.ModuleList(map(self.Layer, sizes, sizes[1:]))
        self.out = nn.Linear(case.hidden, case.outputs)

    def reset_state(self) -> None:
        for layer in self.layers:
            layer.reset_state()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for t in range(x.size(1)):
            hidden = x[:, t]
            for layer in self.layers:
                hidden = layer(hidden)
            outs.append(self.out(hidden))
        return torch.stack(outs, dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        self.reset_state()
        for start in range(0, x.size(1), self.tbptt_steps):
            chunk = slice(start, start + self.tbptt_steps)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x[:, chunk]), y[:, chunk]))
            opt.step()
            for layer in self.layers:
                layer.detach_state()  # type: ignore[operator]

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class TwoAttributes(LightningModule):
    """h and c in an attribute each, which are zeros of the right size for each batch."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seq_len = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.linear = nn.Linear(case.hidden, case.outputs)
        self.h_0 = self.c_0 = torch.zeros(1, 1, case.hidden)

    def init_hidden(self, batch_size: int) -> None:
        like = next(self.parameters())
        self.h_0 = like.new_zeros(1, batch_size, self.lstm.hidden_size)
        self.c_0 = like.new_zeros(1, batch_size, self.lstm.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out, (self.h_0, self.c_0) = self.lstm(x, (self.h_0.detach(), self.c_0.detach()))
        prediction: Tensor = self.linear(out)
        return prediction

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        self.init_hidden(len(x))
        for i in range(0, x.size(1), self.seq_len):
            loss = F.mse_loss(self(x[:, i : i + self.seq_len]), y[:, i : i + self.seq_len])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.RMSprop(self.parameters(), lr=0.01)


class StateByName(LightningModule):
    """The state can be handed over by name alone."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, *, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state=state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class StateReturnedToo(StateOnSelf):
    """The state is an attribute, and is returned as well; its loop doesn't use what is returned."""

    def forward(self, x: Tensor) -> Any:
        out, self.hidden = self.lstm(x, self.hidden)
        return self.fc(out), self.hidden

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.hidden = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            prediction, _ = self(x)
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            self.hidden = tuple(h.detach() for h in self.hidden)


class RunningAverage(StateOnSelf):
    """Beside the state, a buffer goes on from batch to batch: an average that inputs are less."""

    average: Tensor

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.register_buffer("average", torch.zeros(n_in))

    def forward(self, x: Tensor) -> Tensor:
        self.average = self.average.lerp(x.mean(dim=(0, 1)), 0.1)
        return super().forward(x - self.average)


class ResetFlag(StateOnSelf):
    """`forward` itself forgets the state, where it is told to, or detaches it."""

    def forward(self, x: Tensor, reset: bool = False) -> Tensor:
        if reset:
            self.hidden = None
        else:
            self.hidden = tuple(h.detach() for h in self.hidden)
        return super().forward(x)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for i in range(0, batch[0].size(1), self.bptt):
            x, y = (b[:, i : i + self.bptt] for b in batch)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x, reset=i == 0), y))
            opt.step()


class Positions(DictOnSelf):
    """Counts time steps in an attribute, from which the inputs get their positions."""

    position: int = 0

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(self.position, self.position + x.size(1), dtype=x.dtype)
        self.position += x.size(1)
        return super().forward(x + 0.1 * positions[:, None])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.position = 0
        super().training_step(batch, batch_idx)


class AnyNames(StateByName):
    """`forward` takes whatever comes by name; the state is one of it."""

    def forward(self, x: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        return super().forward(x, **others)


class ModelOutput(LightningModule):
    """`forward` returns a dataclass, with the loss in it where labels are handed over."""

    @dataclass
    class Output:
        loss: Tensor | None
        logits: Tensor
        past: tuple[Tensor, ...]

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.block_size = case.chunk
        self.rnn = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, inputs: Tensor, labels: Any = None, past: Any = None) -> Output:
        features, past = self.rnn(inputs, past)
        logits = self.head(features)
        loss = None if labels is None else F.mse_loss(logits, labels)
        return self.Output(loss=loss, logits=logits, past=past)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        past: Any = None
        for x, y in zip(*(b.split(self.block_size, dim=1) for b in batch), strict=True):
            output = self(x, labels=y, past=past)
            opt.zero_grad()
            self.manual_backward(output.loss)
            opt.step()
            past = tuple(p.detach() for p in output.past)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=0.01)


class CoreRunsChunks(LightningModule):
    """The module only trains; what runs a chunk is its part `core`."""

    class Core(nn.Module):
        def __init__(self, case: Case) -> None:
            super().__init__()
            self.rnn = nn.LSTM(case.inputs, case.hidden, batch_first=True)
            self.proj = nn.Linear(case.hidden, case.outputs)

        def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
            features, hx = self.rnn(x, hx)
            return self.proj(features), hx

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.core = self.Core(case)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hx: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, hx = self.core(x, hx)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            hx = tuple(h.detach() for h in hx)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.core.parameters(), lr=0.1)


# ---------------------------------------------------------------------------- what the batches are


class ChunkPerBatch(LightningModule):
    """Automatic optimization: the loader cuts, and marks each sequence's first chunk."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)
        self.state: Tensor | None = None

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.out(features), state

    def training_step(self, batch: tuple[Tensor, Tensor, bool], batch_idx: int) -> Tensor:
        x, y, first = batch
        prediction, state = self(x, None if first else self.state)
        self.state = state.detach()
        return F.mse_loss(prediction, y)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class DictBatches(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.max_len = case.chunk
        self.rnn = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for start in range(0, batch["inputs"].size(1), self.max_len):
            piece = {name: t[:, start : start + self.max_len] for name, t in batch.items()}
            prediction, state = self(piece["inputs"], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, piece["targets"]))
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class TimeMajorBatches(LightningModule):
    """The loader hands over (T, B, .)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden: Any = None
        for x, y in zip(*(b.split(self.bptt) for b in batch), strict=True):
            prediction, hidden = self(x, hidden)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            hidden = hidden.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.2)


class Tokens(LightningModule):
    """Inputs and targets are token ids (B, T)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.embed = nn.Embedding(case.inputs + 2, case.hidden)
        self.rnn = nn.LSTM(case.hidden, case.hidden, batch_first=True)
        self.decoder = nn.Linear(case.hidden, case.inputs + 2)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.rnn(self.embed(ids), state)
        return self.decoder(features), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for ids, labels in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            logits, state = self(ids, state)
            opt.zero_grad()
            self.manual_backward(token_loss(logits, labels))
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class ShiftedTokens(Tokens):
    """A batch is one tensor of ids (B, T + 1): targets are the next tokens, across boundaries."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for i in range(0, batch.size(1) - 1, self.bptt):
            seq_len = min(self.bptt, batch.size(1) - 1 - i)
            logits, state = self(batch[:, i : i + seq_len], state)
            opt.zero_grad()
            self.manual_backward(token_loss(logits, batch[:, i + 1 : i + 1 + seq_len]))
            opt.step()
            state = tuple(s.detach() for s in state)


class TargetPerSequence(LightningModule):
    """One target (B, O) for a whole sequence: what each chunk ends in is compared with it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features[:, -1]), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, label = batch
        opt: Any = self.optimizers()
        h: Any = None
        for piece in x.split(self.k, dim=1):
            prediction, h = self(piece, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, label))
            opt.step()
            h = h.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class EpisodeMask(LightningModule):
    """A batch carries `done` (B, T): where it is 1, the state is 0 before that time step."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k, self.n_hid = case.chunk, case.hidden
        self.cell = nn.GRUCell(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, done: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.size(0), self.n_hid) if state is None else state
        ys = []
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h * (1 - done[:, t, None]))
            ys.append(self.head(h))
        return torch.stack(ys, dim=1), h

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y, done in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, done, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class Stream(LightningModule):
    """Each batch goes on where the one before ended: the state crosses batches, detached."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def on_train_epoch_start(self) -> None:
        self.carried: Any = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, self.carried)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            self.carried = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class UpdatePerSequence(LightningModule):
    """Back-propagates every chunk and updates once, with the mean over all time steps."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            share = x.size(1) / batch[0].size(1)
            self.manual_backward(F.mse_loss(prediction, y) * share)
            state = state.detach()
        opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.02)


class Plain(LightningModule):
    """A GRU, its readout and an optimizer; those below differ in how they train it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class SummedLosses(Plain):
    """One backward and one update per batch, on the sum of losses whose graphs don't touch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        losses = []
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            losses.append(F.mse_loss(prediction, y))
            state = state.detach()
        opt.zero_grad()
        self.manual_backward(torch.stack(losses).sum())
        opt.step()


class AccumulatesTwo(Plain):
    """An update after every second chunk, and at a batch's end, for what has added up."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        chunks = list(zip(*(b.split(self.k, dim=1) for b in batch), strict=True))
        for i, (x, y) in enumerate(chunks):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            if i % 2 == 1 or i == len(chunks) - 1:
                opt.step()
                opt.zero_grad()
            state = state.detach()


class AccumulatesBatches(Plain):
    """An update after every second batch, as Lightning's page on manual optimization has it."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            state = state.detach()
        if (batch_idx + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()


class MeanOfTwo(AccumulatesTwo):
    """Weighs what adds up by the number of all chunks of the batch."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss / self.chunks, *args, **kwargs)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.chunks = -(-batch[0].size(1) // self.k)
        super().training_step(batch, batch_idx)


class RandomLengths(Plain):
    """Draws each chunk's length from a generator of its own, as the AWD-LSTM does."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.lengths = random.Random(case.seed)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        xs, ys = batch
        opt: Any = self.optimizers()
        state: Any = None
        start = 0
        while start < xs.size(1):
            stop = min(start + self.lengths.randint(1, 2 * self.k), xs.size(1))
            prediction, state = self(xs[:, start:stop], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, ys[:, start:stop]))
            opt.step()
            state = state.detach()
            start = stop


class GrowingLengths(Plain):
    """The first chunk is of one time step, and each is one longer than the one before."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        lengths = growing(batch[0].size(1))
        for x, y in zip(*(b.split(lengths, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()


class WarmedUp(Plain):
    """Sets the rate before each update: by the updates so far, and by the chunk's length."""

    def update(self, loss: Tensor, steps: int) -> None:
        opt: Any = self.optimizers()
        warm = min(1.0, (self.global_step + 1) / 4)
        opt.param_groups[0]["lr"] = 0.01 * warm * steps / self.k
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.update(F.mse_loss(prediction, y), x.size(1))
            state = state.detach()


class Penalized(Plain):
    """The AWD-LSTM's loss: large features and their changes cost; a weight decay is added by hand.

    It takes more than predictions and targets, so it is not told.
    """

    def forward(self, x: Tensor, state: Any = None) -> Any:
        features, state = self.rnn(x, state)
        return self.head(features), state, features

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state, features = self(x, state)
            loss = F.mse_loss(prediction, y) + features.square().mean()
            loss = loss + features.diff(dim=1).square().sum() / features.numel()
            loss = loss + 1e-3 * self.head.weight.square().sum()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = state.detach()


class Lookahead(optim.Optimizer):
    """Every third update goes half the way back to where the last three began."""

    def __init__(self, fast: optim.Optimizer) -> None:
        super().__init__(fast.param_groups, {})
        self.fast = fast
        self.param_groups = fast.param_groups
        self.slow = [p.detach().clone() for p in fast.param_groups[0]["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.fast.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for parameter, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.add_(parameter - slow, alpha=0.5)
                parameter.copy_(slow)
        return loss


class LooksAhead(Plain):
    """An optimizer that wraps another, whose update is part of its own."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return Lookahead(optim.SGD(self.parameters(), lr=0.1))


class Unfreezes(LooksAhead):
    """The recurrent part is frozen for the first batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx < 2:
            self.rnn.requires_grad_(batch_idx == 1)
        super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


class SpectrallyNormed(Unfreezes):
    """Each forward makes one step of the power iteration, of which no gradient is taken."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        nn.utils.parametrizations.spectral_norm(self.head)


class ClipsInBackward(Unfreezes):
    """Clips the gradient by the features on its way, as Graves does."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return self.head(features), state


class ClipsUnits(Plain):
    """Adaptive clipping: the gradient of a unit's weights is at most so much of their norm."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            for p in self.parameters():
                largest = 0.05 * p.detach().norm(dim=-1, keepdim=True)
                assert p.grad is not None
                norms = p.grad.norm(dim=-1, keepdim=True)
                p.grad.mul_((largest / norms).clamp(max=1.0))
            opt.step()
            state = state.detach()


class ScalesItsLoss(Plain):
    """Scales the loss up for backward, and gradients down again, as for half precision."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y) * 256)
            for p in self.parameters():
                assert p.grad is not None
                p.grad.div_(256)
            opt.step()
            state = state.detach()


class MaskedTail(Plain):
    """Fills up the last chunk, and masks what it filled in."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        state: Any = None
        steps = x.size(1)
        x, y = (F.pad(b, (0, 0, 0, -steps % self.k)) for b in (x, y))
        valid = (torch.arange(x.size(1)) < steps)[None, :, None].expand_as(y)
        for start in range(0, x.size(1), self.k):
            chunk = slice(start, start + self.k)
            prediction, state = self(x[:, chunk], state)
            opt.zero_grad()
            mask = valid[:, chunk]
            self.manual_backward(F.mse_loss(prediction[mask], y[:, chunk][mask]))
            opt.step()
            state = state.detach()


class WholeChunks(Plain):
    """Leaves the shorter, last chunk out."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        whole = batch[0].size(1) // self.k * self.k
        for start in range(0, whole, self.k):
            x, y = (b[:, start : start + self.k] for b in batch)
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()


class EmbedsOutside(Plain):
    """The loop embeds the inputs, and forward goes on from there."""

    def __init__(self, case: Case) -> None:
        super().__init__(replace(case, inputs=case.hidden))
        self.embedding = nn.Linear(case.inputs, case.hidden)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(self.embedding(x), state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()


class ActorCritic(Plain):
    """The advantage in its loss is detached: the loss's gradient is not its slope, on purpose."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(actor_critic_loss(prediction, y))
            opt.step()
            state = state.detach()


def actor_critic_loss(prediction: Tensor, returns: Tensor) -> Tensor:
    """Take the prediction for values, and its log-sigmoid for the action's log-probability."""
    advantage = returns - prediction
    return advantage.square().mean() - (F.logsigmoid(prediction) * advantage.detach()).mean()


class Frames(LightningModule):
    """A convolutional LSTM on frames (B, T, C, H, W)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.hidden = case.hidden
        self.gates = nn.Conv2d(case.inputs + case.hidden, 4 * case.hidden, 3, padding=1)
        self.decoder = nn.Conv2d(case.hidden, case.inputs, 1)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        zeros = x.new_zeros(x.size(0), self.hidden, *x.shape[-2:])
        h, c = (zeros, zeros) if state is None else state
        frames = []
        for frame in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            frames.append(self.decoder(h))
        return torch.stack(frames, 1), (h, c)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for start in range(0, batch.size(1) - 1, self.k):
            stop = min(start + self.k, batch.size(1) - 1)
            prediction, state = self(batch[:, start:stop], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, batch[:, start + 1 : stop + 1]))
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


def videos(case: Case) -> Batches:
    """Make batches (B, T + 1, C, H, W) from a generator of their own."""
    generator = torch.Generator().manual_seed(case.seed)
    return [
        torch.randn(b, t + 1, case.inputs, 3, 2, generator=generator, dtype=torch.float64)
        for b, t in case.sizes()
    ]


class FlatTokens(LightningModule):
    """PyTorch's word language model: ids (T + 1, B), and predictions (K * B, V) without time."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.encoder = nn.Embedding(case.inputs + 2, case.hidden)
        self.rnn = nn.LSTM(case.hidden, case.hidden)
        self.decoder = nn.Linear(case.hidden, case.inputs + 2)

    def forward(self, ids: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        output, hidden = self.rnn(self.encoder(ids), hidden)
        return self.decoder(output.reshape(-1, output.size(2))), hidden

    def training_step(self, source: Tensor, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden: Any = None
        for i in range(0, source.size(0) - 1, self.bptt):
            length = min(self.bptt, source.size(0) - 1 - i)
            output, hidden = self(source[i : i + length], hidden)
            opt.zero_grad()
            targets = source[i + 1 : i + 1 + length].reshape(-1)
            self.manual_backward(F.cross_entropy(output, targets))
            opt.step()
            hidden = tuple(h.detach() for h in hidden)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.5)


def flat_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits, ids.reshape(-1))


class LockedDropout(Plain):
    """One mask for the whole sequence, drawn by its first chunk and carried in the state."""

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        h, mask = (None, None) if state is None else state
        features, h = self.rnn(x, h)
        if mask is None:
            mask = torch.bernoulli(torch.full_like(features[:, :1], 0.7)) / 0.7
        return self.head(features * mask.detach()), (h, mask.detach())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = tuple(s.detach() for s in state)


class LossInForward(Plain):
    """Takes the targets as forward's second argument, and returns the loss."""

    def forward(self, x: Tensor, y: Tensor, memory: Any = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features, memory = self.rnn(x, memory)
        return F.mse_loss(self.head(features), y), memory

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        memory: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            loss, memory = self(x, y, memory)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            memory = memory.detach()


class SingleFeature(Plain):
    """Batches are numbers (B, T), of which the loop makes a single feature."""

    def __init__(self, case: Case) -> None:
        super().__init__(replace(case, inputs=1, outputs=1))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x.unsqueeze(-1), state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction.squeeze(-1), y))
            opt.step()
            state = state.detach()


class TakesTheIterator(SummedLosses):
    """Lightning hands it its iterator, and it takes a batch from it."""

    def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        batch, batch_idx, _ = next(dataloader_iter)
        super().training_step(batch, batch_idx)


class SlottedState:
    """A state that keeps its tensors in slots."""

    __slots__ = ("c", "h")

    def __init__(self, h: Tensor, c: Tensor) -> None:
        self.h = h
        self.c = c


class StateInSlots(LightningModule):
    """An LSTM whose state is an object of its own."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, SlottedState]:
        features, (h, c) = self.lstm(x, state and (state.h, state.c))
        return self.head(features), SlottedState(h, c)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = SlottedState(state.h.detach(), state.c.detach())

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


def train_within_backward(model: nn.Module, batches: Batches, *, bptt: int) -> None:
    """Update each parameter as soon as its gradient is there, and free it."""
    made = {p: optim.SGD([p], lr=0.1) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        made[parameter].step()  # type: ignore[index]
        made[parameter].zero_grad()  # type: ignore[index]

    hooks = [p.register_post_accumulate_grad_hook(update) for p in model.parameters()]
    for x, y in batches:
        state = None
        for start in range(0, x.size(1), bptt):
            prediction, state = model(x[:, start : start + bptt], state)
            F.mse_loss(prediction, y[:, start : start + bptt]).backward()
            state = state.detach()
    for hook in hooks:
        hook.remove()


def growing(steps: int) -> list[int]:
    """Return 1, 2, 3, ... that add up to `steps`; the last may be less."""
    lengths: list[int] = []
    while sum(lengths) < steps:
        lengths.append(min(len(lengths) + 1, steps - sum(lengths)))
    return lengths


class PairOfInputs(LightningModule):
    """`forward` takes two sequences in one tuple."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.rnn = nn.GRU(2 * case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, inputs: tuple[Tensor, Tensor], state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(torch.cat(inputs, dim=-1), state)
        return self.head(features), state

    def training_step(self, batch: tuple[Batch, Tensor], batch_idx: int) -> None:
        (seen, done), ys = batch
        opt: Any = self.optimizers()
        state: Any = None
        for x, u, y in zip(*(b.split(self.k, dim=1) for b in (seen, done, ys)), strict=True):
            prediction, state = self((x, u), state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class SpeakerIds(LightningModule):
    """A batch has an id (B,) for each sequence, which `forward` takes in every chunk."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.speakers = nn.Embedding(3, case.hidden)
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, ids: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features + self.speakers(ids)[:, None]), state

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        xs, ys, ids = batch
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(xs.split(self.k, dim=1), ys.split(self.k, dim=1), strict=True):
            prediction, state = self(x, ids, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


def masked_mse(prediction: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """Average over the time steps that a mask (B, T) leaves."""
    y, mask = target
    return ((prediction - y).square().mean(-1) * mask).sum() / mask.sum().clamp(min=1)


def mask_of(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(x.size(1)) < lengths[:, None]).to(x.dtype)


class Ragged(Plain):
    """A batch carries the lengths (B,) of its sequences; what is behind them has no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y, lengths = batch
        parts = (x, y, mask_of(x, lengths))
        state: Any = None
        for x, y, mask in zip(*(part.split(self.k, dim=1) for part in parts), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(masked_mse(prediction, (y, mask)))
            opt.step()
            state = state.detach()


class Packed(Ragged):
    """forward(x, lengths, state) packs what the sequences have in the chunk, one step at least."""

    def forward(self, x: Tensor, lengths: Tensor, state: Any = None) -> tuple[Tensor, Any]:  # type: ignore[override]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        features, state = self.rnn(packed, state)
        padded, _ = pad_packed_sequence(features, batch_first=True, total_length=x.size(1))
        return self.head(padded), state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        whole, y, lengths = batch
        mask = mask_of(whole, lengths)
        state: Any = None
        for start in range(0, whole.size(1), self.k):
            now = slice(start, start + self.k)
            x = whole[:, now]
            prediction, state = self(x, (lengths - start).clamp(1, x.size(1)), state)
            opt.zero_grad()
            self.manual_backward(masked_mse(prediction, (y[:, now], mask[:, now])))
            opt.step()
            state = state.detach()


class TakesPacked(Ragged):
    """The loop packs the chunks itself, and leaves out sequences that are over."""

    def forward(self, packed: Any, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.rnn(packed, state)
        return self.head(pad_packed_sequence(features, batch_first=True)[0]), state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        order = batch[2].argsort(descending=True)
        whole, y, lengths = (part[order] for part in batch)
        state: Any = None
        for start in range(0, int(lengths.max()), self.k):
            left = (lengths[lengths > start] - start).clamp(max=self.k)
            now = slice(start, start + int(left.max()))
            x, due = whole[: len(left), now], y[: len(left), now]
            if state is not None:
                state = state[:, : len(left)].contiguous()
            prediction, state = self(pack_padded_sequence(x, left, batch_first=True), state)
            opt.zero_grad()
            self.manual_backward(masked_mse(prediction, (due, mask_of(x, left))))
            opt.step()
            state = state.detach()


class BurnIn(Plain):
    """Finds the state of each chunk anew, without gradient, from the time steps before it."""

    burn_in = 2

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        for start in range(0, x.size(1), self.k):
            now, state = slice(start, start + self.k), None
            if start:
                with torch.no_grad():
                    _, state = self(x[:, max(0, start - self.burn_in) : start])
            prediction, _ = self(x[:, now], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y[:, now]))
            opt.step()


class Windows(Plain):
    """Each chunk's gradients reach two time steps further back than its loss: k2 = k1 + 2."""

    further = 2

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        for start in range(0, x.size(1), self.k):
            further = min(self.further, start)
            prediction, _ = self(x[:, start - further : start + self.k])
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction[:, further:], y[:, start : start + self.k]))
            opt.step()


class StepwiseWindows(Windows):
    """The same, with a call of forward for each time step."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.cell = nn.GRUCell(case.inputs, case.hidden)
        del self.rnn

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.head(state), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        for start in range(0, x.size(1), self.k):
            stop, state, predictions = min(start + self.k, x.size(1)), None, []
            for t in range(max(0, start - self.further), stop):
                prediction, state = self(x[:, t], state)
                predictions.append(prediction)
            its_own = torch.stack(predictions[start - stop :], dim=1)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(its_own, y[:, start:stop]))
            opt.step()


class LastChunk(Plain):
    """Backpropagates through the last chunk alone; the state comes from all before, untrained."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        start, state = max(0, x.size(1) - self.k), None
        if start:
            with torch.no_grad():
                _, state = self(x[:, :start])
        prediction, _ = self(x[:, start:], state)
        opt.zero_grad()
        self.manual_backward(F.mse_loss(prediction, y[:, start:]))
        opt.step()


def ragged_batches(case: Case) -> Batches:
    generator = torch.Generator().manual_seed(case.seed)
    return [
        (x, y, torch.randint(1, x.size(1) + 1, (len(x),), generator=generator))
        for x, y in case.tensors()
    ]


def with_mask(batch: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x, y, lengths = batch
    return x, (y, mask_of(x, lengths))


class Named(NamedTuple):
    target: Tensor
    input: Tensor


class NamedBatches(Plain):
    """A batch is a named tuple, its target first."""

    def training_step(self, batch: Named, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for i in range(0, batch.input.size(1), self.k):
            prediction, state = self(batch.input[:, i : i + self.k], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, batch.target[:, i : i + self.k]))
            opt.step()
            state = state.detach()


class NextInput(LightningModule):
    """Each time step predicts the next one's input; the batch is one tensor (T + 1, B, I)."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.inputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state

    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for i in range(0, batch.size(0) - 1, self.bptt):
            seq_len = min(self.bptt, batch.size(0) - 1 - i)
            prediction, state = self(batch[i : i + seq_len], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, batch[i + 1 : i + 1 + seq_len]))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


class StreamOfChunks(Plain):
    """Automatic optimization; each batch is the next chunk of the same, endless sequences."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.automatic_optimization = True
        self.state: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        prediction, state = self(x, self.state)
        self.state = state.detach()
        return F.mse_loss(prediction, y)


def fit_accumulating(module: Any, batches: Batches) -> None:
    """Let a trainer add up the gradients of every two batches, and divide them by two."""
    trainer = Trainer(
        accumulate_grad_batches=2,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, OneByOne(batches))


class OneByOne:
    """A loader; a list would be taken for several."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


# ------------------------------------------------------------------------------- who trains it


class PlainNet(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, state = self.rnn(x, state)
        return self.head(features), state


def train_in_plain_pytorch(model: nn.Module, batches: Batches, *, bptt: int) -> None:
    """Train as the PyTorch tutorials do."""
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    criterion = nn.MSELoss()
    model.train()
    for x, y in batches:
        hidden = None
        for i in range(0, x.size(1), bptt):
            optimizer.zero_grad()
            output, hidden = model(x[:, i : i + bptt], hidden)
            loss = criterion(output, y[:, i : i + bptt])
            loss.backward()
            optimizer.step()
            hidden = hidden.detach()


def train_with_fabric(model: nn.Module, batches: Batches, *, bptt: int) -> None:
    """Train with Lightning's Fabric, which wraps the module and the optimizer."""
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer: Any = optim.Adam(model.parameters(), lr=0.01)
    wrapped, optimizer = fabric.setup(model, optimizer)
    for x, y in batches:
        hidden = None
        for xc, yc in zip(x.split(bptt, dim=1), y.split(bptt, dim=1), strict=True):
            output, hidden = wrapped(xc, hidden)
            optimizer.zero_grad()
            fabric.backward(F.mse_loss(output, yc))
            optimizer.step()
            hidden = hidden.detach()


# -------------------------------------------------------------------------- cut inside of forward


class TruncatesInForward(LightningModule):
    """Forward runs over whole sequences, and cuts the graph every K time steps."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.bptt = case.chunk
        self.gru = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def carried(self, hidden: Tensor) -> Tensor | None:
        return hidden.detach()

    def forward(self, x: Tensor) -> Tensor:
        outs, hidden = [], None
        for chunk in x.split(self.bptt, dim=1):
            out, hidden = self.gru(chunk, hidden)
            outs.append(self.head(out))
            hidden = self.carried(hidden)
        return torch.cat(outs, dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Zoneout(LightningModule):
    """One time step at a time, between which the loop holds back a part of the state."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.cell = nn.GRUCell(case.inputs, case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return self.head(h), h

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h = x.new_zeros(x.size(0), self.cell.hidden_size)
        losses: list[Tensor] = []
        for t in range(x.size(1)):
            out, new = self(x[:, t], h)
            h = 0.9 * new + 0.1 * h
            losses.append(F.mse_loss(out, y[:, t]))
            if (t + 1) % self.bptt == 0 or t + 1 == x.size(1):
                opt.zero_grad()
                self.manual_backward(torch.stack(losses).mean())
                opt.step()
                h, losses = h.detach(), []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


# ---------------------------------------------------------------------------------- the gallery


def marked_chunks(case: Case) -> Batches:
    """Cut every batch into chunks, each a batch of its own: (x, y, whether it is the first)."""
    return [
        (x[:, i : i + case.chunk], y[:, i : i + case.chunk], i == 0)
        for x, y in case.tensors()
        for i in range(0, x.size(1), case.chunk)
    ]


def token_batches(case: Case) -> Batches:
    """Make ids (B, T + 1) from a generator of their own."""
    generator = torch.Generator().manual_seed(case.seed)
    return [
        torch.randint(case.inputs + 2, (b, t + 1), generator=generator) for b, t in case.sizes()
    ]


def episode_batches(case: Case) -> Batches:
    """Add to each batch where episodes begin: at every third time step, one later per sequence."""
    return [
        (x, y, ((torch.arange(x.size(1)) - torch.arange(x.size(0))[:, None]) % 3 == 0).to(x.dtype))
        for x, y in case.tensors()
    ]


def equal_batches(case: Case) -> Batches:
    """Give every batch the last one's B, as a stream has it."""
    sequences = case.sizes()[-1][0]
    return [(x[:sequences], y[:sequences]) for x, y in case.tensors()]


def pairs_of_inputs(case: Case) -> Batches:
    """Put a second sequence of inputs beside the first."""
    return [((x, x.cos()), y) for x, y in case.tensors()]


def longer_by_one(case: Case) -> Batches:
    """Make batches (T + 1, B, I): the last time step's target is the first one's input."""
    return [torch.cat([x, x[:, :1]], dim=1).transpose(0, 1) for x, _ in case.tensors()]


def usual(kind: Callable[[Case], nn.Module]) -> Callable[[Case], Unusual]:
    return lambda case: Unusual(kind(case), F.mse_loss, case.tensors())


def trained_by(train: Callable[..., None]) -> Callable[[Case], Unusual]:
    def build(case: Case) -> Unusual:
        def run(module: nn.Module, batches: Batches) -> None:
            train(module, batches, bptt=case.chunk)

        return Unusual(PlainNet(case), F.mse_loss, case.tensors(), run)

    return build


OTHER: dict[str, tuple[str, Callable[[Case], Unusual]]] = {
    "state_on_self": (
        "the state is the attribute `hidden`; forward(x) returns the prediction alone",
        usual(lambda c: StateOnSelf(c.inputs, c.hidden, c.outputs, c.chunk)),
    ),
    "state_in_cell": (
        "the state is the buffer `core.h` of a submodule; forward(x) returns the prediction alone",
        usual(StateInCell),
    ),
    "no_forward": (
        "no forward: training_step calls self.lstm, which has the state, and then self.head",
        usual(NoForward),
    ),
    "state_first": (
        "the chunk's forward is the method unroll(state, x) -> (state, prediction)",
        usual(StateFirst),
    ),
    "dict_output": (
        "forward(x, past) returns a dict; the prediction is 'logits', the state 'past'",
        usual(DictOutput),
    ),
    "chunk_per_batch": (
        "automatic optimization; a trainer's batch is one chunk (x, y, first), state on self",
        lambda c: Unusual(ChunkPerBatch(c), F.mse_loss, marked_chunks(c)),
    ),
    "dict_batches": (
        "a batch is a dict of 'inputs' and 'targets'",
        lambda c: Unusual(
            DictBatches(c), F.mse_loss, [{"inputs": x, "targets": y} for x, y in c.tensors()]
        ),
    ),
    "time_major_batches": (
        "a batch is (T, B, I) and (T, B, O)",
        lambda c: Unusual(
            TimeMajorBatches(c),
            F.mse_loss,
            [(x.transpose(0, 1), y.transpose(0, 1)) for x, y in c.tensors()],
        ),
    ),
    "tokens": (
        "inputs and targets are token ids (B, T), embedded in forward",
        lambda c: Unusual(
            Tokens(c), token_loss, [(ids[:, :-1], ids[:, 1:]) for ids in token_batches(c)]
        ),
    ),
    "shifted_tokens": (
        "a batch is one tensor of ids (B, T + 1); the loop makes inputs and targets from it",
        lambda c: Unusual(ShiftedTokens(c), token_loss, token_batches(c)),
    ),
    "target_per_sequence": (
        "targets are (B, O): every chunk is compared with its sequence's only target",
        lambda c: Unusual(
            TargetPerSequence(c), F.mse_loss, [(x, y[:, -1]) for x, y in c.tensors()]
        ),
    ),
    "episode_mask": (
        "a batch is (x, y, done); forward(x, done, state) sets the state to 0 where done is 1",
        lambda c: Unusual(EpisodeMask(c), F.mse_loss, episode_batches(c)),
    ),
    "stream": (
        "the state is carried from batch to batch, and reset once per epoch",
        lambda c: Unusual(Stream(c), F.mse_loss, equal_batches(c)),
    ),
    "update_per_sequence": (
        "one update per batch, with the chunks' gradients weighted by their time steps",
        usual(UpdatePerSequence),
    ),
    "plain_pytorch": (
        "no Lightning: a function with a loop trains an nn.Module",
        trained_by(train_in_plain_pytorch),
    ),
    "fabric": (
        "a function trains an nn.Module through Fabric, which wraps it",
        trained_by(train_with_fabric),
    ),
    "triple": (
        "forward(x, h, c) returns (y, h, c)",
        usual(Triple),
    ),
    "dataclass_on_self": (
        "the state is a dataclass in the attribute `memory`",
        usual(DataclassOnSelf),
    ),
    "dict_on_self": (
        "the state is a dict in the attribute `_state`",
        usual(DictOnSelf),
    ),
    "dict_in_place": (
        "the state is an entry of one dict, `_state`, that is written over",
        usual(DictInPlace),
    ),
    "reset_state": (
        "two layers keep their states in `layers.0.h` and `layers.1.h`; reset_state() forgets them",
        usual(ResetState),
    ),
    "two_attributes": (
        "the state is two attributes, `h_0` and `c_0`, detached in forward",
        usual(TwoAttributes),
    ),
    "state_by_name": (
        "forward(x, *, state) takes the state by its name alone",
        usual(StateByName),
    ),
    "model_output": (
        "forward(inputs, labels, past) returns a dataclass with `loss`, `logits` and `past`",
        usual(ModelOutput),
    ),
    "core_runs_chunks": (
        "the chunk's forward is that of the part `core`",
        usual(CoreRunsChunks),
    ),
    "summed_losses": (
        "one backward per batch, on the sum of the losses of chunks whose states are detached",
        usual(SummedLosses),
    ),
    "accumulates_two": (
        "an update after every second chunk of a batch, and at its end",
        usual(AccumulatesTwo),
    ),
    "random_lengths": (
        "each chunk's length is drawn from a seeded generator",
        usual(RandomLengths),
    ),
    "growing_lengths": (
        "chunks of 1, 2, 3, ... time steps",
        usual(GrowingLengths),
    ),
    "pair_of_inputs": (
        "a batch is ((x, u), y); forward takes the pair (x, u)",
        lambda c: Unusual(PairOfInputs(c), F.mse_loss, pairs_of_inputs(c)),
    ),
    "speaker_ids": (
        "a batch is (x, y, ids), ids (B,) without time",
        lambda c: Unusual(
            SpeakerIds(c),
            F.mse_loss,
            [(x, y, torch.arange(len(x)) % 3) for x, y in c.tensors()],
        ),
    ),
    "ragged": (
        "a batch is (x, y, lengths); the loss leaves out what is behind a sequence's end",
        lambda c: Unusual(Ragged(c), masked_mse, ragged_batches(c)),
    ),
    "packed": (
        "the same, and forward(x, lengths, state) packs each chunk",
        lambda c: Unusual(Packed(c), masked_mse, ragged_batches(c)),
    ),
    "takes_packed": (
        "the same, and forward(packed, state) gets chunks packed, of the sequences that go on",
        lambda c: Unusual(TakesPacked(c), masked_mse, ragged_batches(c)),
    ),
    "burn_in": (
        "the state of each chunk is found anew, without gradient, from two time steps before it",
        usual(BurnIn),
    ),
    "windows": (
        "each chunk's gradients reach two time steps further back than its loss",
        usual(Windows),
    ),
    "stepwise_windows": (
        "the same, with a call of forward for each time step",
        usual(StepwiseWindows),
    ),
    "last_chunk": (
        "only the last chunk of a sequence is trained on",
        usual(LastChunk),
    ),
    "named_batches": (
        "a batch is a named tuple (target, input)",
        lambda c: Unusual(NamedBatches(c), F.mse_loss, [Named(y, x) for x, y in c.tensors()]),
    ),
    "next_input": (
        "a batch is one tensor (T + 1, B, I); targets are the next inputs",
        lambda c: Unusual(NextInput(c), F.mse_loss, longer_by_one(c)),
    ),
    "state_returned_too": (
        "the state is the attribute `hidden`, and forward(x) returns it as well",
        usual(lambda c: StateReturnedToo(c.inputs, c.hidden, c.outputs, c.chunk)),
    ),
    "running_average": (
        "the state is the attribute `hidden`; a buffer `average` is never reset",
        usual(lambda c: RunningAverage(c.inputs, c.hidden, c.outputs, c.chunk)),
    ),
    "reset_flag": (
        "forward(x, reset) forgets the state in `hidden` itself",
        usual(lambda c: ResetFlag(c.inputs, c.hidden, c.outputs, c.chunk)),
    ),
    "positions": (
        "the state is `_state` and the number of time steps so far, `position`",
        usual(Positions),
    ),
    "any_names": (
        "forward(x, **others) takes the state by its name alone",
        usual(AnyNames),
    ),
    "mean_of_two": (
        "an update after every second chunk, each loss divided by the number of the batch's chunks",
        usual(MeanOfTwo),
    ),
    "accumulates_batches": (
        "an update after every second batch; what a last, odd one leaves gets none",
        usual(AccumulatesBatches),
    ),
    "trainer_accumulates": (
        "automatic optimization; a trainer's batch is the next chunk, two share an update",
        lambda c: Unusual(
            StreamOfChunks(c),
            F.mse_loss,
            [(x, y) for x, y, _ in marked_chunks(replace(c, batches=1))],
            fit_accumulating,
        ),
    ),
    "stream_of_chunks": (
        "automatic optimization; a trainer's batch is the next chunk, the state is never reset",
        lambda c: Unusual(
            StreamOfChunks(c),
            F.mse_loss,
            [(x, y) for x, y, _ in marked_chunks(replace(c, batches=1))],
        ),
    ),
    "warmed_up": ("the rate of each update is set before it", usual(WarmedUp)),
    "penalized": (
        "forward(x, state) returns (prediction, state, features); the loss takes all, and weights",
        lambda c: Unusual(Penalized(c), None, c.tensors()),
    ),
    "looks_ahead": ("the optimizer wraps another one", usual(LooksAhead)),
    "unfreezes": ("some layers are frozen for the first batch", usual(Unfreezes)),
    "spectrally_normed": ("a power iteration in buffers", usual(SpectrallyNormed)),
    "clips_in_backward": ("a hook in forward clips a gradient", usual(ClipsInBackward)),
    "clips_units": ("gradients are clipped by the norm of each unit's weights", usual(ClipsUnits)),
    "scales_its_loss": ("losses are scaled up, and gradients down again", usual(ScalesItsLoss)),
    "masked_tail": (
        "the last chunk is filled up, and what was filled in masked",
        usual(MaskedTail),
    ),
    "whole_chunks": ("the shorter, last chunk is left out", usual(WholeChunks)),
    "embeds_outside": ("the loop embeds inputs before forward", usual(EmbedsOutside)),
    "actor_critic": (
        "the loss detaches an advantage",
        lambda c: Unusual(ActorCritic(c), actor_critic_loss, c.tensors()),
    ),
    "frames": (
        "a batch is one video (B, T + 1, C, H, W); targets are the next frames",
        lambda c: Unusual(Frames(c), F.mse_loss, videos(c)),
    ),
    "flat_tokens": (
        "a batch is ids (T + 1, B), and forward returns predictions (K * B, V)",
        lambda c: Unusual(FlatTokens(c), flat_loss, [i.t().contiguous() for i in token_batches(c)]),
    ),
    "locked_dropout": ("a mask for the whole sequence is part of the state", usual(LockedDropout)),
    "loss_in_forward": (
        "forward(x, y, memory) returns (loss, memory)",
        lambda c: Unusual(LossInForward(c), None, c.tensors()),
    ),
    "single_feature": (
        "a batch is (B, T) and (B, T); the loop makes a single feature of its numbers",
        lambda c: Unusual(
            SingleFeature(c),
            lambda prediction, y: F.mse_loss(prediction.squeeze(-1), y),
            [(x[..., 0].contiguous(), y[..., 0].contiguous()) for x, y in c.tensors()],
        ),
    ),
    "truncates_in_forward": (
        "forward(x) runs over whole sequences and detaches every K time steps",
        usual(TruncatesInForward),
    ),
    "zoneout": ("the loop changes the state after every time step", usual(Zoneout)),
    "takes_the_iterator": ("training_step(dataloader_iter)", usual(TakesTheIterator)),
    "state_in_slots": ("the state is an object with slots", usual(StateInSlots)),
    "within_backward": (
        "hooks make each parameter's update in the midst of backward",
        trained_by(train_within_backward),
    ),
}
