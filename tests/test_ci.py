"""What decides which tests run: the table of legs names tests that exist, and CI's own scripts see what is lost."""

from __future__ import annotations

import importlib.util
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest
from legs import LONG, TABLE, leg_of

TESTS = Path(__file__).resolve().parent
PATTERNS = sorted({pattern for patterns in (*TABLE.values(), LONG) for pattern in patterns})


def script(name: str) -> ModuleType:
    """A file of ``.ci``, imported."""
    spec = importlib.util.spec_from_file_location(name, TESTS.parent / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_tests_that_exist(pattern: str) -> None:
    """A renamed test would move to the light leg and say nothing."""
    file, _, name = pattern.partition("[")[0].partition("::")
    found = [at for at in TESTS.rglob("test_*.py") if fnmatchcase(at.relative_to(TESTS).as_posix(), file)]
    assert found
    function = re.compile(name.replace("*", r"\w*"))
    assert any(function.search(at.read_text()) for at in found)


@pytest.mark.parametrize(
    ("nodeid", "needs_libraries", "leg"),
    [
        ("tests/nn/test_moe.py::test_empty", False, "light"),
        ("tests/nn/test_moe.py::test_empty", True, "zoo"),
        ("tests/nn/test_moe.py::test_inductor_has_the_same_gradients", False, "zoo"),
        ("tests/test_packaging.py::test_moefy_runs[wheel]", False, "house"),
        ("tests/triton_ops/test_compile.py::test_every_kernel_compiles_without_faults[80]", False, "release"),
        ("tests/triton_ops/test_compile.py::test_every_kernel_compiles_without_faults[90]", False, "light"),
        ("tests/a_folder_that_no_table_knows/test_x.py::test_y", False, "light"),
    ],
)
def test_every_test_has_one_leg(nodeid: str, needs_libraries: bool, leg: str) -> None:
    assert leg_of(nodeid, needs_libraries=needs_libraries) == leg


def test_lost_ids_are_told_from_renamed_ones() -> None:
    ids = script("test_ids")
    before = ["tests/test_a.py::test_x[1]", "tests/test_a.py::test_y", "tests/b/test_b.py::test_z"]
    after = ["tests/a/test_a.py::test_x[1]", "tests/b/test_b.py::test_z", "tests/b/test_b.py::test_new"]
    renames = [("tests/test_a.py", "tests/a/test_a.py")]
    assert ids.lost(before, after, renames) == ["tests/test_a.py::test_y"]
    assert ids.lost(before, after, []) == before[:2]
    assert ids.lost(before, before, []) == []


def test_renames_are_read(tmp_path: Path) -> None:
    path = tmp_path / "renames.txt"
    path.write_text("tests/test_a.py -> tests/a/test_a.py\n\nnot a rename\n")
    assert script("test_ids").read_renames(path) == [("tests/test_a.py", "tests/a/test_a.py")]


JUNIT = '<testsuites><testsuite tests="5" skipped="{}"/></testsuites>'


@pytest.mark.parametrize(("skipped", "fails"), [(1, False), (2, True)])
def test_a_leg_that_runs_fewer_tests_fails(
    skipped: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "light.xml").write_text(JUNIT.format(skipped))
    (tmp_path / "expected").write_text("light 4\n")
    arguments = ["count_tests", str(tmp_path / "light.xml"), "light", str(tmp_path / "expected")]
    monkeypatch.setattr(sys, "argv", arguments)
    if fails:
        with pytest.raises(SystemExit, match="light: 1 tests no longer run"):
            script("count_tests").main()
    else:
        script("count_tests").main()
