"""Tokens that are more than one vector: trailing axes that form one token, and nested dicts, lists and tuples.

Contract: every tensor of a tree has the same leading shape, whose product is T; what follows is one token's.
``flatten`` makes rows ``[T, ...]`` of each, ``permute`` sorts them by expert, ``combine`` sums each token's outputs by
weight, and ``unflatten`` restores the leading shape. Trees are ``torch.utils._pytree``'s.

    >>> x = {"hidden": torch.randn(2, 5, 16), "positions": torch.zeros(2, 5, dtype=torch.int64)}
    >>> rows = flatten(x, (2, 5))            # {"hidden": [10, 16], "positions": [10]}

Shape letters: T tokens, K top-k, N = T*K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moefy import ops
from moefy.errors import DtypeError, ShapeError
from moefy.nn.functional import count
from moefy.nn.routing.routing import Routing

Tree = Any
"""A tensor, or nested dicts, lists and tuples of tensors."""


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of ``tree``.

    Raises:
        DtypeError: for a leaf that is no tensor, or a tree without leaves.
    """
    found = pytree.tree_leaves(tree)
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
    return map_leaves(lambda leaf: leaf.reshape(count(leading), *leaf.shape[len(leading) :]), tree)


def unflatten(tree: Tree, leading: Sequence[int]) -> Tree:
    """The inverse of ``flatten``."""
    return map_leaves(lambda leaf: leaf.reshape(*leading, *leaf.shape[1:]), tree)


def permute(tree: Tree, routing: Routing) -> Tree:
    """Rows ``[N, ...]`` sorted by expert of leaves ``[T, ...]``."""
    return map_leaves(lambda leaf: _permute(leaf, routing), tree)


def combine(tree: Tree, routing: Routing) -> Tree:
    """``[T, ...]``: each token's rows of ``[N, ...]``, summed by weight."""
    return map_leaves(lambda leaf: _combine(leaf, routing), tree)


def concatenate(trees: Sequence[Tree], zero_rows: int) -> Tree:
    """The rows of all ``trees``, one after the other, and then ``zero_rows`` rows of zeros."""
    structure = pytree.tree_structure(trees[0])
    columns = zip(*(pytree.tree_leaves(tree) for tree in trees), strict=True)
    return pytree.tree_unflatten([_concatenate(column, zero_rows) for column in columns], structure)


def pass_through(tree: Tree, source: Tree, routing: Routing) -> Tree:
    """``tree`` with the tokens of ``source`` in the place of those that capacity left without any expert.

    Raises:
        ShapeError: when the experts changed structure or shape, so that a token cannot pass.
    """
    wanted, seated = (_has_expert(ids, routing) for ids in (routing.choice.index, routing.top_k_index))
    stranded_T = wanted & ~seated
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


def _has_expert(index_TK: Tensor, routing: Routing) -> Tensor:
    return ((index_TK >= 0) & (index_TK < routing.offsets.shape[0])).any(1)


def _wide(value_T: Tensor, like: Tensor) -> Tensor:
    return value_T.view(value_T.shape[0], *[1] * (like.dim() - 1))


def _concatenate(parts: Sequence[Tensor], zero_rows: int) -> Tensor:
    tail = parts[-1].new_zeros(zero_rows, *parts[-1].shape[1:])
    return torch.cat([*parts, tail] if zero_rows else list(parts))


def _permute(leaf: Tensor, routing: Routing) -> Tensor:
    if not leaf.is_floating_point():  # ids and masks, which have no gradient
        return leaf.index_select(0, routing.order // routing.top_k)
    rows_NF = ops.permute(_as_matrix(leaf), routing.order, routing.top_k)
    return rows_NF.reshape(rows_NF.shape[0], *leaf.shape[1:])


def _combine(leaf: Tensor, routing: Routing) -> Tensor:
    if not leaf.is_floating_point():
        raise DtypeError(
            f"experts return floating point tensors, which are summed by weight; got {leaf.dtype}"
        )
    y_TF = ops.combine(_as_matrix(leaf), routing.top_k_weights, routing.order)
    return y_TF.reshape(y_TF.shape[0], *leaf.shape[1:])


def _as_matrix(leaf: Tensor) -> Tensor:
    return leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], count(leaf.shape[1:]))
