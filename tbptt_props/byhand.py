"""Updates that a loop makes itself, without any optimizer of torch's: told by what they moved."""

from __future__ import annotations

import torch
from torch import Tensor

from tbptt_props.trace import Rule


class ByHand:
    """Stands in a rule where an optimizer would: the loop's own arithmetic, which nobody knows."""


BY_HAND = ByHand()
ROUNDING = 8  # units in the last place: a parameter less a product, in whatever order


class Rate:
    """The one rate at which a loop takes gradients off its parameters, if it is that simple.

    Then no update owes anything to those before it. What is less simple, momentum say or a rate
    that decays, may be remembered where nobody can see it.
    """

    def __init__(self) -> None:
        """Begin before the first update."""
        self.steady = True
        self.rate: float | None = None

    def idle(self) -> None:
        """Note a gradient that moved nothing: a rate of zero, which is another one."""
        self.steady = False

    @torch.no_grad()
    def met(self, rule: Rule) -> None:
        """Look at one update more."""
        if self.rate is None:
            self.rate = _rate(rule)
        rate = self.rate
        self.steady = self.steady and all(
            _taken_off(rule.before[name], rule.after[name], rule.handed.get(name), rate)
            for name in rule.after.keys() & rule.before.keys()
        )


def _rate(rule: Rule) -> float:
    """Return by what the gradients were multiplied, if all were by the same."""
    along = square = 0.0
    for name, gradient in rule.handed.items():
        if name in rule.before and rule.before[name].shape == gradient.shape:
            along += float(((rule.before[name] - rule.after[name]) * gradient).sum())
            square += float((gradient * gradient).sum())
    return along / square if square else 0.0


def _taken_off(before: Tensor, after: Tensor, gradient: Tensor | None, rate: float) -> bool:
    """Tell whether `after` is `before` less `rate` times the gradient, but for rounding."""
    if before.shape != after.shape or not before.numel() or not before.is_floating_point():
        return before.shape == after.shape and torch.equal(before, after)
    step = torch.zeros_like(before) if gradient is None else rate * gradient
    size = float(before.abs().max() + step.abs().max())
    off = float((after - (before - step)).abs().max())
    return off <= ROUNDING * torch.finfo(before.dtype).eps * size
