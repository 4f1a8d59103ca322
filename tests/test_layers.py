"""Which module may import which, read from the files themselves.

An import counts wherever it stands: at the top, inside a function, under `TYPE_CHECKING`.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the nouns, which import next to nothing, to the faces, which nothing imports.
MAY_IMPORT: dict[str, dict[str, set[str]]] = {
    "tbptt_props": {
        "case": set(),
        "contract": {"case"},
        "lines": set(),
        "trace": {"contract", "lines", "state"},
        "state": set(),
        "batch": {"places", "state", "trace"},
        "precision": {"trace"},
        "subject": {"batch", "case", "contract", "precision", "state"},
        "attributes": {"state"},
        "forward": {"layout", "process", "standin", "state", "subject", "trace"},
        "graph": set(),
        "surrogate": set(),
        "compiling": set(),
        "standin": {"compiling"},
        "scaling": {"graph", "state"},
        "device": set(),
        "process": {"device"},
        "compare": {"precision", "trace"},
        "places": {"trace"},
        "layout": {"compare", "state"},
        "lineage": {"places"},
        "aims": {"batch", "layout", "places", "trace"},
        "byhand": {"trace"},
        "colour": set(),
        "story": {"trace"},
        "record": {"case", "story", "trace"},
        "kept": {"case"},
        "editions": set(),
        "report": {"case", "editions", "kept", "record", "story", "strategies", "subject", "trace"},
        "strategies": {"case", "state"},
        "flags": {"compare", "state", "trace"},
        "properties": {"byhand", "compare", "flags", "lines", "precision", "state", "trace"},
        "evidence": {"byhand", "compare", "flags", "state", "trace"},
        "names": set(),
        "causes_beside": {"evidence", "names"},
        "causes_state": {"evidence", "names"},
        "causes_time": {"evidence", "names", "trace"},
        "causes_update": {"evidence", "names"},
        "causes": {
            "causes_beside",
            "causes_state",
            "causes_time",
            "causes_update",
            "evidence",
            "names",
            "trace",
        },
        "live": {"lines", "places", "state", "trace"},
        "closing": {
            "aims",
            "batch",
            "compare",
            "graph",
            "layout",
            "live",
            "places",
            "process",
            "state",
            "subject",
            "trace",
        },
        "miswired": {"batch", "compare", "layout", "state", "subject", "trace"},
        "parameters": {"compare", "embeddings", "state", "trace"},
        "underway": {"batch", "compare", "lineage", "places", "state", "subject", "trace"},
        "refusals": {"compare", "forward", "state", "subject", "trace", "underway"},
        "past": {"graph", "lines", "live", "trace"},
        "optimizers": {"parameters", "state", "trace"},
        "watch": {
            "attributes",
            "batch",
            "byhand",
            "closing",
            "compare",
            "device",
            "forward",
            "graph",
            "layout",
            "lines",
            "live",
            "optimizers",
            "parameters",
            "past",
            "places",
            "precision",
            "process",
            "refusals",
            "scaling",
            "standin",
            "state",
            "subject",
            "trace",
            "underway",
        },
        "train": {
            "batch",
            "forward",
            "places",
            "precision",
            "process",
            "standin",
            "subject",
            "watch",
        },
        "sensitivity": {"batch", "compare", "forward", "state", "subject"},
        "again": {"compare", "forward", "graph", "layout", "process", "state", "subject", "trace"},
        "rules": {"byhand", "state", "trace"},
        "embeddings": set(),
        "slopes": {
            "again",
            "compare",
            "embeddings",
            "forward",
            "graph",
            "state",
            "subject",
            "surrogate",
            "trace",
        },
        "dependence": {
            "again",
            "compare",
            "device",
            "forward",
            "process",
            "state",
            "subject",
            "trace",
        },
        "rederivation": {
            "again",
            "compare",
            "compiling",
            "dependence",
            "forward",
            "graph",
            "layout",
            "precision",
            "process",
            "rules",
            "slopes",
            "state",
            "subject",
            "trace",
        },
        "laws": {
            "again",
            "attributes",
            "batch",
            "case",
            "compare",
            "contract",
            "device",
            "forward",
            "layout",
            "optimizers",
            "places",
            "precision",
            "process",
            "rederivation",
            "rules",
            "state",
            "subject",
            "trace",
            "train",
            "watch",
        },
        "observation": {
            "batch",
            "case",
            "compiling",
            "device",
            "laws",
            "lines",
            "precision",
            "process",
            "state",
            "subject",
            "trace",
            "train",
            "watch",
        },
        "judge": {
            "case",
            "causes",
            "causes_time",
            "compare",
            "contract",
            "editions",
            "evidence",
            "flags",
            "miswired",
            "observation",
            "precision",
            "properties",
            "rederivation",
            "report",
            "story",
            "subject",
            "trace",
        },
        "search": {
            "case",
            "causes",
            "contract",
            "editions",
            "judge",
            "observation",
            "properties",
            "report",
            "sensitivity",
            "strategies",
            "subject",
            "trace",
        },
        "pieces": set(),
        "script": {
            "batch",
            "byhand",
            "case",
            "compare",
            "forward",
            "judge",
            "kept",
            "laws",
            "observation",
            "precision",
            "state",
            "subject",
            "trace",
            "train",
        },
        "page": {"trace"},
        "agreement": {"compare", "trace"},
        "copies": {"compare", "device", "forward", "state", "subject"},
        "alike": {
            "case",
            "compare",
            "copies",
            "device",
            "observation",
            "precision",
            "rederivation",
            "report",
            "state",
            "strategies",
            "search",
            "subject",
            "trace",
        },
        "ddp": {
            "agreement",
            "case",
            "judge",
            "observation",
            "precision",
            "rederivation",
            "report",
            "search",
            "strategies",
            "subject",
            "trace",
            "train",
            "watch",
        },
        "options": {"case", "editions", "kept"},
        "ledger": set(),
        "suite": {
            "case",
            "device",
            "editions",
            "judge",
            "kept",
            "ledger",
            "options",
            "properties",
            "report",
            "search",
            "strategies",
            "subject",
        },
        "plugin": {
            "case",
            "colour",
            "editions",
            "kept",
            "ledger",
            "options",
            "page",
            "properties",
            "report",
        },
        "catalogue": {"case", "contract", "report", "search", "strategies", "subject", "trace"},
        "wiring": {
            "case",
            "judge",
            "observation",
            "process",
            "report",
            "state",
            "subject",
            "trace",
            "train",
        },
        "__main__": {
            "case",
            "catalogue",
            "colour",
            "ddp",
            "editions",
            "kept",
            "page",
            "report",
            "script",
            "search",
            "subject",
            "wiring",
        },
        "__init__": {
            "alike",
            "case",
            "contract",
            "ddp",
            "judge",
            "observation",
            "properties",
            "rederivation",
            "report",
            "search",
            "strategies",
            "subject",
            "suite",
            "trace",
        },
    },
    "tbptt_ref": {
        "module": set(),
        "oracle": set(),
        "closed_form": set(),
        "faults_devices": {"module"},
        "faults_precision": {"module"},
        "faults_processes": {"module"},
        "faults_side_effects": {"module"},
        "faults_state": {"module"},
        "faults_time": {"module"},
        "faults_update": {"module"},
        "faults": {
            "faults_devices",
            "faults_precision",
            "faults_processes",
            "faults_side_effects",
            "faults_state",
            "faults_time",
            "faults_update",
            "module",
        },
        "__init__": set(),
    },
}

# What only these may import, of all modules of both packages.
ONLY: dict[str, set[str]] = {
    "lightning": {"tbptt_props.pieces", "tbptt_props.train", "tbptt_ref.module"},
    "hypothesis": {
        "tbptt_props.ddp",
        "tbptt_props.search",
        "tbptt_props.strategies",
        "tbptt_props.suite",
    },
    "pytest": {
        "tbptt_props.ledger",
        "tbptt_props.options",
        "tbptt_props.plugin",
        "tbptt_props.suite",
    },
    "numpy": {"tbptt_props.process", "tbptt_ref.closed_form"},
    # What is imported by a name made up at run time is seen by no test that reads files.
    # "record" asks for the versions of what is installed.
    "importlib": {"tbptt_props.__init__", "tbptt_props.__main__", "tbptt_props.record"},
}
NO_TORCH = {
    "tbptt_props.__init__",
    "tbptt_props.__main__",
    "tbptt_props.alike",
    "tbptt_props.causes",
    "tbptt_props.causes_beside",
    "tbptt_props.causes_state",
    "tbptt_props.causes_time",
    "tbptt_props.causes_update",
    "tbptt_props.colour",
    "tbptt_props.contract",
    "tbptt_props.editions",
    "tbptt_props.kept",
    "tbptt_props.ledger",
    "tbptt_props.lines",
    "tbptt_props.names",
    "tbptt_props.options",
    "tbptt_props.page",
    "tbptt_props.past",
    "tbptt_props.plugin",
    "tbptt_props.record",
    "tbptt_props.report",
    "tbptt_props.search",
    "tbptt_props.standin",
    "tbptt_props.story",
    "tbptt_props.suite",
    "tbptt_ref.__init__",
    "tbptt_ref.closed_form",
}


def imported(source: str, package: str) -> Iterator[str]:
    """Yield the dotted name of all that a module of `package` imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [package] if node.level else []
            origin = ".".join([*parts, *filter(None, [node.module])])
            if origin == package:  # its modules, by name
                yield from (f"{package}.{alias.name}" for alias in node.names)
            else:
                yield origin


def of_ours(source: str, package: str) -> set[str]:
    """Return the modules of `package` that a module of it imports."""
    roots = (name.split(".") for name in imported(source, package))
    return {(root[1] if len(root) > 1 else "__init__") for root in roots if root[0] == package}


def of_others(source: str, package: str) -> set[str]:
    """Return the packages that a module of `package` imports."""
    return {name.split(".")[0] for name in imported(source, package)} - {package}


def sources(package: str, root: Path = ROOT) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in (root / package).glob("*.py")}


def unasked(
    found: Mapping[str, str], package: str, allowed: Mapping[str, set[str]]
) -> dict[str, set[str]]:
    """Return, for each module, what it imports of ours though the table does not let it."""
    extra = {
        name: of_ours(text, package) - allowed.get(name, set()) for name, text in found.items()
    }
    return {name: names for name, names in extra.items() if names}


PACKAGES = list(MAY_IMPORT)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_module_imports_no_more_than_the_table_says(package: str) -> None:
    assert unasked(sources(package), package, MAY_IMPORT[package]) == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_says_no_more_than_is_imported(package: str) -> None:
    found = sources(package)

    assert MAY_IMPORT[package].keys() == found.keys()
    unused = {
        name: allowed - of_ours(found[name], package)
        for name, allowed in MAY_IMPORT[package].items()
    }
    assert {name: names for name, names in unused.items() if names} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_leads_back_to_where_it_came_from(package: str) -> None:
    graph = {name: of_ours(text, package) for name, text in sources(package).items()}

    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_flat_so_that_every_module_is_read(package: str) -> None:
    assert {path.parent for path in (ROOT / package).rglob("*.py")} == {ROOT / package}


def everything() -> dict[str, set[str]]:
    return {
        f"{package}.{name}": of_others(text, package)
        for package in PACKAGES
        for name, text in sources(package).items()
    }


@pytest.mark.parametrize("other", ONLY)
def test_only_the_modules_that_have_to_do_with_it_know_another_package(other: str) -> None:
    assert {name for name, others in everything().items() if other in others} == ONLY[other]


def test_modules_that_need_no_tensors_do_not_know_torch() -> None:
    assert {name for name, others in everything().items() if "torch" not in others} == NO_TORCH


def test_the_judge_and_what_it_is_tried_on_do_not_know_each_other() -> None:
    for name, others in everything().items():
        assert not others & set(PACKAGES), name


def test_the_referees_know_neither_lightning_nor_what_they_referee() -> None:
    found = everything()

    assert found["tbptt_ref.oracle"] - sys.stdlib_module_names == {"torch"}
    assert found["tbptt_ref.closed_form"] - sys.stdlib_module_names == {"numpy"}
    assert not of_ours(sources("tbptt_ref")["oracle"], "tbptt_ref")
    assert not of_ours(sources("tbptt_ref")["closed_form"], "tbptt_ref")


def test_whatever_is_imported_is_installed_with_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.split(r"[^\w-]", dependency)[0].replace("-", "_")
        for dependency in project["dependencies"]
    }

    used = set().union(*everything().values()) - sys.stdlib_module_names

    assert used == declared


# The same, on modules that break it ---------------------------------------------------------

WAYS = {
    "at the top": "import {0}",
    "as something": "import {0} as other",
    "a part of it": "import {0}.part",
    "a name from it": "from {0} import name",
    "a name from a part of it": "from {0}.part import name",
    "inside a function": "def f():\n    import {0}",
    "inside a method": "class A:\n    def f(self):\n        from {0} import name",
    "for types alone": "if TYPE_CHECKING:\n    from {0} import Name",
    "if there is one": "try:\n    import {0}\nexcept ImportError:\n    pass",
    "beside others": "import os, {0}",
}


@pytest.mark.parametrize("way", WAYS)
def test_an_import_of_another_package_is_seen_wherever_it_stands(way: str) -> None:
    source = WAYS[way].format("lightning")

    assert "lightning" in of_others(source, "tbptt_props")
    assert of_ours(source, "tbptt_props") == set()


@pytest.mark.parametrize(
    "way",
    [
        *(way.format("tbptt_props.judge") for way in WAYS.values()),
        "from tbptt_props import judge",
        "from tbptt_props import case, judge",
        "from . import judge",
        "from .judge import check",
        "def f():\n    from .judge import check",
    ],
)
def test_an_import_of_ours_that_the_table_does_not_allow_is_seen(way: str, tmp_path: Path) -> None:
    (tmp_path / "tbptt_props").mkdir()
    (tmp_path / "tbptt_props" / "trace.py").write_text(way, encoding="utf-8")
    allowed = {"trace": {"case", "contract"}}

    found = unasked(sources("tbptt_props", tmp_path), "tbptt_props", allowed)

    assert found == {"trace": {"judge"}}


def test_an_import_of_the_package_itself_is_one_of_all_that_it_knows() -> None:
    assert of_ours("import tbptt_props", "tbptt_props") == {"__init__"}


def test_a_module_that_the_table_does_not_know_may_import_nothing() -> None:
    found = unasked({"helpers": "from tbptt_props import case"}, "tbptt_props", {"case": set()})

    assert found == {"helpers": {"case"}}


def test_imports_that_lead_back_are_seen() -> None:
    texts = {"judge": "def f():\n    from . import report", "report": "from . import judge"}
    graph = {name: of_ours(text, "tbptt_props") for name, text in texts.items()}

    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_what_is_not_imported_is_not_seen() -> None:
    source = '"""import lightning"""\n# import lightning\nlightning = "import lightning"'

    assert of_others(source, "tbptt_props") == set()
