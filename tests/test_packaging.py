"""moefy runs from a bare checkout, an editable install and a wheel; the wheel holds the tree.

Each kind gets a copy of the tracked files and a virtual environment that sees this one's libraries
(torch, tabulate) through links, but neither moefy nor its metadata, so that nothing leaks from
the environment that runs the tests:

    bare        python -m moefy env                           in the checkout
    editable    pip install -e . ; python -m moefy env        elsewhere, and in the checkout
    wheel       pip wheel --no-deps . ; pip install the file ; the same
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("moefy", "passes", "triton_ops")
NO_BUILD = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
KINDS = ("bare", "editable", "wheel")


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of a command, which must succeed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def package_folders() -> list[str]:
    """The folders that hold Python files, as the names they are imported under."""
    names = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            if not any(q.is_symlink() for q in path.parents):
                names.add(".".join(parts if parts[0] == "moefy" else ("moefy", *parts)))
    return sorted(names)


def test_listed_packages_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == package_folders()


def test_links_are_relative() -> None:
    for name in ("passes", "triton_ops"):
        assert os.readlink(ROOT / "moefy" / name) == f"../{name}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product's files, links as links."""
    at = tmp_path_factory.mktemp("checkout")
    for room in ROOMS:
        shutil.copytree(ROOT / room, at / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, at / name)
    return at


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the checkout, built once."""
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "moefy"
    shutil.copytree(checkout, source, symlinks=True)
    run(sys.executable, "-m", "pip", "wheel", *NO_BUILD, "-w", out, source, cwd=out)
    (built,) = out.glob("moefy-*.whl")
    return built


@pytest.fixture(scope="module", params=KINDS)
def installed(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple:
    """``(kind, the python that has moefy, a folder to run in)``."""
    kind, at = request.param, tmp_path_factory.mktemp(request.param)
    if kind == "bare":
        return kind, python_without_moefy(at), checkout
    python = python_without_moefy(at)
    target = ["-e", checkout] if kind == "editable" else [request.getfixturevalue("wheel")]
    run(sys.executable, "-m", "pip", "--python", python, "install", *NO_BUILD, *target, cwd=at)
    return kind, python, at


def python_without_moefy(at: Path) -> Path:
    """A python in a new environment that sees this one's libraries, but neither moefy nor its metadata."""
    venv.create(at / "venv", with_pip=False, symlinks=True)
    python = at / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=at).strip()
    libraries = at / "libraries"
    libraries.mkdir()
    for library in Path(sysconfig.get_path("purelib")).iterdir():
        if "moefy" not in library.name:
            (libraries / library.name).symlink_to(library)
    # Lines of a path file are added as they are: the path files of the libraries are not followed.
    Path(site, "libraries.pth").write_text(f"{libraries}\n")
    return python


@pytest.mark.slow
def test_moefy_runs(installed: tuple) -> None:
    _, python, at = installed
    assert "torch" in run(python, "-m", "moefy", "env", cwd=at)


@pytest.mark.slow
def test_rooms_are_one_package(installed: tuple, checkout: Path) -> None:
    kind, python, at = installed
    code = (
        "import moefy.passes, moefy.triton_ops, moefy.ops, sys;"
        "assert not {'passes', 'triton_ops'} & set(sys.modules);"
        "print(moefy.__file__)"
    )
    for folder in {at, checkout}:
        file = Path(run(python, "-c", code, cwd=folder).strip())
        assert file.is_relative_to(checkout) == (kind != "wheel" or folder == checkout)


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["editable", "wheel"], indirect=True)
def test_entry_points_are_listed(installed: tuple) -> None:
    _, python, at = installed
    code = (
        "import torch._dynamo as d; print('moefy' in d.list_backends());"
        "print(d.lookup_backend('moefy').__module__)"
    )
    assert run(python, "-c", code, cwd=at).split() == ["True", "moefy.compiler.backend"]
    assert "torch" in run(python.parent / "moefy", "env", cwd=at)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["moefy", "torch._dynamo"])
def test_torch_compile_knows_the_backend_by_name(installed: tuple, first: str) -> None:
    """Also where no metadata names it, whichever of moefy and Dynamo's list of backends comes first."""
    _, python, at = installed
    code = f"""
import sys, importlib.metadata, warnings
import torch
warnings.simplefilter("error", UserWarning)
if {first!r} == "torch._dynamo":
    torch._dynamo.list_backends()
import moefy
assert ("torch._dynamo" in sys.modules) == ({first!r} == "torch._dynamo"), "import moefy brought Dynamo"
compiled = torch.compile(torch.nn.Linear(2, 2), backend="moefy", options={{"inner": "eager"}})
compiled(torch.ones(2))
(entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="moefy")
print(entry.load().__module__, "moefy" in torch._dynamo.list_backends())
print([d.metadata["Name"] for d in importlib.metadata.distributions()].count("moefy"))
"""
    assert run(python, "-c", code, cwd=at).split() == ["moefy.compiler.backend", "True", "1"]


@pytest.mark.slow
def test_wheel_holds_exactly_the_tree(wheel: Path, checkout: Path) -> None:
    expected = {"moefy/py.typed"}
    for room in ROOMS:
        prefix = "" if room == "moefy" else "moefy/"
        for path in (checkout / room).rglob("*.py"):
            if not any(q.is_symlink() for q in path.parents):
                expected.add(prefix + path.relative_to(checkout).as_posix())
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == expected
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
