"""Pre-score weighting: the routing weight multiplies an expert's input instead of its output.

Contract: ``y[t] = sum_k expert[e[t, k]](w[t, k] * x[t])`` (Tutel's ``is_postscore=False``; Llama 4 does it with K=1).
It is the usual computation for N = T*K tokens of one expert each with weight 1: a slot's number is then its token's,
so that order and offsets stay. The weights are applied before any dispatcher sees the tokens, hence on the rank that
has the tokens. A dropped slot adds nothing.

    >>> x_N, slots = weight_inputs(x_TD, routing)
    >>> y_TO = sum_slots(run(x_N, slots), routing)

Shape letters: T tokens, K top-k, N = T*K slots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moefy.nn.routing.layout import TokenLayout
from moefy.nn.routing.routing import Routing
from moefy.nn.routing.token_tree import Tree, map_leaves
from moefy.ops.cpu.sums import accumulation_dtype


def weight_inputs(tokens: Tree, routing: Routing) -> tuple[Tree, Routing]:
    """Each slot's weighted token, and the routing of the slots as tokens.

    Args:
        tokens: ``[T, ...]``; an integer leaf is repeated without a weight.
        routing: that of the tokens.

    Returns:
        ``[N, ...]`` in the structure of ``tokens``, and a routing with K = 1 and weights 1.
    """
    slots = dataclasses.replace(
        routing,
        top_k_index=routing.top_k_index.reshape(-1, 1),
        top_k_weights=torch.ones_like(routing.top_k_weights).reshape(-1, 1),
        layout=TokenLayout((routing.num_rows,)),
        stranded=None,
    )
    return map_leaves(lambda leaf: _weighted(leaf, routing.top_k_weights), tokens), slots


def sum_slots(slots: Tree, routing: Routing) -> Tree:
    """``[T, ...]``: the sum over each token's K slots of ``[N, ...]``."""
    return map_leaves(lambda leaf: _summed(leaf, routing.top_k), slots)


def _weighted(leaf: Tensor, weights_TK: Tensor) -> Tensor:
    tokens, top_k = weights_TK.shape
    copies = leaf.unsqueeze(1).expand(tokens, top_k, *leaf.shape[1:])
    if leaf.is_floating_point():
        weights = weights_TK.view(tokens, top_k, *[1] * (leaf.dim() - 1))
        copies = (copies * weights).to(leaf.dtype)
    return copies.reshape(tokens * top_k, *leaf.shape[1:])


def _summed(leaf: Tensor, top_k: int) -> Tensor:
    slots = leaf.reshape(leaf.shape[0] // top_k, top_k, *leaf.shape[1:])
    return slots.sum(1, dtype=accumulation_dtype(leaf)).to(leaf.dtype)
