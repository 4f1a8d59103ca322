import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tbptt_props
import tbptt_ref

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "lightning", "hypothesis", "pytest", "numpy")


def loaded_after(statements: str) -> set[str]:
    """Run `statements` in a new Python; return which of the heavy packages it then has loaded."""
    script = f"import sys\n{statements}\nprint(*set({HEAVY!r}) & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def in_types() -> dict[str, str]:
    """Return the public names and their modules as type checkers are told them."""
    tree = ast.parse(Path(tbptt_props.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    stubs = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(stubs) == len(block.body)
    assert all(alias.name == alias.asname for stub in stubs for alias in stub.names)
    return {alias.name: stub.module or "" for stub in stubs for alias in stub.names}


def at_run_time() -> dict[str, str]:
    return {name: f"tbptt_props.{home}" for name, home in tbptt_props._HOMES.items()}


PUBLIC = sorted(at_run_time())


def test_importing_the_package_alone_loads_nothing_heavy() -> None:
    assert loaded_after("import tbptt_props") == set()


@pytest.mark.parametrize(
    ("statement", "due"),
    [
        ("tbptt_props.Case(2, 5, 2).sizes()", set()),
        ("tbptt_props.Contract(tail='drop')", set()),
        ("import tbptt_props.__main__", set()),
        ("dir(tbptt_props), tbptt_props.__version__", set()),
        ("tbptt_props.cases(chunk=35)", {"hypothesis"}),
    ],
)
def test_what_needs_no_tensors_loads_no_torch(statement: str, due: set[str]) -> None:
    found = loaded_after(f"import tbptt_props\n{statement}")

    assert found - {"numpy", "pytest"} == due  # Hypothesis may look at them


def test_a_package_that_is_loaded_would_be_seen() -> None:
    assert loaded_after("import numpy") == {"numpy"}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_the_one_of_its_module(name: str) -> None:
    found = getattr(tbptt_props, name)

    assert found is getattr(import_module(at_run_time()[name]), name)
    if isinstance(found, type) or callable(found):
        assert found.__module__ == at_run_time()[name]


def test_names_are_the_same_for_type_checkers_and_at_run_time() -> None:
    assert in_types() == at_run_time()


def test_names_are_listed_in_order() -> None:
    homes = list(tbptt_props._HOMES)

    assert homes == sorted(homes)


def test_dir_lists_the_public_names_and_the_version() -> None:
    assert dir(tbptt_props) == sorted([*PUBLIC, "__version__"])


@pytest.mark.parametrize("name", ["Window", "judges", "_private", "__all__", ""])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(tbptt_props, name)

    assert str(raised.value) == f"module 'tbptt_props' has no attribute {name!r}"
    assert not hasattr(tbptt_props, name)


def test_an_unknown_name_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Window'"):
        from tbptt_props import Window  # noqa: F401


def test_a_module_can_be_imported_by_its_own_name() -> None:
    assert import_module("tbptt_props.judge").check is tbptt_props.check


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    assert tbptt_props.__version__ == project["version"]


@pytest.mark.parametrize("package", [tbptt_props, tbptt_ref])
def test_both_packages_are_typed_and_shipped(package: object) -> None:
    folder = Path(getattr(package, "__file__", "")).parent
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]

    assert (folder / "py.typed").exists()
    assert setup["package-data"][folder.name] == ["py.typed"]
    assert folder.name in setup["packages"]
