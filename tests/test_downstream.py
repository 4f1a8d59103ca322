"""A stranger's project, installed beside the built wheel in an environment of its own, and run."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("tbptt_props", "tbptt_ref", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta as b; print(b.build_{}({!r}))"
DETACH = "            memory = tuple(part.detach() for part in memory)\n"


def copied(names: tuple[str, ...], origin: Path, folder: Path) -> Path:
    """Copy what a build works on, for it writes into the tree that it is run in."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (origin / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(origin / name, folder / name, ignore=ignored)
        else:
            shutil.copy(origin / name, folder / name)
    return folder


def ran(*command: str | Path, cwd: Path, due: int = 0) -> str:
    """Run a command as a stranger would, with nothing of this repository on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == due, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build wheel and sdist, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    tree = copied(SOURCES, ROOT, tmp_path_factory.mktemp("tree") / "kit")
    for kind in ("wheel", "sdist"):
        ran(sys.executable, "-c", BUILD.format(kind, str(folder)), cwd=tree)
    return folder


def files_of(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_what_is_built_has_all_modules_and_says_that_it_is_typed(pattern: str, built: Path) -> None:
    (archive,) = built.glob(pattern)
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("tbptt_props", "tbptt_ref")
        for path in (ROOT / package).glob("*.py")
    }

    found = files_of(archive)

    assert modules | {"tbptt_props/py.typed", "tbptt_ref/py.typed"} <= found
    assert not [name for name in found if name.startswith("tests/gallery")]


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel, and with what it needs from the one that runs this."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (site,) = home.glob("lib/python*/site-packages")
    needed = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (site / "needed.pth").write_text("\n".join(sorted(needed)), encoding="utf-8")
    (wheel,) = built.glob("*.whl")
    install(python, wheel, cwd=home)
    return python


def install(python: Path, what: Path, *, cwd: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    ran(*pip, "--no-index", "--no-deps", "--no-build-isolation", what, cwd=cwd)


@pytest.fixture
def project(python: Path, tmp_path: Path) -> Path:
    """Put a copy of the stranger's project somewhere, installed."""
    names = ("weather", "tests", "pyproject.toml", "README.md")
    project = copied(names, ROOT / "examples" / "downstream", tmp_path / "weather")
    install(python, project, cwd=tmp_path)
    shutil.rmtree(project / "build", ignore_errors=True)
    return project


def test_the_strangers_project_passes_its_tests(project: Path, python: Path) -> None:
    where = ran(python, "-c", "import tbptt_props; print(tbptt_props.__file__)", cwd=project)
    assert Path(where.strip()).is_relative_to(python.parent.parent)

    told = ran(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project)

    assert "24 passed, 1 skipped" in told
    assert "test_model.py::test_trains_a_day_at_a_time: 23 judged, 23 held, 0 broken" in told
    assert "counterexamples/index.html" in told
    assert list((project / "counterexamples").glob("*.toml")) == []


def test_a_mistake_in_it_is_found_kept_and_tried_first(project: Path, python: Path) -> None:
    model = project / "weather" / "model.py"
    model.write_text(model.read_text().replace(DETACH, ""))
    only = ("-q", "-p", "no:cacheprovider", "-k", "graph_crosses")

    told = ran(python, "-m", "pytest", *only, cwd=project, due=1)

    assert "The state is carried into the next chunk with its graph" in told
    assert "weather/model.py:" in told
    (kept,) = (project / "counterexamples").glob("*.toml")
    script = ran(python.parent / "tbptt-props", "show", kept, cwd=project)
    assert "graph_crosses_no_boundary is broken" in script


def test_the_command_judges_it(project: Path, python: Path) -> None:
    command = python.parent / "tbptt-props"
    sizes = ("--inputs", "3", "--outputs", "1", "--max-examples", "5")

    told = ran(command, "check", "tests/test_model.py:build", *sizes, cwd=project)

    assert "0 broken" in told
