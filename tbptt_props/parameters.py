"""A module's parameters under watch: what they were when last looked at, and what moved since."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from tbptt_props.compare import close, difference, same
from tbptt_props.embeddings import only_renormed
from tbptt_props.state import dense
from tbptt_props.trace import Difference, Tensors


class Parameters:
    """The parameters of a module, by name, with the values that they had when last looked at."""

    def __init__(self, module: nn.Module) -> None:
        """Look after the parameters of `module`, none of whose values is known yet."""
        self.module = module
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.known: dict[str, Tensor] = {}  # their values when last looked at
        self.known_when = "training began"
        self.ever_trainable: frozenset[str] = frozenset()  # in some forward
        self.moves: list[tuple[str, Difference]] = []  # that no update has made

    def trainable(self) -> frozenset[str]:
        """Name those that want a gradient, as forward is about to be called."""
        now = frozenset(n for n, p in self.module.named_parameters() if p.requires_grad)
        self.ever_trainable |= now
        return now

    def look(self, until: str, is_trained: Callable[[str], bool]) -> None:
        """Look at the parameters; what changed since they were last looked at was no update."""
        now: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            before = self.known.get(name)
            if before is not None and same(parameter, before):
                continue
            now[name] = parameter.detach().clone()
            if before is None or before.shape != now[name].shape or not is_trained(name):
                continue
            if not only_renormed(self.module, parameter, before):
                moved = difference(name, now[name], before)
                self.moves.append((f"between {self.known_when} and {until}", moved))
        self._take(now, until)

    def take(self) -> None:
        """Look at the parameters right after an update, which may move them."""
        now = {
            name: parameter.detach().clone()
            for name, parameter in self.module.named_parameters()
            if name not in self.known or not same(parameter, self.known[name])
        }
        self._take(now, "the update")

    def _take(self, now: dict[str, Tensor], when: str) -> None:
        if now:
            self.known = {**self.known, **now}  # anew: snapshots hold the one before
        self.known_when = when

    def moved(self) -> set[str]:
        """Name those that are not as they were when they were last looked at."""
        return {
            name
            for name, parameter in self.module.named_parameters()
            if name in self.known and not same(parameter, self.known[name])
        }

    def taken_moves(self) -> list[tuple[str, Difference]]:
        """Hand over the moves that no update has made: they are told of once."""
        moves, self.moves = self.moves, []
        return moves

    def came_back_to(self, began: Tensors) -> bool:
        """Tell whether the parameters are again as they `began`, but for rounding."""
        return all(close(p, self.known[name], rounded=False) for name, p in began.items())

    def gradients(self, handed: Tensors | None = None) -> Tensors:
        """Copy the gradients, or take those of `handed` that they are equal to."""
        found = {}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is None:
                continue
            gradient = dense(parameter.grad.detach())
            known = handed.get(name) if handed is not None else None
            equal = known is not None and same(gradient, known)
            found[name] = known if equal and known is not None else gradient.clone()
        return found

    def has_gradient(self, name: str) -> bool:
        """Tell whether a gradient but zero stands in a parameter's `grad`."""
        return stands(self.module.get_parameter(name).grad)


def stands(gradient: Tensor | None) -> bool:
    """Tell whether there is a gradient, and it is not zero."""
    return gradient is not None and bool(dense(gradient).any())
