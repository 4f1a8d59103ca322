"""The batch that is trained on, as the loop has it: which rows of it forward is handed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tbptt_props.batch import Batch
from tbptt_props.compare import difference, same
from tbptt_props.lineage import Lineage
from tbptt_props.places import by_memory, locate
from tbptt_props.state import leaves
from tbptt_props.subject import Subject, WiringError
from tbptt_props.trace import Difference


class Underway:
    """The batch under way, beside a copy of each that nobody touches."""

    def __init__(
        self, subject: Subject, pristine: Sequence[Batch], busy: Callable[[], bool]
    ) -> None:
        """Begin before the first of the `pristine` batches; look away while `busy`."""
        self.subject = subject
        self.pristine = pristine
        self.index = -1
        self.begun = False  # and not yet ended
        self.changed: list[tuple[int, Difference]] = []  # of which batch, and where
        self.lineage = Lineage(self._its_own, busy) if subject.follows else None
        self._live: Batch | None = None

    def begin(self, index: int, whole: Any) -> None:
        """Turn to batch `index`, as the loop gets it."""
        self.index, self.begun = index, True
        if self.lineage is not None:
            self.lineage.forget()
        try:
            self._live = Batch.of(whole, self.subject.parts)
        except Exception:  # whoever trains may have wrapped or moved it
            self._live = None

    def end(self, index: int) -> None:
        """Note what the loop has changed in batch `index`."""
        live, self._live, self.begun = self._live, None, False
        if live is None or not 0 <= index < len(self.pristine):
            return
        kept = self.pristine[index]
        after, before = (
            {"inputs": batch.inputs, **leaves(batch.targets, "targets")} for batch in (live, kept)
        )
        for name, now in after.items():
            then = before.get(name)
            if then is None or now.shape != then.shape or same(now, then):
                continue
            self.changed.append((index, difference(name, now, then)))

    def following(self) -> contextlib.AbstractContextManager[object]:
        """Follow, within the block, what is made of the batch, if the subject asks for it."""
        return self.lineage or contextlib.nullcontext()

    def holds(self, value: Any) -> bool:
        """Tell whether a tensor lies in the memory of any part of the batch."""
        if not isinstance(value, Tensor) or self._live is None or not value.numel():
            return False
        place = value.untyped_storage().data_ptr()
        parts = leaves(self._live.whole).values()
        return any(part.untyped_storage().data_ptr() == place for part in parts)

    def places(self, whole: Any) -> Tensor | None:
        """Return the place of each row that forward is handed, (..., 2), if it is the batch's."""
        x = whole if isinstance(whole, Tensor) else next(iter(leaves(whole).values()), None)
        if x is None or not self._is_known:
            return None
        live = self._live.inputs if self._live else None
        if isinstance(whole, PackedSequence):
            return _unpacked(whole, locate(whole.data, live, self.pristine[self.index].inputs))
        return locate(x, live, self.pristine[self.index].inputs)

    def followed(self, whole: Any) -> Tensor | None:
        """Tell from what the loop made of the batch where inputs are from, (..., 2).

        Raises:
            WiringError: what it makes has not been followed from the beginning.
        """
        if not isinstance(whole, Tensor) or not self._is_known:
            return None
        if self.lineage is not None:
            return self.lineage.places(whole)
        raise WiringError(
            f"{type(self.subject.module).__name__}.{self.subject.forward} is handed other numbers "
            "than the batch's: have them followed with Subject(..., follows=True)",
            {"follows": True},
        )

    @property
    def _is_known(self) -> bool:
        return 0 <= self.index < len(self.pristine)

    def _its_own(self, tensor: Tensor) -> Tensor | None:
        """Return the places of a part of the batch under way, told from its memory."""
        live = self._live.inputs if self._live else None
        return None if live is None else by_memory(tensor, live)


def _unpacked(packed: PackedSequence, places: Tensor | None) -> Tensor | None:
    """Lay the places of packed inputs out as (B, K, 2), if all sequences have K time steps."""
    if places is None or len(set(packed.batch_sizes.tolist())) > 1:
        return places
    laid_out = places.reshape(len(packed.batch_sizes), -1, 2).transpose(0, 1)
    order = packed.unsorted_indices
    return laid_out if order is None else laid_out[order.cpu()]
