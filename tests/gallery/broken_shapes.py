"""Loops of `other_shapes`, each with one mistake that people make.

Shapes: B sequences, T time steps, K time steps in a chunk, I inputs, O outputs.
"""

# mypy: disable-error-code="no-untyped-call"
# (torch annotates neither Tensor.split nor Tensor.backward)

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- as everybody writes it
from torch import Tensor, nn

from gallery import other_shapes as right
from gallery.correct import Batch
from gallery.other_shapes import Unusual
from tbptt_props.case import Case

# ---------------------------------------------------------------------------- where the state is


class SelfNotDetached(right.StateOnSelf):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.hidden = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y), retain_graph=True)
            opt.step()


class SelfNotReset(right.StateOnSelf):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self.hidden = tuple(h.detach() for h in self.hidden)


class SelfResetInEachChunk(right.StateOnSelf):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            self.hidden = None
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()


class SelfResetInForward(right.StateOnSelf):
    def forward(self, x: Tensor) -> Tensor:
        self.hidden = None
        return super().forward(x)


class SelfScaled(right.StateOnSelf):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self.hidden = None
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self.hidden = tuple(0.9 * h.detach() for h in self.hidden)


class CellNotReset(right.StateInCell):
    class Cell(right.StateInCell.Cell):
        def reset(self, batch_size: int) -> None:
            if batch_size != self.h.size(0):
                super().reset(batch_size)


class OnlyHDetached(right.DataclassOnSelf):
    class Memory(right.DataclassOnSelf.Memory):
        def detached(self) -> "OnlyHDetached.Memory":
            return OnlyHDetached.Memory(self.h.detach(), self.c)


class DictNotDetached(right.DictInPlace):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        self._state.clear()
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self._state["h"].detach()


class DictNotCleared(right.DictOnSelf):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        kept = self._state.get("h")
        alike = kept is not None and kept.size(1) == len(batch[0])
        super().training_step(batch, batch_idx) if not alike else self.going_on(batch)

    def going_on(self, batch: Batch) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x), y))
            opt.step()
            self._state = {name: value.detach() for name, value in self._state.items()}


class OneLayerNotDetached(right.ResetState):
    class Layer(right.ResetState.Layer):
        def detach_state(self) -> None:
            if self.cell.input_size == self.cell.hidden_size:
                super().detach_state()


class OneLayerNotReset(right.ResetState):
    def reset_state(self) -> None:
        first, last = self.layers
        first.reset_state()  # type: ignore[operator]
        kept: Any = last.h
        if kept is not None and len(kept) != self.sequences:
            last.reset_state()  # type: ignore[operator]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.sequences = len(batch[0])
        super().training_step(batch, batch_idx)


class SwappedPair(right.Triple):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h, c = self.init_hidden(batch[0])
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, c, h = self(x, h, c)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            h, c = h.detach(), c.detach()


class COfThePairForgotten(right.Triple):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h, c = self.init_hidden(batch[0])
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h, _ = self(x, h, c)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y))
            opt.step()
            h = h.detach()


class COfThePairAttached(right.Triple):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        h, c = self.init_hidden(batch[0])
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            out, h, c = self(x, h, c)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(out, y), retain_graph=True)
            opt.step()
            h = h.detach()


class NamedStateNotHandedOn(right.StateByName):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, _ = self(x, state=state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()


class PastNotDetached(right.ModelOutput):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        past: Any = None
        for x, y in zip(*(b.split(self.block_size, dim=1) for b in batch), strict=True):
            output = self(x, labels=y, past=past)
            opt.zero_grad()
            self.manual_backward(output.loss, retain_graph=True)
            opt.step()
            past = output.past


# ------------------------------------------------------------------------- what the batches are


class CutAlongTheBatch(right.TimeMajorBatches):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            prediction, _ = self(x)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()


class NotShifted(right.ShiftedTokens):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        both = torch.stack([batch[:, :-1]] * 2)
        right.Tokens.training_step(self, (batch[:, :-1], both[1]), batch_idx)


class ShiftedInsideTheChunk(right.NextInput):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for chunk in batch[:-1].split(self.bptt):
            prediction, state = self(chunk, state)
            loss = F.mse_loss(prediction[:-1], chunk[1:]) if len(chunk) > 1 else prediction.sum()
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()
            state = state.detach()


class TargetsOfAnotherSequence(right.TargetPerSequence):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step((batch[0], batch[1].flip(0)), batch_idx)


class MaskedStateDropped(right.EpisodeMask):
    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y, done in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, _ = self(x, done)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()


class ChunksNeverDetached(right.ChunkPerBatch):
    def training_step(self, batch: tuple[Tensor, Tensor, bool], batch_idx: int) -> Tensor:
        x, y, first = batch
        prediction, self.state = self(x, None if first else self.state)
        return F.mse_loss(prediction, y)


class ChunksScaled(right.ChunkPerBatch):
    def training_step(self, batch: tuple[Tensor, Tensor, bool], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert self.state is not None
        self.state = 0.9 * self.state
        return loss


class RaggedUnmasked(right.Ragged):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, lengths = batch
        super().training_step((x, y, torch.full_like(lengths, x.size(1))), batch_idx)


class RaggedDropped(right.Ragged):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, lengths = batch
        for start in range(0, x.size(1), self.k):
            now = slice(start, start + self.k)
            super().training_step((x[:, now], y[:, now], (lengths - start).clamp(0)), batch_idx)


class PackedStopsEarly(right.TakesPacked):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y, lengths = batch
        super().training_step((x, y, (lengths - 1).clamp(1)), batch_idx)


class WindowsScoredWhole(right.Windows):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        x, y = batch
        for start in range(0, x.size(1), self.k):
            now = slice(max(0, start - self.further), start + self.k)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(self(x[:, now])[0], y[:, now]))
            opt.step()


class WindowsTooShort(right.Windows):
    further = 1


class LastButOneChunk(right.LastChunk):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step((batch[0][:, :-1], batch[1][:, :-1]), batch_idx)


# -------------------------------------------------------------------- how far, and when updated


class StreamReset(right.Stream):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.carried = None
        super().training_step(batch, batch_idx)


class StreamAttached(right.Stream):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, self.carried = self(x, self.carried)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y), retain_graph=True)
            opt.step()


class StreamOfOneBatch(right.StreamOfChunks):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            self.state = None
        return super().training_step(batch, batch_idx)


class SequenceCleared(right.UpdatePerSequence):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            opt.zero_grad()
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y) * x.size(1) / batch[0].size(1))
            state = state.detach()
        opt.step()


class SequenceNotWeighted(right.UpdatePerSequence):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            state = state.detach()
        opt.step()


class SequenceNeverCleared(right.UpdatePerSequence):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y) * x.size(1) / batch[0].size(1))
            state = state.detach()
        opt.step()


class SequenceUpdatedByChunk(right.UpdatePerSequence):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y) * x.size(1) / batch[0].size(1))
            opt.step()
            state = state.detach()


class SummedThroughTheBatch(right.SummedLosses):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        losses = []
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            losses.append(F.mse_loss(prediction, y))
        opt.zero_grad()
        self.manual_backward(torch.stack(losses).sum())
        opt.step()


class SummedAllButTheLast(right.SummedLosses):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        whole = batch[0].size(1) // self.k * self.k
        x, y = (b[:, : max(1, whole)] for b in batch)
        super().training_step((x, y), batch_idx)


class OddOneLeftOver(right.AccumulatesTwo):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for i, (x, y) in enumerate(zip(*(b.split(self.k, dim=1) for b in batch), strict=True)):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            if i % 2 == 1:
                opt.step()
                opt.zero_grad()
            state = state.detach()


class AccumulatesTheLast(right.AccumulatesTwo):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        chunks = list(zip(*(b.split(self.k, dim=1) for b in batch), strict=True))
        for i, (x, y) in enumerate(chunks):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            if i % 2 == 1 or i == len(chunks) - 1:
                opt.step()
            state = state.detach()


class AccumulatesThree(right.AccumulatesTwo):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        state: Any = None
        chunks = list(zip(*(b.split(self.k, dim=1) for b in batch), strict=True))
        for i, (x, y) in enumerate(chunks):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            if i % 3 == 2 or i == len(chunks) - 1:
                opt.step()
                opt.zero_grad()
            state = state.detach()


class ClearsBetweenBatches(right.AccumulatesBatches):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        super().training_step(batch, batch_idx)


class UpdatesEveryBatch(right.AccumulatesBatches):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, 1)


class RandomOverlap(right.RandomLengths):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        xs, ys = batch
        opt: Any = self.optimizers()
        state: Any = None
        start = 0
        while start < xs.size(1):
            stop = start + self.lengths.randint(2, 2 * self.k + 1)
            prediction, state = self(xs[:, start:stop], state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, ys[:, start:stop]))
            opt.step()
            state = state.detach()
            start = stop - 1 if stop < xs.size(1) else stop


class GrowsByTwo(right.GrowingLengths):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        start, length = 0, 1
        while start < batch[0].size(1):
            x, y = (b[:, start : start + length] for b in batch)
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()
            start, length = start + length, length + 2


# ---------------------------------------------------------------------------------- the gallery


# By name: which right loop it is, its mistake, the module, and the property that says it best.
class PenalizedAttached(right.Penalized):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state, features = self(x, state)
            opt.zero_grad()
            self.manual_backward(
                F.mse_loss(prediction, y) + features.square().mean(), retain_graph=True
            )
            opt.step()


class LooksAheadUncleared(right.LooksAhead):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            self.manual_backward(F.mse_loss(prediction, y))
            opt.step()
            state = state.detach()


class ScalesForGood(right.ScalesItsLoss):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y) * 256)
            opt.step()
            state = state.detach()


class FramesThemselves(right.Frames):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for start in range(0, batch.size(1) - 1, self.k):
            chunk = batch[:, start : min(start + self.k, batch.size(1) - 1)]
            prediction, state = self(chunk, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, chunk))
            opt.step()
            state = tuple(s.detach() for s in state)


class FlatCellAttached(right.FlatTokens):
    def training_step(self, source: Tensor, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        hidden: Any = None
        for i in range(0, source.size(0) - 1, self.bptt):
            length = min(self.bptt, source.size(0) - 1 - i)
            output, hidden = self(source[i : i + length], hidden)
            opt.zero_grad()
            targets = source[i + 1 : i + 1 + length].reshape(-1)
            self.manual_backward(F.cross_entropy(output, targets), retain_graph=True)
            opt.step()
            hidden = (hidden[0].detach(), hidden[1])


class SlotsAttached(right.StateInSlots):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        state: Any = None
        for x, y in zip(*(b.split(self.k, dim=1) for b in batch), strict=True):
            prediction, state = self(x, state)
            opt.zero_grad()
            self.manual_backward(F.mse_loss(prediction, y), retain_graph=True)
            opt.step()
            state.h = state.h.detach()


class NeverCutsInForward(right.TruncatesInForward):
    def carried(self, hidden: Tensor) -> Tensor | None:
        return hidden


class ForgetsInForward(right.TruncatesInForward):
    def carried(self, hidden: Tensor) -> Tensor | None:
        return None


class ForgetsBetweenChunks(right.Zoneout):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt: Any = self.optimizers()
        for x, y in zip(*(b.split(self.bptt, dim=1) for b in batch), strict=True):
            h = x.new_zeros(x.size(0), self.cell.hidden_size)
            losses = []
            for t in range(x.size(1)):
                out, h = self(x[:, t], h)
                losses.append(F.mse_loss(out, y[:, t]))
            opt.zero_grad()
            self.manual_backward(torch.stack(losses).mean())
            opt.step()


BROKEN_SHAPES: dict[str, tuple[str, str, Callable[[Case], nn.Module], str]] = {
    "never_cuts_in_forward": (
        "truncates_in_forward",
        "forward carries its state on with its graph",
        NeverCutsInForward,
        "graph_crosses_no_boundary",
    ),
    "forgets_in_forward": (
        "truncates_in_forward",
        "forward starts each of its chunks from no state",
        ForgetsInForward,
        "state_crosses_every_boundary",
    ),
    "forgets_between_chunks": (
        "zoneout",
        "one time step at a time, from zeros in every chunk",
        ForgetsBetweenChunks,
        "state_crosses_every_boundary",
    ),
    "self_not_detached": (
        "state_on_self",
        "the state on self is never detached, and the error is silenced",
        lambda c: SelfNotDetached(c.inputs, c.hidden, c.outputs, c.chunk),
        "graph_crosses_no_boundary",
    ),
    "self_not_reset": (
        "state_on_self",
        "the state on self is not reset with a new batch",
        lambda c: SelfNotReset(c.inputs, c.hidden, c.outputs, c.chunk),
        "state_starts_afresh_with_each_batch",
    ),
    "self_reset_in_each_chunk": (
        "state_on_self",
        "the state on self is reset with each chunk",
        lambda c: SelfResetInEachChunk(c.inputs, c.hidden, c.outputs, c.chunk),
        "state_crosses_every_boundary",
    ),
    "self_scaled": (
        "state_on_self",
        "the state on self is scaled at each boundary",
        lambda c: SelfScaled(c.inputs, c.hidden, c.outputs, c.chunk),
        "state_crosses_every_boundary",
    ),
    "cell_not_reset": (
        "state_in_cell",
        "the cell is reset only when the number of sequences changes",
        CellNotReset,
        "state_starts_afresh_with_each_batch",
    ),
    "only_h_detached": (
        "dataclass_on_self",
        "c of the dataclass keeps its graph",
        OnlyHDetached,
        "graph_crosses_no_boundary",
    ),
    "dict_not_detached": (
        "dict_in_place",
        "what `detach` returns is thrown away",
        DictNotDetached,
        "graph_crosses_no_boundary",
    ),
    "dict_not_cleared": (
        "dict_on_self",
        "the dict goes on into the next batch if the sizes allow it",
        DictNotCleared,
        "state_starts_afresh_with_each_batch",
    ),
    "one_layer_not_detached": (
        "reset_state",
        "one of two layers keeps its graph",
        OneLayerNotDetached,
        "graph_crosses_no_boundary",
    ),
    "one_layer_not_reset": (
        "reset_state",
        "one of two layers keeps its state over batches",
        OneLayerNotReset,
        "state_starts_afresh_with_each_batch",
    ),
    "swapped_pair": (
        "triple",
        "h and c change places at each boundary",
        SwappedPair,
        "state_crosses_every_boundary",
    ),
    "c_of_the_pair_forgotten": (
        "triple",
        "each chunk starts from a c of zeros",
        COfThePairForgotten,
        "state_crosses_every_boundary",
    ),
    "c_of_the_pair_attached": (
        "triple",
        "c keeps its graph, and the error is silenced",
        COfThePairAttached,
        "graph_crosses_no_boundary",
    ),
    "named_state_not_handed_on": (
        "state_by_name",
        "what is handed over by its name is always None",
        NamedStateNotHandedOn,
        "state_crosses_every_boundary",
    ),
    "past_not_detached": (
        "model_output",
        "the past keeps its graph, and the error is silenced",
        PastNotDetached,
        "graph_crosses_no_boundary",
    ),
    "cut_along_the_batch": (
        "time_major_batches",
        "batches with time first are cut along their sequences",
        CutAlongTheBatch,
        "chunks_tile_the_sequence",
    ),
    "not_shifted": (
        "shifted_tokens",
        "each token is its own target",
        NotShifted,
        "loss_is_the_chunks_own",
    ),
    "shifted_inside_the_chunk": (
        "next_input",
        "targets are shifted inside each chunk, whose last time step has none",
        ShiftedInsideTheChunk,
        "loss_is_the_chunks_own",
    ),
    "targets_of_another_sequence": (
        "target_per_sequence",
        "sequences are compared with each other's targets",
        TargetsOfAnotherSequence,
        "loss_is_the_chunks_own",
    ),
    "masked_state_dropped": (
        "episode_mask",
        "the state is dropped after each chunk, not only where episodes begin",
        MaskedStateDropped,
        "state_crosses_every_boundary",
    ),
    "chunks_never_detached": (
        "chunk_per_batch",
        "the state on self keeps its graph from one of the trainer's batches to the next",
        ChunksNeverDetached,
        "graph_crosses_no_boundary",
    ),
    "chunks_scaled": (
        "chunk_per_batch",
        "the state is scaled between two of the trainer's batches",
        ChunksScaled,
        "state_crosses_every_boundary",
    ),
    "stream_reset": (
        "stream",
        "each batch of a stream starts afresh",
        StreamReset,
        "state_crosses_every_boundary",
    ),
    "stream_attached": (
        "stream",
        "the state of a stream keeps its graph, and the error is silenced",
        StreamAttached,
        "graph_crosses_no_boundary",
    ),
    "stream_of_one_batch": (
        "stream_of_chunks",
        "the state is reset once, after the first chunk of all",
        StreamOfOneBatch,
        "state_crosses_every_boundary",
    ),
    "sequence_cleared": (
        "update_per_sequence",
        "the gradients of a batch are cleared before each chunk",
        SequenceCleared,
        "gradients_are_the_chunks_own",
    ),
    "sequence_not_weighted": (
        "update_per_sequence",
        "a shorter chunk counts as much as the others",
        SequenceNotWeighted,
        "loss_is_the_chunks_own",
    ),
    "sequence_never_cleared": (
        "update_per_sequence",
        "the gradients of a batch stay for the next one",
        SequenceNeverCleared,
        "events_come_in_a_legal_order",
    ),
    "ragged_unmasked": (
        "ragged",
        "what is behind a sequence's end counts as well",
        RaggedUnmasked,
        "loss_is_the_chunks_own",
    ),
    "ragged_dropped": (
        "ragged",
        "each chunk starts afresh",
        RaggedDropped,
        "state_crosses_every_boundary",
    ),
    "packed_stops_early": (
        "takes_packed",
        "the last time step of each sequence is left out",
        PackedStopsEarly,
        "chunks_tile_the_sequence",
    ),
    "windows_scored_whole": (
        "windows",
        "the loss is also of the time steps that a window only reaches back to",
        WindowsScoredWhole,
        "loss_is_the_chunks_own",
    ),
    "windows_too_short": (
        "windows",
        "gradients reach one time step less far back than promised",
        WindowsTooShort,
        "chunks_tile_the_sequence",
    ),
    "last_but_one_chunk": (
        "last_chunk",
        "the last time step is never trained on",
        LastButOneChunk,
        "chunks_tile_the_sequence",
    ),
    "sequence_updated_by_chunk": (
        "update_per_sequence",
        "the optimizer updates after each chunk, with gradients that add up",
        SequenceUpdatedByChunk,
        "each_chunk_updates_once",
    ),
    "summed_through_the_batch": (
        "summed_losses",
        "the one backward runs through the whole sequence",
        SummedThroughTheBatch,
        "graph_crosses_no_boundary",
    ),
    "summed_all_but_the_last": (
        "summed_losses",
        "a shorter last chunk is left out",
        SummedAllButTheLast,
        "chunks_tile_the_sequence",
    ),
    "odd_one_left_over": (
        "accumulates_two",
        "the last of an odd number of chunks gets no update",
        OddOneLeftOver,
        "each_chunk_updates_once",
    ),
    "accumulates_the_last": (
        "accumulates_two",
        "the gradients of two chunks are cleared between them",
        AccumulatesTheLast,
        "gradients_are_the_chunks_own",
    ),
    "accumulates_three": (
        "accumulates_two",
        "an update after every third chunk",
        AccumulatesThree,
        "each_chunk_updates_once",
    ),
    "clears_between_batches": (
        "accumulates_batches",
        "the gradients of a batch are cleared as the next begins",
        ClearsBetweenBatches,
        "gradients_are_the_chunks_own",
    ),
    "updates_every_batch": (
        "accumulates_batches",
        "an update after every batch, where two should share it",
        UpdatesEveryBatch,
        "each_chunk_updates_once",
    ),
    "random_overlap": (
        "random_lengths",
        "each chunk begins with the last time step of the one before",
        RandomOverlap,
        "chunks_tile_the_sequence",
    ),
    "grows_by_two": (
        "growing_lengths",
        "each chunk is two time steps longer than the one before",
        GrowsByTwo,
        "chunks_tile_the_sequence",
    ),
    "penalized_attached": (
        "penalized",
        "the state keeps its graph, and the loss is not told",
        PenalizedAttached,
        "graph_crosses_no_boundary",
    ),
    "looks_ahead_uncleared": (
        "looks_ahead",
        "the gradients of a wrapped optimizer are never cleared",
        LooksAheadUncleared,
        "events_come_in_a_legal_order",
    ),
    "scales_for_good": (
        "scales_its_loss",
        "gradients are not scaled down again",
        ScalesForGood,
        "loss_is_the_chunks_own",
    ),
    "frames_themselves": (
        "frames",
        "targets are the frames that come in",
        FramesThemselves,
        "loss_is_the_chunks_own",
    ),
    "flat_cell_attached": (
        "flat_tokens",
        "the cell keeps its graph",
        FlatCellAttached,
        "graph_crosses_no_boundary",
    ),
    "slots_attached": (
        "state_in_slots",
        "one of the state's slots keeps its graph",
        SlotsAttached,
        "graph_crosses_no_boundary",
    ),
}


def as_wired(name: str) -> Callable[[Case], Unusual]:
    """Put a broken module in the place of the right one, with its loss and on its batches."""
    loop, _, broken, _ = BROKEN_SHAPES[name]

    def build(case: Case) -> Unusual:
        like = right.OTHER[loop][1](case)
        return Unusual(broken(case), like.loss, like.batches, like.train)

    return build
