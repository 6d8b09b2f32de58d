"""The body of a region as an ``fx.Graph`` of its own: entry outputs in, exit input out.

Whole calls of the owner's children (``act_fn``, ``dropout``) become ``call_module`` nodes, so that learnable
activations keep their parameters and dropout its mode; everything else is copied as it ran. Reshapes that keep the
feature axis are dropped: their sizes are those of the traced input.

    SwiGLU in a LlamaMLP:    gate, up -> self.act_fn(gate) * up
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from moefy.passes.match.regions import Region, keeps_last_axis
from moefy.passes.trace import ModuleCall, Trace
from moefy.passes.trace.vocabulary import DROPOUTS, RESHAPES, op_name, tensor_inputs


class OutsideOwner(Exception):
    """The body reads a parameter that does not belong to the owner."""


def body_graph(trace: Trace, region: Region, owner: str | None) -> fx.Graph:
    """Copy the region's body: one placeholder per entry, the exit's input as output.

    With ``owner`` None parameters keep their full FQN and no child is called: the graph for probing and printing.

    Raises:
        OutsideOwner: the body needs a parameter from outside ``owner``.
    """
    inputs = [entry.out for entry in region.entries]
    return _copy_nodes(trace, inputs, region.body, region.exit.x, region.exit.axis, owner)


def tail_graph(trace: Trace, region: Region, owner: str) -> fx.Graph | None:
    """Copy what the owner does to the exit's output (dropout); None when that is nothing."""
    if not region.tail:
        return None
    return _copy_nodes(trace, [region.exit.out], region.tail, region.tail[-1], region.exit.axis, owner)


def _copy_nodes(
    trace: Trace,
    inputs: list[fx.Node],
    nodes: Sequence[fx.Node],
    output: fx.Node,
    axis: int,
    owner: str | None,
) -> fx.Graph:
    graph = fx.Graph()
    env = {node: graph.placeholder(f"rows_{index}") for index, node in enumerate(inputs)}
    children = _child_calls(trace, set(nodes), owner)
    covered: dict[fx.Node, int] = {n: c for c, inner in children.items() for n in inner}

    def value(node: fx.Node) -> fx.Node:
        if node in env:
            return env[node]
        if node.op == "get_attr":
            env[node] = graph.get_attr(_relative(str(node.target), owner))
            return env[node]
        return value(tensor_inputs(node)[0])  # a dropped reshape or cast

    for node in nodes:
        if node in covered:
            call = trace.calls[covered[node]]
            if node is call.output:
                args = tuple(value(n) for n in call.inputs if n is not None)
                env[node] = graph.call_module(_relative(call.fqn, owner), args)
        elif op_name(node) in RESHAPES and axis == -1 and keeps_last_axis(node):
            env[node] = value(tensor_inputs(node)[0])
        else:
            env[node] = _copy(graph, node, value, owner)
    graph.output(value(output))
    return graph


def _copy(graph: fx.Graph, node: fx.Node, value: Any, owner: str | None) -> fx.Node:
    args = fx.map_arg(node.args, value)
    kwargs = dict(fx.map_arg(node.kwargs, value))
    target = node.target
    if op_name(node) in DROPOUTS:
        args, kwargs = _live_dropout(graph, node, args, kwargs, owner)
    if kwargs.get("inplace"):
        kwargs["inplace"] = False
    method = _tensor_methods().get(target)
    if method is not None:  # it has no importable name
        return graph.call_method(method, args, kwargs)
    return graph.call_function(target, args, kwargs)  # type: ignore[arg-type]


@functools.cache
def _tensor_methods() -> dict[Any, str]:
    """The methods of ``Tensor`` by object: ``Tensor.__pow__`` calls itself "pow" and lives in ``torch._tensor``."""
    members = ((getattr(Tensor, name), name) for name in dir(Tensor) if name != "__class__")
    return {member: name for member, name in members if callable(member) and not isinstance(member, type)}


def _live_dropout(
    graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], owner: str | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``F.dropout(x, p, training=False)`` in an eval trace follows the owner's mode afterwards."""
    try:
        bound = inspect.signature(node.target).bind(*args, **kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin: torch.dropout(input, p, train)
        flag = args[2] if len(args) > 2 else kwargs.get("train", False)
        live = graph.get_attr("training") if owner is not None and flag is False else flag
        return (*args[:2], live), {}
    if owner is not None and bound.arguments.get("training") is False:
        bound.arguments["training"] = graph.get_attr("training")
    bound.arguments.pop("inplace", None)
    return bound.args, bound.kwargs


def _child_calls(trace: Trace, body: set[fx.Node], owner: str | None) -> dict[int, list[fx.Node]]:
    """Outermost calls of the owner's children that lie wholly in the body, with their nodes."""
    if owner is None or not body:
        return {}
    found: dict[int, list[fx.Node]] = {}
    taken: set[fx.Node] = set()
    candidates = {c for n in body if n.meta["call"] is not None for c in trace.ancestors(n.meta["call"])}
    for index in sorted(candidates):
        call = trace.calls[index]
        nodes = [n for n in body if call.start <= n.meta["seq"] < call.end]
        if taken.isdisjoint(nodes) and _is_element_wise_call(call, nodes, trace, owner):
            found[index] = nodes
            taken.update(nodes)
    return found


def _is_element_wise_call(call: ModuleCall, nodes: Sequence[fx.Node], trace: Trace, owner: str) -> bool:
    inside = sum(
        1 for n in trace.graph.nodes if n.op == "call_function" and call.start <= n.meta["seq"] < call.end
    )
    prefix = f"{owner}." if owner else ""
    tensor_args = [n for n in call.inputs if n is not None]
    return (
        call.fqn != owner
        and call.fqn.startswith(prefix)
        and inside == len(nodes)
        and not call.has_other_inputs
        and len(tensor_args) == len(call.inputs) == 1
        and isinstance(call.output, fx.Node)
        and call.output in nodes
    )


def _relative(fqn: str, owner: str | None) -> str:
    if owner is None or owner == "":
        return fqn
    if not fqn.startswith(f"{owner}."):
        raise OutsideOwner(fqn)
    return fqn[len(owner) + 1 :]
