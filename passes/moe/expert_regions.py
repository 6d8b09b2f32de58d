"""Find expert regions in a graph: permute, entry GEMMs, a body, exit GEMM, combine.

This is what a transformed model looks like to Dynamo when its FFN code stayed the user's. A region is
safe to replace when nothing else reads its inside, its entries read one source with one routing, its
body reads nothing but the entries, and autocast is in one state throughout.

    >>> [region] = find_expert_regions(gm.graph)
    >>> [n.name for n in region.entries], region.combine.name
    (['row_NO'], 'y_TO')
    >>> region.reason                              # or why it cannot be one op
    ''
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor, fx

from moefy import ops  # noqa: F401  registers torch.ops.moefy

PERMUTE = torch.ops.moefy.permute.default
GROUPED_LINEAR = torch.ops.moefy.grouped_linear.default
COMBINE = torch.ops.moefy.combine.default


@dataclasses.dataclass
class ExpertRegion:
    """One expert FFN, by its nodes. ``body`` is in graph order; ``reason`` says why not to fuse it."""

    combine: fx.Node
    exit: fx.Node
    entries: list[fx.Node] = dataclasses.field(default_factory=list)
    permutes: list[fx.Node] = dataclasses.field(default_factory=list)
    body: list[fx.Node] = dataclasses.field(default_factory=list)
    reason: str = ""

    @property
    def nodes(self) -> set[fx.Node]:
        """All nodes that the fused op replaces."""
        return {self.combine, self.exit, *self.entries, *self.permutes, *self.body}


def find_expert_regions(graph: fx.Graph) -> list[ExpertRegion]:
    """Every region that ends in a ``moefy::combine``, in graph order."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    autocast = _autocast_states(graph)
    regions = []
    for combine in graph.find_nodes(op="call_function", target=COMBINE):
        exit_linear = combine.args[0]
        if isinstance(exit_linear, fx.Node) and exit_linear.target is GROUPED_LINEAR:
            region = ExpertRegion(combine, exit_linear)
            region.reason = _walk_up(region, position) or _check(region, position, autocast)
            regions.append(region)
    return sorted(regions, key=lambda r: position[r.combine])


def is_tensor_node(node: fx.Node) -> bool:
    """Whether the node's value is or holds a tensor; when unknown, yes."""
    value = node.meta.get("example_value", node.meta.get("val"))
    values = value if isinstance(value, tuple | list) else (value,)
    return value is None or any(isinstance(v, Tensor) for v in values)


def _walk_up(region: ExpertRegion, position: dict[fx.Node, int]) -> str:
    """Collect body, entries and permutes above the exit; return what is in the way."""
    seen: set[fx.Node] = set()
    todo = [region.exit.args[0]]
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen or not is_tensor_node(node):
            continue
        seen.add(node)
        if node.target is GROUPED_LINEAR:
            region.entries.append(node)
        elif node.op not in ("call_function", "call_method"):
            return f"the body reads {node.name}"
        elif node.target in (PERMUTE, COMBINE):
            return "the body holds rows of another routing"
        else:
            region.body.append(node)
            todo.extend(node.all_input_nodes)
    region.entries.sort(key=position.__getitem__)
    region.body.sort(key=position.__getitem__)
    permutes = [e.args[0] for e in region.entries]
    if any(not isinstance(p, fx.Node) or p.target is not PERMUTE for p in permutes):
        return "an entry does not read permuted tokens"
    region.permutes = sorted(dict.fromkeys(permutes), key=position.__getitem__)  # type: ignore[arg-type]
    return "" if region.entries else "no entry above the exit"


def _check(region: ExpertRegion, position: dict[fx.Node, int], autocast: dict[fx.Node, Any]) -> str:
    """Whether the region is one FFN that nothing else looks into."""
    order, offsets = region.combine.args[2], region.exit.args[3]
    if any(e.args[3] is not offsets for e in region.entries):
        return "the linears have different offsets"
    if any(p.args[1] is not order for p in region.permutes):
        return "the linears have different routings"
    first, *others = (p.args[0] for p in region.permutes)
    if not all(same_value(first, other) for other in others):
        return "the entries read different tensors"
    inside = region.nodes
    for node in inside - {region.combine}:
        if not set(node.users) <= inside:
            return f"{node.name} is used outside the FFN"
    if len({autocast[n] for n in inside}) > 1:
        return "autocast changes inside"
    start, end = position[region.permutes[0]], position[region.exit]
    strangers = (n for n, at in position.items() if start < at < end and n not in inside)
    return next((f"{n.name} writes in place" for n in strangers if _mutates(n)), "")


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same computation of the same nodes.

    Valid where nothing is written in place between the two, which ``_check`` makes sure of.
    """
    if a is b:
        return True
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        pure = a.op in ("call_function", "call_method") and a.op == b.op and a.target == b.target
        return pure and same_value((a.args, a.kwargs), (b.args, b.kwargs))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[k], b[k]) for k in a)
    return type(a) is type(b) and not isinstance(a, fx.Node) and a == b


def _autocast_states(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each node the autocast blocks around it."""
    states: dict[fx.Node, tuple[fx.Node, ...]] = {}
    open_blocks: list[fx.Node] = []
    for node in graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast:
            open_blocks.append(node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            open_blocks = [b for b in open_blocks if b is not node.args[0]]
        states[node] = tuple(open_blocks)
    return states


def _mutates(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    augmented = name.startswith("i") and hasattr(operator, f"__{name}__")
    written = node.target is operator.setitem or node.kwargs.get("inplace") or "out" in node.kwargs
    return bool(written or augmented or (name.endswith("_") and not name.endswith("__")))
