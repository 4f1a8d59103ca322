"""Loops that are as right as those in `correct`, wired in ways that have to be told.

Each comes with the batches it trains on and, where it is no LightningModule, with what trains it.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L  # noqa: N812 -- as in Lightning's own examples
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim

from gallery.correct import Batch, Loss
from tbptt_props.case import Case

Batches = list[Any]


@dataclass(frozen=True)
class Unusual:
    """What a loop trains, by what loss, on what; `train` is None where a Trainer's fit does it."""

    module: nn.Module
    loss: Loss
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
}
