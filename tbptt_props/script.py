"""A kept case as a script of plain torch and Lightning, which fails as long as the loop is broken.

It trains the module on the numbers of the case, writes down its calls of forward and its updates,
and asserts what was found broken. The kit has no part in that, but where the module is built.
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from tbptt_props.kept import Kept
from tbptt_props.subject import Subject, resolve

HEAD = '''\
"""{name} is broken for {subject}:

{found}.

Needs torch and Lightning, and what builds the module: `build` is where it was described for
tbptt-props. To do without that, put in your own lines there.
"""

import copy
import sys
from itertools import groupby, pairwise
from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, "")  # modules are looked for where this is run

# The case: its sizes, and its numbers, which grow from the seed.
sizes = SimpleNamespace({sizes})
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(sizes.seed)


def normal(*shape):
    return torch.randn(*shape, generator=generator)


shapes = {shapes}  # sequences and time steps of each batch
batches = [(normal(b, t, sizes.inputs), normal(b, t, sizes.outputs)) for b, t in shapes]

# The module as it is built for its tests.
{build}
torch.manual_seed(sizes.seed)
subject = build(case=sizes)
module, loss_of = subject.module.double(), subject.loss
twin = copy.deepcopy(module)  # to compare with

# Calls of forward and updates are written down as they come.
calls, updates = [], []
trained = module{part}
forward = trained.{method}


def value(state):
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {{key: value(item) for key, item in state.items()}}
    return type(state)(map(value, state)) if isinstance(state, (list, tuple)) else state


def tensors(state):
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state
    return [t for i in items for t in tensors(i)] if isinstance(state, (dict, list, tuple)) else []


def noted(x, *others, **named):
    handed = (*others, *named.values(), None)[0]
    call = SimpleNamespace(x=value(x), others=value(others), named=value(named))
    call.attached = any(t.requires_grad for t in tensors(handed))
    call.state, call.updates = tensors(value(handed)), len(updates)
    call.weights = value(dict(module.state_dict()))
    result = forward(x, *others, **named)
    call.after = tensors(value(result[1])) if isinstance(result, tuple) else []
    calls.append(call)
    return result


def place(call):
    """Return the batch, the first and the last time step that a call was handed."""
    for x in (call.x, call.x.transpose(0, 1)):
        for i, (inputs, _) in enumerate(batches):
            for t in range(inputs.shape[1] - x.shape[1] + 1):
                if torch.equal(inputs[:, t : t + x.shape[1]], x):
                    return i, t, t + x.shape[1] - 1
    return None


def own_loss(call):
    """Run a call again by itself; return the loss against its own targets."""
    twin.load_state_dict(call.weights)
    i, first, last = place(call)
    result = twin{part}.{method}(value(call.x), *value(call.others), **value(call.named))
    prediction = result[0] if isinstance(result, tuple) else result
    return loss_of(prediction, batches[i][1][:, first : last + 1])


class Batches:  # a list would be taken for several loaders
    def __iter__(self):
        return iter([(x.clone(), y.clone()) for x, y in batches])

    def __len__(self):
        return len(batches)


{before}trained.{method} = noted
register_optimizer_step_pre_hook(lambda *step: updates.append({update}))
trainer = pl.Trainer(
    accelerator="cpu",
    devices=1,
    max_epochs=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, Batches())

# What is broken.
{asserted}
print("fixed: {name} is not broken here")
'''

TILES = """\
chunks = [[place(call) for call in group] for _, group in groupby(calls, lambda c: {chunk_of})]
found = [None if None in c else (c[0][0], c[0][1], c[-1][2]) for c in chunks]
due = {due}  # batch, first and last time step of each chunk
assert found == due, f"chunks {{found}}, but should be {{due}}"
"""

CROSSES = """\
for before, after in pairwise(calls):
    if place(before) and place(after) and place(before)[0] == place(after)[0]:
        same = len(before.after) == len(after.state)
        same = same and all(map(torch.equal, before.after, after.state))
        assert same, f"time steps {place(after)[1:]} do not start in the state of those before"
"""

AFRESH = """\
for before, after in pairwise(calls):
    if place(before) and place(after) and place(before)[0] != place(after)[0]:
        old = torch.cat([t.flatten() for t in before.after])
        new = torch.cat([t.flatten() for t in after.state] or [old[:0]])
        assert not torch.isin(new[new != 0], old).any(), "a batch starts in the state of another"
"""

DETACHED = """\
for call in calls[1:]:
    assert not call.attached, f"time steps {place(call)[1:]} start in a state with a graph"
"""

BEFORE_GRADIENTS = """\
def check_gradients():
    \"\"\"Hold the gradients that an update meets against those of the last chunk's own loss.\"\"\"
    with torch.enable_grad():
        loss = own_loss(calls[-1])
        due = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True)
    for (name, parameter), grad in zip(module.named_parameters(), due):
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = torch.zeros_like(parameter) if grad is None else grad
        assert torch.allclose(found, grad, rtol=1e-6, atol=1e-10), (
            f"gradient of {name} at time steps {place(calls[-1])[1:]}: {found.flatten()[:3]}..., "
            f"but should be {grad.flatten()[:3]}..."
        )


"""

UPDATES = """\
due = {chunks}
assert len(updates) == due, f"{{len(updates)}} updates, but should be {{due}}"
"""

SPANS = """\
direction = [torch.randn_like(p) for p in twin.parameters()]


def moved(call, nudge):
    weights = dict(zip(dict(twin.named_parameters()), direction))
    moved = {n: w + nudge * weights[n] if n in weights else w for n, w in call.weights.items()}
    with torch.no_grad():
        return own_loss(SimpleNamespace(**{**vars(call), "weights": moved})).item()


for call in calls:
    grads = torch.autograd.grad(own_loss(call), list(twin.parameters()), allow_unused=True)
    by_gradients = sum((g * d).sum().item() for g, d in zip(grads, direction) if g is not None)
    by_values = (moved(call, 1e-5) - moved(call, -1e-5)) / 2e-5
    assert abs(by_gradients - by_values) < 1e-5 * max(1, abs(by_values)), (
        f"time steps {place(call)[1:]}: slope of the loss {by_gradients} by gradients, "
        f"but should be {by_values} by values"
    )
"""

ONE_CHUNK = """\
used, first = trainer.optimizers[0], calls[0]
twin.load_state_dict(first.weights)
optimizer = type(used)(twin.parameters(), **used.defaults)
(x, y), = batches
prediction = twin{part}.{method}(x, *first.others, **first.named)[0]
loss_of(prediction, y).backward()
optimizer.step()
for (name, found), due in zip(module.named_parameters(), twin.parameters()):
    assert torch.allclose(found, due, rtol=1e-9, atol=1e-12), (
        f"{{name}} after one ordinary update: {{found.flatten()[:3]}}..., "
        f"but should be {{due.flatten()[:3]}}..."
    )
"""

FROM_A_FILE = """\
import importlib.util  # noqa: E402

spec = importlib.util.spec_from_file_location("built", {file!r})
built = importlib.util.module_from_spec(spec)
sys.modules["built"] = built
spec.loader.exec_module(built)
build = built.{name}.tbptt_build  # the function that is decorated"""


class NoScript(ValueError):
    """A case that no script can be made of; the message says why."""


def script_of(kept: Kept, subject: Subject) -> str:
    """Return a script that fails as long as a kept case breaks its property.

    Args:
        kept: the case, and where what was judged is built.
        subject: what is built for it.

    Raises:
        NoScript: the property can't be shown so, or the loop is wired otherwise than most.
    """
    _require_plain(subject)
    shown = _shown(kept)
    needs_loss = shown in (GRADIENTS, SPANS, ONE_CHUNK)
    if needs_loss and subject.loss is None:
        raise NoScript(f"a script that shows {kept.name} needs Subject(..., loss=...)")
    if shown == GRADIENTS and (subject.contract.clips or subject.contract.adds_up):
        raise NoScript("gradients that are clipped or added up are not shown by a script")
    alike = kept.case if subject.contract.carry == "within" else _alike(kept)
    chunks = [
        (i, start, stop - 1)
        for i, (_, steps) in enumerate(alike.sizes())
        for start, stop in subject.contract.plan(kept.case, steps)
    ]
    part, method = _called(subject)
    filled = shown
    if shown in (TILES, UPDATES, ONE_CHUNK):
        chunk_of = "id(c)" if subject.contract.adds_up else "c.updates"
        filled = shown.format(
            due=chunks, chunks=len(chunks), chunk_of=chunk_of, part=part, method=method
        )
    return HEAD.format(
        name=kept.name,
        subject=kept.subject,
        found=textwrap.fill(kept.found or "it was found broken", 96),
        sizes=", ".join(f"{size}={value}" for size, value in asdict(kept.case).items()),
        shapes=list(alike.sizes()),
        build=_builder(kept.build),
        part=part,
        method=method,
        before=BEFORE_GRADIENTS if shown == GRADIENTS else "",
        update="check_gradients()" if shown == GRADIENTS else "step",
        asserted=filled.rstrip("\n"),
    )


GRADIENTS = 'assert updates, "no update was made"\n'
TRAINS = "# Training has come to its end, which it did not.\n"
SHOWN = {
    "training_reaches_the_end": TRAINS,
    "chunks_tile_the_sequence": TILES,
    "state_crosses_every_boundary": CROSSES,
    "state_starts_afresh_with_each_batch": AFRESH,
    "graph_crosses_no_boundary": DETACHED,
    "loss_is_the_chunks_own": GRADIENTS,
    "gradients_are_the_chunks_own": GRADIENTS,
    "gradients_span_the_whole_chunk": SPANS,
    "events_come_in_a_legal_order": GRADIENTS,
    "each_chunk_updates_once": UPDATES,
    "one_chunk_is_one_ordinary_update": ONE_CHUNK,
}


def _shown(kept: Kept) -> str:
    """Return the part that shows what was found."""
    if kept.name not in SHOWN:
        raise NoScript(f"no script of plain torch shows {kept.name}")
    if "without any effect" in kept.found or "at time step" in kept.found.split(":")[0]:
        if "targets of" in kept.found:
            return GRADIENTS
        raise NoScript(f"no script of plain torch shows this: {kept.found}")
    if kept.name == "graph_crosses_no_boundary" and "incoming" not in kept.found:
        return GRADIENTS
    return SHOWN[kept.name]


def _require_plain(subject: Subject) -> None:
    for name in ("state", "batches", "parts", "outputs", "train", "around", "disturbed"):
        if getattr(subject, name):
            raise NoScript(f"no script can be made of a subject with {name}=")


def _alike(kept: Kept) -> Any:
    """Return the case with as many sequences in each batch, as where a state goes on."""
    return replace(kept.case, seed=kept.case.seed & ~1)


def _called(subject: Subject) -> tuple[str, str]:
    """Return the part of the module and its method that run a chunk."""
    called: Any = resolve(subject.module, subject.forward)
    path = subject.forward if isinstance(called, nn.Module) else subject.forward.rpartition(".")[0]
    method = "forward" if isinstance(called, nn.Module) else subject.forward.rpartition(".")[2]
    return f".{path}" if path else "", method


def _builder(build: str) -> str:
    where, _, name = build.partition(":")
    if where.endswith(".py"):
        return FROM_A_FILE.format(file=where, name=name)
    return f"from {where} import {name} as build  # noqa: E402"
