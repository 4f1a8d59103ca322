"""The pages in docs: their generated parts, their links, and every snippet, which is run."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pages
import pytest
from hypothesis import settings
from torch import nn
from torch.nn.functional import mse_loss

import tbptt_props as tb
from tbptt_props.judge import Property
from tbptt_ref.faults import FAULTS, Fault
from tbptt_ref.module import TruncatedRNN

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARTS = ["Why it matters", "How to fix it", "When it does not apply"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# A page for each property --------------------------------------------------------------------


def test_every_property_has_a_page_and_no_other_has() -> None:
    names = {judged.__name__ for judged in tb.PROPERTIES}

    assert {path.stem for path in pages.FOLDER.glob("*.md")} == names == pages.SHOWN.keys()


@pytest.mark.parametrize("judged", tb.PROPERTIES, ids=lambda judged: judged.__name__)
def test_what_is_generated_of_a_page_is_as_it_would_be_now(judged: Property) -> None:
    page = (pages.FOLDER / f"{judged.__name__}.md").read_text(encoding="utf-8")

    assert page == pages.written_anew(page, pages.generated(judged)), "python tests/pages.py"


@pytest.mark.parametrize("judged", tb.PROPERTIES, ids=lambda judged: judged.__name__)
def test_a_page_says_why_it_matters_how_to_fix_it_and_when_it_does_not_apply(
    judged: Property,
) -> None:
    page = (pages.FOLDER / f"{judged.__name__}.md").read_text(encoding="utf-8")

    assert page.startswith(f"# `{judged.__name__}`\n")
    assert re.findall(r"(?m)^## (.*)$", page) == PARTS
    assert all(len(text.strip()) > 20 for text in re.split(r"(?m)^## .*$", page)[1:])


def test_the_pages_are_listed_by_claim() -> None:
    told = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")

    due = [
        f"* [`{p.__name__}`](properties/{p.__name__}.md): {(p.__doc__ or '').splitlines()[0]}"
        for p in tb.PROPERTIES
    ]
    assert told.partition("<!-- properties -->")[2].strip().splitlines() == due


# What each fault has said, and the API ---------------------------------------------------------


def without_numbers(text: str) -> str:
    """Leave out what another machine's sums may differ in."""
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_page_has_what_is_said_of_a_fault_now(fault: Fault) -> None:
    page = pages.GALLERY.read_text(encoding="utf-8")
    (part,) = re.findall(rf"(?ms)^## {fault.name}\n(.*?)(?=^## |\Z)", page)

    assert without_numbers(part.strip()) == without_numbers(pages.said_of(fault))


def test_the_page_has_the_faults_in_their_order() -> None:
    page = pages.GALLERY.read_text(encoding="utf-8")

    assert re.findall(r"(?m)^## (\w+)$", page) == [fault.name for fault in FAULTS]


def test_the_reference_is_that_of_the_docstrings() -> None:
    assert pages.API.read_text(encoding="utf-8") == pages.api(), "python tests/pages.py"


# Links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_link_within_the_repository_leads_somewhere(path: Path) -> None:
    text = re.sub(r"(?s)```.*?```", "", path.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]

    for link in links:
        file, _, heading = link.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), link
        if heading:
            heads = re.findall(r"(?m)^#+ (.*)$", there.read_text(encoding="utf-8"))
            assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads]


def test_the_architecture_page_tells_of_modules_that_there_are() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = {
        n for row in re.findall(r"(?m)^\| (`.*?) \|", page) for n in re.findall(r"`(\w+)`", row)
    }
    there = {path.stem for path in (ROOT / "tbptt_props").glob("*.py")}

    assert told <= there
    assert len(told) > 20


# Snippets ------------------------------------------------------------------------------------

SNIPPETS = {
    name_of(path): blocks
    for path in PAGES
    if (blocks := re.findall(r"(?s)```python\n(.*?)```", path.read_text(encoding="utf-8")))
}
# Their snippets are cut from examples, which are run by test_peers and test_loops.
RUN_ELSEWHERE = {"docs/loops.md", "docs/peers.md"}
CUT_FROM = r"(?s)<!-- from (\S+): ([\w, ]+) -->\n```python\n(.*?)\n```"


class LitRNN(TruncatedRNN):
    """What the README takes a reader's own module to be."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, chunk_size: int) -> None:
        core = nn.LSTM(inputs, hidden, batch_first=True)
        super().__init__(core, nn.Linear(hidden, outputs), chunk=chunk_size)


def build(case: tb.Case) -> tb.Subject:
    module = LitRNN(case.inputs, case.hidden, case.outputs, chunk_size=case.chunk)
    return tb.Subject(module, loss=mse_loss)


@pytest.fixture
def _a_readers_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = types.ModuleType("my_project")
    vars(project)["LitRNN"] = LitRNN
    monkeypatch.setitem(sys.modules, "my_project", project)


@pytest.fixture
def _a_profile_of_its_own() -> Iterator[None]:
    before = settings()
    yield
    settings.register_profile("as before", before)
    settings.load_profile("as before")


@pytest.mark.usefixtures("_a_readers_project", "_a_profile_of_its_own")
@pytest.mark.parametrize("name", sorted(SNIPPETS.keys() - RUN_ELSEWHERE))
def test_every_snippet_runs(name: str) -> None:
    told: dict[str, Any] = {"build": build, "tb": tb, "__name__": "snippet"}

    for snippet in SNIPPETS[name]:
        exec(compile(snippet, name, "exec"), told)
    for own, function in list(told.items()):
        if own.startswith("test_") and hasattr(function, "tbptt_build"):
            function.tbptt_build(tb.Case())
        elif own.startswith("test_"):
            function()


@pytest.mark.parametrize("name", sorted(RUN_ELSEWHERE))
def test_a_snippet_that_is_not_run_is_cut_from_an_example_that_is(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    cut = re.findall(CUT_FROM, page)

    assert len(cut) == len(SNIPPETS[name]) > 4
    for example, functions, snippet in cut:
        source = (ROOT / example).read_text(encoding="utf-8")
        shown = [source_of(function, source) for function in functions.split(", ")]
        assert snippet == "\n\n\n".join(shown)


def source_of(function: str, source: str) -> str:
    """Return a function's source as if it stood at the top of its file."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    (node,) = (node for node in nodes if node.name == function)
    return dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]))


def test_the_pages_with_snippets_are_known() -> None:
    assert {"README.md", "docs/own-properties.md", *RUN_ELSEWHERE} <= SNIPPETS.keys()
