"""The house's rules: arrows between rooms, floors inside them, circles, file sizes, docstrings, names.

CONTRIBUTING.md has the rooms and what each may import; ``house`` reads its tables and the source. Every kind of fault
is also planted in a small tree and must be found there: a check that has gone blind fails.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from house import (
    MAX_LOOSE,
    PRODUCT,
    Import,
    Room,
    Rooms,
    Tree,
    arrow_faults,
    circles,
    floor_faults,
    loose_faults,
    table_faults,
)

ROOT = Path(__file__).resolve().parent.parent
TREE = Tree(ROOT)
ROOMS = Rooms.read((ROOT / "CONTRIBUTING.md").read_text())
MAX_LINES = 500
MAX_EXAMPLE_LINES = 150

# The kernels' room is usable without moefy, so it may not even import plain data.
TRITON_OPS_THIRD_PARTY = frozenset({"torch", "triton"})
# Importing one of these at module level would make `import moefy` slow, or fail where it is not
# installed.
ONLY_IN_FUNCTIONS = frozenset(
    {
        "transformers",
        "timm",
        "torchvision",
        "megatron",
        "peft",
        "tqdm",
        "matplotlib",
        "accelerate",
        "numpy",
    }
)


def third_party_faults(tree: Tree) -> list[str]:
    """Every third-party import that its room may not have."""
    return [fault for found in tree.imports for fault in _third_party(tree, found)]


def _third_party(tree: Tree, found: Import) -> list[str]:
    mine, top = ROOMS.room(found.importer), found.module.split(".")[0]
    faults, where = [], f"{tree.relative(found.path)}:{found.line} imports {found.module}"
    if top in ("passes", "triton_ops"):
        faults.append(f"{where}; the room's name is moefy.{top}")
    if found.at_module_level and top in ONLY_IN_FUNCTIONS:
        faults.append(f"{where} at module level")
    if found.at_module_level and top == "triton" and mine != "triton_ops":
        faults.append(f"{where} at module level outside triton_ops")
    if mine == "triton_ops" and top not in TRITON_OPS_THIRD_PARTY | sys.stdlib_module_names | {"moefy"}:
        faults.append(f"{where}; triton_ops knows torch and triton only")
    return faults


def shape_faults(tree: Tree, path: Path) -> list[str]:
    """What is wrong with the length or the opening of a file."""
    text, faults = path.read_text(), []
    lines = text.count("\n")
    limit = MAX_EXAMPLE_LINES if "examples" in path.relative_to(tree.root).parts else MAX_LINES
    if lines > limit:
        faults.append(f"{tree.relative(path)}: {lines} lines; at most {limit}")
    if text and not ast.get_docstring(ast.parse(text)):
        faults.append(f"{tree.relative(path)}: does not open with a docstring")
    return faults


# -- the tree as it is ---------------------------------------------------------------------------------------------
def test_arrows_run_one_way() -> None:
    assert arrow_faults(TREE, ROOMS) == []


def test_the_table_is_the_tree() -> None:
    assert table_faults(TREE, ROOMS) == []


def test_floors_inside_rooms() -> None:
    assert floor_faults(TREE, ROOMS) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(TREE) == []


def test_few_files_lie_loose() -> None:
    assert loose_faults(TREE) == []


def test_third_party_imports() -> None:
    assert third_party_faults(TREE) == []


def test_files_are_short_and_open_with_a_docstring() -> None:
    files = TREE.files(*PRODUCT, "examples", "tests", ".ci")
    assert not [fault for path in files for fault in shape_faults(TREE, path)]


# -- planted faults ------------------------------------------------------------------------------------------------
INDEX = '_PUBLIC = {"transform": "moefy.verbs", "MoE": "moefy.nn"}\n'
EXISTING = (
    "ops/permute",
    "nn/__init__",
    "nn/moe",
    "nn/dispatch",
    "cli/main",
    "verbs",
    "hf/callback",
    "reports/tables",
)


def plant(root: Path, files: dict[str, str]) -> Tree:
    """A small tree with some real names in it, and ``files``."""
    existing = {f"moefy/{name}.py": "" for name in EXISTING}
    for name, text in {"moefy/__init__.py": INDEX, **existing, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Tree(root)


UPWARD = {
    "moefy/model/run_quietly.py": "from moefy.cli.main import main\n",
    "moefy/reports/text/tables.py": "from moefy.verbs import transform\n",
    "moefy/reports/lazy.py": "def f():\n    from moefy import verbs\n",
    "moefy/reports/public.py": "from moefy import transform\n",
    "moefy/capture/used.py": "import moefy\n\ndef f(model):\n    moefy.transform(model)\n",
    "moefy/rewrite/typed.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moefy.verbs import x\n",
    "moefy/rewrite/dynamic.py": "import importlib\nimportlib.import_module('moefy.verbs')\n",
    "moefy/ops/a.py": "from moefy.nn import moe\n",
    "moefy/nn/b.py": "def f():\n    import moefy.cli.main\n",
    "moefy/nn/relative.py": "from .. import verbs\n",
    "moefy/config/c.py": "from .. import ops\n",
    "moefy/errors.py": "from moefy.records import FFNMatch\n",
    "passes/d.py": "from moefy.nn.moe import MoE\n",
    "passes/e.py": "from moefy.nn import moe\n",
    "triton_ops/f.py": "from moefy.errors import ShapeError\n",
    "triton_ops/g.py": "import moefy\n",
    "moefy/hf/h.py": "from moefy.compat import tutel\n",
    "moefy/verbs.py": "from moefy.hf import callback\n",
}
DOWNWARD = {
    "moefy/cli/own.py": "from moefy.cli.main import main\n",
    "moefy/cli/public.py": "import moefy\n\nmoefy.transform, moefy.__version__\n",
    "moefy/reports/version.py": "import moefy\n\nmoefy.__version__\n",
    "passes/functions.py": "from moefy.nn import dispatch\nfrom moefy.ops import permute\n",
    "moefy/hf/down.py": "from moefy.reports import tables\n",
}


@pytest.mark.parametrize("name", UPWARD)
def test_an_upward_arrow_is_seen(name: str, tmp_path: Path) -> None:
    (fault,) = arrow_faults(plant(tmp_path, {name: UPWARD[name]}), ROOMS)
    assert fault.startswith(f"{name}:")


def test_downward_arrows_are_no_fault(tmp_path: Path) -> None:
    assert not arrow_faults(plant(tmp_path, DOWNWARD), ROOMS)


def test_an_edge_is_imported_inside_functions_only(tmp_path: Path) -> None:
    late, early = "def f():\n    from moefy.hf import callback\n", "from moefy.hf import callback\n"
    tree = plant(tmp_path, {"moefy/cli/late.py": late, "moefy/cli/early.py": early})
    rooms = Rooms({"hf": Room("hf", (), edge=True), "cli": Room("cli", ("hf",))}, {})
    (fault,) = arrow_faults(tree, rooms)
    assert fault.startswith("moefy/cli/early.py:1") and "at module level" in fault


def test_a_table_that_is_not_the_tree_is_seen(tmp_path: Path) -> None:
    tree = plant(
        tmp_path, {"moefy/nn/a.py": "import io, moefy.ops\n", "moefy/ops/b.py": "", "moefy/new/c.py": ""}
    )
    rows = [Room(name, ()) for name in ("cli", "reports", "verbs", "__init__", "io")]
    rows += [Room("hf", (), reserved=True), Room("nn", ("ops", "verbs", "io")), Room("ops", ())]
    floors = {"nn": [["gone"], ["a"]]}
    assert sorted(table_faults(tree, Rooms({room.name: room for room in rows}, floors))) == [
        "hf is reserved, and exists",
        "io is a row without a room",
        "moefy.nn.gone has a floor and no file",
        "new is a room without a row",
        "nn may import io, and does not",
        "nn may import ops, which is not below it",
        "nn may import verbs, and does not",
    ]


def test_an_arrow_to_a_higher_floor_is_seen(tmp_path: Path) -> None:
    files = {
        "moefy/nn/routing/a.py": "from moefy.nn.routers.base import Router\n",
        "moefy/nn/losses/b.py": "def f():\n    from ..experts import linear\n",
        "moefy/nn/losses/delivery.py": "from moefy.nn.routers import base\n",
        "moefy/nn/free.py": "from moefy.nn import moe\n",
        "moefy/nn/routers/base.py": "from moefy.nn import losses, routing, free\n",
        "moefy/nn/experts/linear.py": "",
        "passes/trace/c.py": "from moefy.passes.match import rules\n",
        "passes/match/rules.py": "from moefy.passes.trace import recorder\n",
        "passes/trace/recorder.py": "",
        "moefy/reports/text/d.py": "from moefy.reports import tables\n",
        "moefy/reports/e.py": "from moefy.reports.text import d\n",
    }
    faults = [fault.split(":")[0] for fault in floor_faults(plant(tmp_path, files), ROOMS)]
    assert faults == [
        "moefy/nn/losses/b.py",
        "moefy/nn/routing/a.py",
        "moefy/reports/text/d.py",
        "passes/trace/c.py",
    ]


CIRCLES = {
    "through a function": {
        "moefy/nn/a.py": "from moefy.nn.b import x\n",
        "moefy/nn/b.py": "def f():\n    from moefy.nn import a\n",
    },
    "for types": {
        "moefy/nn/a.py": "from moefy.nn import b\n",
        "moefy/nn/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from moefy.nn.a import A\n",
    },
    "over a third file": {
        "moefy/nn/a.py": "from . import b\n",
        "moefy/nn/b.py": "import moefy.ops.c\n",
        "moefy/ops/c.py": "def f():\n    import importlib\n    importlib.import_module('moefy.nn.a')\n",
    },
    "by a public name": {
        "moefy/verbs.py": "from moefy.nn import a\n",
        "moefy/nn/a.py": "import moefy\n\ndef f(model):\n    moefy.transform(model)\n",
    },
    "by the room's own index": {
        "moefy/nn/__init__.py": "from moefy.nn.a import A\n",
        "moefy/nn/a.py": "def f():\n    from moefy.nn import MoE\n",
    },
}


@pytest.mark.parametrize("how", CIRCLES)
def test_a_circle_is_seen(how: str, tmp_path: Path) -> None:
    alone = {"moefy/nn/alone.py": "from moefy.nn import a, alone\nimport moefy\n"}
    tree = plant(tmp_path, {**CIRCLES[how], **alone})
    assert circles(tree) == [sorted(tree.module_name(tmp_path / name) for name in CIRCLES[how])]


def test_a_file_too_many_is_seen(tmp_path: Path) -> None:
    names = [f"moefy/loose_{i}.py" for i in range(MAX_LOOSE - 2)]  # beside __init__.py and verbs.py
    assert not loose_faults(plant(tmp_path, dict.fromkeys(names, "")))
    assert loose_faults(plant(tmp_path, {"moefy/data.json": "{}"}))


THIRD_PARTY = {
    "moefy/nn/i.py": "import triton\n",
    "moefy/j.py": "import transformers\n",
    "moefy/k.py": "import passes.trace\n",
    "triton_ops/l.py": "def f():\n    import tabulate\n",
}
SHAPE = {"moefy/m.py": "x = 1\n", "passes/n.py": '"""Doc."""\n' + "x = 1\n" * MAX_LINES}


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_third_party_import_is_seen(name: str, tmp_path: Path) -> None:
    (fault,) = third_party_faults(plant(tmp_path, {name: THIRD_PARTY[name]}))
    assert fault.startswith(f"{name}:")


@pytest.mark.parametrize("name", SHAPE)
def test_a_file_out_of_shape_is_seen(name: str, tmp_path: Path) -> None:
    assert shape_faults(plant(tmp_path, SHAPE), tmp_path / name)


# -- names and the top level ---------------------------------------------------------------------------------------
def test_examples_have_a_main() -> None:
    for path in TREE.files("examples"):
        tree = ast.parse(path.read_text())
        assert "main" in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], path.name


def test_the_top_level_is_fixed() -> None:
    fixed = {"moefy", "passes", "triton_ops", "examples", "tests", "pyproject.toml", "README.md"}
    allowed = {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} - allowed == fixed


def test_no_module_bears_the_name_of_a_public_function() -> None:
    moefy = importlib.import_module("moefy")
    names = [name for name in moefy.__all__ if TREE.exists(f"moefy.{name}")]
    clashes = [name for name in names if not isinstance(getattr(moefy, name), ModuleType)]
    assert not clashes, f"moefy.{clashes[0]}(...) would become the module after `import moefy.{clashes[0]}`"


def test_every_public_name_exists_and_is_documented() -> None:
    moefy = importlib.import_module("moefy")
    for name in moefy.__all__:
        if not name.startswith("__"):
            assert getattr(moefy, name).__doc__, name


def test_import_moefy_is_light() -> None:
    heavy = [*ONLY_IN_FUNCTIONS, "triton", "passes", "triton_ops", "torch._dynamo"]
    heavy += ["moefy.hf", "moefy.compat", "moefy.triton_ops"]
    code = "; ".join(
        [
            "import sys, torch",
            "before = set(sys.modules)",
            "import moefy",
            f"print([n for n in {heavy} if n in sys.modules and n not in before])",
        ]
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", f"import moefy loads {run.stdout}{run.stderr}"
