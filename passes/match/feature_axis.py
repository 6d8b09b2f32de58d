"""``FeatureAxes``: which axis of a value holds the features.

Contract: the last axis after a linear, an embedding or a layer norm, axis 1 after a convolution. Element-wise ops,
permutations and reshapes carry the axis on. An axis that is not certain is ``None``, and then no rule refuses.

The axis tells a channel MLP from a token-mixing MLP (MLP-Mixer). Both have a residual of equal width, but the linears
of the latter read the transposed value: their axis is not the feature axis of the stream.

    norm(x): [2, 5, 8], axis 2      norm(x).transpose(1, 2): [2, 8, 5], axis 1; a linear on it acts on axis 2
"""

from __future__ import annotations

import math

from torch import fx

from moefy.passes.match.linears import LinearSite
from moefy.passes.match.regions import keeps_last_axis
from moefy.passes.trace.vocabulary import (
    CASTS,
    CONCATS,
    CONVS,
    DROPOUTS,
    PERMUTES,
    RESHAPES,
    SPLITS,
    moved_axis,
    op_name,
    parameter_only,
    shape_of,
    tensor_inputs,
)

_LAST = frozenset(
    [
        "embedding",
        "linear",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "scaled_dot_product_attention",
        "addmm",
    ]
)
_CHANNEL = frozenset(
    [
        "batch_norm",
        "group_norm",
        "native_group_norm",
        "instance_norm",
        "max_pool1d",
        "max_pool2d",
        "avg_pool2d",
        "adaptive_avg_pool2d",
        "avg_pool1d",
        "interpolate",
    ]
)


class FeatureAxes:
    """Feature axes (non-negative) of the values of one trace, computed on demand."""

    def __init__(self, sites: dict[fx.Node, LinearSite]) -> None:
        self._sites = sites
        self._known: dict[fx.Node, int | None] = {}

    def of(self, node: fx.Node) -> int | None:
        """The feature axis of the node's value; ``None`` when unknown."""
        stack = [node]
        while stack:  # iterative: residual streams are deeper than Python's stack
            current = stack[-1]
            if current in self._known:
                stack.pop()
                continue
            pending = [n for n in self._needs(current) if n not in self._known]
            if pending:
                stack.extend(pending)
            else:
                self._known[current] = self._infer(current)
                stack.pop()
        return self._known[node]

    def _needs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose axes decide about ``node``; none where the operation alone decides."""
        if node.op != "call_function" or node in self._sites or op_name(node) in _LAST | CONVS:
            return []
        return [n for n in tensor_inputs(node) if not parameter_only(n)]

    def _infer(self, node: fx.Node) -> int | None:
        name, rank = op_name(node), len(shape_of(node))
        if node in self._sites:
            return self._sites[node].axis % rank if rank else None
        if node.op != "call_function":
            return None
        if name in CONVS:
            return rank - len(shape_of(tensor_inputs(node)[0])) + 1 if rank >= 3 else None
        if name in _LAST:
            return rank - 1 if rank else None
        known = [(n, axis) for n in self._needs(node) if (axis := self._known.get(n)) is not None]
        if not known:
            return None
        value, axis = known[0]
        before = shape_of(value)
        if name in PERMUTES:
            return moved_axis(node, axis)
        if name in RESHAPES:
            return _through_reshape(before, shape_of(node), axis, keeps_last_axis(node))
        if name in CASTS or name in DROPOUTS or name in CONCATS or name in _CHANNEL or name in SPLITS:
            return axis if len(before) == rank else None
        if name == "getitem":
            return axis if len(before) == rank else (rank - 1 if axis == len(before) - 1 and rank else None)
        same_rank = [a for n, a in known if len(shape_of(n)) == rank]
        return same_rank[0] if same_rank else None


def _through_reshape(
    before: tuple[int, ...], after: tuple[int, ...], axis: int, keeps_last: bool
) -> int | None:
    """Where ``axis`` stands after a reshape; ``None`` when the reshape splits or merges it.

    The last axis survives when it stays whole. An inner one is found by its size and the product of those before it.
    """
    if axis == len(before) - 1:
        return len(after) - 1 if keeps_last else None
    lead = math.prod(before[:axis])
    for candidate in range(len(after)):
        if math.prod(after[:candidate]) == lead and after[candidate] == before[axis]:
            return candidate
    return None
