"""The house's rules, checked by parsing the source: import arrows, file sizes, docstrings, names.

The arrows run one way: triton_ops < ops < nn, distributed < passes < faces < hf, compat. ``passes``
get modules by argument, so of ``nn`` they import only ``nn.dispatch``; ``hf`` and ``compat`` are
edges, imported inside functions only; ``errors``, ``config`` and ``records`` are plain data that
everybody may import. So ``from moefy.nn.moe import MoE`` in ``passes/trace/recorder.py`` fails here:

    passes/trace/recorder.py:12 (passes) imports moefy.nn.moe (nn)
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("moefy", "passes", "triton_ops")
PLAIN = ("errors", "config", "records")
MAX_LINES = 500
MAX_EXAMPLE_LINES = 150

# room -> the rooms it may import, beside itself and plain data
MAY_IMPORT: dict[str, frozenset[str]] = {
    "plain": frozenset(),
    "triton_ops": frozenset(),
    "ops": frozenset({"triton_ops"}),
    "nn": frozenset({"ops"}),
    "distributed": frozenset({"ops"}),
    "passes": frozenset({"ops"}),
    "faces": frozenset({"ops", "nn", "distributed", "passes", "hf", "compat"}),
    "hf": frozenset({"ops", "nn", "distributed", "passes", "faces"}),
    "compat": frozenset({"ops", "nn", "distributed", "passes", "faces"}),
}
# The MoE core: functions over ops, without modules, which a rewritten graph calls by name.
FUNCTIONS_FOR_PASSES = "moefy.nn.dispatch"
EDGES = frozenset({"hf", "compat"})
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


def sources(*folders: str) -> list[Path]:
    """Every Python file under ``folders``, each once: what lies behind a link is left out."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(
        p for p in files if not any(q.is_symlink() for q in p.parents) and "__pycache__" not in p.parts
    )


def relative(path: Path) -> str:
    """The path as a reader names it."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """The name under which a product file is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "moefy":
        parts.insert(0, "moefy")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """The room of ``moefy.<...>``."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in PLAIN:
        return "plain"
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "faces"


def exists(module: str) -> bool:
    """Whether ``module`` is a file or folder of the product."""
    parts = module.split(".")
    at = ROOT.joinpath(*parts)
    return at.is_dir() or at.with_suffix(".py").is_file()


def imported(node: ast.stmt, module: str, is_package: bool) -> Iterator[str]:
    """The modules that one import statement names, in full."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            up = parts[: len(parts) - node.level + is_package]
            base = ".".join([*up, base] if base else up)
        for alias in node.names:
            deeper = f"{base}.{alias.name}"
            yield deeper if base.split(".")[0] == "moefy" and exists(deeper) else base


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """``(line, module, whether at module level)`` of every import; ``if TYPE_CHECKING`` is not."""
    tree = ast.parse(path.read_text())
    deferred: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or typing_only:
            deferred.update(ast.walk(node))
    name, is_package = module_name(path), path.name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in imported(node, name, is_package):
                yield node.lineno, module, node not in deferred


def arrow_faults(path: Path) -> list[str]:
    """Every import of ``path`` that runs against the arrows."""
    mine, faults = room(module_name(path)), []
    for line, module, at_module_level in imports(path):
        if module.split(".")[0] != "moefy":
            continue
        theirs = room(module)
        plain_ok = theirs == "plain" and mine != "triton_ops"
        core_ok = mine == "passes" and module == FUNCTIONS_FOR_PASSES
        allowed = theirs == mine or plain_ok or core_ok or theirs in MAY_IMPORT[mine]
        where = f"{relative(path)}:{line} ({mine}) imports {module} ({theirs})"
        if not allowed:
            faults.append(where)
        elif theirs in EDGES and mine != theirs and at_module_level:
            faults.append(f"{where} at module level; edges are imported on demand, inside a function")
    return faults


def third_party_faults(path: Path) -> list[str]:
    """Every third-party import of ``path`` that its room may not have."""
    mine, faults = room(module_name(path)), []
    for line, module, at_module_level in imports(path):
        top, where = module.split(".")[0], f"{relative(path)}:{line} imports {module}"
        if top in ("passes", "triton_ops"):
            faults.append(f"{where}; the room's name is moefy.{top}")
        if at_module_level and top in ONLY_IN_FUNCTIONS:
            faults.append(f"{where} at module level")
        if at_module_level and top == "triton" and mine != "triton_ops":
            faults.append(f"{where} at module level outside triton_ops")
        own = TRITON_OPS_THIRD_PARTY | sys.stdlib_module_names | {"moefy"}
        if mine == "triton_ops" and top not in own:
            faults.append(f"{where}; triton_ops knows torch and triton only")
    return faults


def shape_faults(path: Path) -> list[str]:
    """What is wrong with the length or the opening of a file."""
    text, faults = path.read_text(), []
    lines = text.count("\n")
    limit = MAX_EXAMPLE_LINES if "examples" in path.relative_to(ROOT).parts else MAX_LINES
    if lines > limit:
        faults.append(f"{relative(path)}: {lines} lines; at most {limit}")
    if text and not ast.get_docstring(ast.parse(text)):
        faults.append(f"{relative(path)}: does not open with a docstring")
    return faults


def test_arrows_run_one_way() -> None:
    assert not [fault for path in sources(*PRODUCT) for fault in arrow_faults(path)]


def test_third_party_imports() -> None:
    assert not [fault for path in sources(*PRODUCT) for fault in third_party_faults(path)]


def test_files_are_short_and_open_with_a_docstring() -> None:
    files = sources(*PRODUCT, "examples", "tests", ".ci")
    assert not [fault for path in files for fault in shape_faults(path)]


def write(root: Path, files: dict[str, str]) -> None:
    """A small tree to plant faults in."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_checks_see_planted_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {
        "moefy/ops/a.py": "from moefy.nn import moe\n",
        "moefy/nn/b.py": "def f():\n    import moefy.cli.main\n",
        "passes/c.py": "from moefy.nn.moe import MoE\n",
        "triton_ops/d.py": "from moefy.errors import ShapeError\n",
        "moefy/e.py": "from moefy.hf import load\n",
        "moefy/nn/f.py": "from .. import search\n",
        "moefy/config.py": "from . import ops\n",
    }
    sound = {
        "moefy/g.py": "def f():\n    from moefy.hf import load\n",
        "passes/h.py": "from moefy.ops import permute\nfrom moefy.errors import ShapeError\n",
    }
    third_party = {
        "moefy/nn/i.py": "import triton\n",
        "moefy/j.py": "import transformers\n",
        "moefy/k.py": "import passes.trace\n",
        "triton_ops/l.py": "def f():\n    import tabulate\n",
    }
    shape = {"moefy/m.py": "x = 1\n", "passes/n.py": '"""Doc."""\n' + "x = 1\n" * MAX_LINES}
    write(tmp_path, {"moefy/search.py": "", "moefy/nn/moe.py": ""})
    write(tmp_path, {**planted, **sound, **third_party, **shape})
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert [name for name in planted if not arrow_faults(tmp_path / name)] == []
    assert [name for name in sound if arrow_faults(tmp_path / name)] == []
    assert [name for name in third_party if not third_party_faults(tmp_path / name)] == []
    assert [name for name in shape if not shape_faults(tmp_path / name)] == []


def test_examples_have_a_main() -> None:
    for path in sources("examples"):
        tree = ast.parse(path.read_text())
        assert "main" in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], path.name


def test_the_top_level_is_fixed() -> None:
    fixed = {"moefy", "passes", "triton_ops", "examples", "tests"}
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == fixed | files


def test_no_module_bears_the_name_of_a_public_function() -> None:
    moefy = importlib.import_module("moefy")
    names = [name for name in moefy.__all__ if exists(f"moefy.{name}")]
    clashes = [name for name in names if not isinstance(getattr(moefy, name), ModuleType)]
    assert not clashes, f"moefy.{clashes[0]}(...) would become the module after `import moefy.{clashes[0]}`"


def test_every_public_name_exists_and_is_documented() -> None:
    moefy = importlib.import_module("moefy")
    for name in moefy.__all__:
        if not name.startswith("__"):
            assert getattr(moefy, name).__doc__, name


def test_import_moefy_is_light() -> None:
    heavy = [*ONLY_IN_FUNCTIONS, "triton", "passes", "triton_ops"]
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
