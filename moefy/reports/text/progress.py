"""A progress bar for long loops, drawn by tqdm where tqdm is installed and stderr is a terminal.

Contract: yields the items unchanged and in order. Nothing is drawn when the work is small, nor on any rank but the
first. Nothing goes to stdout.

    >>> list(progress([1, 2, 3], "layers", work=10))
    [1, 2, 3]
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Iterable
from typing import TypeVar

LARGE = 500_000_000  # tensor elements: about a second of copying in fp32

T = TypeVar("T")


def progress(items: Collection[T], what: str, *, work: int) -> Iterable[T]:
    """``items``, with a bar named ``what`` when the loop is long.

    Args:
        items: what to loop over.
        what: the unit, such as ``"layers"``.
        work: tensor elements that the whole loop writes. Below ``LARGE`` no bar is drawn.
    """
    if work < LARGE or not _watched():
        return items
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ImportError:
        return items
    return tqdm(items, desc=f"moefy: {what}", unit="", file=sys.stderr, leave=False)


def _watched() -> bool:
    """Whether this process is rank 0 and its stderr a terminal."""
    if os.environ.get("RANK", "0") != "0":
        return False
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False
