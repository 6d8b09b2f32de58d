"""The house's rooms and arrows, read from the source: who imports whom, and what CONTRIBUTING.md allows.

``Rooms.read`` takes the two tables of CONTRIBUTING.md, ``Tree`` parses the product's files. Every import counts: at
module level, inside a function, for types only, by ``import_module("moefy. ...")``, and the use of a public name after
``import moefy``. Each check returns its faults as sentences with file and line:

    >>> arrow_faults(Tree(ROOT), Rooms.read(TEXT))
    ['passes/trace/recorder.py:12 (passes) imports moefy.nn.moe (nn)']
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

PRODUCT = ("moefy", "passes", "triton_ops")
MAX_LOOSE = 5
REST = "the rest"


@dataclasses.dataclass(frozen=True)
class Room:
    """One row of the table. A reserved room does not exist yet; an edge is imported inside functions only."""

    name: str
    may_import: tuple[str, ...]
    reserved: bool = False
    edge: bool = False


@dataclasses.dataclass(frozen=True)
class Rooms:
    """The rooms from bottom to top, and the floors inside some of them, each a list of names from bottom to top."""

    rooms: dict[str, Room]
    floors: dict[str, list[list[str]]]

    @classmethod
    def read(cls, text: str) -> Rooms:
        """The tables below the headings ``| room | ... | may import |`` and ``| room | ... bottom to top |``."""
        rooms = [_room(cells) for cells in _rows(text, r"\| room \|.*\| may import \|")]
        floors = dict(_floors(cells) for cells in _rows(text, r"\| room \|.*bottom to top \|"))
        return cls({room.name: room for room in rooms}, floors)

    def room(self, module: str) -> str:
        """The room of ``moefy.<room>. ...``; ``__init__`` is that of ``moefy`` itself."""
        return module.split(".")[1] if "." in module else "__init__"


def _rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the Markdown table below ``heading``, row by row."""
    found = re.search(rf"^{heading}\n\|[-| ]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    assert found, f"CONTRIBUTING.md has no table with the heading {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def _room(cells: Sequence[str]) -> Room:
    first, *_, last = cells
    (name,) = _names(first)
    return Room(name, tuple(_names(last)), reserved="(reserved)" in first, edge="(edge)" in first)


def _floors(cells: Sequence[str]) -> tuple[str, list[list[str]]]:
    room, floors = cells
    return _names(room)[0], [_names(floor) or [REST] * (REST in floor) for floor in floors.split(" < ")]


def _names(cell: str) -> list[str]:
    return re.findall(r"`([\w.]+)`", cell)


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: who, whom, in which line, and whether the import runs when the file does."""

    path: Path
    importer: str
    line: int
    module: str
    at_module_level: bool


@dataclasses.dataclass(frozen=True)
class Tree:
    """The Python files below a root."""

    root: Path

    def files(self, *folders: str) -> list[Path]:
        """Every Python file under ``folders``, each once: what lies behind a link is left out."""
        files = [path for folder in folders for path in (self.root / folder).rglob("*.py")]
        linked = {p for p in files if any(q.is_symlink() for q in p.parents)}
        return sorted(p for p in files if p not in linked and "__pycache__" not in p.parts)

    def relative(self, path: Path) -> str:
        """The path as a reader names it."""
        return path.relative_to(self.root).as_posix()

    def module_name(self, path: Path) -> str:
        """The name under which a product file is imported."""
        parts = list(path.relative_to(self.root).with_suffix("").parts)
        if parts[0] != "moefy":
            parts.insert(0, "moefy")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def exists(self, module: str) -> bool:
        """Whether ``moefy.<...>`` is a file or folder of the product."""
        parts = module.split(".")
        at = self.root.joinpath(*parts[1:] if parts[1] in PRODUCT else parts)
        return at.is_dir() or at.with_suffix(".py").is_file()

    @functools.cached_property
    def public(self) -> dict[str, str]:
        """The modules of moefy's public names, as ``_PUBLIC`` in ``moefy/__init__.py`` has them."""
        index = self.root / "moefy" / "__init__.py"
        for node in ast.parse(index.read_text()).body if index.exists() else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_PUBLIC":
                return ast.literal_eval(node.value)
        return {}

    @functools.cached_property
    def imports(self) -> list[Import]:
        """Every import of the product's files, third-party ones included."""
        return [found for path in self.files(*PRODUCT) for found in self.imports_of(path)]

    def imports_of(self, path: Path) -> Iterator[Import]:
        """Every import of one file."""
        tree, importer = ast.parse(path.read_text()), self.module_name(path)
        deferred = _deferred(tree)
        for node in ast.walk(tree):
            for module in self._imported(node, importer, path.name == "__init__.py"):
                line: int = getattr(node, "lineno")  # noqa: B009  every node that imports has one
                yield Import(path, importer, line, module, node not in deferred)

    def _imported(self, node: ast.AST, importer: str, is_package: bool) -> Iterator[str]:
        """The modules that one node names, in full."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, importer, is_package)
            yield from (self._named(base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            values = [a.value for a in node.args if isinstance(a, ast.Constant)]
            yield from (value for value in values if isinstance(value, str))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from [self._named("moefy", node.attr)] * (node.value.id == "moefy")

    def _named(self, base: str, name: str) -> str:
        """The module that ``from base import name`` needs: a public name of moefy stands for its own."""
        if base.split(".")[0] == "moefy" and self.exists(f"{base}.{name}"):
            return f"{base}.{name}"
        return self.public.get(name, base) if base == "moefy" else base


def _deferred(tree: ast.AST) -> set[ast.AST]:
    """The nodes inside functions and below ``if TYPE_CHECKING``."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or typing_only:
            found.update(ast.walk(node))
    return found


def _base(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    base = node.module or ""
    if not node.level:
        return base
    parts = importer.split(".")
    up = parts[: len(parts) - node.level + is_package]
    return ".".join([*up, base] if base else up)


def _within(module: str, names: Sequence[str]) -> bool:
    """Whether ``module`` is one of ``names`` or lies in one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in names)


def arrow_faults(tree: Tree, rooms: Rooms) -> list[str]:
    """Every import that the table does not allow. ``import moefy`` by itself (for the version) is free where any is."""
    faults = []
    for found in tree.imports:
        mine, theirs = rooms.room(found.importer), rooms.room(found.module)
        if found.module.split(".")[0] != "moefy" or mine == theirs or mine not in rooms.rooms:
            continue
        room, target = rooms.rooms[mine], found.module.removeprefix("moefy.")
        where = f"{tree.relative(found.path)}:{found.line} ({mine}) imports {found.module} ({theirs})"
        index = found.module == "moefy" and bool(room.may_import)
        if not index and not _within(target, room.may_import):
            faults.append(where)
        elif theirs in rooms.rooms and rooms.rooms[theirs].edge and found.at_module_level:
            faults.append(f"{where} at module level; an edge is imported on demand, inside a function")
    return faults


def table_faults(tree: Tree, rooms: Rooms) -> list[str]:
    """Where tables and tree disagree: rooms and rows without each other, arrows upward, arrows without an import."""
    faults, below = [], set()
    used = [(rooms.room(i.importer), i.module) for i in tree.imports]
    there = {rooms.room(tree.module_name(path)) for path in tree.files(*PRODUCT)}
    faults += [f"{name} is a room without a row" for name in sorted(there - set(rooms.rooms))]
    for room in rooms.rooms.values():
        below.add(room.name)
        if room.reserved == (room.name in there):
            why = "reserved, and exists" if room.reserved else "a row without a room"
            faults.append(f"{room.name} is {why}")
        for arrow in room.may_import:
            if arrow.split(".")[0] not in below - {room.name}:
                faults.append(f"{room.name} may import {arrow}, which is not below it")
            if not room.reserved and not any(
                a == room.name and _within(b, [f"moefy.{arrow}"]) for a, b in used
            ):
                faults.append(f"{room.name} may import {arrow}, and does not")
    for room_name, floors in rooms.floors.items():
        names = [f"moefy.{room_name}.{name}" for floor in floors for name in floor if name != REST]
        faults += [f"{name} has a floor and no file" for name in names if not tree.exists(name)]
    return faults


def floor_faults(tree: Tree, rooms: Rooms) -> list[str]:
    """Every import inside a room that leads to a higher floor, or to another name on the same one."""
    faults = []
    for found in tree.imports:
        mine, theirs = (_floor(rooms, module) for module in (found.importer, found.module))
        if mine is None or theirs is None or mine[0] != theirs[0] or mine == theirs or mine[1] > theirs[1]:
            continue
        where = f"{tree.relative(found.path)}:{found.line} ({mine[2]})"
        faults.append(f"{where} imports {found.module} ({theirs[2]}), which is on no lower floor")
    return faults


def _floor(rooms: Rooms, module: str) -> tuple[str, int, str] | None:
    """``(room, height, name)`` of a module, by the longest name that fits; None for one that has no floor."""
    room, _, inside = module.removeprefix("moefy.").partition(".")
    floors = [(height, name) for height, names in enumerate(rooms.floors.get(room, ())) for name in names]
    fits = [(len(name), height, name) for height, name in floors if _within(inside, [name])]
    rest = [(0, height, name) for height, name in floors if name == REST]
    best = max(fits or rest, default=None)
    return None if best is None or not inside else (room, best[1], best[2])


def circles(tree: Tree) -> list[list[str]]:
    """Files that import each other, however indirectly or late: each group once, its files in alphabetical order.

    ``moefy/__init__.py`` is left out: it is the index of public names, and whoever uses one counts as importing the
    name's own module.
    """
    edges: dict[str, set[str]] = {}
    for found in tree.imports:
        if "moefy" not in (found.importer, found.module) and found.importer != found.module:
            edges.setdefault(found.importer, set()).add(found.module)
    reach = {module: _reachable(module, edges) for module in edges}
    groups = {
        frozenset(other for other in reach[module] if module in reach.get(other, ()))
        for module in edges
        if module in reach[module]
    }
    return sorted(sorted(group) for group in groups)


def _reachable(module: str, edges: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        for other in edges.get(todo.pop(), ()):
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen


def loose_faults(tree: Tree) -> list[str]:
    """More files directly under ``moefy/`` than a reader takes in at a glance."""
    loose = sorted(p.name for p in (tree.root / "moefy").iterdir() if p.is_file())
    fault = f"{len(loose)} files lie directly under moefy/: {', '.join(loose)}"
    return [fault] if len(loose) > MAX_LOOSE else []
