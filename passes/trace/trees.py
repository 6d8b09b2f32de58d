"""Nested containers of tensors, as arguments and results of calls are.

>>> map_tensors({"a": [torch.ones(2), 3]}, lambda t: t.sum().item())
{'a': [2.0, 3]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def map_tensors(tree: Any, fn: Callable[[Tensor], Any]) -> Any:
    """``tree_map`` over tensors. Plain containers, which are nearly all there are, are done here: the recorder
    asks for every torch call of a forward."""
    if isinstance(tree, Tensor):
        return fn(tree)
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind(map_tensors(item, fn) for item in tree)
    if kind is dict:
        return {key: map_tensors(item, fn) for key, item in tree.items()}
    if tree is None or kind in (int, float, bool, str, torch.dtype, torch.device):
        return tree
    return tree_map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of ``tree``, in order."""
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def has_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a tuple or list that holds one."""
    if isinstance(value, Tensor):
        return True
    return isinstance(value, tuple | list) and any(has_tensor(v) for v in value)
