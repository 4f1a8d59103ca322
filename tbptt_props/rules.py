"""An update made again, by the optimizer's own rule and from what it remembered."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tbptt_props.byhand import BY_HAND
from tbptt_props.state import map_tensors
from tbptt_props.trace import Outcome, Rule, Tensors


def updated(outcome: Outcome, module: nn.Module) -> tuple[tuple[Tensors, ...], str]:
    """Repeat the updates: the same optimizer, settings, memory and gradients.

    A single one, which is the rule, is made of the module's own parameters, to save a copy.
    """
    if any(rule.optimizer is BY_HAND for rule in outcome.rules):
        return (), "an optimizer of torch's: updates are made by hand"
    after: list[Tensors] = []
    parameters = dict(module.named_parameters())
    for rule in outcome.rules:
        try:
            single = len(outcome.rules) == 1 and rule.before.keys() == parameters.keys()
            copies = _loaded(parameters, rule) if single else _cloned(rule)
            apply_rule(rule, copies)
        except Exception as error:  # whatever a stranger's optimizer raises out of its place
            return (), f"{type(rule.optimizer).__name__} could not be repeated ({error})"
        after.append({name: p.detach() for name, p in copies.items()})
        for parameter in copies.values():
            parameter.grad = None
    return tuple(after), ""


def _cloned(rule: Rule) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in rule.before.items()}


@torch.no_grad()
def _loaded(parameters: dict[str, nn.Parameter], rule: Rule) -> dict[str, nn.Parameter]:
    for name, value in rule.before.items():
        parameters[name].copy_(value)
    return parameters


def apply_rule(
    rule: Rule, copies: Mapping[str, nn.Parameter], gradients: Tensors | None = None
) -> Optimizer:
    """Make one update of `copies` by `rule`, in place; return the optimizer that made it."""
    if wraps_another(rule.optimizer):  # whose live memory, and parameters, an update would change
        raise TypeError("it wraps another optimizer")
    if has_hooks(rule.optimizer):
        raise TypeError("hooks of its own may change what it meets and what it leaves")
    handed = rule.handed if gradients is None else gradients
    spares = type(rule.optimizer).__module__.startswith("torch.optim.")  # gradients, in its rule
    groups = []
    memory: dict[Any, Any] = {}
    for group in rule.groups:
        members = [copies[name] for name in group["params"] if name]
        for name in filter(None, group["params"]):
            grad = handed.get(name)
            copies[name].grad = grad if grad is None or spares else grad.clone()
            if rule.memory.get(name):
                memory[copies[name]] = map_tensors(Tensor.clone, dict(rule.memory[name]))
        groups.append({**copy.copy(dict(group)), "params": members})
    optimizer = object.__new__(type(rule.optimizer))
    optimizer.__dict__.update(_own_attributes(rule.optimizer))
    optimizer.__setstate__(
        {"defaults": rule.optimizer.defaults, "state": _defaulting(memory), "param_groups": groups}
    )
    optimizer.step()
    return optimizer  # type: ignore[no-any-return]


def wraps_another(optimizer: Any) -> bool:
    """Tell whether an optimizer keeps another one, and so has a memory besides its own."""
    return any(isinstance(value, Optimizer) for value in vars(optimizer).values())


def has_hooks(optimizer: Any) -> bool:
    """Tell whether hooks run around the steps of this very optimizer, within what torch's see."""
    kinds = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    return any(vars(optimizer).get(kind) for kind in kinds)


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Return what an optimizer keeps besides torch's own, which `__setstate__` makes anew."""
    return {
        key: value
        for key, value in vars(optimizer).items()
        if not key.startswith("_") and key not in ("defaults", "state", "param_groups", "step")
    }


def _defaulting(memory: dict[Any, Any]) -> Any:
    from collections import defaultdict

    return defaultdict(dict, memory)
