"""Tokens that are more than one vector: trailing axes that form one token, and nested dicts, lists and tuples.

Contract: every tensor of a tree has the same leading shape, whose product is T; the axes behind it are one token's.
``flatten`` makes ``[T, ...]`` of each tensor, ``unflatten`` restores the leading shape. A tensor is a tree of one leaf.
Trees are ``torch.utils._pytree``'s.

    >>> x = {"hidden": torch.randn(2, 5, 16), "positions": torch.zeros(2, 5, dtype=torch.int64)}
    >>> tokens = flatten(x, (2, 5))          # {"hidden": [10, 16], "positions": [10]}

Shape letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moefy.errors import DtypeError, ShapeError
from moefy.nn.routing.layout import numel

Tree = Any
"""A tensor, or nested dicts, lists and tuples of tensors."""


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of ``tree``.

    Raises:
        DtypeError: for a leaf that is no tensor, or a tree without leaves.
    """
    found = [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)
    for leaf in found:
        if not isinstance(leaf, Tensor):
            raise DtypeError(f"a tree of tokens holds tensors only; got {type(leaf).__name__}")
    if not found:
        raise DtypeError("a tree of tokens holds at least one tensor; got none")
    return found


def flatten(tree: Tree, leading: Sequence[int]) -> Tree:
    """Every leaf ``[*leading, ...]`` as ``[T, ...]``.

    Raises:
        ShapeError: for a leaf with another leading shape.
    """
    leading = tuple(leading)
    for leaf in leaves(tree):
        if tuple(leaf.shape[: len(leading)]) != leading:
            raise ShapeError(
                f"all tensors of a tree have the same leading shape; got {tuple(leaf.shape)}, expected {leading} "
                "in front"
            )
    return map_leaves(lambda leaf: leaf.reshape(numel(leading), *leaf.shape[len(leading) :]), tree)


def unflatten(tree: Tree, leading: Sequence[int]) -> Tree:
    """Every leaf ``[T, ...]`` as ``[*leading, ...]``."""
    return map_leaves(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), tree)


def concatenate(trees: Sequence[Tree], zero_rows: int) -> Tree:
    """The rows of all ``trees``, one after the other, and then ``zero_rows`` rows of zeros."""
    structure = pytree.tree_structure(trees[0])
    columns = zip(*(pytree.tree_leaves(tree) for tree in trees), strict=True)
    return pytree.tree_unflatten([_concatenate(column, zero_rows) for column in columns], structure)


def pass_through(tree: Tree, source: Tree, stranded_T: Tensor) -> Tree:
    """``tree`` with the tokens of ``source`` in the places where ``stranded_T`` is true.

    Raises:
        ShapeError: when structure or shapes differ, so that a token cannot pass.
    """
    ys, structure = pytree.tree_flatten(tree)
    xs = pytree.tree_leaves(source)
    if [y.shape for y in ys] != [x.shape for x in xs]:
        raise ShapeError(
            "a token without a seat cannot pass through experts that change the shape of tokens; "
            "use a Capacity with residual=False"
        )
    passed = [torch.where(_wide(stranded_T, y), x.to(y.dtype), y) for x, y in zip(xs, ys, strict=True)]
    return pytree.tree_unflatten(passed, structure)


def map_leaves(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """``tree`` with ``function`` of every leaf."""
    return function(tree) if isinstance(tree, Tensor) else pytree.tree_map(function, tree)


def _wide(value_T: Tensor, like: Tensor) -> Tensor:
    return value_T.view(value_T.shape[0], *[1] * (like.dim() - 1))


def _concatenate(parts: Sequence[Tensor], zero_rows: int) -> Tensor:
    tail = parts[-1].new_zeros(zero_rows, *parts[-1].shape[1:])
    return torch.cat([*parts, tail] if zero_rows else list(parts))
