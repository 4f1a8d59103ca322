"""Finds out how a LightningModule is handed over to be judged, and writes a test file that does so.

Every guess is a draft of the very file that is written: it is run, the module trains, and what was
seen tells how well it fits. What can't be known is left in the file as a question.

Shapes: B sequences, T time steps, I inputs, O outputs.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tbptt_props.case import Case
from tbptt_props.judge import judge
from tbptt_props.observation import observe
from tbptt_props.process import undisturbed
from tbptt_props.report import WIDTH, Report
from tbptt_props.state import leaves
from tbptt_props.subject import ObservationError, Subject
from tbptt_props.trace import Span, counted, spanned
from tbptt_props.train import is_lightnings

PROBE = Case(batch=3, steps=7, chunk=2, inputs=4, hidden=5, outputs=6, batches=2)
ONE_CHUNK = replace(PROBE, steps=2, batches=1)  # on which a loop trains that never detaches
LONGER = (70, 400, 1100)  # time steps to try, until a module that has its own K cuts a sequence
CLASSES = 4  # of targets that are labels: with a single one there would be nothing to learn
QUESTION = "QUESTION: "

# What people call these arguments of a module, and what to hand over for them.
CALLED = {
    "case.chunk": r"k|k1|chunks?|(chunk|window|bptt|tbptt|truncation|unroll|segment)_?"
    r"(size|len|length|steps)?|(t?bptt|truncated_bptt|n|num|unroll|time)_steps|seq_len(gth)?|"
    r"truncate(_every|_after)?|split_size|k_steps|trunc(_len|_length|_steps)?",
    "case.inputs": r"inputs?|(input|in|n_in|x|obs|d_in)_?(size|dim|dims|features|channels)?|d_in|"
    r"(n|num)_(inputs?|features|in|channels)|features|n_features_in|feature_(size|dim)",
    "case.hidden": r"hidden|h|units|width|(hidden|h|rnn|lstm|gru|state|model|d)_?"
    r"(size|dim|dims|units|features|hidden|model|channels)|(n|num)_(hidden|hid|units)|nhid",
    "case.outputs": r"outputs?|out|classes|(output|out|n_out|y|target|d_out)_?"
    r"(size|dim|dims|features|channels)|(n|num)_(outputs?|out|classes|targets)|d_out",
    "case.batch": r"batch|batch_size|bs|b",
    "VOCABULARY": r"vocab(ulary)?|(vocab|vocabulary|dict|alphabet)_?size|n_?(tokens?|vocab|chars)|"
    r"num_(tokens|embeddings|chars|symbols)|ntokens?",
    "1": r"(num|n)_?layers|layers|depth",
    "0.1": r"lr|learning_rate|alpha|eta",
    "0.0": r"(p_?)?drop(out)?(_p|_rate|_prob)?|weight_decay|wd",
    "8": r"(emb|embed|embedding)_?(size|dim)?|ninp|emsize",
}

# What a failure is not, if it is promised: tried where a property is broken.
PROMISES = (
    'tail="drop"',
    'carry="across"',
    'update="batch"',
    'update="batch", weight="mean"',
    'update="batch", weight="steps"',
    'tail="drop", carry="across"',
    'tail="drop", update="batch"',
)


class Unknown(Exception):
    """The module can't be tried out; the message says why."""


@dataclass(frozen=True)
class Layout:
    """What a batch may be: how it is made, and how it is told of."""

    says: str
    makes: str = ""  # source of `batches(case)`, or none where it is `case.tensors()`
    parts: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """How a loss is handed over."""

    given: str = ""  # what stands behind `loss=`; none is handed over where it is empty
    source: str = ""  # the module that it is imported from
    imported: str = ""  # by this name
    written: str = ""  # the expression that the test file's own `loss` returns

    def __str__(self) -> str:
        """Write it as a person would."""
        return self.written or self.given or "not known"


@dataclass(frozen=True)
class Draft:
    """A test file, part by part."""

    module: str
    name: str
    arguments: tuple[tuple[str, str], ...] = ()
    layout: Layout = field(default_factory=lambda: Layout("(inputs (B, T, I), targets (B, T, O))"))
    loss: Loss = field(default_factory=Loss)
    contract: str = ""
    fixed: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 0
    questions: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of a case that are fixed."""
        return {**self.fixed, **self.layout.fixed}

    @property
    def call(self) -> str:
        """The call that builds the module."""
        return f"{self.name}({', '.join(f'{name}={given}' for name, given in self.arguments)})"

    @property
    def test(self) -> str:
        """The name of the test."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", self.name)
        return f"test_{words.lower()}"

    def source(self) -> str:
        """Write the test file."""
        return "\n".join([*self._head(), "", "", *self._body()]) + "\n"

    def build(self) -> Callable[[Case], Subject]:
        """Run the test file without what makes it a test; return the function that it defines."""
        lines = [line for line in self._body() if not line.startswith("@")]
        names: dict[str, Any] = {"__name__": "tbptt_props.draft"}
        exec("\n".join([*self._head(), *lines]), names)
        return names[self.test]  # type: ignore[no-any-return]

    def _head(self) -> Iterator[str]:
        yield f'"""Is the truncated backpropagation through time of {self.name} right?"""'
        yield ""
        if self.layout.makes:
            yield from ["from typing import Any", ""]
        before = len("torch") if "torch." in self.layout.makes else 0
        if before:
            yield "import torch"
        if self.loss.written:
            yield "from torch import Tensor"
        own = self.loss.source == self.module
        if self.loss.imported and not own:
            yield f"from {self.loss.source} import {self.loss.imported}"
        if before or self.loss.written or (self.loss.imported and not own):
            yield ""
        yield "import tbptt_props as tb"
        names = sorted([self.name, self.loss.imported] if own else [self.name])
        yield f"from {self.module} import {', '.join(names)}"
        if self.vocabulary:
            yield from ["", f"VOCABULARY = {self.vocabulary}"]

    def _body(self) -> Iterator[str]:
        if self.layout.makes:
            yield from [*self.layout.makes.splitlines(), "", ""]
        if self.loss.written:
            yield "def loss(prediction: Tensor, target: Tensor) -> Tensor:"
            yield from [f"    return {self.loss.written}", "", ""]
        for question in self.questions:
            yield from textwrap.wrap(
                QUESTION + question, 98, initial_indent="# ", subsequent_indent="# "
            )
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
        yield f"@tb.conformance({sizes})"
        yield f"def {self.test}(case: tb.Case) -> tb.Subject:"
        arguments = [f"{name}={given}" for name, given in self.arguments]
        yield from _called("    module = ", self.name, arguments)
        given = {
            "loss": self.loss.given,
            "batches": "batches" if self.layout.makes else "",
            "parts": self.layout.parts,
            "contract": f"tb.Contract({self.contract})" if self.contract else "",
        }
        told = [f"{name}={value}" for name, value in given.items() if value]
        yield from _called("    return ", "tb.Subject", ["module", *told])


def _called(start: str, name: str, arguments: Sequence[str]) -> Iterator[str]:
    """Write a call on one line, or one argument a line where it is too long."""
    line = f"{start}{name}({', '.join(arguments)})"
    if len(line) <= 98:
        yield line
    else:
        yield from [f"{start}{name}(", *(f"        {one}," for one in arguments), "    )"]


# What a batch may be -------------------------------------------------------------------------

TARGETS = {
    "targets (B, T, O)": ("y", {}),
    "labels (B, T)": ("y.argmax(-1)", {"outputs": CLASSES}),
    "one target for each sequence (B, O)": ("y[:, -1]", {}),
    "one label for each sequence (B,)": ("y[:, -1].argmax(-1)", {"outputs": CLASSES}),
}


def layouts(keys: Sequence[str], *, tokens: bool, classes: bool) -> Iterator[Layout]:
    """Yield what a batch may be, the likeliest first.

    Args:
        keys: by which names the loop takes parts out of a batch; none if it is no dict.
        tokens: whether inputs are numbers of tokens.
        classes: whether how many outputs there are can be chosen.
    """
    for time_first in (False, True):
        if tokens:
            yield from _of_tokens(keys, time_first=time_first)
        for says, (target, fixed) in TARGETS.items():
            per_step = not says.startswith("one")
            yield _of_numbers(
                ("inputs (B, T, I)", says),
                ("x", target),
                keys,
                swapped=(time_first, time_first and per_step),
                fixed=fixed if classes else {},
            )


def _of_numbers(
    says: tuple[str, str],
    parts: tuple[str, str],
    keys: Sequence[str],
    *,
    swapped: tuple[bool, bool],
    fixed: Mapping[str, int],
) -> Layout:
    whole = [f"{p}.transpose(0, 1)" if s else p for p, s in zip(parts, swapped, strict=True)]
    told = [t.replace("(B, T", "(T, B") if s else t for t, s in zip(says, swapped, strict=True)]
    if whole == ["x", "y"] and not keys:
        return Layout(_contained(told, keys), fixed=fixed)
    made = f"[{_contained(whole, keys)} for x, y in case.tensors()]"
    return Layout(_contained(told, keys), _function(made), _taken_apart(swapped, keys), fixed)


def _of_tokens(keys: Sequence[str], *, time_first: bool) -> Iterator[Layout]:
    shape = "(T, B)" if time_first else "(B, T)"
    size = "(t + 1, b)" if time_first else "(b, t + 1)"
    now, following = ("[:-1]", "[1:]") if time_first else ("[:, :-1]", "[:, 1:]")
    drawn = f"torch.randint(VOCABULARY, {size}, generator=generator)"
    setup = "    generator = torch.Generator().manual_seed(case.seed)\n"
    pair = _contained([f"ids{now}", f"ids{following}"], keys)
    pairs = f"[{pair} for ids in made]"
    says = _contained([f"tokens {shape}", f"the tokens that follow {shape}"], keys)
    made = f"{setup}    made = [{drawn} for b, t in case.sizes()]\n"
    yield Layout(says, _function(pairs, made), _taken_apart((time_first, time_first), keys))
    swap = ".T" if time_first else ""
    if len(keys) < 2:
        whole = f'{{"{keys[0]}": ids}}' if keys else "ids"
        ids = f'b["{keys[0]}"]' if keys else "b"
        yield Layout(
            f"tokens {shape.replace('T', 'T + 1')}, which are the targets too",
            _function(f"[{whole} for ids in made]" if keys else "made", made),
            f"lambda b: ({ids}{now}{swap}, {ids}{following}{swap})",
        )


def _contained(parts: Sequence[str], keys: Sequence[str]) -> str:
    """Write the parts of a batch as it holds them."""
    if len(keys) < 2:
        return f"({', '.join(parts)})"
    return "{" + ", ".join(f'"{k}": {p}' for k, p in zip(keys, parts, strict=False)) + "}"


def _taken_apart(swapped: tuple[bool, bool], keys: Sequence[str]) -> str:
    """Write how inputs and targets are taken out of it; nothing where they come first anyway."""
    if not any(swapped):
        return ""
    places = [f'"{key}"' for key in keys] if len(keys) > 1 else ["0", "1"]
    taken = [
        f"b[{p}].transpose(0, 1)" if s else f"b[{p}]" for p, s in zip(places, swapped, strict=False)
    ]
    return f"lambda b: ({', '.join(taken)})"


def _function(returned: str, before: str = "") -> str:
    return f"def batches(case: tb.Case) -> list[Any]:\n{before}    return {returned}"


# Losses --------------------------------------------------------------------------------------

SHAPED = (  # how predictions and targets are made to fit a loss of torch's
    ("prediction", "target"),
    ("prediction.flatten(0, 1)", "target.flatten(0, 1)"),
    ("prediction.transpose(1, 2)", "target"),
    ("prediction.squeeze(-1)", "target"),
    ("prediction[:, -1]", "target"),
    ("prediction[-1]", "target"),
)


@dataclass(frozen=True)
class Scored:
    """A loss of torch's that was called, with what it was told besides input and target."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def losses(self) -> Iterator[Loss]:
        """Yield how it may be handed over."""
        told = "".join(f", {name}={value!r}" for name, value in self.settings)
        for prediction, target in SHAPED:
            if prediction == "prediction" and not told:
                yield Loss(self.name, functional.__name__, self.name)
            else:
                written = f"{self.name}({prediction}, {target}{told})"
                yield Loss("loss", functional.__name__, self.name, written)


def own_losses(kind: type, module: str) -> Iterator[Loss]:
    """Yield what a class calls in its methods that may be a loss: functions of its file, its own.

    A loss module that torch has is told by the function it calls.
    """
    here = sys.modules[module]
    for node in ast.walk(_tree(kind)):
        if not isinstance(node, ast.Call) or len(node.args) != 2:
            continue
        called = node.func
        if isinstance(called, ast.Name) and inspect.isfunction(vars(here).get(called.id)):
            yield Loss(called.id, module, called.id)
        elif (
            isinstance(called, ast.Attribute)
            and isinstance(called.value, ast.Name)
            and called.value.id == "self"
            and not called.attr.startswith(("log", "manual_", "training_"))
        ):
            yield Loss(f"module.{called.attr}")


def _tree(kind: type) -> ast.AST:
    """Return the source of a class; empty where there is none to read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


class Losses(TorchFunctionMode):
    """Notes which losses of torch's are called within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.met: dict[Scored, None] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a loss, and call it."""
        named = dict(kwargs or {})
        if getattr(func, "__module__", "") == functional.__name__:
            found = _scored(func, args, named)
            if found is not None:
                self.met[found] = None
        return func(*args, **named)


def _scored(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Scored | None:
    """Return the loss that a call is of: what takes an input and a target first."""
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return None
    names = [*signature.parameters]
    if names[:2] != ["input", "target"]:
        return None
    plain = {n: v for n, v in bound.items() if isinstance(v, (bool, int, float, str))}
    settings = tuple(
        (name, value)
        for name, value in plain.items()
        if value != signature.parameters[name].default and name not in names[:2]
    )
    return Scored(function.__name__, settings)


# Trying out ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A draft, and what was seen when it was tried out."""

    draft: Draft
    report: Report | None = None
    error: str = ""
    losses: tuple[Scored, ...] = ()
    seen: Mapping[str, str] = field(default_factory=dict)

    @property
    def fit(self) -> tuple[float, ...]:
        """How well it fits, best last; what a mistake in the loop may spoil counts least."""
        if self.report is None or self.report.trace is None:
            return (0.0,)
        trace = self.report.trace
        known = [chunk for chunk in trace.chunks if chunk.span is not None]
        whole = [c for c in known if len({*c.lanes}) == trace.sizes[c.batch][0]]
        count = max(1, len(trace.chunks))
        return (
            float(trace.halt is None and bool(trace.chunks)),
            len(known) / count,
            len(whole) / count,
            float(self.holds_loss),
            -len(self.report.broken),
            len(self.report.holds),
        )

    @property
    def fits(self) -> bool:
        """Whether all is known that has to be."""
        return self.fit[:4] == (1.0,) * 4

    @property
    def holds_loss(self) -> bool:
        """Whether the loss is the one that is trained on."""
        return self.report is not None and "loss_is_the_chunks_own" in [
            verdict.name for verdict in self.report.holds
        ]

    @property
    def spans(self) -> list[Span | None]:
        """How the first batch was cut."""
        trace = None if self.report is None else self.report.trace
        return [] if trace is None else [c.span for c in trace.chunks if c.batch == 0]

    @property
    def reason(self) -> str:
        """Why it can't be judged."""
        trace = None if self.report is None else self.report.trace
        return trace.halt.error if trace is not None and trace.halt else self.error


def tried(draft: Draft, case: Case = PROBE) -> Found:
    """Judge what a draft builds on one case."""
    build = draft.build()
    sized = replace(case, **draft.sizes)
    losses = Losses()
    try:
        with losses:
            report = judge(lambda: build(sized), sized)
    except Exception as error:  # a guess that is wrong may raise anything
        return Found(draft, error=f"{type(error).__name__}: {error}")
    return Found(draft, report, losses=tuple(losses.met))


def drafted(kind: Any, module: str) -> Found:
    """Return the test file that fits a LightningModule best, and what was seen with it.

    Raises:
        Unknown: it is no LightningModule, or can't be built or trained; the message says why.
    """
    if not is_lightnings(kind):
        raise Unknown("it is no LightningModule: write a build(case) by hand")
    with undisturbed(dtype=torch.get_default_dtype(), seed=0):
        found = _drafted(kind, module)
        return replace(found, seen=_seen(found.draft))


def _drafted(kind: type, module: str) -> Found:
    draft = _constructed(Draft(module, kind.__name__), kind)
    example = _example(draft)
    embeddings = [part for part in example.modules() if isinstance(part, nn.Embedding)]
    if embeddings:
        draft = replace(draft, vocabulary=draft.vocabulary or embeddings[0].num_embeddings)
    else:
        draft = _sized(draft, example)
    every = [
        replace(draft, layout=layout)
        for layout in layouts(_keys(kind), tokens=bool(embeddings), classes=_classes(draft))
    ]
    scored = list(own_losses(kind, module))
    found: list[Found] = []
    for case in (PROBE, ONE_CHUNK, *(replace(PROBE, steps=steps) for steps in LONGER)):
        for one in every:
            found.append(_with_loss(tried(one, case), scored, case))
            if found[-1].fits:
                return _promised(_with_chunk(found[-1]))
        best = max(found, key=lambda one: one.fit)
        if best.fit[0]:
            return _promised(_with_chunk(best))
    raise Unknown(f"no batch was found that {kind.__name__} trains on: {found[0].reason}")


def _classes(draft: Draft) -> bool:
    """Tell whether the number of outputs can be chosen."""
    return "outputs" not in draft.fixed


def _constructed(draft: Draft, kind: type) -> Draft:
    """Say what is handed over for each argument that is required, or that a size goes into."""
    arguments: list[tuple[str, str]] = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        given = next((what for what, names in CALLED.items() if _is_called(name, names)), "")
        required = parameter.default is parameter.empty
        if given.startswith("case.") or given == "VOCABULARY" or (required and given):
            arguments.append((name, given))
        elif required:
            raise Unknown(
                f"{kind.__name__} must be given {name!r}, and what it is can't be told from its "
                "name: give it a default, or write a function build(case) and use tb.conformance"
            )
    vocabulary = 11 if any(given == "VOCABULARY" for _, given in arguments) else 0
    return replace(draft, arguments=tuple(arguments), vocabulary=vocabulary)


def _is_called(name: str, names: str) -> bool:
    return re.fullmatch(names, name.lower()) is not None


def _example(draft: Draft) -> nn.Module:
    try:
        return draft.build()(replace(PROBE, **draft.sizes)).module
    except Exception as error:
        raise Unknown(f"{draft.call} raised {type(error).__name__}: {error}") from error


def _sized(draft: Draft, example: nn.Module) -> Draft:
    """Fix the sizes of inputs and outputs that the module can't vary."""
    given = {what for _, what in draft.arguments}
    inputs, outputs = _ends(example)
    fixed: dict[str, int] = {}
    if "case.inputs" not in given and inputs:
        fixed["inputs"] = inputs
    if "case.outputs" not in given and outputs:
        fixed["outputs"] = outputs
        if "case.inputs" in given and outputs == PROBE.inputs:  # as many as there are inputs
            fixed["inputs"] = outputs
    return replace(draft, fixed=fixed)


def _ends(module: nn.Module) -> tuple[int, int]:
    """Return I and O of a module's first and last layers, 0 where they can't be told."""
    recurrent = (nn.RNNBase, nn.RNNCellBase)
    layers = [p for p in module.modules() if isinstance(p, (nn.Linear, *recurrent))]
    if not layers:
        return 0, 0
    first, last = layers[0], layers[-1]
    inputs = first.in_features if isinstance(first, nn.Linear) else first.input_size
    outputs = last.out_features if isinstance(last, nn.Linear) else last.hidden_size
    return int(inputs), int(outputs)


def _keys(kind: type) -> tuple[str, ...]:
    """Return by which names `training_step` takes parts out of its batch."""
    steps = [
        node
        for node in ast.walk(_tree(kind))
        if isinstance(node, ast.FunctionDef) and node.name == "training_step"
    ]
    if not steps or len(steps[0].args.args) < 2:
        return ()
    batch = steps[0].args.args[1].arg
    keys = [
        node.slice.value
        for node in ast.walk(steps[0])
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == batch
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    ]
    return tuple(dict.fromkeys(keys))


def _with_loss(found: Found, own: Sequence[Loss], case: Case) -> Found:
    """Return the draft with the loss that the module trains on, if it can be told."""
    if found.fit[0] == 0.0:
        return found
    torchs = [loss for scored in found.losses for loss in scored.losses()]
    guessed = [] if torchs else [*Scored("mse_loss").losses()]
    first: Found | None = None
    for loss in dict.fromkeys([*own, *torchs, *guessed]):
        one = tried(replace(found.draft, loss=loss), case)
        if one.holds_loss:
            return one
        if first is None and loss in torchs and one.report is not None:
            first = one
    if first is not None:
        asking = _asking(
            first.draft,
            f"is {first.draft.loss} the loss that is trained on? What was seen is another number; "
            "if it is the right one, what is broken is the loop",
        )
        return replace(first, draft=asking)
    asking = _asking(
        found.draft,
        "which loss(prediction, target) is trained on could not be told. Without it, what follows "
        "from the loss is not judged",
    )
    return replace(found, draft=asking)


def _asking(draft: Draft, question: str) -> Draft:
    return replace(draft, questions=(*draft.questions, question))


def _with_chunk(found: Found) -> Draft:
    """Fix the length of chunks, where the module has its own."""
    draft = found.draft
    if any(given == "case.chunk" for _, given in draft.arguments):
        return draft
    for steps in (PROBE.steps, *LONGER):
        spans = tried(draft, replace(PROBE, steps=steps, batches=1)).spans
        if spans[1:] and spans[0] is not None:
            return replace(draft, fixed={**draft.fixed, "chunk": spans[0][1] - spans[0][0]})
    return _asking(
        draft,
        f"which argument says how long a chunk is? None was found, and sequences of {LONGER[-1]} "
        "time steps are not cut",
    )


def _promised(draft: Draft) -> Found:
    """Judge it; ask whether what is broken is meant, where one promise would account for it."""
    chunk = draft.fixed.get("chunk", 0)
    case = replace(PROBE, steps=2 * chunk + 1) if chunk else PROBE
    found = tried(draft, case)
    if found.report is None or not found.report.broken:
        return found
    for promise in PROMISES:
        one = tried(replace(draft, contract=promise), case)
        if one.report is not None and not one.report.broken and one.fit[:3] >= found.fit[:3]:
            meant = f"is this meant? Then say contract=tb.Contract({promise}) below, with which "
            return replace(found, draft=_asking(draft, f"{meant}nothing is broken"))
    return found


# Telling -------------------------------------------------------------------------------------


def told(found: Found) -> list[str]:
    """Say what was seen of a module, a line each."""
    draft, report = found.draft, found.report
    arguments = ", ".join(f"{name}={given}" for name, given in draft.arguments)
    lines = {"built by": f"{draft.name}({arguments})", "a batch is": draft.layout.says}
    if draft.sizes:
        lines["fixed"] = ", ".join(f"{name}={size}" for name, size in draft.sizes.items())
    lines["loss"] = str(draft.loss)
    if report is not None and report.trace is not None:
        chunks = counted(len(report.trace.chunks), "chunk")
        lines["chunks"] = f"{' '.join(map(spanned, found.spans))} of the first batch"
        lines["updates"] = f"{report.trace.updates} in {chunks} of {PROBE.batches} batches"
        lines["properties"] = f"{len(report.holds)} hold on this one case"
        if report.broken:
            lines["broken"] = ", ".join(verdict.name for verdict in report.broken)
    lines |= found.seen
    width = max(map(len, lines)) + 2
    return [
        textwrap.fill(
            value,
            WIDTH,
            initial_indent=f"  {name:{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, value in lines.items()
    ]


def _seen(draft: Draft) -> dict[str, str]:
    """Say of which shapes the state is, and which optimizers take part."""
    sized = replace(PROBE, **draft.sizes)
    try:
        trace = observe(draft.build()(sized), sized)
    except ObservationError:
        return {}
    outcomes = [chunk.outcome for chunk in trace.chunks if chunk.outcome is not None]
    states = [leaves(state) for outcome in outcomes[:1] for state in outcome.states[:1]]
    shapes = [str(tuple(leaf.shape)) for state in states for leaf in state.values()]
    kinds = [type(rule.optimizer).__name__ for outcome in outcomes for rule in outcome.rules]
    found = {"state": shapes, "optimizer": dict.fromkeys(kinds)}
    return {name: ", ".join(texts) for name, texts in found.items() if texts}
