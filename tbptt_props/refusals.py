"""What forward is handed, or returns, that can't be judged as a subject is wired.

Each refusal says what to do; where it is known how the subject has to be wired, a `WiringError`
carries that along, and is acted on without asking anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tbptt_props.compare import same, same_leaves
from tbptt_props.forward import Arguments, Forward
from tbptt_props.state import leaves
from tbptt_props.subject import ObservationError, Subject, WiringError
from tbptt_props.trace import Tensors
from tbptt_props.underway import Underway


class Refusals:
    """Looks at calls of a subject's forward, in the order in which its methods stand."""

    def __init__(self, subject: Subject, forward: Forward, underway: Underway) -> None:
        """Look at calls of `forward`, on the batch that is `underway`."""
        self.subject = subject
        self.forward = forward
        self.underway = underway
        self.name = f"{type(subject.module).__name__}.{subject.forward}"

    def parameters(self) -> None:
        """Refuse parameters that are put in the place of the module's own."""
        if not all(isinstance(p, nn.Parameter) for p in self.subject.module.parameters()):
            raise ObservationError(
                f"{type(self.subject.module).__name__} is called with parameters that are not its "
                "own, as torch.func.functional_call does: what updates them can't be seen"
            )

    def inputs(self, arguments: Arguments, *, handed: bool) -> None:
        """Refuse a state that comes first where the inputs are looked for, and they behind it.

        Raises:
            WiringError: it does, or it has to be watched first what the loop makes of the batch.
        """
        first = next(iter(leaves(arguments.x).values()), None)
        name = self.forward.inputs or arguments.way.inputs
        behind = arguments.state if self.forward.inputs else arguments.others[1]
        if self.subject.state or not name or self.underway.places(behind) is None:
            return
        if self.underway.places(arguments.x) is not None or self.underway.holds(first):
            return
        if first is not None and self.underway.followed(first) is not None:
            return
        # It may as well be noise, with inputs behind it, and then the state.
        further = first is not None and self.forward.parameters[2:]
        which = "..." if further or not (handed or not self.forward.inputs) else name
        raise WiringError(
            f"{self.name} takes a part of the batch behind {name}, where the inputs are looked "
            f"for: say which argument is the state with Subject(..., state={which!r})",
            {} if which == "..." else {"state": (name,)},
        )

    def a_state(self, arguments: Arguments) -> None:
        """Refuse a part of the batch where the state is looked for: targets, say, or a mask."""
        if self.subject.state or not self.underway.holds(arguments.state):
            return
        _, named = arguments.others
        further = self.forward.parameters[2:]
        found = next((n for n in further if not self.underway.holds(named.get(n))), None)
        found = found or self.forward.star
        if not found:
            return
        raise WiringError(
            f"{self.name} takes a part of the batch as its second argument, where the state is "
            f"looked for: say which one is the state with Subject(..., state={found!r})",
            {"state": (found,)},
        )

    def handed_on(
        self, arguments: Arguments, last: Any, filled: Any, earlier: Sequence[Any]
    ) -> None:
        """Refuse a state that goes back into forward where it is not looked for.

        Args:
            arguments: What forward is handed.
            last: The state that the call before returned.
            filled: What the call before was handed and filled, if that may be the state.
            earlier: The states returned by the calls of the chunk under way: where sequences take
                turns, it is one of them.
        """
        returned, state = leaves(last), leaves(arguments.state)
        self._filled(arguments, leaves(filled), returned)
        if self.subject.state or not returned or _shapes(state) == _shapes(returned):
            return
        ways = (self.forward.handing_on(arguments, one) for one in (last, *earlier))
        found = next(filter(None, ways), ())
        others = leaves(arguments.others).values()
        if found:
            raise WiringError(
                f"{self.name} takes the state that it returned as {found[0]}: say so with "
                f"Subject(..., state={found[0]!r})",
                {"state": found},
            )
        among = any(same(one, leaf) for one in others for leaf in returned.values() if leaf.any())
        apart = len(state) != len(returned) and (state or self.forward.came_apart)
        if among or (apart and self.forward.spread):
            raise ObservationError(
                f"{self.name} returns a state of {len(returned)} tensors and takes {len(state)} of "
                "them where a state is looked for: say which arguments are the state with "
                "Subject(..., state=...), and which of what it returns with Subject(..., "
                "outputs=...)"
            )

    def _filled(self, arguments: Arguments, filled: Tensors, returned: Tensors) -> None:
        """Refuse what is returned for a state, if one that was filled in place goes in again."""
        state = leaves(arguments.state)
        if not filled or state.keys() != filled.keys() or _shapes(state) != _shapes(filled):
            return
        like_both = _shapes(filled) == _shapes(returned)
        if like_both and (same_leaves(filled, returned) or not same_leaves(state, filled)):
            return
        if not self.forward.depends_on_state(arguments):
            return
        name = self.forward.handed[0]
        raise WiringError(
            f"{self.name} fills {name} in place, goes on from it, and returns something else: say "
            f"so with Subject(..., state={name!r})",
            {"state": (name,)},
        )

    def pair(self, returned: Any, arguments: Arguments) -> tuple[Any, Any] | None:
        """Return (prediction, state); what `outputs` raises is no fault of the loop's."""
        if self.subject.outputs is None:
            return self.forward.came_out(returned, arguments)
        try:
            found = self.forward.came_out(returned, arguments)
        except Exception as error:
            raise ObservationError(
                f"outputs raised {type(error).__name__}: {error} on {_kind(returned)}"
            ) from error
        if found is None:
            raise ObservationError(
                "outputs must return a pair (prediction, state) whose prediction is a tensor, or "
                "several of the same sequences and time steps"
            )
        return found

    def no_pair(
        self, returned: Any, *, guessed: Sequence[str], several: bool, layer: str | None
    ) -> WiringError:
        """Return the refusal of what is no (prediction, state), with how to wire it.

        Args:
            returned: What forward returned.
            guessed: The attributes that may be the state.
            several: Whether it is several predictions.
            layer: The one recurrent layer, if forward has run it.
        """
        instead: dict[str, Any] = {"state": guessed} if guessed else {}
        if not instead and layer and isinstance(returned, torch.Tensor):
            # Its state never leaves forward, which may cut the sequence itself.
            instead = {"forward": layer, "loss": None}
        return WiringError(
            f"{self.name} must return a pair (prediction, state) whose prediction is a tensor, got "
            f"{_kind(returned)}; name another call with Subject(..., forward='...') if this is not "
            "the one that runs a chunk, or say where the state is with Subject(..., state='...'), "
            "or how to make a pair of what it returns with Subject(..., outputs=...)",
            {"outputs": _as_it_is} if several else instead,
        )


def _shapes(tensors: Tensors) -> list[torch.Size]:
    return [leaf.shape for leaf in tensors.values()]


def _as_it_is(returned: Any) -> Any:
    return returned


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
