"""The pass that writes MoE into a caller's graph: entry, body and exit nodes become routed ones.

    linear(x, w1) -> gelu -> linear(., w2)
    exchange = route_by(router, x) -> expert_entries(x, [W1], exchange) -> gelu -> expert_exit(., W2, exchange)

The router is a ``get_attr`` node of its module, so that any router does. The weights are ``get_attr`` nodes under their
dense FQNs, which by then hold stacked experts. Preserves numerics to rounding when the experts are copies and the
router's weights sum to 1.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from moefy.nn import dispatch
from moefy.passes.base import Pass
from moefy.passes.match import Match
from moefy.passes.match.body_graph import body_graph
from moefy.passes.match.regions import Region
from moefy.passes.pipeline import run_pass
from moefy.passes.trace import Trace
from moefy.passes.trace.vocabulary import RESHAPES, op_name
from moefy.records import PassRecord


@dataclasses.dataclass(frozen=True)
class GraphMatch:
    """One FFN of the graph, the trace that it was found in, and where its router will be."""

    match: Match
    trace: Trace
    router: str


class FFNToMoE(Pass):
    """The pass ``ffn_to_moe``, for one graph.

    Args:
        matches: the FFNs to rewrite.
        nodes: the graph's node for each node that the traces of the matches name as an origin.
    """

    name = "ffn_to_moe"
    stage = "capture"

    def __init__(self, matches: Sequence[GraphMatch], nodes: dict[fx.Node, fx.Node]) -> None:
        self.matches, self.nodes = matches, nodes

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Rewrite every call of every match; the number of matches."""
        for match in self.matches:
            for region in match.match.regions:
                last = _rewrite(gm.graph, self.nodes, match, region)
                dense = [self.nodes[o] for n in region.nodes() if (o := n.meta.get("origin")) in self.nodes]
                _erase(gm.graph, [*dense, last])
        return len(self.matches)


def ffn_to_moe(graph: fx.Graph, matches: Sequence[GraphMatch]) -> tuple[fx.Graph, PassRecord]:
    """A copy of ``graph`` with every match rewritten, and the record of the pass."""
    copied, copies = _copy(graph)
    record = run_pass(FFNToMoE(matches, copies), _without_modules(copied))
    return copied, record


def _without_modules(graph: fx.Graph) -> fx.GraphModule:
    """A module around ``graph`` for the runner. It holds none of the modules that the graph names.

    Routers and stacked experts are installed after the pass, so lint may not look for them: the graph has no owner.
    """
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm.graph = graph
    graph.owning_module = None
    return gm


def _copy(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of ``graph``, and its node for each of the old ones."""
    copies: dict[fx.Node, fx.Node] = {}
    copied = fx.Graph()
    output = copied.graph_copy(graph, copies, return_output_node=True)
    if output is not None:
        value, old_output = cast("tuple[Any, fx.Node]", output)
        node = copied.output(value)
        node.meta.update(old_output.meta)
        copies[old_output] = node
    copied._codegen = graph._codegen
    return copied, copies


def _rewrite(graph: fx.Graph, copies: dict[fx.Node, fx.Node], match: GraphMatch, region: Region) -> fx.Node:
    axis = region.feature_dim
    x = _caller_value(region.entries[0].x, region.source, copies)
    last = _last_of_exit(copies[region.exit.out.meta["origin"]], region)
    with graph.inserting_before(last):
        router = graph.get_attr(match.router)
        exchange = _leaf(graph, dispatch.route_by, (router, x), {"feature_dim": axis})
        linears = [_weights(graph, entry.weight, entry.bias) for entry in region.entries]
        entries = _leaf(graph, dispatch.expert_entries, (x, linears, exchange))
        rows = [graph.call_function(operator.getitem, (entries, i)) for i in range(len(linears))]
        body = body_graph(match.trace, region, "")
        inner: dict[fx.Node, fx.Node] = dict(
            zip((n for n in body.nodes if n.op == "placeholder"), rows, strict=True)
        )
        hidden = graph.graph_copy(body, inner)
        linear = _weights(graph, region.exit.weight, region.exit.bias)
        out = _leaf(graph, dispatch.expert_exit, (hidden, *linear, exchange))
    last.replace_all_uses_with(out)
    return last


def _erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase the nodes that nobody reads any more, and what only they read."""
    erased: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node in erased or node.users or node.op in ("placeholder", "output"):
            continue
        nodes.extend(node.all_input_nodes)
        erased.add(node)
        graph.erase_node(node)


def _leaf(
    graph: fx.Graph, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """A call that stays one node when the graph is traced again, as unpickling a GraphModule does."""
    node = graph.call_function(function, args, kwargs)
    node.meta["is_wrapped"] = True
    return node


def _weights(graph: fx.Graph, weight: str, bias: str | None) -> tuple[fx.Node, fx.Node | None]:
    return graph.get_attr(weight), graph.get_attr(bias) if bias is not None else None


def _caller_value(raw: fx.Node, source: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """The caller's node of the source: that of the looked-through value, where it is visible in the graph."""
    return (
        copies[source.meta["origin"]] if source.meta.get("origin") in copies else copies[raw.meta["origin"]]
    )


def _last_of_exit(node: fx.Node, region: Region) -> fx.Node:
    """The exit's node, or the reshape behind it that gives a flattened result its leading shape back."""
    if len(region.exit.out.meta["shape"]) == len(region.source.meta["shape"]):
        return node
    users = list(node.users)
    if len(users) == 1 and users[0].op in ("call_function", "call_method") and _reshapes(users[0]):
        return users[0]
    return node


def _reshapes(node: fx.Node) -> bool:
    return node.target in RESHAPES if node.op == "call_method" else op_name(node) in RESHAPES
