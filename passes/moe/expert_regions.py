"""Find expert regions in a graph: permute, entry GEMMs, a body, exit GEMM, combine.

A transformed model looks so to Dynamo when its FFN code stayed the user's. A region is safe to replace
when nothing else reads its inside, its entries read one source with one routing, its body reads
nothing but the entries, and autocast is in one state throughout.

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
from moefy.passes.graphs import example_value
from moefy.passes.trace.vocabulary import qualified_op_name

PERMUTE = torch.ops.moefy.permute.default
GROUPED_LINEAR = torch.ops.moefy.grouped_linear.default
COMBINE = torch.ops.moefy.combine.default


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertRegion:
    """One expert FFN, by its nodes; ``entries``, ``permutes`` and ``body`` are in graph order.

    ``reason`` says why the region cannot be one op; it is empty when the region can.
    """

    combine: fx.Node
    exit: fx.Node
    entries: tuple[fx.Node, ...] = ()
    permutes: tuple[fx.Node, ...] = ()
    body: tuple[fx.Node, ...] = ()
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
            region = _walk_up(combine, exit_linear, position)
            reason = region.reason or _check(region, position, autocast)
            regions.append(dataclasses.replace(region, reason=reason))
    return sorted(regions, key=lambda r: position[r.combine])


def is_tensor_node(node: fx.Node) -> bool:
    """Whether the node's value is or holds a tensor; when unknown, yes."""
    value = example_value(node)
    values = value if isinstance(value, tuple | list) else (value,)
    return value is None or any(isinstance(v, Tensor) for v in values)


def _walk_up(combine: fx.Node, exit_linear: fx.Node, position: dict[fx.Node, int]) -> ExpertRegion:
    """The region above ``combine``: body, entries and permutes, or the reason that ended the walk."""
    seen: set[fx.Node] = set()
    entries: list[fx.Node] = []
    body: list[fx.Node] = []
    todo = [exit_linear.args[0]]
    while todo:
        node = todo.pop()
        if not isinstance(node, fx.Node) or node in seen or not is_tensor_node(node):
            continue
        seen.add(node)
        if node.target is GROUPED_LINEAR:
            entries.append(node)
        elif node.op not in ("call_function", "call_method"):
            return ExpertRegion(combine, exit_linear, reason=f"the body reads {node.name}")
        elif node.target in (PERMUTE, COMBINE):
            return ExpertRegion(combine, exit_linear, reason="the body holds rows of another routing")
        else:
            body.append(node)
            todo.extend(node.all_input_nodes)
    permutes = [p for e in entries if isinstance(p := e.args[0], fx.Node) and p.target is PERMUTE]
    if len(permutes) < len(entries):
        return ExpertRegion(combine, exit_linear, reason="an entry does not read permuted tokens")
    found = (tuple(sorted(set(nodes), key=position.__getitem__)) for nodes in (entries, permutes, body))
    return ExpertRegion(combine, exit_linear, *found, reason="" if entries else "no entry above the exit")


def _check(region: ExpertRegion, position: dict[fx.Node, int], autocast: dict[fx.Node, Any]) -> str:
    """Why the region is not one FFN that nothing else looks into; empty when it is."""
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
    """For each node the nodes that opened the autocast blocks around it."""
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
    """Whether the call writes to one of its arguments: ``x += 1``, ``x.relu_()``, ``x[0] = 1``, ``out=x``."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = qualified_op_name(node)
    augmented = name.startswith("i") and hasattr(operator, f"__{name}__")
    written = node.target is operator.setitem or node.kwargs.get("inplace") or "out" in node.kwargs
    return bool(written or augmented or (name.endswith("_") and not name.endswith("__")))
