"""Many module paths as few lines: paths that differ only in integers become one brace pattern.

Contract: the patterns, expanded, are exactly the paths that went in, each once. Lines come in the order in which their
first path appeared.

    >>> [(f.pattern, f.count) for f in fold(["h.0.mlp", "h.1.mlp", "h.2.mlp", "head"])]
    [('h.{0..2}.mlp', 3), ('head', 1)]
    >>> spell([0, 2, 4, 6, 9])
    '{0..6..2,9}'
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Sequence

_INTEGER = re.compile(r"\d+")

_Box = tuple[tuple[int, ...], ...]  # one sorted tuple of values per integer of the path: their product


@dataclasses.dataclass(frozen=True)
class Folded:
    """``count`` paths written as one ``pattern``. ``first`` is the index of the earliest path."""

    pattern: str
    count: int
    first: int


def fold(paths: Sequence[str], keys: Sequence[Hashable] | None = None) -> list[Folded]:
    """Fold ``paths`` that have the same ``key`` and differ only in integers.

    An integer inside a name folds too (``encoder_layer_3``). Paths with two integers share a line when all
    combinations occur (``stages.{0..3}.blocks.{0,1}``), else they take several lines.
    """
    marks = list(keys) if keys is not None else [None] * len(paths)
    groups: dict[tuple[tuple[str, ...], Hashable], dict[tuple[int, ...], int]] = {}
    repeats: list[Folded] = []
    for index, (path, key) in enumerate(zip(paths, marks, strict=True)):
        literals, values = _split(path)
        seen = groups.setdefault((literals, key), {})
        if values in seen:
            repeats.append(Folded(path, 1, index))
        else:
            seen[values] = index
    folded = [line for (literals, _), seen in groups.items() for line in _boxes(literals, seen)]
    return sorted([*folded, *repeats], key=lambda line: line.first)


def spell(values: Sequence[int]) -> str:
    """Sorted integers as a brace pattern; runs of three or more as ``a..b`` or ``a..b..step``."""
    if len(values) == 1:
        return str(values[0])
    return "{" + ",".join(_runs(values)) + "}"


def _split(path: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The text around the integers, and the integers. ``007`` counts as text, since ``int`` would drop its zeros."""
    literals, values, last = [], [], 0
    for match in _INTEGER.finditer(path):
        if str(int(match.group())) == match.group():
            literals.append(path[last : match.start()])
            values.append(int(match.group()))
            last = match.end()
    return (*literals, path[last:]), tuple(values)


def _boxes(literals: tuple[str, ...], seen: dict[tuple[int, ...], int]) -> list[Folded]:
    """Cover the integer tuples by products of value sets: merge along one axis after the other."""
    boxes: dict[_Box, int] = {tuple((v,) for v in values): at for values, at in seen.items()}
    for axis in reversed(range(len(literals) - 1)):
        merged: dict[_Box, tuple[list[int], int]] = {}
        for box, at in boxes.items():
            others = (*box[:axis], (), *box[axis + 1 :])
            values, first = merged.get(others, ([], at))
            merged[others] = (values + list(box[axis]), min(first, at))
        boxes = {
            (*others[:axis], tuple(sorted(values)), *others[axis + 1 :]): first
            for others, (values, first) in merged.items()
        }
    return [Folded(_write(literals, box), _size(box), first) for box, first in boxes.items()]


def _write(literals: tuple[str, ...], box: _Box) -> str:
    """The pattern of one product of value sets."""
    pairs = zip(literals, [*map(spell, box), ""], strict=True)
    return "".join(text + values for text, values in pairs)


def _size(box: _Box) -> int:
    """How many paths the product stands for."""
    size = 1
    for values in box:
        size *= len(values)
    return size


def _runs(values: Sequence[int]) -> list[str]:
    """Arithmetic runs of three or more, greedily: the longest run from each start."""
    parts, start = [], 0
    while start < len(values):
        step, end = 0, start + 1
        if end < len(values):
            step = values[end] - values[start]
            while end + 1 < len(values) and values[end + 1] - values[end] == step:
                end += 1
        if step and end - start >= 2:
            suffix = "" if step == 1 else f"..{step}"
            parts.append(f"{values[start]}..{values[end]}{suffix}")
            start = end + 1
        else:
            parts.append(str(values[start]))
            start += 1
    return parts
