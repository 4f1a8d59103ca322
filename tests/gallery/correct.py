"""Loops that are right, each as another stranger might write it.

Every one learns from (x, y), x (B, T, I) and y (B, T, O), cut along time inside `training_step`:
one update per chunk of at most K time steps, the tail kept, the state's value carried over and its
gradient not, every batch begun afresh. Names, idioms and the order of things are the strangers'.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

import math
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L  # noqa: N812 -- as in Lightning's own examples
import lightning.pytorch as pl
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations, weight_norm
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from tbptt_props.case import Case

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Build = Callable[[Case], tuple[LightningModule, Loss]]


# ------------------------------------------------------------ the order of zero, forward, backward


class LSTMRegressor(L.LightningModule):
    def __init__(self, input_size: int, hidden_size: int, output_size: int, tbptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.tbptt_steps = tbptt
        self.lstm = nn.LSTM(input_size, hidden_size, batch_first=True)
        self.fc = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        out, state = self.lstm(x, state)
        return self.fc(out), state

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        opt: Any = self.optimizers()
        x, y = batch
        split_x = x.split(self.tbptt_steps, dim=1)
        split_y = y.split(self.tbptt_steps, dim=1)

        hiddens: Any = None
        for x_chunk, y_chunk in zip(split_x, split_y, strict=True):
            opt.zero_grad()
            y_hat, hiddens = self(x_chunk, hiddens)
            loss = F.mse_loss(y_hat, y_chunk)
            self.manual_backward(loss)
            opt.step()
            hiddens = (hiddens[0].detach(), hiddens[1].detach())
            self.log("train_loss", loss)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=1e-2)


class GRUForecaster(pl.LightningModule):
    """Detaches on the way in and zeroes between the forward and the backward."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int, lr: float = 0.05) -> None:
        super().__init__()
        self.gru = nn.GRU(n_in, n_hid, batch_first=True)
        self.out = nn.Linear(n_hid, n_out)
        self.bptt = bptt
        self.lr = lr
        self.automatic_optimization = False

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=self.lr)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features, h_n = self.gru(x, state)
        return self.out(features), h_n

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        data, target = batch
        optimizer: Any = self.optimizers()
        h: Any = None
        for i in range(0, data.size(1), self.bptt):
            if h is not None:
                h = h.detach()
            output, h = self(data[:, i : i + self.bptt], h)
            loss = F.mse_loss(output, target[:, i : i + self.bptt])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss.item())


class ElmanNet(LightningModule):
    """Zeroes last, for the next chunk to find nothing."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seq_len = case.chunk
        self.rnn = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.decoder = nn.Linear(case.hidden, case.outputs)
        self.criterion = nn.MSELoss()

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        y, h = self.rnn(x, state)
        return self.decoder(y), h

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        h = None
        pieces = list(zip(*(t.split(self.seq_len, 1) for t in batch), strict=True))
        for inputs, labels in pieces:
            pred, h = self(inputs, h)
            h = h.detach()
            loss: Tensor = self.criterion(pred, labels)
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Seq2SeqNet(nn.Module):
    def __init__(self, in_dim: int, hid_dim: int, out_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_dim, hid_dim)
        self.recurrent = nn.GRU(hid_dim, hid_dim, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(hid_dim, out_dim)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        z, h = self.recurrent(torch.relu(self.encoder(x)), h)
        return self.decoder(z), h


class LitWrapper(L.LightningModule):
    """Wraps a network of its own and zeroes through the network."""

    def __init__(self, net: nn.Module, k: int) -> None:
        super().__init__()
        self.net = net
        self.k = k

    @property  # type: ignore[misc]
    def automatic_optimization(self) -> bool:
        return False

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.net(x, state)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        state = None
        for start in range(0, x.shape[1], self.k):
            stop = min(start + self.k, x.shape[1])
            self.net.zero_grad()
            pred, state = self.forward(x[:, start:stop], state)
            loss = F.mse_loss(pred, y[:, start:stop])
            self.manual_backward(loss)
            self.opt.step()
            state = state.detach()

    @property
    def opt(self) -> Any:
        return self.optimizers()

    def configure_optimizers(self) -> Any:
        return {"optimizer": optim.AdamW(self.net.parameters(), lr=0.02)}


class SelfZeroGrad(L.LightningModule):
    def __init__(self, hparams: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters(hparams)
        self.automatic_optimization = False
        self.rnn = nn.RNN(
            hparams["input_dim"], hparams["hidden_dim"], batch_first=True, nonlinearity="relu"
        )
        self.head = nn.Linear(hparams["hidden_dim"], hparams["output_dim"])

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.head(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        xs, ys = (torch.split(t, self.hparams["tbptt_steps"], dim=1) for t in batch)
        carry = None
        losses = []
        for x, y in zip(xs, ys, strict=True):
            self.zero_grad()
            y_hat, carry = self(x, carry)
            loss = torch.mean((y_hat - y) ** 2)
            self.manual_backward(loss)
            self.optimizers().step()  # type: ignore[union-attr]
            carry = carry.detach()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).mean()}

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.RMSprop(self.parameters(), lr=0.01)


class NoGradients(GRUForecaster):
    """Drops the gradients one parameter at a time."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        x, y = batch
        hidden = None
        for xb, yb in zip(x.split(self.bptt, dim=1), y.split(self.bptt, dim=1), strict=True):
            for p in self.parameters():
                p.grad = None
            out, hidden = self(xb, hidden)
            self.manual_backward(F.mse_loss(out, yb))
            optimizer.step()
            hidden = hidden.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adagrad(self.parameters(), lr=0.1)


class ZeroedInPlace(LightningModule):
    def __init__(self, n_features: int, n_hidden: int, n_targets: int, steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = steps
        self.cell = nn.GRUCell(n_features, n_hidden)
        self.linear = nn.Linear(n_hidden, n_targets)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
            outputs.append(self.linear(state))
        assert state is not None
        return torch.stack(outputs, dim=1), state

    def wipe(self) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.detach_()
                    p.grad.zero_()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        h: Any = None
        n_chunks = math.ceil(x.size(1) / self.steps)
        for c in range(n_chunks):
            window = slice(c * self.steps, (c + 1) * self.steps)
            self.wipe()
            y_hat, h_next = self(x[:, window], h)
            self.manual_backward(F.mse_loss(y_hat, y[:, window]))
            self.optimizers().step()  # type: ignore[union-attr]
            h = h_next.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.5, nesterov=True)


class KeepsZeroTensors(LSTMRegressor):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        state: Any = None
        t = 0
        while t < x.size(1):
            opt.zero_grad(set_to_none=False)
            pred, (h, c) = self(x[:, t : t + self.tbptt_steps], state)
            loss = F.mse_loss(pred, y[:, t : t + self.tbptt_steps])
            self.manual_backward(loss)
            opt.step()
            state = (h.detach(), c.detach())
            t += self.tbptt_steps


# ------------------------------------------------------------------------- how the graph is cut


class DetachInPlace(LSTMRegressor):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        inputs, targets = batch
        both = torch.cat([inputs, targets], dim=-1)
        for piece in both.split(self.tbptt_steps, dim=1):
            x, y = piece.split([inputs.size(-1), targets.size(-1)], dim=-1)
            pred, state = self(x, state)
            loss = F.l1_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            for s in state:
                s.detach_()


class DotData(GRUForecaster):
    """Old habits: a tensor's `.data` has no past."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        hidden = None
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            out, hidden = self(x[:, i : i + self.bptt], hidden)
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            opt.step()
            hidden = hidden.data


class StackedLSTM(LightningModule):
    """A list of (h, c) pairs, one for each layer."""

    def __init__(self, sizes: list[int], outputs: int, *, truncate: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.truncate = truncate
        self.layers = nn.ModuleList(nn.LSTM(a, b, batch_first=True) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, list[Any]]:
        new_state = []
        for i, layer in enumerate(self.layers):
            x, s = layer(x, None if state is None else state[i])
            new_state.append(s)
        return self.head(x), new_state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for steps in torch.arange(batch[0].size(1), device=self.device).split(self.truncate):
            x, y = (t[:, steps] for t in batch)
            pred, state = self(x, state)
            loss = F.smooth_l1_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = tree_map(lambda t: t.detach(), state)
        self.log("train/loss", loss.detach(), prog_bar=True)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


def repackage_hidden(h: Any) -> Any:
    """Wraps hidden states in new Tensors, to detach them from their history."""
    if isinstance(h, Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)


class WordLanguageModelStyle(StackedLSTM):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        hidden: Any = self.init_hidden(x)
        for i in range(0, x.size(1), self.truncate):
            hidden = repackage_hidden(hidden)
            opt.zero_grad()
            output, hidden = self(x[:, i : i + self.truncate], hidden)
            loss = F.mse_loss(output, y[:, i : i + self.truncate])
            self.manual_backward(loss)
            opt.step()

    def init_hidden(self, x: Tensor) -> Any:
        sizes = [layer.hidden_size for layer in self.layers]
        zeros = [x.new_zeros(1, x.size(0), int(n)) for n in sizes]  # type: ignore[arg-type]
        return [(z, z.clone()) for z in zeros]


class ForwardDetaches(LightningModule):
    """Whoever calls may hand over any state: `forward` cuts it on entry."""

    def __init__(self, d_in: int, d_model: int, d_out: int, n_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.n_steps = n_steps
        self.rnn = nn.GRU(d_in, d_model, batch_first=True)
        self.proj = nn.Linear(d_model, d_out)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is not None:
            state = state.detach()
        feats, state = self.rnn(x, state)
        return self.proj(feats), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        state = None
        for t0 in range(0, x.shape[1], self.n_steps):
            pred, state = self(x[:, t0 : t0 + self.n_steps], state)
            loss = F.mse_loss(pred, y[:, t0 : t0 + self.n_steps])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=5e-3)


class CloneUnderNoGrad(LSTMRegressor):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        memory = None
        bounds = [*range(0, batch[0].size(1), self.tbptt_steps), batch[0].size(1)]
        for start, stop in pairwise(bounds):
            x, y = (b[:, start:stop].contiguous() for b in batch)
            pred, new_memory = self(x, memory)
            loss = F.huber_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            with torch.no_grad():
                memory = tuple(m.clone() for m in new_memory)


class LeafState(GRUForecaster):
    """Makes the carried state a leaf that wants a gradient, and looks at how large it is."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        xs, ys = map(partial(torch.split, split_size_or_sections=self.bptt, dim=1), batch)
        for j in range(len(xs)):
            out, h_new = self(xs[j], h)
            loss = F.mse_loss(out, ys[j])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            if h is not None:
                self.log("dL/dh", h.grad.norm())
            h = h_new.detach().requires_grad_()


class DetachesTheCopyItKeeps(GRUForecaster):
    """Runs the next chunk from a copy made before the backward, as `detach().clone()`."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        first = 0
        for xc in torch.split(x, self.bptt, dim=1):
            last = first + xc.size(1)
            pred, h_last = self(xc, h)
            h = h_last.detach().clone()
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, first:last]))
            opt.step()
            first = last


# ------------------------------------------------------------------------- how the chunks are cut


class TensorSplitAtIndices(LightningModule):
    def __init__(self, core: nn.Module, readout: nn.Module, bptt_len: int) -> None:
        super().__init__()
        self.core, self.readout, self.bptt_len = core, readout, bptt_len
        self.automatic_optimization = False

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.core(x, state)
        return self.readout(hidden), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        cuts = list(range(self.bptt_len, x.size(1), self.bptt_len))
        state = None
        pairs = zip(x.tensor_split(cuts, dim=1), y.tensor_split(cuts, dim=1), strict=True)
        for step, (x_i, y_i) in enumerate(pairs):
            y_hat, state = self(x_i, state)
            loss = F.mse_loss(y_hat, y_i)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = state.detach()
            self.log(f"loss_{step}", loss.detach())

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1, weight_decay=1e-3)


class GeneratorOfChunks(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case = case
        self.rnn = nn.LSTM(case.inputs, case.hidden, num_layers=3, batch_first=True)
        self.to_y = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.rnn(x, state)
        return self.to_y(z), state

    def iter_chunks(self, *tensors: Tensor) -> Iterator[list[Tensor]]:
        position, total = 0, tensors[0].shape[1]
        while position < total:
            length = min(self.case.chunk, total - position)
            yield [t.narrow(1, position, length) for t in tensors]
            position += length

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for x, y in self.iter_chunks(*batch):
            state = self.learn(opt, x, y, state)

    def learn(self, opt: Any, x: Tensor, y: Tensor, state: Any) -> Any:
        opt.zero_grad()
        prediction, state = self(x, state)
        self.manual_backward(F.mse_loss(prediction, y))
        opt.step()
        return [s.detach() for s in state]

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.NAdam(self.parameters(), lr=0.01)


class RemainderLast(GRUForecaster):
    """Whole chunks first, then what is left over."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        whole, rest = divmod(x.size(1), self.bptt)
        h: Any = None
        for i in range(whole):
            h = self.step_on(x, y, h, i * self.bptt, self.bptt)
        if rest:
            self.step_on(x, y, h, whole * self.bptt, rest)

    def step_on(self, x: Tensor, y: Tensor, h: Any, start: int, length: int) -> Tensor:
        opt: Any = self.optimizers()
        opt.zero_grad()
        out, new_h = self(x[:, start : start + length], h)
        self.manual_backward(F.mse_loss(out, y[:, start : start + length]))
        opt.step()
        carried: Tensor = new_h.detach()
        return carried


class BufferFillsUp(LightningModule):
    """Collects time steps one by one and trains when the buffer is full, or the sequence ends."""

    def __init__(self, in_features: int, hidden: int, out_features: int, every: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every
        self.rnn = nn.RNN(in_features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.head(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        h = None
        total = batch[0].size(1)
        for t, (x_t, y_t) in enumerate(zip(*(b.unbind(1) for b in batch), strict=True), start=1):
            xs.append(x_t)
            ys.append(y_t)
            if len(xs) == self.every or t == total:
                h = self.flush(torch.stack(xs, 1), torch.stack(ys, 1), h)
                xs, ys = [], []

    def flush(self, x: Tensor, y: Tensor, h: Any) -> Any:
        opt: Any = self.optimizers()
        pred, h = self(x, h)
        opt.zero_grad()
        self.manual_backward(((pred - y) ** 2).mean())
        opt.step()
        return h.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), 0.1)


class TimeMajorGRU(LightningModule):
    """Turns the batch to (T, B, .) first, as `batch_first=False` wants it."""

    def __init__(self, ninp: int, nhid: int, nout: int, bptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = bptt
        self.rnn = nn.GRU(ninp, nhid, 2)
        self.decoder = nn.Linear(nhid, nout)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        output, hidden = self.rnn(x, state)
        return self.decoder(output), hidden

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        source, targets = (b.transpose(0, 1).contiguous() for b in batch)
        opt: Any = self.optimizers()
        hidden = None
        for i in range(0, source.size(0), self.bptt):
            seq_len = min(self.bptt, len(source) - i)
            opt.zero_grad()
            output, hidden = self(source[i : i + seq_len], hidden)
            loss = F.mse_loss(output, targets[i : i + seq_len])
            self.manual_backward(loss)
            opt.step()
            hidden = hidden.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.2)


class ChunksTurned(LightningModule):
    """Cuts (B, T, .) and turns each chunk to (K, B, .)."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, k: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = k
        self.lstm = nn.LSTM(n_in, n_hid)
        self.mlp = nn.Sequential(nn.Linear(n_hid, n_hid), nn.Tanh(), nn.Linear(n_hid, n_out))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.lstm(x, state)
        return self.mlp(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hc: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            out, hc = self(x.permute(1, 0, 2), hc)
            loss = F.mse_loss(out, y.permute(1, 0, 2))
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            hc = tuple(v.detach() for v in hc)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01, amsgrad=True)


# --------------------------------------------------------------------- closures, and who optimizes


class ClosureStep(LightningModule):
    def __init__(self, case: Case, optimizer: Callable[..., optim.Optimizer]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make_optimizer = optimizer
        self.chunk_len = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.lin = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.lin(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.learn(*batch, None)

    def learn(self, x: Tensor, y: Tensor, state: Any) -> None:
        k = self.chunk_len
        state = self.optimize(x[:, :k], y[:, :k], state)
        if x.size(1) > k:
            self.learn(x[:, k:], y[:, k:], state)

    def optimize(self, x: Tensor, y: Tensor, state: Any) -> Tensor:
        opt: Any = self.optimizers()
        reached: list[Tensor] = []

        def closure() -> Tensor:
            opt.zero_grad()
            pred, new_state = self(x, state)
            reached.append(new_state.detach())
            loss = F.mse_loss(pred, y)
            self.manual_backward(loss)
            return loss

        opt.step(closure=closure)
        return reached[0]  # later evaluations have other parameters

    def configure_optimizers(self) -> optim.Optimizer:
        return self.make_optimizer(self.parameters())


class ForwardThenClosure(LSTMRegressor):
    """The closure only clears and back-propagates; the forward is outside."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        state: Any = None
        x_chunks = iter(batch[0].split(self.tbptt_steps, dim=1))
        y_chunks = iter(batch[1].split(self.tbptt_steps, dim=1))
        while (x := next(x_chunks, None)) is not None:
            pred, state = self(x, state)
            loss = F.mse_loss(pred, next(y_chunks))

            def closure(loss: Tensor = loss) -> Tensor:
                opt.zero_grad()
                self.manual_backward(loss)
                return loss

            opt.step(closure)
            state = tuple(s.detach() for s in state)
        return loss.detach()


class Toggled(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        self.toggle_optimizer(opt)
        for i in range(0, x.size(1), self.bptt):
            out, h = self(x[:, i : i + self.bptt], h)
            loss = F.mse_loss(out, y[:, i : i + self.bptt])
            self.manual_backward(loss)
            opt.step()
            opt.zero_grad()
            h = h.detach()
        self.untoggle_optimizer(opt)


class ToggledModel(ElmanNet):
    """Toggles with the context manager of Lightning's optimizer."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(t.split(self.seq_len, 1) for t in batch), strict=True):
            with opt.toggle_model():
                pred, h = self(x, h)
                loss: Tensor = self.criterion(pred, y)
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            h = h.detach()
        return loss.detach()


class TwoOptimizers(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.span = case.chunk
        self.core = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        features, state = self.core(x, state)
        return self.readout(features), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        core_opt, readout_opt = self.optimizers()  # type: ignore[attr-defined]
        state: Any = None
        x_all, y_all = batch
        for n in range(-(-x_all.size(1) // self.span)):
            x = x_all[:, n * self.span : (n + 1) * self.span]
            y = y_all[:, n * self.span : (n + 1) * self.span]
            core_opt.zero_grad()
            readout_opt.zero_grad()
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            core_opt.step()
            readout_opt.step()
            state = tree_map(torch.Tensor.detach, state)

    def configure_optimizers(self) -> list[optim.Optimizer]:
        return [
            optim.Adam(self.core.parameters(), lr=0.01),
            optim.SGD(self.readout.parameters(), lr=0.1),
        ]


class ReturnsNewOptimizer(LightningModule):
    """Any optimizer over any groups: what varies here is only how it is configured."""

    def __init__(self, case: Case, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._configure = configure
        self.n = case.chunk
        self.encoder = nn.Linear(case.inputs, case.hidden)
        self.memory = nn.GRU(case.hidden, case.hidden, batch_first=True)
        self.decoder = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.memory(torch.tanh(self.encoder(x)), state)
        return self.decoder(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        for x, y in self.cut(batch):
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(nn.functional.mse_loss(pred, y))
            opt.step()
            h = h.detach()

    def cut(self, batch: Batch) -> list[Batch]:
        x, y = batch
        starts = range(0, x.size(1), self.n)
        return [(x[:, s : s + self.n], y[:, s : s + self.n]) for s in starts]

    def configure_optimizers(self) -> Any:
        return self._configure(self)


def adamw_without_decay_on_biases(module: LightningModule) -> optim.Optimizer:
    named = list(module.named_parameters())
    decay = [p for name, p in named if "bias" not in name]
    no_decay = [p for name, p in named if "bias" in name]
    groups = [
        {"params": decay, "weight_decay": 0.1},
        {"params": no_decay, "weight_decay": 0.0, "lr": 0.02},
    ]
    return optim.AdamW(groups, lr=0.01)


class SchedulerPerUpdate(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        sched: Any = self.lr_schedulers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            sched.step()
            h = h.detach()

    def configure_optimizers(self) -> Any:
        opt = optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        warmup = optim.lr_scheduler.LambdaLR(opt, lambda n: min(1.0, (n + 1) / 4))
        return [opt], [warmup]


class SchedulerPerBatch(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            out, h = self(x[:, i : i + self.bptt], h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            opt.step()
            h = h.detach()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        opt = optim.SGD(self.parameters(), lr=self.lr)
        sched = optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": sched, "interval": "step"}}


class SchedulerPerEpoch(ElmanNet):
    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        opt = optim.Adam(self.parameters(), lr=0.02)
        return [opt], [optim.lr_scheduler.ExponentialLR(opt, 0.9)]


class LightningClips(LSTMRegressor):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hx: Any = None
        for x, y in zip(*(b.split(self.tbptt_steps, dim=1) for b in batch), strict=True):
            y_hat, hx = self(x, hx)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(y_hat, y))
            self.clip_gradients(opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            opt.step()
            hx = tuple(h.detach() for h in hx)


class ClipsNorm(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            out, h = self(x[:, i : i + self.bptt], h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            norm = clip_grad_norm_(self.parameters(), max_norm=0.25)
            opt.step()
            h = h.detach()
            self.log("grad_norm", norm)


class ClipsValue(ElmanNet):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(t.split(self.seq_len, 1) for t in batch), strict=True):
            pred, h = self(x, h)
            loss: Tensor = self.criterion(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            clip_grad_value_(self.parameters(), 0.05)
            opt.step()
            h.detach_()
        return loss


class RetainedThenReleased(GRUForecaster):
    """Keeps the graph for a second look at it, then lets go of it."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            out, h = self(x[:, i : i + self.bptt], h)
            loss = F.mse_loss(out, y[:, i : i + self.bptt])
            self.manual_backward(loss, retain_graph=True)
            (sensitivity,) = torch.autograd.grad(loss, self.out.weight)
            self.log("sensitivity", sensitivity.abs().max())
            opt.step()
            h = h.detach()
            del loss, out


# ------------------------------------------------------------------------------ the first state


class ExplicitZeros(LSTMRegressor):
    def init_hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, x.size(0), self.lstm.hidden_size)
        return x.new_zeros(shape), x.new_zeros(shape)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h, c = self.init_hidden(x)
        for i in range(0, x.size(1), self.tbptt_steps):
            opt.zero_grad()
            pred, (h, c) = self(x[:, i : i + self.tbptt_steps], (h, c))
            loss = F.mse_loss(pred, y[:, i : i + self.tbptt_steps])
            self.manual_backward(loss)
            opt.step()
            h, c = h.detach(), c.detach()


class ZerosOfDefaultDtype(LSTMRegressor):
    def init_hidden(self, batch_size: int) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(1, batch_size, self.lstm.hidden_size).to(self.device),
            torch.zeros(1, batch_size, self.lstm.hidden_size).to(self.device),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        hidden: Any = self.init_hidden(x.shape[0])
        for i in range(0, x.size(1), self.tbptt_steps):
            hidden = tuple(h.data for h in hidden)
            opt.zero_grad()
            pred, hidden = self(x[:, i : i + self.tbptt_steps], hidden)
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.tbptt_steps]))
            opt.step()


class CellWithDefaultZeros(LightningModule):
    """The zeros are made in `forward`, of whatever dtype is the default."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, trunc: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.hidden_dim, self.trunc = hidden_dim, trunc
        self.cell = nn.LSTMCell(input_dim, hidden_dim)
        self.fc = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            h = torch.zeros(x.size(0), self.hidden_dim, device=x.device)
            c = torch.zeros(x.size(0), self.hidden_dim, device=x.device)
        else:
            h, c = state
        ys = []
        for x_t in x.unbind(dim=1):
            h, c = self.cell(x_t, (h, c))
            ys.append(self.fc(h))
        return torch.stack(ys, dim=1), (h, c)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        x_seq, y_seq = batch
        done = 0
        while done != x_seq.size(1):
            x, y = x_seq[:, done:][:, : self.trunc], y_seq[:, done:][:, : self.trunc]
            done += x.size(1)
            y_hat, (h, c) = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(y_hat, y))
            opt.step()
            state = h.detach(), c.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class NoiseOfDefaultDtype(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = torch.randn(1, x.size(0), self.gru.hidden_size, device=self.device)
        for i in range(0, x.size(1), self.bptt):
            out, h = self(x[:, i : i + self.bptt], h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            opt.step()
            h = h.detach()


class LearnedStart(LightningModule):
    """The first state is a parameter: its graph must reach the first chunk, and no further."""

    def __init__(self, n_inputs: int, n_units: int, n_outputs: int, n_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.n_steps = n_steps
        self.h0 = nn.Parameter(0.1 * torch.randn(1, 1, n_units))
        self.c0 = nn.Parameter(0.1 * torch.randn(1, 1, n_units))
        self.lstm = nn.LSTM(n_inputs, n_units, batch_first=True)
        self.linear = nn.Linear(n_units, n_outputs)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        return tuple(s.expand(-1, batch_size, -1).contiguous() for s in (self.h0, self.c0))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if state is None:
            state = self.initial_state(x.size(0))
        z, state = self.lstm(x, state)
        return self.linear(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        state: Any = self.initial_state(len(x))
        for x_k, y_k in zip(x.split(self.n_steps, 1), y.split(self.n_steps, 1), strict=True):
            y_hat, state = self(x_k, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(y_hat, y_k))
            opt.step()
            state = [s.detach() for s in state]

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


class LearnedStartInForward(LearnedStart):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.n_steps, 1) for b in batch), strict=True):
            opt.zero_grad()
            y_hat, state = self(x, state=state)
            self.manual_backward(F.mse_loss(y_hat, y))
            opt.step()
            state = tuple(s.detach() for s in state)


class RandomStart(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = torch.randn(1, x.size(0), self.gru.hidden_size, dtype=x.dtype, device=x.device)
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            out, h = self(x[:, i : i + self.bptt], h)
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            opt.step()
            h = h.detach()


class FirstChunkWithoutState(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h = self(x) if h is None else self(x, h.detach())
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()


class ResetInHook(GRUForecaster):
    """A hook clears the state that the batch before left, though nobody would read it."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.hidden_state: Any = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        hidden = self.hidden_state
        for i in range(0, x.size(1), self.bptt):
            out, hidden = self(x[:, i : i + self.bptt], hidden)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y[:, i : i + self.bptt]))
            opt.step()
            hidden = hidden.detach()
        self.hidden_state = hidden


# --------------------------------------------------------------------------- what the state is


class DictState(LightningModule):
    """A dict of tensors, one of which counts time steps and is no floating-point number."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.fast = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.slow = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.mix = nn.Linear(2 * case.hidden, case.outputs)

    def forward(self, x: Tensor, state: dict[str, Any] | None = None) -> Any:
        if state is None:
            state = {"fast": None, "slow": None, "t": torch.zeros((), dtype=torch.long)}
        a, fast = self.fast(x, state["fast"])
        b, slow = self.slow(x, state["slow"])
        new = {"fast": fast, "slow": slow, "t": state["t"] + x.size(1)}
        return self.mix(torch.cat([a, b], dim=-1)), new

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = {k: v.detach() for k, v in state.items()}

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class HC(NamedTuple):
    h: Tensor
    c: Tensor

    def detach(self) -> "HC":
        return HC(*(t.detach() for t in self))


class PeepholeLSTM(LightningModule):
    """Written out gate by gate, its gates looking at the cell; the state is a named tuple."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.n_hid, self.bptt = n_hid, bptt
        self.gates = nn.Linear(n_in + n_hid, 4 * n_hid)
        self.peep = nn.Parameter(torch.randn(3, n_hid) * 0.1)
        self.readout = nn.Linear(n_hid, n_out)

    def cell(self, x: Tensor, s: HC) -> HC:
        i, f, g, o = self.gates(torch.cat([x, s.h], dim=-1)).chunk(4, dim=-1)
        i = torch.sigmoid(i + self.peep[0] * s.c)
        f = torch.sigmoid(f + self.peep[1] * s.c)
        c = f * s.c + i * torch.tanh(g)
        o = torch.sigmoid(o + self.peep[2] * c)
        return HC(o * torch.tanh(c), c)

    def forward(self, x: Tensor, state: HC | None = None) -> tuple[Tensor, HC]:
        s = state or HC(*x.new_zeros(2, x.size(0), self.n_hid))
        ys = []
        for t in range(x.size(1)):
            s = self.cell(x[:, t], s)
            ys.append(self.readout(s.h))
        return torch.stack(ys, 1), s

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        s = None
        for i in range(math.ceil(batch[0].size(1) / self.bptt)):
            x, y = (b.split(self.bptt, dim=1)[i] for b in batch)
            opt.zero_grad()
            pred, s = self(x, s)
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            s = s.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.02)


@dataclass(frozen=True)
class Memory:
    h: Tensor
    seen: int = 0
    name: str = "memory"


class DataclassState(LightningModule):
    """A frozen dataclass with leaves that are no tensors; how much was seen enters the cell."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case = case
        self.i2h = nn.Linear(case.inputs, case.hidden)
        self.h2h = nn.Linear(case.hidden, case.hidden, bias=False)
        self.h2o = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Memory | None = None) -> tuple[Tensor, Memory]:
        if state is None:
            state = Memory(x.new_zeros(x.size(0), self.case.hidden))
        h, outputs = state.h, []
        for t in range(x.size(1)):
            h = torch.tanh(self.i2h(x[:, t]) + self.h2h(h) / (1 + state.seen + t))
            outputs.append(h)
        return self.h2o(torch.stack(outputs, 1)), Memory(h, state.seen + x.size(1))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        memory = None
        for t in range(0, x.size(1), self.case.chunk):
            pred, memory = self(x[:, t : t + self.case.chunk], memory)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, t : t + self.case.chunk]))
            opt.step()
            memory = Memory(memory.h.detach(), memory.seen)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9, dampening=0.1)


class CellStack(LightningModule):
    """LSTM cells on top of each other, looped over time by hand, with a residual connection."""

    def __init__(self, n_in: int, width: int, n_out: int, depth: int, tbptt_len: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.width, self.tbptt_len = width, tbptt_len
        self.embed = nn.Linear(n_in, width)
        self.cells = nn.ModuleList(nn.LSTMCell(width, width) for _ in range(depth))
        self.head = nn.Linear(width, n_out)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, list[Any]]:
        if state is None:
            zero = x.new_zeros(x.size(0), self.width)
            state = [(zero, zero) for _ in self.cells]
        state, outs = list(state), []
        for t in range(x.size(1)):
            z = self.embed(x[:, t])
            for j, cell in enumerate(self.cells):
                state[j] = cell(z, state[j])
                z = z + state[j][0]
            outs.append(self.head(z))
        return torch.stack(outs, dim=1), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        T = batch[0].size(1)  # noqa: N806 -- as in the papers
        lengths = [min(self.tbptt_len, T - t) for t in range(0, T, self.tbptt_len)]
        for x, y in zip(*(b.split(lengths, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = [(h.detach(), c.detach()) for h, c in state]

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01, weight_decay=0.01)


class LinearRecurrentUnit(LightningModule):
    """A diagonal recurrence with complex eigenvalues: the state is complex."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.chunk_size = case.chunk
        self.log_decay = nn.Parameter(torch.randn(case.hidden) - 1)
        self.angle = nn.Parameter(torch.rand(case.hidden) * math.pi)
        self.inp = nn.Linear(case.inputs, case.hidden)
        self.out = nn.Linear(2 * case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = self.inp(x)
        eigenvalues = torch.polar(torch.exp(-torch.exp(self.log_decay)), self.angle)
        s = torch.zeros_like(u[:, 0] * eigenvalues) if state is None else state
        states = []
        for t in range(x.size(1)):
            s = eigenvalues * s + u[:, t]
            states.append(s)
        z = torch.view_as_real(torch.stack(states, 1)).flatten(-2)
        return self.out(z), s

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        s = None
        for x, y in zip(*(b.split(self.chunk_size, dim=1) for b in batch), strict=True):
            pred, s = self(x, s)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            s = s.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class MemoryAttention(LightningModule):
    """Attends to itself and to a memory of the features before: a state that grows at first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.segment, self.mem_len = case.chunk, 4
        self.embed = nn.Linear(case.inputs, case.hidden)
        self.qkv = nn.Linear(case.hidden, 3 * case.hidden)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self.embed(x)
        memory = z[:, :0] if state is None else state
        context = torch.cat([memory, z], dim=1)
        q, k, v = self.qkv(context).chunk(3, dim=-1)
        old, new = memory.size(1), z.size(1)
        mask = torch.ones(new, old + new, dtype=torch.bool, device=x.device).tril(old)
        z = z + F.scaled_dot_product_attention(q[:, old:], k, v, attn_mask=mask)
        return self.head(z), context[:, -self.mem_len :]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        mems = None
        x_all, y_all = batch
        for i in range(0, x_all.size(1), self.segment):
            x = x_all[:, i : i + self.segment].detach().clone()
            y = y_all[:, i : i + self.segment].detach().clone()
            pred, mems = self(x, mems)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            mems = mems.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class CausalConvolution(LightningModule):
    """The state is the end of the inputs before: nothing in it ever had a gradient."""

    def __init__(self, case: Case, kernel_size: int = 3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.length, self.pad = case.chunk, kernel_size - 1
        self.conv = nn.Conv1d(case.inputs, case.hidden, kernel_size)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.transpose(1, 2)
        left = x.new_zeros(*x.shape[:2], self.pad) if state is None else state
        x = torch.cat([left, x], dim=2)
        z = torch.relu(self.conv(x)).transpose(1, 2)
        return self.head(z), x[:, :, -self.pad :]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        cache = None
        x_all, y_all = batch
        for frames in torch.arange(x_all.size(1)).split(self.length):
            x, y = x_all.index_select(1, frames), y_all.index_select(1, frames)
            pred, cache = self(x, cache)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.05)


class EchoState(LightningModule):
    """A fixed reservoir in buffers; only the readout learns."""

    w_in: Tensor
    w_rec: Tensor

    def __init__(self, case: Case, leak: float = 0.7) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.leak, self.k = leak, case.chunk
        self.register_buffer("w_in", torch.randn(case.inputs, case.hidden))
        self.register_buffer("w_rec", torch.randn(case.hidden, case.hidden) / case.hidden)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.size(0), self.w_rec.size(0)) if state is None else state
        hs = []
        for x_t in x.unbind(1):
            h = (1 - self.leak) * h + self.leak * torch.tanh(x_t @ self.w_in + h @ self.w_rec)
            hs.append(h)
        return self.readout(torch.stack(hs, 1)), h

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.readout.parameters(), lr=0.1)


# ------------------------------------------------------------------- one call for every time step


class StepByStep(GRUForecaster):
    """Calls the module on (B, 1, I) and averages the losses of the chunk's time steps."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        for start in range(0, x.size(1), self.bptt):
            stop = min(start + self.bptt, x.size(1))
            loss = x.new_zeros(())
            for t in range(start, stop):
                out, h = self(x[:, t : t + 1], h)
                loss = loss + F.mse_loss(out, y[:, t : t + 1])
            loss = loss / (stop - start)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()


class OneStepForward(LightningModule):
    """`forward` takes a single time step (B, I); the predictions are stacked before the loss."""

    def __init__(self, obs_dim: int, hidden_dim: int, act_dim: int, unroll: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.unroll = unroll
        self.cell = nn.GRUCell(obs_dim, hidden_dim)
        self.pi = nn.Linear(hidden_dim, act_dim)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.pi(state), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        obs, act = batch
        h, preds = None, []
        for t in range(obs.size(1)):
            pred, h = self(obs[:, t], h)
            preds.append(pred)
            if len(preds) == self.unroll or t == obs.size(1) - 1:
                loss = F.mse_loss(torch.stack(preds, 1), act[:, t + 1 - len(preds) : t + 1])
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
                h, preds = h.detach(), []

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=3e-3)


# ----------------------------------------------------------------------- regularized, tied, frozen


class DropoutLSTM(LightningModule):
    def __init__(self, case: Case, p: float = 0.4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.drop = nn.Dropout(p)
        self.rnn = nn.LSTM(case.inputs, case.hidden, num_layers=2, dropout=p, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.rnn(x, state)
        return self.out(self.drop(z)), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            pred, state = self(x, state)
            loss = F.mse_loss(pred, y)
            self.manual_backward(loss)
            opt.step()
            state = tuple(s.detach() for s in state)
            self.log("train_loss", loss.detach(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class NormalizedFeatures(LightningModule):
    def __init__(self, case: Case, norm: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": nn.BatchNorm1d,
            "layer": nn.LayerNorm,
        }
        self.norm = norms[norm](case.hidden)
        self.out = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        flat = z.flatten(0, 1)
        if len(flat) > 1:  # one row has no variance
            flat = self.norm(flat)
        return self.out(flat.view_as(z)), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        losses = []
        data, labels = batch
        for begin in range(0, data.shape[1], self.bptt):
            end = min(begin + self.bptt, data.shape[1])
            x, y = data[:, begin:end, :], labels[:, begin:end, :]
            pred, h = self(x, h)
            loss = F.mse_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()
            losses.append(loss.item())
        self.log_dict({"loss": sum(losses) / len(losses), "last": losses[-1]})

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


class TiedWeights(LightningModule):
    """The way out is the way in, transposed; a linear layer bridges the sizes."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.encode = nn.Linear(case.inputs, case.hidden, bias=False)
        self.first = nn.RNN(case.hidden, case.hidden, batch_first=True)
        self.second = nn.RNN(case.hidden, case.hidden, batch_first=True)
        self.second.weight_hh_l0 = self.first.weight_hh_l0
        self.bridge = nn.Linear(case.inputs, case.outputs)

    def forward(self, x: Tensor, state: Any = (None, None)) -> tuple[Tensor, Any]:
        a, b = state or (None, None)
        z, a = self.first(self.encode(x), a)
        z, b = self.second(z, b)
        return self.bridge(z @ self.encode.weight), (a, b)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.05)


class FrozenEncoder(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.encoder = nn.Sequential(nn.Linear(case.inputs, case.hidden), nn.ReLU())
        self.encoder.requires_grad_(False)
        self.rnn = nn.GRU(case.hidden, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z = self.encoder(x)
        z, state = self.rnn(z, state)
        return self.head(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        rest_x, rest_y = batch
        while rest_x.size(1):
            x, rest_x = rest_x[:, : self.bptt], rest_x[:, self.bptt :]
            y, rest_y = rest_y[:, : self.bptt], rest_y[:, self.bptt :]
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            h = h.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01)


class Checkpointed(GRUForecaster):
    """Computes the activations of a chunk again in the backward pass, to save memory."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = x.new_zeros(1, x.size(0), self.gru.hidden_size)
        z, state = checkpoint(self.gru, x, state, use_reentrant=False)
        return self.out(z), state


class WeightNormedCell(ZeroedInPlace):
    """Weight norm as a parametrization, on the recurrent weights."""

    def __init__(self, n_features: int, n_hidden: int, n_targets: int, steps: int) -> None:
        super().__init__(n_features, n_hidden, n_targets, steps)
        parametrizations.weight_norm(self.cell, "weight_hh")


class OldWeightNorm(GRUForecaster):
    """Weight norm by the older hook, on the readout."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.out = weight_norm(self.out)


class ModuleDictCores(LightningModule):
    scale: Tensor

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.args = args
        self.cores = nn.ModuleDict(
            {
                "gru": nn.GRU(args.inputs, args.hidden, batch_first=True),
                "rnn": nn.RNN(args.inputs, args.hidden, batch_first=True),
            }
        )
        self.register_buffer("scale", torch.tensor([2.0]))
        self.head = nn.Linear(args.hidden, args.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        state = state or {}
        runs = {name: core(x * self.scale, state.get(name)) for name, core in self.cores.items()}
        z = runs["gru"][0] + runs["rnn"][0]
        return self.head(z), {name: h for name, (_, h) in runs.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: dict[str, Tensor] = {}
        queue = deque(zip(*(b.split(self.args.bptt, dim=1) for b in batch), strict=True))
        while queue:
            x, y = queue.popleft()
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            for name in state:
                state[name] = state[name].detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


# ----------------------------------------------------------------------- metrics, losses, structure


class MetricForward(GRUForecaster):
    """Runs the chunk again for a metric, from the same state, and forgets where that ended."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h_next = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            with torch.no_grad():
                after, _ = self(x, h)
                self.log("mae_after_update", F.l1_loss(after, y))
            h = h_next.detach()


class EvaluatesAsItGoes(DropoutLSTM):
    """Looks at the metric in evaluation mode, and goes back to training mode."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            self.log("before", self.metric(x, y, state))
            opt.zero_grad()
            pred, state = self(x, state)
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = tuple(s.detach() for s in state)

    @torch.no_grad()
    def metric(self, x: Tensor, y: Tensor, state: Any) -> Tensor:
        self.eval()
        score = F.l1_loss(self(x, state)[0], y)
        self.train()
        return score


class WithCriterion(LightningModule):
    """Any loss; the same step serves training and validation."""

    def __init__(self, case: Case, criterion: Loss) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.criterion = criterion
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.head(z), state

    def _shared_step(self, x: Tensor, y: Tensor, h: Any, stage: str) -> tuple[Tensor, Tensor]:
        logits, h = self(x, h)
        loss = self.criterion(logits, y)
        self.log(f"{stage}_loss", loss.detach())
        return loss, h

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            loss, h = self._shared_step(x, y, h, "train")
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            _, h = self._shared_step(x, y, h, "val")

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=0.01)


def soft_cross_entropy(logits: Tensor, scores: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), scores.softmax(-1).flatten(0, -2))


def bce_against_probabilities(logits: Tensor, scores: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, scores.sigmoid())


class LogCosh(nn.Module):
    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.log(torch.cosh(prediction - target)).mean()


class BaseSequenceModel(LightningModule):
    """A framework within the framework: what a chunk is and how it is learnt are separate."""

    def __init__(self, chunk_size: int, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False

    def encode(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.encode(x, state)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        state: Any = None
        size = self.hparams["chunk_size"]
        for i, (x, y) in enumerate(zip(*(b.split(size, 1) for b in batch), strict=True)):
            state = self.training_chunk(x, y, state, i)

    def training_chunk(self, x: Tensor, y: Tensor, state: Any, index: int) -> Any:
        opt: Any = self.optimizers()
        prediction, state = self.forward(x, state=state)
        loss = F.mse_loss(prediction, y)
        opt.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        opt.step()
        return tree_map(lambda s: s.detach() if isinstance(s, Tensor) else s, state)

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


class MiddleModel(BaseSequenceModel):
    def __init__(self, n_in: int, n_hid: int, n_out: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rnn = nn.GRU(n_in, n_hid, batch_first=True)
        self.head = nn.Linear(n_hid, n_out)

    def encode(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        z, state = self.rnn(x, state)
        return self.head(z), state


class DownstreamModel(MiddleModel):
    """The subclass of a subclass adds skip connections and calls everything by `super()`."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, **kwargs: Any) -> None:
        super().__init__(n_in, n_hid, n_out, **kwargs)
        self.skip = nn.Linear(n_in, n_out, bias=False)

    def encode(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        prediction, state = super().encode(x, state)
        return prediction + self.skip(x), state


class EpochMean(LSTMRegressor):
    """Gathers detached losses and logs their mean, weighted by time steps, in an epoch hook."""

    def on_train_epoch_start(self) -> None:
        self.seen_losses: list[Tensor] = []
        self.seen_steps: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        bounds = torch.arange(0, batch[0].size(1), self.tbptt_steps).tolist()
        for b in bounds:
            x, y = (seq.narrow(1, b, min(self.tbptt_steps, seq.size(1) - b)) for seq in batch)
            pred, state = self(x, state)
            loss = F.mse_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = tuple(s.detach() for s in state)
            self.seen_losses.append(loss.detach())
            self.seen_steps.append(x.size(0) * x.size(1))

    def on_train_epoch_end(self) -> None:
        weights = torch.tensor(self.seen_steps, dtype=self.seen_losses[0].dtype)
        mean = (torch.stack(self.seen_losses) * weights).sum() / weights.sum()
        self.log("epoch_loss", mean)


class PlainBackward(GRUForecaster):
    """Calls the loss's own `backward`: on one device and in full precision it is the same."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h = self(x, h)
            loss = F.mse_loss(out, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            h = h.detach()


class AutogradGrad(GRUForecaster):
    """Asks for the gradients and puts them where the optimizer looks."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        params = list(self.parameters())
        h: Any = None
        chunks = [b.split(self.bptt, dim=1) for b in batch]
        for x, y in zip(*chunks, strict=True):
            out, h = self(x, h)
            grads = torch.autograd.grad(F.mse_loss(out, y), params)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            opt.step()
            h = h.detach()


# ----------------------------------------------------------- what happens beside the update itself


class MicroBatches(GRUForecaster):
    """Back-propagates each chunk half a batch at a time, and updates once."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = x.new_zeros(1, x.size(0), self.gru.hidden_size)
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            ends = []
            for rows in torch.arange(x.size(0)).split(max(1, x.size(0) // 2)):
                out, end = self(x[rows, i : i + self.bptt], h[:, rows])
                loss = F.mse_loss(out, y[rows, i : i + self.bptt])
                self.manual_backward(loss * self.share(rows, x))
                ends.append(self.cut(end))
            opt.step()
            h = self.together(ends)

    def share(self, rows: Tensor, x: Tensor) -> float:
        return len(rows) / x.size(0)

    def cut(self, end: Tensor) -> Tensor:
        return end.detach()

    def together(self, ends: list[Tensor]) -> Tensor:
        return torch.cat(ends, dim=1)


class MicroBatchesSummed(GRUForecaster):
    """Runs each chunk half a batch at a time, and back-propagates both losses at once."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.start = nn.Parameter(torch.rand(1, 1, n_hid))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        parts = torch.arange(x.size(0)).split((x.size(0) + 1) // 2)
        states = [self.start.expand(-1, len(rows), -1).contiguous() for rows in parts]
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            errors = []
            for n, rows in enumerate(parts):
                out, end = self(x[rows, i : i + self.bptt], states[n])
                errors.append((out - y[rows, i : i + self.bptt]).square().sum())
                states[n] = end.detach()
            loss: Tensor = sum(errors) / y[:, i : i + self.bptt].numel()
            self.manual_backward(loss)
            opt.step()


class AveragedWeights(GRUForecaster):
    """Keeps a moving average of itself, in parameters that no gradient ever reaches."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.average = nn.ModuleList([nn.GRU(n_in, n_hid), nn.Linear(n_hid, n_out)])
        self.average.requires_grad_(False)

    @torch.no_grad()
    def update_average(self) -> None:
        live = [*self.gru.parameters(), *self.out.parameters()]
        for slow, fast in zip(self.average.parameters(), live, strict=True):
            slow.lerp_(fast, 0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            self.update_average()
            h = h.detach()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.01)


class ClampedWeights(ElmanNet):
    """Puts the weights back into a box after every update."""

    @torch.no_grad()
    def project(self) -> None:
        for p in self.parameters():
            p.clamp_(-0.3, 0.3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(b.split(self.seq_len, 1) for b in batch), strict=True):
            pred, h = self(x, h)
            loss: Tensor = self.criterion(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            self.project()
            h = h.detach()
        return loss


class LearningRateByHand(GRUForecaster):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            h = h.detach()
            for group in opt.param_groups:
                group["lr"] *= 0.8


# ---------------------------------------------------------------------------------- the gallery


def four(case: Case) -> tuple[int, int, int, int]:
    return case.inputs, case.hidden, case.outputs, case.chunk


def hyperparameters(case: Case) -> dict[str, int]:
    keys = ("input_dim", "hidden_dim", "output_dim", "tbptt_steps")
    return dict(zip(keys, four(case), strict=True))


def downstream(case: Case) -> LightningModule:
    *sizes, chunk = four(case)
    return DownstreamModel(*sizes, chunk_size=chunk, learning_rate=0.01)


def module_dict(case: Case) -> LightningModule:
    keys = ("inputs", "hidden", "outputs", "bptt")
    return ModuleDictCores(Namespace(**dict(zip(keys, four(case), strict=True))))


def indexed(case: Case) -> LightningModule:
    core = nn.GRU(case.inputs, case.hidden, batch_first=True)
    return TensorSplitAtIndices(core, nn.Linear(case.hidden, case.outputs), case.chunk)


def stacked(kind: type[StackedLSTM], case: Case) -> LightningModule:
    sizes = [case.inputs, case.hidden, case.hidden + 1]
    return kind(sizes, case.outputs, truncate=case.chunk)


def with_optimizer(make: Callable[..., optim.Optimizer], **options: Any) -> Build:
    def build(case: Case) -> tuple[LightningModule, Loss]:
        configure = lambda module: make(module.parameters(), **options)  # noqa: E731
        return ReturnsNewOptimizer(case, configure), F.mse_loss

    return build


def with_loss(criterion: Loss) -> Build:
    return lambda case: (WithCriterion(case, criterion), criterion)


CORRECT: dict[str, Build] = {
    "zero_forward_backward_step": lambda c: (LSTMRegressor(*four(c)), F.mse_loss),
    "forward_zero_backward_step": lambda c: (GRUForecaster(*four(c)), F.mse_loss),
    "forward_backward_step_zero": lambda c: (ElmanNet(c), F.mse_loss),
    "network_zero_grad": lambda c: (
        LitWrapper(Seq2SeqNet(c.inputs, c.hidden, c.outputs), c.chunk),
        F.mse_loss,
    ),
    "self_zero_grad_and_hyperparameters": lambda c: (
        SelfZeroGrad(hyperparameters(c)),
        F.mse_loss,
    ),
    "gradients_set_to_none_by_hand": lambda c: (NoGradients(*four(c)), F.mse_loss),
    "gradients_zeroed_in_place": lambda c: (ZeroedInPlace(*four(c)), F.mse_loss),
    "set_to_none_false": lambda c: (KeepsZeroTensors(*four(c)), F.mse_loss),
    "detach_in_place": lambda c: (DetachInPlace(*four(c)), F.l1_loss),
    "dot_data": lambda c: (DotData(*four(c)), F.mse_loss),
    "tree_map_over_layers": lambda c: (stacked(StackedLSTM, c), F.smooth_l1_loss),
    "repackage_hidden": lambda c: (stacked(WordLanguageModelStyle, c), F.mse_loss),
    "forward_detaches_on_entry": lambda c: (ForwardDetaches(*four(c)), F.mse_loss),
    "clone_under_no_grad": lambda c: (CloneUnderNoGrad(*four(c)), F.huber_loss),
    "carried_state_is_a_leaf": lambda c: (LeafState(*four(c)), F.mse_loss),
    "detach_and_clone_before_backward": lambda c: (DetachesTheCopyItKeeps(*four(c)), F.mse_loss),
    "tensor_split_at_indices": lambda c: (indexed(c), F.mse_loss),
    "generator_of_chunks": lambda c: (GeneratorOfChunks(c), F.mse_loss),
    "remainder_last": lambda c: (RemainderLast(*four(c)), F.mse_loss),
    "buffer_fills_up": lambda c: (BufferFillsUp(*four(c)), F.mse_loss),
    "time_major_sequences": lambda c: (TimeMajorGRU(*four(c)), F.mse_loss),
    "time_major_chunks": lambda c: (ChunksTurned(*four(c)), F.mse_loss),
    "closure_adam": lambda c: (ClosureStep(c, partial(optim.Adam, lr=0.01)), F.mse_loss),
    "closure_lbfgs_one_iteration": lambda c: (
        ClosureStep(c, partial(optim.LBFGS, lr=0.1, max_iter=1)),
        F.mse_loss,
    ),
    "closure_lbfgs_keeps_first_state": lambda c: (
        ClosureStep(c, partial(optim.LBFGS, lr=0.1, max_iter=3)),
        F.mse_loss,
    ),
    "closure_of_backward_alone": lambda c: (ForwardThenClosure(*four(c)), F.mse_loss),
    "toggle_optimizer": lambda c: (Toggled(*four(c)), F.mse_loss),
    "toggle_model": lambda c: (ToggledModel(c), F.mse_loss),
    "two_optimizers": lambda c: (TwoOptimizers(c), F.mse_loss),
    "fused_adam": with_optimizer(optim.Adam, lr=0.01, fused=True),
    "fused_sgd_momentum": with_optimizer(optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "foreach_adamw": with_optimizer(optim.AdamW, lr=0.01, foreach=True),
    "foreach_rmsprop_centered": with_optimizer(optim.RMSprop, lr=0.01, centered=True, foreach=True),
    "plain_adagrad": with_optimizer(optim.Adagrad, lr=0.1, foreach=False),
    "adadelta": with_optimizer(optim.Adadelta, lr=1.0),
    "rprop": with_optimizer(optim.Rprop, lr=0.01),
    "parameter_groups": lambda c: (
        ReturnsNewOptimizer(c, adamw_without_decay_on_biases),
        F.mse_loss,
    ),
    "scheduler_per_update": lambda c: (SchedulerPerUpdate(*four(c)), F.mse_loss),
    "scheduler_per_batch": lambda c: (SchedulerPerBatch(*four(c)), F.mse_loss),
    "scheduler_per_epoch": lambda c: (SchedulerPerEpoch(c), F.mse_loss),
    "clip_gradients": lambda c: (LightningClips(*four(c)), F.mse_loss),
    "clip_grad_norm": lambda c: (ClipsNorm(*four(c)), F.mse_loss),
    "clip_grad_value": lambda c: (ClipsValue(c), F.mse_loss),
    "retained_then_released": lambda c: (RetainedThenReleased(*four(c)), F.mse_loss),
    "explicit_zeros": lambda c: (ExplicitZeros(*four(c)), F.mse_loss),
    "zeros_of_default_dtype": lambda c: (ZerosOfDefaultDtype(*four(c)), F.mse_loss),
    "zeros_of_default_dtype_in_forward": lambda c: (CellWithDefaultZeros(*four(c)), F.mse_loss),
    "noise_of_default_dtype": lambda c: (NoiseOfDefaultDtype(*four(c)), F.mse_loss),
    "learned_start": lambda c: (LearnedStart(*four(c)), F.mse_loss),
    "learned_start_in_forward": lambda c: (LearnedStartInForward(*four(c)), F.mse_loss),
    "random_start": lambda c: (RandomStart(*four(c)), F.mse_loss),
    "first_chunk_without_state": lambda c: (FirstChunkWithoutState(*four(c)), F.mse_loss),
    "reset_in_hook": lambda c: (ResetInHook(*four(c)), F.mse_loss),
    "dict_state": lambda c: (DictState(c), F.mse_loss),
    "peephole_and_named_tuple": lambda c: (PeepholeLSTM(*four(c)), F.mse_loss),
    "dataclass_state": lambda c: (DataclassState(c), F.mse_loss),
    "residual_cell_stack": lambda c: (
        CellStack(c.inputs, c.hidden, c.outputs, 2, c.chunk),
        F.mse_loss,
    ),
    "complex_state": lambda c: (LinearRecurrentUnit(c), F.mse_loss),
    "memory_attention": lambda c: (MemoryAttention(c), F.mse_loss),
    "causal_convolution": lambda c: (CausalConvolution(c), F.mse_loss),
    "echo_state": lambda c: (EchoState(c), F.mse_loss),
    "step_by_step": lambda c: (StepByStep(*four(c)), F.mse_loss),
    "one_step_forward": lambda c: (OneStepForward(*four(c)), F.mse_loss),
    "dropout": lambda c: (DropoutLSTM(c), F.mse_loss),
    "batch_norm": lambda c: (NormalizedFeatures(c, "batch"), F.mse_loss),
    "layer_norm": lambda c: (NormalizedFeatures(c, "layer"), F.mse_loss),
    "tied_weights": lambda c: (TiedWeights(c), F.mse_loss),
    "frozen_encoder": lambda c: (FrozenEncoder(c), F.mse_loss),
    "checkpointed_forward": lambda c: (Checkpointed(*four(c)), F.mse_loss),
    "weight_norm_parametrization": lambda c: (WeightNormedCell(*four(c)), F.mse_loss),
    "old_weight_norm": lambda c: (OldWeightNorm(*four(c)), F.mse_loss),
    "module_dict_and_buffer": lambda c: (module_dict(c), F.mse_loss),
    "metric_forward": lambda c: (MetricForward(*four(c)), F.mse_loss),
    "evaluates_as_it_goes": lambda c: (EvaluatesAsItGoes(c), F.mse_loss),
    "cross_entropy": with_loss(soft_cross_entropy),
    "binary_cross_entropy": with_loss(bce_against_probabilities),
    "module_criterion": with_loss(nn.SmoothL1Loss(beta=0.5)),
    "home_made_criterion": with_loss(LogCosh()),
    "subclass_of_subclass": lambda c: (downstream(c), F.mse_loss),
    "epoch_mean": lambda c: (EpochMean(*four(c)), F.mse_loss),
    "plain_backward": lambda c: (PlainBackward(*four(c)), F.mse_loss),
    "autograd_grad": lambda c: (AutogradGrad(*four(c)), F.mse_loss),
    "micro_batches": lambda c: (MicroBatches(*four(c)), F.mse_loss),
    "micro_batches_summed": lambda c: (MicroBatchesSummed(*four(c)), F.mse_loss),
    "averaged_weights": lambda c: (AveragedWeights(*four(c)), F.mse_loss),
    "clamped_weights": lambda c: (ClampedWeights(c), F.mse_loss),
    "learning_rate_by_hand": lambda c: (LearningRateByHand(*four(c)), F.mse_loss),
}

# These make tensors of the default dtype, so they train in float32 unless the default changes.
DEFAULT_DTYPE = frozenset(
    {"zeros_of_default_dtype", "zeros_of_default_dtype_in_forward", "noise_of_default_dtype"}
)

# What one might have to know about a loop that is right, beyond the plainest: none of it is wrong.
NOTES: dict[str, str] = {
    "network_zero_grad": "calls self.forward(x, state), which runs no hooks of the module",
    "subclass_of_subclass": "calls self.forward(x, state=state), which runs no hooks of the module",
    "cross_entropy": "with one output the loss is 0 whatever is predicted",
    "layer_norm": "with one unit the features are constant",
    "forward_detaches_on_entry": "the incoming state still has its graph; forward cuts it",
    "carried_state_is_a_leaf": "the incoming state wants a gradient, but has no graph",
    "time_major_sequences": "forward takes (K, B, I) and returns (K, B, O)",
    "time_major_chunks": "forward takes (K, B, I) and returns (K, B, O)",
    "closure_adam": "forward and backward run inside the optimizer's step",
    "closure_lbfgs_one_iteration": "forward and backward run inside the optimizer's step",
    "closure_lbfgs_keeps_first_state": "several forwards and backwards in one update",
    "closure_of_backward_alone": "the backward runs inside the optimizer's step",
    "two_optimizers": "both optimizers step once in every chunk",
    "scheduler_per_update": "the learning rate changes after every update",
    "scheduler_per_batch": "the learning rate changes after every batch",
    "clip_gradients": "clips the norm of each chunk's gradient to 0.1",
    "clip_grad_norm": "clips the norm of each chunk's gradient to 0.25",
    "clip_grad_value": "clips the entries of each chunk's gradient to 0.05",
    "retained_then_released": "a second walk through the graph, by autograd.grad, for a metric",
    "zeros_of_default_dtype": "the first state is float32 whatever the module is",
    "zeros_of_default_dtype_in_forward": "the first state is float32 whatever the module is",
    "noise_of_default_dtype": "the first state is random, and float32 whatever the module is",
    "learned_start": "the first state is a parameter's, with a graph; forward is handed it",
    "learned_start_in_forward": "the first state is a parameter's, made in forward",
    "random_start": "the first state is random",
    "dict_state": "one entry of the state is an integer tensor",
    "dataclass_state": "the state is a frozen dataclass with an int and a str in it",
    "complex_state": "the state is complex",
    "memory_attention": "the state grows from chunk to chunk, up to a length",
    "causal_convolution": "the state never had a graph, and is never detached",
    "echo_state": "the state never had a graph; most weights are buffers",
    "step_by_step": "forward runs once for every time step, on (B, 1, I)",
    "one_step_forward": "forward runs once for every time step, on (B, I)",
    "dropout": "random numbers are drawn in forward",
    "evaluates_as_it_goes": "random numbers are drawn in forward; a metric's forward draws none",
    "batch_norm": "forward changes buffers",
    "tied_weights": "two cores share a parameter, and one matrix goes both in and out",
    "frozen_encoder": "some parameters never change",
    "checkpointed_forward": "the core's forward runs again in the backward",
    "old_weight_norm": "torch warns when it is built, and it can't be deep-copied",
    "micro_batches_summed": "several forwards in one backward, each of some sequences only",
    "micro_batches": "several forwards and backwards in one update, each of some sequences only",
    "averaged_weights": "some parameters are moved by no optimizer, after every update",
    "clamped_weights": "the parameters are moved once more after every update",
    "learning_rate_by_hand": "the learning rate changes after every update",
    "metric_forward": "the module runs twice on every chunk",
    "plain_backward": "calls loss.backward(), not manual_backward",
    "autograd_grad": "no backward is called, and nothing is zeroed",
}
