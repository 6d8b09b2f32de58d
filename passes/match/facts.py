"""``Facts``: what the matcher asks of one trace. Linears, feature axes, dead nodes, and which module call holds what.

>>> facts = Facts(trace_module(model, (x,)))           # x + self.mlp(x)
>>> [facts.trace.calls[i].fqn for i in facts.calls_around(region)]
['mlp', '']
"""

from __future__ import annotations

from torch import fx

from moefy.passes.match.feature_axis import FeatureAxes
from moefy.passes.match.linears import LinearSite, find_linears
from moefy.passes.match.regions import Region, look_through
from moefy.passes.trace import ModuleCall, Trace
from moefy.passes.trace.vocabulary import parameter_only


class Facts:
    """Facts about ``trace``.

    Attributes:
        trace: the trace.
        sites: every linear map, by each of its nodes.
        axes: the feature axis of every value that one is known for.
        dead: call nodes whose value reaches no output.
        attributes: FQNs of the parameters and buffers that the forward read.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        for node in trace.graph.nodes:
            parameter_only(node)  # its answers are cached: asked in execution order it never recurses deeply
        self.dead = _dead_nodes(trace.graph)
        self.sites = find_linears(trace)
        self.axes = FeatureAxes(self.sites)
        self.attributes = [str(n.target) for n in trace.graph.nodes if n.op == "get_attr"]
        nodes = {n.meta["seq"]: n for n in trace.graph.nodes if n.op == "call_function"}
        self._by_seq = [nodes.get(i) for i in range(max(nodes, default=-1) + 1)]

    def span(self, call: ModuleCall) -> list[fx.Node]:
        """The call nodes that ran inside ``call``."""
        return [n for n in self._by_seq[call.start : call.end] if n is not None]

    def calls_around(self, region: Region) -> list[int]:
        """The module calls that contain the whole region, innermost first."""
        seqs = [n.meta["seq"] for n in region.nodes() if n.op == "call_function" and not parameter_only(n)]
        low, high = min(seqs), max(seqs)
        start = region.exit.out.meta["call"]
        if start is None:
            return []
        calls = self.trace.calls
        return [c for c in self.trace.ancestors(start) if calls[c].start <= low and high < calls[c].end]

    def linear_call(self, site: LinearSite) -> ModuleCall | None:
        """The module call that is exactly this linear."""
        owner = site.owner
        if site.weight != f"{owner}.weight" or site.bias not in (None, f"{owner}.bias"):
            return None
        for index in self.trace.ancestors(site.node_call) if site.node_call is not None else ():
            call = self.trace.calls[index]
            if call.fqn == owner:
                out = call.output
                exact = isinstance(out, fx.Node) and look_through(out) is look_through(site.out)
                return call if exact and not call.has_other_inputs else None
        return None


def _dead_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Call nodes whose value reaches no output."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and all(user in dead for user in node.users):
            dead.add(node)
    return dead
