"""The residual rule: an FFN's output is added, through nothing but scaling, to the stream that it reads.

From the exit the walk goes forward through dropout, casts, reshapes, norms, permutations, concatenation of chunks,
products with a parameter, a scalar or a ``[..., 1]`` factor, and sums, until it meets a sum whose other operand is the
source or an ancestor of it. Heads, poolers, squeeze-excite blocks and projectors have no such sum.

    x + drop(down(gelu(up(norm(x)))))      source norm(x), stream {norm(x), x}: the sum is the residual
    x * sigmoid(down(relu(up(mean(x)))))   no sum
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from moefy.passes.match.linears import LinearSite
from moefy.passes.match.regions import Region
from moefy.passes.trace.vocabulary import (
    CASTS,
    CONVS,
    DROPOUTS,
    NORMS,
    PERMUTES,
    RESHAPES,
    SPLITS,
    is_pointwise,
    op_name,
    parameter_only,
    shape_of,
    tensor_inputs,
)

_CARRIERS = (
    CASTS
    | DROPOUTS
    | RESHAPES
    | NORMS
    | PERMUTES
    | frozenset(
        ("cat", "concat", "concatenate", "stack", "pad", "roll", "contiguous", "getitem", "mutated_by_view")
    )
)
_SCALES = frozenset(["mul", "div", "addcmul", "masked_fill", "where", "nan_to_num", "clamp"])
# Bounds the cost of one search, forward and up. Among the 343 models of the test zoo a residual is at most 5 steps from
# the exit, and no search takes more than 11.
_MAX_STEPS = 400


def find_residual(region: Region, sites: dict[fx.Node, LinearSite]) -> fx.Node | None:
    """The sum that adds the region's output to its own source's stream, or None."""
    axis = region.exit.axis
    stream = _stream(region.source, sites, axis)
    inside = region.nodes()
    frontier, seen = [region.exit.out], {region.exit.out}
    for _ in range(_MAX_STEPS):
        if not frontier:
            return None
        value = frontier.pop(0)
        for user in value.users:
            if user in seen or user in inside or user.op != "call_function":
                continue
            if op_name(user) in ("add", "sub") and _adds_stream(user, value, stream, inside):
                return user
            if _sums_a_stack(user, value):
                branches = [n for n in tensor_inputs(value) if n not in seen]
                if any(_meets(branch, stream, inside) for branch in branches):
                    return user
            if _carries(user, value, sites, axis):
                seen.add(user)
                frontier.append(user)
    return None


def _adds_stream(add: fx.Node, value: fx.Node, stream: set[fx.Node], inside: set[fx.Node]) -> bool:
    others = [n for n in tensor_inputs(add) if n is not value and not parameter_only(n)]
    return any(_meets(other, stream, inside) for other in others)


def _meets(node: fx.Node, stream: set[fx.Node], inside: set[fx.Node]) -> bool:
    """Whether ``node`` is the stream, or carries it: scaled, cast, reshaped, or as one addend of a sum.

    The walk up ends at the region's own nodes and at any other operation (a linear, an activation). What lies behind
    one is a branch that was computed from the stream, not the stream.
    """
    stack, seen = [node], {node}
    while stack and len(seen) < _MAX_STEPS:
        current = stack.pop()
        if current in stream:
            return True
        name = op_name(current)
        if current in inside or current.op != "call_function":
            continue
        if name in ("add", "sub") or name in _CARRIERS or name in SPLITS or name in _SCALES:
            for value in tensor_inputs(current):
                if value not in seen and not parameter_only(value):
                    seen.add(value)
                    stack.append(value)
    return False


def _carries(user: fx.Node, value: fx.Node, sites: dict[fx.Node, LinearSite], axis: int) -> bool:
    """Whether the walk forward goes on through ``user``."""
    if user in sites:
        return False
    name = op_name(user)
    if name in ("add", "sub") or name in _CARRIERS or _sums_a_stack(user, value):
        return True
    others = [n for n in tensor_inputs(user) if n is not value]
    return name in _SCALES and all(parameter_only(n) or _is_factor(n, value, axis) for n in others)


def _sums_a_stack(node: fx.Node, value: fx.Node) -> bool:
    """Whether ``node`` adds branches as ``torch.stack([...]).sum(0)``."""
    if op_name(node) != "sum" or op_name(value) != "stack":
        return False
    stacked = value.args[1] if len(value.args) > 1 else value.kwargs.get("dim", 0)
    summed = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    summed = summed[0] if isinstance(summed, list | tuple) and len(summed) == 1 else summed
    rank = len(shape_of(value))
    return isinstance(stacked, int) and isinstance(summed, int) and stacked % rank == summed % rank


def _is_factor(node: fx.Node, value: fx.Node, axis: int) -> bool:
    """Whether ``node`` is a mask, a gate with one value per position, or one for all positions (adaptive norms)."""
    shape = shape_of(node)
    if len(shape) < 2 or shape[axis] == 1 or node.meta.get("dtype") == torch.bool:
        return True
    return math.prod(shape) < math.prod(shape_of(value))


def _stream(source: fx.Node, sites: dict[fx.Node, LinearSite], axis: int) -> set[fx.Node]:
    """The source and its ancestors through norms (also hand-written), casts, reshapes, scales and depthwise convs."""
    found, stack = {source}, [source]
    while stack:
        node = stack.pop()
        for value in _upstream(node, sites, axis):
            if value not in found:
                found.add(value)
                stack.append(value)
    return found


def _upstream(node: fx.Node, sites: dict[fx.Node, LinearSite], axis: int) -> Iterator[fx.Node]:
    """The inputs of ``node`` that are the same stream."""
    if node.op != "call_function" or node in sites:
        return
    name = op_name(node)
    inputs = [n for n in tensor_inputs(node) if not parameter_only(n)]
    if name in _CARRIERS or name in SPLITS:
        yield from inputs if name in ("cat", "concat", "stack") else inputs[:1]
    elif name in CONVS:
        if inputs and shape_of(inputs[0]) and _is_depthwise(node):
            yield inputs[0]
    elif is_pointwise(node):
        wide = [n for n in inputs if not _is_factor(n, node, axis)]
        if name in ("add", "sub") or (len(wide) == 1 and name in _SCALES):
            yield from wide  # a shortcut may begin before the block's other branches (EdgeNeXt)


def _is_depthwise(node: fx.Node) -> bool:
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    aten_groups = node.args[8] if len(node.args) > 8 else groups
    return isinstance(aten_groups, int) and aten_groups > 1
