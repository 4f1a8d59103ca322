"""Loops that are wrong, each as another stranger might get it wrong.

They set out to do what those in `correct` do: (x, y) with x (B, T, I) and y (B, T, O), one update
per chunk of at most K time steps, the tail kept, the state's value carried over and its gradient
not, every batch begun afresh. The sentence beside each says where it fails to.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, H hidden units, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

import math
from itertools import count
from typing import Any

import lightning as L  # noqa: N812 -- as in Lightning's own examples
import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim

from gallery.correct import Batch, Build, MicroBatches, four
from tbptt_props.case import Case

# ------------------------------------------------- what they start from: three common ways to begin


class GRUNet(LightningModule):
    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = bptt
        self.gru = nn.GRU(n_in, n_hid, batch_first=True)
        self.head = nn.Linear(n_hid, n_out)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.gru(x, state)
        return self.head(z), state

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1)


class LSTMNet(L.LightningModule):
    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, tbptt_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.lstm = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        out, (h, c) = self.lstm(x, state)
        return self.fc(out), (h, c)

    def chunks(self, batch: Batch) -> Any:
        return zip(*(b.split(self.hparams["tbptt_steps"], 1) for b in batch), strict=True)

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


class HandMadeRNN(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = case.chunk
        self.hidden_size = case.hidden
        self.i2h = nn.Linear(case.inputs + case.hidden, case.hidden)
        self.h2o = nn.Linear(case.hidden, case.outputs)

    def cell(self, x_t: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.i2h(torch.cat([x_t, h], dim=1)))

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.size(0), self.hidden_size) if state is None else state
        ys = []
        for t in range(x.size(1)):
            h = self.cell(x[:, t], h)
            ys.append(self.h2o(h))
        return torch.stack(ys, dim=1), h

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for i in range(0, x.size(1), self.k):
            pred, h = self(x[:, i : i + self.k], h)
            loss = F.mse_loss(pred, y[:, i : i + self.k])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


# --------------------------------------------------------------------------------- the gradient


class NeverDetached(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for t in range(0, x.shape[1], self.bptt):
            opt.zero_grad()
            y_hat, h = self(x[:, t : t + self.bptt], h)
            loss = F.mse_loss(y_hat, y[:, t : t + self.bptt])
            self.manual_backward(loss)
            opt.step()


class RetainsGraph(LSTMNet):
    """Followed the hint of the error message."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden = None
        for x, y in self.chunks(batch):
            y_hat, hidden = self(x, hidden)
            loss = F.mse_loss(y_hat, y)
            opt.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            opt.step()
            self.log("loss", loss.item())


class RetainsGraphFused(RetainsGraph):
    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01, fused=True)


class OnlyHiddenDetached(LSTMNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h, c = self.zeros(x), self.zeros(x)
        k = self.hparams["tbptt_steps"]
        for i in range(math.ceil(x.size(1) / k)):
            h = h.detach()
            out, (h, c) = self(x[:, i * k : (i + 1) * k], (h, c))
            loss = F.mse_loss(out, y[:, i * k : (i + 1) * k])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()

    def zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(1, x.size(0), self.hparams["hidden_dim"])


class DetachNotAssigned(HandMadeRNN):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        state = None
        for inputs, targets in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            if state is not None:
                state.detach()
            optimizer.zero_grad()
            outputs, state = self(inputs, state)
            self.manual_backward(F.mse_loss(outputs, targets))
            optimizer.step()


class OneLayerDetached(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seq_len = case.chunk
        self.lower = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.upper = nn.RNN(case.hidden, case.hidden, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        state = state or {"lower": None, "upper": None}
        z, low = self.lower(x, state["lower"])
        z, up = self.upper(z, state["upper"])
        return self.out(z), {"lower": low, "upper": up}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.seq_len, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            pred, state = self(x, state)
            self.manual_backward(F.mse_loss(pred, y), retain_graph=True)
            opt.step()
            state["lower"] = state["lower"].detach()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1, momentum=0.9, fused=True)


class EveryOtherDetached(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        chunks = zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True)
        for step, (x, y) in enumerate(chunks):
            if h is not None and step % 2 == 0:
                h = h.detach()
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y), retain_graph=True)
            opt.step()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1, fused=True)


class DetachesEveryTimeStep(HandMadeRNN):
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        h = x.new_zeros(x.size(0), self.hidden_size) if state is None else state
        ys = []
        for x_t in x.unbind(1):
            h = self.cell(x_t, h.detach())
            ys.append(self.h2o(h))
        return torch.stack(ys, dim=1), h


class DetachesAroundEveryCall(GRUNet):
    """Calls the module once for every time step, and carries on from a state with no past."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h = None
        for xc, yc in zip(x.split(self.bptt, 1), y.split(self.bptt, 1), strict=True):
            preds = []
            for t in range(xc.size(1)):
                pred, h = self(xc[:, t : t + 1], h)
                h = h.detach()
                preds.append(pred)
            loss = F.mse_loss(torch.cat(preds, 1), yc)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()


class DetachesFeatures(LightningModule):
    def __init__(self, in_size: int, hid_size: int, out_size: int, k: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.k = k
        self.backbone = nn.GRU(in_size, hid_size, batch_first=True)
        self.classifier = nn.Linear(hid_size, out_size)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, hidden = self.backbone(x, state)
        features, hidden = features.detach(), hidden.detach()
        return self.classifier(features), hidden

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        x, y = batch
        hidden = None
        for start in range(0, x.size(1), self.k):
            stop = start + self.k
            opt.zero_grad()
            logits, hidden = self.forward(x[:, start:stop], hidden)
            loss = F.mse_loss(logits, y[:, start:stop])
            self.manual_backward(loss)
            opt.step()
        return loss.detach()

    def configure_optimizers(self) -> Any:
        return optim.RMSprop(self.parameters(), lr=0.01)


class CoreUnderNoGrad(LightningModule):
    """Wanted the state without a graph, and took the graph from everything."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case = case
        self.embed = nn.Linear(case.inputs, case.hidden)
        self.rnn = nn.RNN(case.hidden, case.hidden, batch_first=True)
        self.head = nn.Linear(2 * case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        e = self.embed(x)
        with torch.no_grad():
            z, state = self.rnn(e, state)
        return self.head(torch.cat([e, z], dim=-1)), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for x, y in zip(*(b.split(self.case.chunk, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.02)


class LearnedStartDetached(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.initial = nn.Parameter(torch.randn(1, 1, case.hidden))
        self.rnn = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.initial.expand(-1, x.size(0), -1).contiguous()
        z, state = self.rnn(x, state)
        return self.head(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        state = self.initial.repeat(1, x.size(0), 1)
        for i in range(0, x.size(1), self.bptt):
            state = state.detach()
            pred, state = self(x[:, i : i + self.bptt], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.bptt]))
            opt.step()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1)


class UpdatesByHand(GRUNet):
    """Steps as the old word-language-model example did, through `.data`."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        hidden = None
        for data, targets in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            self.zero_grad()
            output, hidden = self(data, hidden)
            self.manual_backward(F.mse_loss(output, targets), retain_graph=True)
            for p in self.parameters():
                assert p.grad is not None
                p.data.add_(p.grad, alpha=-0.1)

    def configure_optimizers(self) -> None:
        pass


class TotalLossGrows(HandMadeRNN):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h, total = None, x.new_zeros(())
        for i in range(0, x.size(1), self.k):
            pred, h = self(x[:, i : i + self.k], h)
            h = h.detach()
            total = total + F.mse_loss(pred, y[:, i : i + self.k])
            opt.zero_grad()
            self.manual_backward(total, retain_graph=True)
            opt.step()

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01, fused=True)


class ErrorsSwallowed(LSTMNet):
    """Nothing is detached, so every chunk but the first raises, and is skipped."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for x, y in self.chunks(batch):
            try:
                opt.zero_grad()
                pred, state = self(x, state)
                self.manual_backward(F.mse_loss(pred, y))
                opt.step()
            except RuntimeError:
                self.log("skipped_chunks", 1.0, reduce_fx="sum")


# ------------------------------------------------------------------------------------- the state


class StateNeverFedBack(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            y_hat, new_hidden = self(x, hidden)
            loss = F.mse_loss(y_hat, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            new_hidden = new_hidden.detach()


class CalledWithoutState(LSTMNet):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        optimizer: Any = self.optimizers()
        for x, y in self.chunks(batch):
            optimizer.zero_grad()
            prediction, state = self(x)
            loss = F.mse_loss(prediction, y)
            self.manual_backward(loss)
            optimizer.step()
            state = tuple(s.detach() for s in state)
        return {"loss": loss}


class ForwardIgnoresState(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps = case.chunk
        self.rnn = nn.LSTM(case.inputs, case.hidden, num_layers=2, batch_first=True)
        self.proj = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.rnn(x)
        return self.proj(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.steps, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=0.01)


class ZerosInEveryChunk(LSTMNet):
    def init_hidden(self, batch_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, batch_size, self.hparams["hidden_dim"])
        return like.new_zeros(shape), like.new_zeros(shape)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        step = self.hparams["tbptt_steps"]
        for t in range(0, x.size(1), step):
            hidden = self.init_hidden(x.size(0), x)
            pred, hidden = self(x[:, t : t + step], hidden)
            loss = F.mse_loss(pred, y[:, t : t + step])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            hidden = (hidden[0].detach(), hidden[1].detach())


class KeptBetweenBatches(GRUNet):
    """The state lives on the module and goes into the next batch's sequences."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.hidden: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        if self.hidden is not None:
            self.hidden = self.hidden[:, : x.size(0)].contiguous()
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            pred, hidden = self(x[:, i : i + self.bptt], self.hidden)
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.bptt]))
            opt.step()
            self.hidden = hidden.detach()

    def on_train_epoch_start(self) -> None:
        self.hidden = None


class RoundedState(HandMadeRNN):
    """Keeps the state in half precision between the chunks, to save memory."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        cache: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            state = None if cache is None else cache.to(x.dtype)
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            cache = state.detach().half()


class ReshapedLayers(LightningModule):
    """Keeps the state with the batch in front, and gets there by `reshape`."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.case = case
        self.gru = nn.GRU(case.inputs, case.hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.gru(x, state)
        return self.fc(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        stored = x.new_zeros(x.size(0), 2, self.case.hidden)
        for i in range(0, x.size(1), self.case.chunk):
            state = stored.transpose(0, 1).contiguous()
            pred, state = self(x[:, i : i + self.case.chunk], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.case.chunk]))
            opt.step()
            stored = state.detach().reshape(x.size(0), 2, -1)

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.02)


class HardestFirst(GRUNet):
    """Sorts the sequences of each chunk, and leaves the state in the order it was."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            order = y.abs().mean(dim=(1, 2)).argsort(descending=True)
            pred, state = self(x[order], state)
            loss = F.mse_loss(pred, y[order])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = state.detach()


class RecomputedState(GRUNet):
    """Computes the state again with the parameters after the update."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            chunk = slice(i, i + self.bptt)
            pred, _ = self(x[:, chunk], h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, chunk]))
            opt.step()
            with torch.no_grad():
                _, h = self(x[:, chunk], h)


class MetricAdvancesState(LSTMNet):
    """Runs the chunk a second time, for a metric, from where the first run ended."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in self.chunks(batch):
            opt.zero_grad()
            loss, state = self.compute_loss(x, y, state)
            self.manual_backward(loss)
            opt.step()
            state = tuple(s.detach() for s in state)
            with torch.no_grad():
                metric, state = self.compute_loss(x, y, state)
            self.log("loss_after_update", metric)

    def compute_loss(self, x: Tensor, y: Tensor, state: Any) -> tuple[Tensor, Any]:
        pred, state = self(x, state)
        return F.mse_loss(pred, y), state


class ClosureAdvancesState(GRUNet):
    """Every time the optimizer evaluates its closure, the state moves on by a chunk."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.h: Any = None
        x, y = batch
        for i in range(0, x.size(1), self.bptt):
            self.update(x[:, i : i + self.bptt], y[:, i : i + self.bptt])

    def update(self, x: Tensor, y: Tensor) -> None:
        opt: Any = self.optimizers()

        def closure() -> Tensor:
            opt.zero_grad()
            pred, h = self(x, self.h)
            self.h = h.detach()
            loss = F.mse_loss(pred, y)
            self.manual_backward(loss)
            return loss

        opt.step(closure)

    def configure_optimizers(self) -> Any:
        return optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class RunsAhead(GRUNet):
    """Runs the next chunk's forward before the update, to overlap it with the backward."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        chunks = list(zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True))
        pred, h = self(chunks[0][0])
        for i, (_, y) in enumerate(chunks):
            loss = F.mse_loss(pred, y)
            if i + 1 < len(chunks):
                pred, h = self(chunks[i + 1][0], h.detach())
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1, fused=True)


class FirstSequencesState(HandMadeRNN):
    """Carries on from the state of the first sequence, whichever batch size comes."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for xc, yc in zip(x.split(self.k, dim=1), y.split(self.k, dim=1), strict=True):
            h_in = None if h is None else h.expand(xc.size(0), -1)
            pred, h_out = self(xc, h_in)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, yc))
            opt.step()
            h = h_out[:1].detach()


class WrongEndOfTheFeatures(LightningModule):
    """Takes the state from the features itself: the first time step's, not the last one's."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.length = case.chunk
        self.rnn = nn.RNN(case.inputs, case.hidden, batch_first=True)
        self.out = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        features, _ = self.rnn(x, state)
        return self.out(features), features[:, 0].unsqueeze(0).contiguous()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for x, y in zip(*(b.split(self.length, dim=1) for b in batch), strict=True):
            pred, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = state.detach()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1)


class BatchFirstForgotten(LightningModule):
    """The core takes the sequences for time steps and the time steps for sequences."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden)
        self.linear = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.lstm(x, state)
        return self.linear(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        hidden: Any = None
        for i in range(0, x.shape[1], self.bptt):
            pred, hidden = self(x[:, i : i + self.bptt], hidden)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.bptt]))
            opt.step()
            hidden = tuple(h.detach() for h in hidden)

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


class TupleOfLayers(GRUNet):
    """The idiom for an LSTM's pair takes a GRU's tensor apart into its layers."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hiddens: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, hiddens = self(x, hiddens)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            hiddens = tuple(h.detach() for h in hiddens)


# ------------------------------------------------------------------------------------ the chunks


class CountsPieces(L.LightningModule):
    """As in Lightning's documentation."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.truncated_bptt_steps = case.chunk
        self.my_rnn = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.linear = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        pred, hiddens = self.my_rnn(x, state)
        return self.linear(pred), hiddens

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        split_x = x.tensor_split(self.truncated_bptt_steps, dim=1)
        split_y = y.tensor_split(self.truncated_bptt_steps, dim=1)
        hiddens: Any = None
        optimizer: Any = self.optimizers()
        for xs, ys in zip(split_x, split_y, strict=True):
            y_pred, hiddens = self(xs, hiddens)
            loss = F.mse_loss(y_pred, ys)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            hiddens = [h.detach() for h in hiddens]

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


class WholeChunksOnly(HandMadeRNN):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h = None
        num_chunks = x.size(1) // self.k
        for n in range(num_chunks):
            window = slice(n * self.k, (n + 1) * self.k)
            pred, h = self(x[:, window], h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, window]))
            opt.step()
            h = h.detach()


class RangeStopsShort(LSTMNet):
    """The language-model idiom `range(0, T - k, k)`, where no time step is left for a target."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        seq_length = self.hparams["tbptt_steps"]
        states: Any = None
        for i in range(0, x.size(1) - seq_length, seq_length):
            outputs, states = self(x[:, i : i + seq_length], states)
            loss = F.mse_loss(outputs, y[:, i : i + seq_length])
            self.zero_grad()
            self.manual_backward(loss)
            opt.step()
            states = [state.detach() for state in states]


class LastChunkDropped(GRUNet):
    """Takes it for granted that the last chunk is a short one."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        chunks = list(zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True))[:-1]
        hidden = None
        for x, y in chunks:
            pred, hidden = self(x, hidden)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            hidden = hidden.detach()


class TailMerged(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        starts = list(range(0, batch[0].size(1) - self.bptt + 1, self.bptt)) or [0]
        h: Any = None
        for x, y in zip(*(b.tensor_split(starts[1:], dim=1) for b in batch), strict=True):
            h = None if h is None else h.detach()
            pred, h = self(x, h)
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            opt.zero_grad()


class FirstChunkLonger(HandMadeRNN):
    """Trains when t is a multiple of k, and t = 0 is not one to train at."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        h, losses = None, []
        for t in range(x.size(1)):
            pred, h = self(x[:, t : t + 1], h)
            losses.append(F.mse_loss(pred, y[:, t : t + 1]))
            if t > 0 and t % self.k == 0:
                self.learn(losses)
                h, losses = h.detach(), []
        if losses:
            self.learn(losses)

    def learn(self, losses: list[Tensor]) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(torch.stack(losses).mean())
        opt.step()


class TailNeverLearnt(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        opt: Any = self.optimizers()
        h: Any = None
        loss = inputs.new_zeros(())
        for t in range(inputs.size(1)):
            out, h = self(inputs[:, t : t + 1], h)
            loss = loss + F.mse_loss(out, targets[:, t : t + 1]) / self.bptt
            if (t + 1) % self.bptt == 0:
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
                h, loss = h.detach(), inputs.new_zeros(())


class SplitsSequences(GRUNet):
    """`split` without `dim` cuts the batch, and every piece is a whole sequence."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for x_chunk, y_chunk in zip(x.split(self.bptt), y.split(self.bptt), strict=True):
            if h is not None:
                h = h[:, : len(x_chunk)].detach().contiguous()
            pred, h = self(x_chunk, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y_chunk))
            opt.step()


class Overlapping(LSTMNet):
    """Every chunk takes one time step of the next one along."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        k, state = self.hparams["tbptt_steps"], None
        for i in range(0, x.size(1), k):
            end = min(i + k + 1, x.size(1))
            pred, state = self(x[:, i:end], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y[:, i:end]))
            opt.step()
            state = [s.detach() for s in state]


class EasiestFirst(HandMadeRNN):
    """A curriculum: the chunks of a sequence are trained in the order of their difficulty."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        chunks = list(zip(*(b.split(self.k, dim=1) for b in batch), strict=True))
        for x, y in sorted(chunks, key=lambda chunk: float(chunk[1].abs().max())):
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            h = h.detach()


class BackToFront(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        stack = [list(b.split(self.bptt, dim=1)) for b in batch]
        h: Any = None
        while stack[0]:
            x, y = (pieces.pop() for pieces in stack)
            pred, h = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            h = h.detach()


class PaddedTail(LSTMNet):
    """Fills the last chunk up with zeros, and learns to predict zeros from them."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        k = self.hparams["tbptt_steps"]
        x, y = (F.pad(b, (0, 0, 0, -b.size(1) % k)) for b in batch)
        opt: Any = self.optimizers()
        state: Any = None
        for xc, yc in zip(x.unflatten(1, (-1, k)).unbind(1), y.split(k, 1), strict=True):
            pred, state = self(xc, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, yc))
            opt.step()
            state = tuple(s.detach() for s in state)


class FirstStepsOnly(GRUNet):
    """Truncates the sequence, where the gradient was meant."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        opt: Any = self.optimizers()
        y_hat, _ = self(x[:, : self.bptt])
        loss = F.mse_loss(y_hat, y[:, : self.bptt])
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        return loss


class WholeSequence(HandMadeRNN):
    """Has a chunk length and never looks at it."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        pred, state = self(x)
        loss = F.mse_loss(pred, y)
        opt.zero_grad()
        self.manual_backward(loss)
        opt.step()
        state = state.detach()
        self.log("loss", loss)


class OldLightning(L.LightningModule):
    """For Lightning 1.x, which cut the batch and handed over `hiddens`; 2.x does neither."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.truncated_bptt_steps = case.chunk
        self.lstm = nn.LSTM(case.inputs, case.hidden, batch_first=True)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.lstm(x, state)
        return self.head(z), state

    def training_step(self, batch: Batch, batch_idx: int, hiddens: Any = None) -> Any:
        x, y = batch
        pred, hiddens = self(x, hiddens)
        loss = F.mse_loss(pred, y)
        return {"loss": loss, "hiddens": tuple(h.detach() for h in hiddens)}

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


class OldLightningStrict(OldLightning):
    def training_step(self, batch: Batch, batch_idx: int, hiddens: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, batch_idx, hiddens)


class BurnIn(GRUNet):
    """Only warms the state up on the first chunk, which nobody asked for."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        chunks = zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True)
        with torch.no_grad():
            _, h = self(next(chunks)[0])
        for x, y in chunks:
            pred, h = self(x, h.detach())
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()


# ------------------------------------------------------------------------------------ the update


class NeverZeroed(HandMadeRNN):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            out, hidden = self(x, hidden)
            hidden = hidden.detach()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()


class ZeroedTooLate(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            y_hat, h = self(x[:, i : i + self.bptt], h)
            loss = F.mse_loss(y_hat, y[:, i : i + self.bptt])
            self.manual_backward(loss)
            opt.zero_grad()
            opt.step()
            h = h.detach()


class ZeroedInsideSteppedOutside(LSTMNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in self.chunks(batch):
            opt.zero_grad()
            pred, state = self(x, state)
            self.manual_backward(F.mse_loss(pred, y))
            state = tuple(s.detach() for s in state)
        opt.step()


class SteppedPerBatch(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        opt.zero_grad()
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            pred, h = self(x[:, i : i + self.bptt], h)
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.bptt]))
            h = h.detach()
        opt.step()


class OnlyReadoutZeroed(HandMadeRNN):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state = None
        for x, y in zip(*(torch.split(b, self.k, dim=1) for b in batch), strict=True):
            self.h2o.zero_grad()
            pred, state = self(x, state)
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            state = state.detach()


class EverySecondChunk(GRUNet):
    """Accumulates over two chunks; an odd one at the end is never stepped on."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        counter = count(1)
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, h = self(x, h)
            self.manual_backward(F.mse_loss(pred, y) / 2)
            if next(counter) % 2 == 0:
                opt.step()
                opt.zero_grad()
            h = h.detach()


class BackwardTwice(LSTMNet):
    """Back-propagates for a gradient norm to log, and again for the update."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in self.chunks(batch):
            opt.zero_grad()
            pred, state = self(x, state)
            loss = F.mse_loss(pred, y)
            self.manual_backward(loss, retain_graph=True)
            norms = [p.grad.norm() for p in self.parameters() if p.grad is not None]
            self.log("grad_norm", torch.stack(norms).norm())
            self.manual_backward(loss)
            opt.step()
            state = tuple(s.detach() for s in state)

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.05)


class StepBeforeBackward(GRUNet):
    """Every update uses the gradients of the chunk before."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            pred, h = self(x[:, i : i + self.bptt], h)
            loss = F.mse_loss(pred, y[:, i : i + self.bptt])
            opt.step()
            opt.zero_grad()
            self.manual_backward(loss)
            h = h.detach()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.1, fused=True)


class NewOptimizerPerChunk(HandMadeRNN):
    """Adam begins anew in every chunk."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        h: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            optimizer = self.configure_optimizers()
            optimizer.zero_grad()
            pred, h = self(x, h)
            self.manual_backward(F.mse_loss(pred, y))
            optimizer.step()
            h = h.detach()


class OneOfTwoOptimizers(LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.core = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.readout = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.core(x, state)
        return self.readout(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opts: Any = self.optimizers()
        h = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            for opt in opts:
                opt.zero_grad()
            pred, h = self(x, h)
            self.manual_backward(F.mse_loss(pred, y))
            h = h.detach()
            opts[0].step()
        opts[1].step()

    def configure_optimizers(self) -> Any:
        core = optim.SGD(self.core.parameters(), lr=0.1)
        readout = optim.SGD(self.readout.parameters(), lr=0.1)
        return [core, readout]


class SteppedTwice(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, h = self(x, h)
            opt.zero_grad()
            self.backward_and_step(F.mse_loss(pred, y))
            opt.step()
            h = h.detach()

    def backward_and_step(self, loss: Tensor) -> None:
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]


class ManualForgotten(GRUNet):
    """Runs its own loop and leaves Lightning to optimize as well."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.automatic_optimization = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        opt: Any = self.optimizers()
        x, y = batch
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            pred, h = self(x[:, i : i + self.bptt], h)
            loss = F.mse_loss(pred, y[:, i : i + self.bptt])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()
        return loss


class BackwardUnderAutomatic(GRUNet):
    """Back-propagates the chunks itself; Lightning then zeroes all but the last one's gradient."""

    def __init__(self, n_in: int, n_hid: int, n_out: int, bptt: int) -> None:
        super().__init__(n_in, n_hid, n_out, bptt)
        self.automatic_optimization = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        *earlier, last = zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True)
        h: Any = None
        for x, y in earlier:
            pred, h = self(x, h)
            F.mse_loss(pred, y).backward()
            h = h.detach()
        return F.mse_loss(self(last[0], h)[0], last[1])


# -------------------------------------------------------------------------------------- the loss


class LastTimeStepOnly(GRUNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, h = self(x, h)
            loss = F.mse_loss(pred[:, -1], y[:, -1])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()


class ShiftedInsideTheChunk(LSTMNet):
    """Shifts prediction against target in each chunk, and loses one time step at every boundary."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in self.chunks(batch):
            if x.size(1) < 2:
                continue
            logits, state = self(x, state)
            loss = F.mse_loss(logits[:, :-1], y[:, 1:])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = tuple(s.detach() for s in state)


class FlattenedTwoWays(LightningModule):
    """Predictions flattened time first, targets sequence first."""

    def __init__(self, ntoken: int, nhid: int, nout: int, bptt: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt, self.nout = bptt, nout
        self.rnn = nn.GRU(ntoken, nhid)
        self.decoder = nn.Linear(nhid, nout)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.decoder(z), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, y = batch
        opt: Any = self.optimizers()
        hidden: Any = None
        for i in range(0, x.size(1), self.bptt):
            data, targets = x[:, i : i + self.bptt].transpose(0, 1), y[:, i : i + self.bptt]
            output, hidden = self(data, hidden)
            loss = F.mse_loss(output.reshape(-1, self.nout), targets.reshape(-1, self.nout))
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            hidden = hidden.detach()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.parameters(), lr=0.2)


class DividedByChunks(GRUNet):
    """The mean over chunks, though each has an update of its own."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        pieces = [b.split(self.bptt, dim=1) for b in batch]
        h: Any = None
        for x, y in zip(*pieces, strict=True):
            pred, h = self(x, h)
            loss = F.mse_loss(pred, y) / len(pieces[0])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()


class EvaluationForever(LightningModule):
    """Goes to evaluation mode for a metric and never back: dropout ends with the first chunk."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bptt = case.chunk
        self.rnn = nn.GRU(case.inputs, case.hidden, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(case.hidden, case.outputs)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Tensor]:
        z, state = self.rnn(x, state)
        return self.head(self.drop(z)), state

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, h_next = self(x, h)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y))
            opt.step()
            self.eval()
            with torch.no_grad():
                self.log("mae", F.l1_loss(self(x, h)[0], y))
            h = h_next.detach()

    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), lr=0.01)


# --------------------------------------------------- what no number shows: memory, and book-keeping


class LossesKept(GRUNet):
    """Keeps every chunk's loss with its graph, until the epoch ends."""

    def on_train_epoch_start(self) -> None:
        self.losses: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h: Any = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            pred, h = self(x, h)
            loss = F.mse_loss(pred, y)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()
            self.losses.append(loss)

    def on_train_epoch_end(self) -> None:
        self.log("epoch_loss", torch.stack(self.losses).mean())


class RunningLoss(HandMadeRNN):
    """Sums the losses for the log, and with them the graphs of all chunks."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        opt: Any = self.optimizers()
        h, total_loss = None, x.new_zeros(())
        for i in range(0, x.size(1), self.k):
            pred, h = self(x[:, i : i + self.k], h)
            loss = F.mse_loss(pred, y[:, i : i + self.k])
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            h = h.detach()
            total_loss = total_loss + loss
        self.log("train_loss", total_loss)
        return total_loss


class MicroBatchesCleared(MicroBatches):
    """Gradients are cleared before each part of the batch: only the last part's are left."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.zero_grad()
        return super().forward(x, state)


class MicroBatchesUnweighted(MicroBatches):
    """The mean of each part of the batch counts as much as the mean of all would."""

    def share(self, rows: Tensor, x: Tensor) -> float:
        return 1.0


class MicroStatesSwapped(MicroBatches):
    """Each sequence goes on from a state of another."""

    def together(self, ends: list[Tensor]) -> Tensor:
        return torch.cat(ends, dim=1).flip(1)


class MicroStatesAttached(MicroBatches):
    """The states of all parts are put together with their graphs."""

    def cut(self, end: Tensor) -> Tensor:
        return end


class OutputsRetained(LSTMNet):
    """Detaches the state, retains the graph none the less, and keeps the predictions on it."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        outputs, state = [], None
        for x, y in self.chunks(batch):
            pred, state = self(x, state)
            outputs.append(pred)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(pred, y), retain_graph=True)
            opt.step()
            state = tuple(s.detach() for s in state)
        self.log("mae", F.l1_loss(torch.cat(outputs, dim=1), batch[1]))


class RawOptimizer(GRUNet):
    """Steps past Lightning, whose `global_step` stays at 0."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers(use_pl_optimizer=False)
        x, y = batch
        h: Any = None
        for i in range(0, x.size(1), self.bptt):
            opt.zero_grad()
            pred, h = self(x[:, i : i + self.bptt], h)
            self.manual_backward(F.mse_loss(pred, y[:, i : i + self.bptt]))
            opt.step()
            h = h.detach()


# ---------------------------------------------------------------------------------- the gallery


def sized(kind: type[Any]) -> Build:
    """Build a loop that takes its sizes one by one."""
    return lambda case: (kind(*four(case)), F.mse_loss)


def cased(kind: type[Any]) -> Build:
    """Build a loop that takes the case."""
    return lambda case: (kind(case), F.mse_loss)


BROKEN: dict[str, tuple[str, Build]] = {
    "never_detached": (
        "the state is carried with its graph, so the second backward meets a freed graph",
        sized(NeverDetached),
    ),
    "retains_graph": (
        "nothing is detached; retain_graph=True lets the second backward run into changed weights",
        sized(RetainsGraph),
    ),
    "retains_graph_and_fused": (
        "nothing is detached, the graph is retained, a fused optimizer hides it: full-length BPTT",
        sized(RetainsGraphFused),
    ),
    "only_hidden_detached": (
        "of an LSTM's pair only h is detached; c keeps its graph",
        sized(OnlyHiddenDetached),
    ),
    "detach_not_assigned": (
        "the result of detach() is thrown away",
        cased(DetachNotAssigned),
    ),
    "one_layer_detached": (
        "of two layers' states only the lower is detached; a fused optimizer hides it",
        cased(OneLayerDetached),
    ),
    "every_other_detached": (
        "the state is detached at every second boundary only: gradients reach back two chunks",
        sized(EveryOtherDetached),
    ),
    "detaches_every_time_step": (
        "forward detaches the state before every time step: gradients reach back one time step",
        cased(DetachesEveryTimeStep),
    ),
    "detaches_around_every_call": (
        "the loop calls forward per time step and detaches each time: one time step of gradient",
        sized(DetachesAroundEveryCall),
    ),
    "detaches_features": (
        "forward detaches the features before the readout: the core never learns",
        sized(DetachesFeatures),
    ),
    "core_under_no_grad": (
        "forward runs the core under no_grad: the core never learns",
        cased(CoreUnderNoGrad),
    ),
    "learned_start_detached": (
        "the learned first state is detached too: it never learns",
        cased(LearnedStartDetached),
    ),
    "updates_by_hand": (
        "nothing is detached, and updates through .data hide it; no optimizer takes part",
        sized(UpdatesByHand),
    ),
    "total_loss_grows": (
        "every backward starts from the sum of all losses so far",
        cased(TotalLossGrows),
    ),
    "errors_swallowed": (
        "nothing is detached, and the error that follows is caught: only first chunks are trained",
        sized(ErrorsSwallowed),
    ),
    "state_never_fed_back": (
        "the new state goes into another variable: every chunk starts from nothing",
        sized(StateNeverFedBack),
    ),
    "called_without_state": (
        "forward is called without the state that was carefully detached",
        sized(CalledWithoutState),
    ),
    "forward_ignores_state": (
        "forward accepts a state and does not use it",
        cased(ForwardIgnoresState),
    ),
    "zeros_in_every_chunk": (
        "the state is set to zeros inside the loop over chunks",
        sized(ZerosInEveryChunk),
    ),
    "kept_between_batches": (
        "the state of one batch's sequences starts the next batch's",
        sized(KeptBetweenBatches),
    ),
    "rounded_state": (
        "the state is rounded to half precision at every boundary",
        cased(RoundedState),
    ),
    "reshaped_layers": (
        "the state is reshaped where it should be transposed: layers and sequences mix",
        cased(ReshapedLayers),
    ),
    "hardest_first": (
        "the sequences are sorted anew in each chunk, their states are not",
        sized(HardestFirst),
    ),
    "recomputed_state": (
        "the state handed on is computed again with the updated parameters",
        sized(RecomputedState),
    ),
    "metric_advances_state": (
        "a second forward for a metric runs on from the new state and replaces it",
        sized(MetricAdvancesState),
    ),
    "closure_advances_state": (
        "each evaluation of LBFGS's closure starts from the state the one before ended in",
        sized(ClosureAdvancesState),
    ),
    "runs_ahead": (
        "the next chunk's forward runs before the update; a fused optimizer hides it",
        sized(RunsAhead),
    ),
    "first_sequences_state": (
        "every sequence is carried on from the first sequence's state",
        cased(FirstSequencesState),
    ),
    "wrong_end_of_the_features": (
        "the state handed on is that of the chunk's first time step",
        cased(WrongEndOfTheFeatures),
    ),
    "batch_first_forgotten": (
        "the core takes sequences for time steps; the state has a row for every time step",
        cased(BatchFirstForgotten),
    ),
    "tuple_of_layers": (
        "detaching a GRU's state as if it were a pair makes it a tuple of layers",
        sized(TupleOfLayers),
    ),
    "counts_pieces": (
        "tensor_split(k) makes k pieces instead of pieces of k time steps",
        cased(CountsPieces),
    ),
    "whole_chunks_only": (
        "T // k chunks: the tail is dropped",
        cased(WholeChunksOnly),
    ),
    "range_stops_short": (
        "range(0, T - k, k): the last whole chunk or the tail is dropped",
        sized(RangeStopsShort),
    ),
    "last_chunk_dropped": (
        "the last chunk is dropped, be it short or whole",
        sized(LastChunkDropped),
    ),
    "tail_merged": (
        "the tail is trained together with the last whole chunk",
        sized(TailMerged),
    ),
    "first_chunk_longer": (
        "the first chunk has k + 1 time steps, and all boundaries are one late",
        cased(FirstChunkLonger),
    ),
    "tail_never_learnt": (
        "an update only after every k-th time step: the tail has a forward and no update",
        sized(TailNeverLearnt),
    ),
    "splits_sequences": (
        "the batch is cut along sequences: whole sequences, each from another one's state",
        sized(SplitsSequences),
    ),
    "overlapping": (
        "each chunk has k + 1 time steps: those at the boundaries are trained on twice",
        sized(Overlapping),
    ),
    "easiest_first": (
        "the chunks are trained in the order of their targets' size",
        cased(EasiestFirst),
    ),
    "back_to_front": (
        "the chunks are trained from the last to the first",
        sized(BackToFront),
    ),
    "padded_tail": (
        "the tail is filled up with zeros that are trained on",
        sized(PaddedTail),
    ),
    "first_steps_only": (
        "only the first k time steps are ever looked at",
        sized(FirstStepsOnly),
    ),
    "whole_sequence": (
        "the chunk length is ignored: one update with the whole sequence's gradient",
        cased(WholeSequence),
    ),
    "old_lightning": (
        "a Lightning 1.x module: 2.x neither cuts the batch nor hands over hiddens",
        cased(OldLightning),
    ),
    "old_lightning_strict": (
        "a Lightning 1.x module whose training_step demands the hiddens that 2.x never hands over",
        cased(OldLightningStrict),
    ),
    "burn_in": (
        "the first chunk only warms the state up",
        sized(BurnIn),
    ),
    "never_zeroed": (
        "gradients are never zeroed: each update uses the sum of all so far",
        cased(NeverZeroed),
    ),
    "zeroed_too_late": (
        "gradients are zeroed between backward and step: nothing is ever learnt",
        sized(ZeroedTooLate),
    ),
    "zeroed_inside_stepped_outside": (
        "zero_grad in the loop, step after it: only the last chunk's gradient counts",
        sized(ZeroedInsideSteppedOutside),
    ),
    "stepped_per_batch": (
        "one update per batch, with the sum of all chunks' gradients",
        sized(SteppedPerBatch),
    ),
    "only_readout_zeroed": (
        "only the readout's gradients are zeroed: the core's add up",
        cased(OnlyReadoutZeroed),
    ),
    "every_second_chunk": (
        "one update for two chunks, and none for an odd one at the end",
        sized(EverySecondChunk),
    ),
    "backward_twice": (
        "the same loss is back-propagated twice: the gradient doubles",
        sized(BackwardTwice),
    ),
    "step_before_backward": (
        "the update comes before the backward and uses the gradients of the chunk before",
        sized(StepBeforeBackward),
    ),
    "new_optimizer_per_chunk": (
        "a new optimizer for every chunk: Adam forgets its moments",
        cased(NewOptimizerPerChunk),
    ),
    "one_of_two_optimizers": (
        "of two optimizers one steps per chunk, the other once per batch",
        cased(OneOfTwoOptimizers),
    ),
    "stepped_twice": (
        "a helper steps, and so does its caller: two updates with each gradient",
        sized(SteppedTwice),
    ),
    "manual_forgotten": (
        "automatic_optimization is left at True",
        sized(ManualForgotten),
    ),
    "backward_under_automatic": (
        "under automatic optimization Lightning zeroes what the loop has back-propagated",
        sized(BackwardUnderAutomatic),
    ),
    "last_time_step_only": (
        "only the last time step of every chunk is in the loss",
        sized(LastTimeStepOnly),
    ),
    "shifted_inside_the_chunk": (
        "targets are shifted inside each chunk: those just after a boundary are lost",
        sized(ShiftedInsideTheChunk),
    ),
    "flattened_two_ways": (
        "predictions are flattened time first, targets sequence first: they do not match",
        sized(FlattenedTwoWays),
    ),
    "divided_by_chunks": (
        "the loss is divided by the number of chunks, though each has its own update",
        sized(DividedByChunks),
    ),
    "evaluation_forever": (
        "the module stays in evaluation mode from the first chunk on: no dropout",
        cased(EvaluationForever),
    ),
    "losses_kept": (
        "every chunk's loss is kept with its graph until the epoch ends",
        sized(LossesKept),
    ),
    "running_loss": (
        "the summed loss that is logged keeps the graphs of all chunks",
        cased(RunningLoss),
    ),
    "micro_batches_cleared": (
        "gradients are cleared before each part of the batch that shares an update",
        sized(MicroBatchesCleared),
    ),
    "micro_batches_unweighted": (
        "the mean losses of the batch's parts are added up as they are",
        sized(MicroBatchesUnweighted),
    ),
    "micro_states_swapped": (
        "the parts' states are put together in another order",
        sized(MicroStatesSwapped),
    ),
    "micro_states_attached": (
        "the parts' states are put together with their graphs",
        sized(MicroStatesAttached),
    ),
    "outputs_retained": (
        "predictions are kept on graphs that are retained: memory grows with T",
        sized(OutputsRetained),
    ),
    "raw_optimizer": (
        "the optimizer is stepped past Lightning: global_step stays at 0",
        sized(RawOptimizer),
    ),
}
