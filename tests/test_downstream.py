"""What is built is what strangers install: the wheel, in an environment and a project of theirs."""

import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILDS = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tbptt_props", "tbptt_ref")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", name="built")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the sdist and the wheel of what is checked out."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__py*"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-c", BUILDS.format(str(built)), cwd=source)
    return built


@pytest.fixture(scope="module", name="python")
def _python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the wheel, and with what it depends on."""
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # What we depend on takes gigabytes: that of this environment is shared, behind its own.
    shared = [path for path in (*site.getsitepackages(), *sys.path) if "-packages" in path]
    (packages / "shared.pth").write_text("\n".join(dict.fromkeys(shared)), encoding="utf-8")
    python = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    installed(python, wheel)
    return python


def installed(python: Path, what: Path) -> None:
    """Install something and nothing that it needs."""
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    run(*pip, what, cwd=python.parent)


@pytest.fixture(name="project")
def _project(python: Path, tmp_path: Path) -> Path:
    """Return a copy of the stranger's project, installed; what is changed in it comes first."""
    project = tmp_path / "downstream"
    shutil.copytree(ROOT / "examples" / "downstream", project)
    installed(python, project)
    return project


def session(python: Path, project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=500)


def test_the_wheel_holds_both_packages_typed_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        entries = archive.read(entry_points).decode()

    ours = {f"{package}/{path.name}" for package in SHIPPED[-2:] for path in sources(package)}
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {"tbptt_props/py.typed", "tbptt_ref/py.typed"} <= ours
    assert "tbptt-props = tbptt_props.__main__:main" in entries
    assert "tbptt_props.plugin = tbptt_props.plugin" in entries
    assert any(name.endswith("licenses/LICENSE") for name in names)


def sources(package: str) -> list[Path]:
    return [path for path in (ROOT / package).iterdir() if path.suffix in (".py", ".typed")]


def test_the_sdist_builds_the_same_wheel_again(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-c", BUILDS.format(str(tmp_path)), cwd=source)

    names = []
    for folder in (built, tmp_path):
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names.append(sorted(archive.namelist()))
    assert names[0] == names[1]


def test_a_strangers_project_passes_its_tests_against_the_wheel(
    python: Path, project: Path
) -> None:
    where = "import tbptt_props; print(tbptt_props.__file__)"
    assert str(python.parent.parent) in run(python, "-c", where, cwd=project)

    done = session(python, project, "-q")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/test_tbptt.py::test_river_level: " in done.stdout
    summed_up = re.search(r" 0 broken, 1 not judged; (\d+) cases,", done.stdout)
    assert summed_up
    assert int(summed_up[1]) <= 20  # a quick profile, as its pyproject.toml says


def test_a_strangers_mistake_is_found_by_the_wheel(python: Path, project: Path) -> None:
    model = project / "river_level" / "model.py"
    right = "state = (state[0].detach(), state[1].detach())"
    source = model.read_text(encoding="utf-8")
    assert right in source
    model.write_text(source.replace(right, "state = (state[0].detach(), state[1])"))

    done = session(python, project, "-k", "graph_crosses_no_boundary")

    assert done.returncode == 1
    assert "incoming state[1]: attached to the graph of time steps 0-0" in done.stdout
    assert "river_level/model.py:" in done.stdout
    replay = next(line for line in done.stdout.splitlines() if "--tbptt-case=" in line)
    assert "Case(steps=2, chunk=1)" in replay
