"""Every refusal code that the source can answer with is in the table of ``codes``, and none in it is dead.

The source is parsed. Codes stand before a text in a pair, first in a pair that is returned, in the rows of ``_ISSUES``,
and as first argument of ``refused`` and ``issues.setdefault``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from moefy.passes.match.codes import Code

ROOT = Path(__file__).resolve().parents[2]
WHERE = ("passes/match", "moefy/capture", "moefy/rewrite", "moefy/verbs.py")


def files() -> list[Path]:
    return [p for at in WHERE for p in ([ROOT / at] if at.endswith(".py") else (ROOT / at).rglob("*.py"))]


def is_text(node: ast.AST) -> bool:
    """A reason in words: a string of several, or an f-string."""
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    )


def strings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def codes_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and len(node.elts) >= 2 and is_text(node.elts[-1]):
            yield from strings(node.elts[-2])
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            yield from strings(node.value.elts[0])
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and called.endswith((".refused", "issues.setdefault")) and node.args:
            yield from strings(node.args[0])


def emitted() -> dict[str, str]:
    """Each code with a file that can answer with it."""
    return {code: p.name for p in files() for code in codes_in(ast.parse(p.read_text()))}


def test_every_code_is_in_the_table_and_none_is_dead() -> None:
    assert set(emitted()) == set(get_args(Code))


@pytest.mark.parametrize(
    "planted",
    [
        'def f(x):\n    return "made-up", f"it is {x}"\n',
        'def f(text):\n    return "made-up", text\n',
        'problem = ("made-up", "the weight is odd")\n',
        'match = match.refused("made-up", "left out")\n',
        'self.issues.setdefault("made-up", text)\n',
        '_ISSUES = ((CONVS, "made-up", "a convolution ({}) between"),)\n',
    ],
)
def test_a_planted_code_is_seen(planted: str) -> None:
    assert set(codes_in(ast.parse(planted))) == {"made-up"}


def test_codes_are_short_names() -> None:
    codes = get_args(Code)
    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and " " not in code for code in codes)
