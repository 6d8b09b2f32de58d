"""A progress bar for long loops: tqdm when it is installed and somebody watches, else nothing.

Contract: yields the items unchanged and in order. Silent when stderr is no terminal, when the work is small, and
on every rank but the first. Never prints to stdout.

    >>> list(progress([1, 2, 3], "layers", work=10))
    [1, 2, 3]
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

LARGE = 500_000_000  # elements to write: about a second of copying in fp32

T = TypeVar("T")


def progress(items: Collection[T], what: str, *, work: int) -> Iterable[T]:
    """``items``, with a bar named ``what`` when the loop is long.

    Args:
        items: what to loop over.
        what: the unit, such as ``"layers"``.
        work: how many tensor elements the whole loop writes; below ``LARGE`` no bar is drawn.
    """
    if work < LARGE or not _watched():
        return items
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return items
    return tqdm(items, desc=f"moefy: {what}", unit="", file=sys.stderr, leave=False)


def _watched() -> bool:
    """Whether a person looks at stderr of this process."""
    if os.environ.get("RANK", "0") != "0":
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
