"""Combinations of alternatives, in the order in which they are worth a try.

>>> list(nearest_first([["a", "b"], [1, 2]], ranked=100))
[('a', 1), ('a', 2), ('b', 1), ('b', 2)]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any


def nearest_first(choices: Sequence[Sequence[Any]], *, ranked: int) -> Iterator[tuple[Any, ...]]:
    """Take one alternative of each choice; combinations of first alternatives, or near them, come first.

    Args:
        choices: the alternatives of each choice, best first.
        ranked: how many combinations are put in order. Further ones are left out.
    """
    ranks = itertools.product(*(range(len(options)) for options in choices))
    for rank in sorted(itertools.islice(ranks, ranked), key=sum):
        yield tuple(options[i] for options, i in zip(choices, rank, strict=True))
