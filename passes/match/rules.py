"""Match: which regions of a trace are feed-forward networks, how each can be rewritten, and why the others cannot.

A region (``regions.py``) is an FFN when its linears are plain, nothing in it escapes, its body is element-wise,
its width comes out as it went in, its output is added to the stream that it reads, and the linears act on that stream's
feature axis. The same weights at several places are one FFN called several times.

Every candidate yields a ``Match``; a refused one has ``record.code`` and ``record.reason``:

========================  ============================================================================
grouped, quantized,       a linear that cannot become experts
computed-weight, lora,
unregistered-weight
escape                    an inner value is used outside the region
conv-, concat-, norm-,    the body holds more than element-wise ops
reduction-, opaque-between
different-source          the entries, or the body, read different values
width-change              D_in != D_out
router-above              part of an existing Mixture-of-Experts
no-residual               heads, poolers, squeeze-excite, projectors
feature-axis              token mixing
shared-weight             a weight is also used elsewhere
raw-parameters            no module of its own to replace
========================  ============================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import fx

from moefy.passes.match.body_graph import OutsideOwner, body_graph, tail_graph
from moefy.passes.match.classify_body import classify_body
from moefy.passes.match.feature_axis import FeatureAxes
from moefy.passes.match.linears import LinearSite, find_linears
from moefy.passes.match.regions import Region, find_regions, keeps_last_axis, look_through
from moefy.passes.match.residual import find_residual
from moefy.passes.trace.recorder import ModuleCall, Trace
from moefy.passes.trace.vocabulary import (
    CASTS,
    DROPOUTS,
    RESHAPES,
    ROUTING,
    SPLITS,
    op_name,
    parameter_only,
    shape_of,
    tensor_inputs,
)
from moefy.records import FFNMatch, Form, KnownBody

_ISSUE_ORDER = (
    "conv-between",
    "concat-between",
    "norm-between",
    "reduction-between",
    "opaque-between",
    "feature-axis",
    "different-source",
)
Refusal = tuple[str, str]


@dataclasses.dataclass(eq=False)
class Match:
    """One candidate with all its call sites; ``regions[0]`` describes it, ``record`` is its public face.

    ``returns_tuple`` tells that the owner answers ``(out, bias)`` (Megatron). ``body`` and ``tail`` are there when
    ``record.form`` is "module", ``known`` when the expert op computes the body by itself.
    """

    regions: list[Region]
    record: FFNMatch
    returns_tuple: bool = False
    body: fx.Graph | None = None
    tail: fx.Graph | None = None
    known: KnownBody | None = None

    @property
    def region(self) -> Region:
        """The first call site."""
        return self.regions[0]

    def refused(self, code: str, reason: str) -> Match:
        """This match with a refusal."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record, code=code, reason=reason))


def match_ffns(trace: Trace) -> list[Match]:
    """Every candidate of the trace, in execution order of its first call."""
    return Matcher(trace).run()


class Matcher:
    """The rules over one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        for node in trace.graph.nodes:
            parameter_only(node)  # in execution order, so that it never recurses deeply
        self.dead = _dead_nodes(trace.graph)
        self.sites = find_linears(trace)
        self.axes = FeatureAxes(self.sites)
        self._known: dict[str, KnownBody | None] = {}
        nodes = {n.meta["seq"]: n for n in trace.graph.nodes if n.op == "call_function"}
        self._attributes = [str(n.target) for n in trace.graph.nodes if n.op == "get_attr"]
        self.calls_by_seq = [nodes.get(i) for i in range(max(nodes, default=-1) + 1)]

    def run(self) -> list[Match]:
        """Group the candidate regions by their weights and judge each group."""
        groups: dict[tuple[tuple[str, ...], str], list[Region]] = {}
        for region in find_regions(self.trace, self.sites):
            if self._is_candidate(region):
                groups.setdefault(region.key, []).append(region)
        return [self._judge(regions) for regions in groups.values()]

    def _is_candidate(self, region: Region) -> bool:
        if region.same_source:
            return True
        return _is_lora(region) or not region.issues

    def _judge(self, regions: list[Region]) -> Match:
        refusal = next((r for region in regions if (r := self._refuse(region))), None)
        refusal = refusal or self._shared_weight(regions)
        owners = {self._owner(region) for region in regions}
        owner = owners.pop() if len(owners) == 1 else None
        form, fqn, returns_tuple = self._form(regions, owner)
        body = tail = None
        if refusal is None and form == "module":
            try:
                body = body_graph(self.trace, regions[0], fqn)
                tail = tail_graph(self.trace, regions[0], fqn)
            except OutsideOwner:
                form = "linears" if all(map(self._swappable, regions)) else None
        if refusal is None and form is None:
            refusal = self._unwritable(regions[0])
        known = self._probe(regions[0])
        record = self._record(regions, refusal, form or "linears", fqn, known)
        return Match(regions, record, returns_tuple, body, tail, known)

    # -- rules ---------------------------------------------------------------------------------------------------
    def _refuse(self, region: Region) -> Refusal | None:
        if _is_lora(region):
            return "lora", "a linear carries a LoRA adapter; merge or unload it first"
        rules: Iterable[Callable[[Region], Refusal | None]] = (
            self._router_above,
            _linear_problem,
            self._escape,
            self._body_issue,
            _width,
            self._no_residual,
            self._token_mixing,
        )
        return next((r for rule in rules if (r := rule(region))), None)

    def _escape(self, region: Region) -> Refusal | None:
        inside = region.nodes()
        outs = region.exit.nodes
        for node in inside - outs:
            if node.op != "call_function" or parameter_only(node):
                continue
            for user in node.users:
                if user not in inside and user not in self.dead:
                    where = op_name(user) if user.op != "output" else "the model's output"
                    return "escape", f"{op_name(node)} inside the FFN is also used outside it, by {where}"
        return None

    def _body_issue(self, region: Region) -> Refusal | None:
        issues = region.issues
        if not region.same_source:
            return "different-source", "its first linears read different values"
        for code in _ISSUE_ORDER:
            if code in issues:
                names = {op_name(n) for n in region.body}
                if code == "reduction-between" and names & {
                    "rsqrt",
                    "sqrt",
                    "var",
                    "std",
                    "norm",
                    "linalg_vector_norm",
                }:
                    return "norm-between", "a hand-written norm between the linears"
                return code, issues[code]
        return None

    def _router_above(self, region: Region) -> Refusal | None:
        residual = find_residual(region, self.sites)
        inside = region.nodes()
        for index in self._calls_around(region):
            call = self.trace.calls[index]
            if call.fqn == "" or (residual is not None and call.start <= residual.meta["seq"] < call.end):
                break
            if self._holds_router(call, inside):
                return "router-above", f"{call.fqn} already routes to experts"
        return None

    def _holds_router(self, call: ModuleCall, inside: set[fx.Node]) -> bool:
        if any(n not in inside and op_name(n) in ROUTING for n in self._span(call)):
            return True
        routers = (f"{call.fqn}.router.", f"{call.fqn}.experts.")
        return any(target.startswith(routers) for target in self._attributes)

    def _no_residual(self, region: Region) -> Refusal | None:
        if find_residual(region, self.sites) is None:
            return (
                "no-residual",
                "its output is not added to the stream that it reads (a head, gate or projector)",
            )
        return None

    def _token_mixing(self, region: Region) -> Refusal | None:
        axis = self.axes.of(region.source)
        rank = len(shape_of(region.source))
        if axis is not None and rank and axis != region.exit.axis % rank:
            return (
                "feature-axis",
                f"it mixes axis {region.exit.axis % rank}, but the features lie on axis {axis}",
            )
        return None

    def _shared_weight(self, regions: list[Region]) -> Refusal | None:
        weights = [s.weight for s in _sites_of(regions[0])]
        if len(set(weights)) < len(weights):
            return "shared-weight", f"{weights[-1]} serves two of its linears"
        allowed = set().union(*(r.nodes() for r in regions))
        for site in _sites_of(regions[0]):
            for parameter in (site.weight_node, site.bias_node):
                users = parameter.users if parameter is not None else ()
                if any(u not in allowed and u not in self.dead for u in users):
                    return "shared-weight", f"{parameter.target} is also used elsewhere"  # type: ignore[union-attr]
        return None

    def _unwritable(self, region: Region) -> Refusal:
        entries = {id(e.x) for e in region.entries}
        if len(entries) > 1 and all(self._linear_call(s) is not None for s in _sites_of(region)):
            return "different-source", "its entries read different tensor objects of the same value"
        return "raw-parameters", (
            "its weights are used without a linear module of their own, inside a forward that does more; "
            "move the FFN into its own module"
        )

    # -- where it stands -----------------------------------------------------------------------------------------
    def _form(self, regions: list[Region], owner: tuple[str, bool] | None) -> tuple[Form | None, str, bool]:
        common = _common_fqn([self._place(s) for s in _sites_of(regions[0])])
        if self.trace.source == "fx graph" and not (owner and self._within_one_call(regions[0])):
            return ("graph" if all(map(_graph_visible, regions)) else None), common, False
        if owner is not None:
            return "module", owner[0], owner[1]
        return ("linears" if all(map(self._swappable, regions)) else None), common, False

    def _place(self, site: LinearSite) -> str:
        """FQN of the linear; of the module that ran it when its weight has no name of its own."""
        node = site.weight_node
        if node is not None and node.op == "get_attr" and not node.meta.get("unknown"):
            return site.name
        return self.trace.calls[site.node_call].fqn if site.node_call is not None else ""

    def _within_one_call(self, region: Region) -> bool:
        origins = {n.meta["origin"] for n in region.nodes()}
        return len(origins) == 1 and next(iter(origins)) is not None

    def _owner(self, region: Region) -> tuple[str, bool] | None:
        """FQN of the module whose whole forward is the region, and whether it answers a pair."""
        if self._answers_bias(region):
            region.exit.leave_bias_outside()
        call_index = next(iter(self._calls_around(region)), None)
        if call_index is None:
            return None
        call = self.trace.calls[call_index]
        answer = _answer(call, region)
        if answer is None:
            return None
        inside = region.nodes() | set(region.tail)
        for node in self._span(call):
            if node not in inside and node not in self.dead and not self._pads(node, region):
                return None
        tensors = [n for n in call.inputs if n is not None]
        if (
            call.has_other_inputs
            or len(tensors) != 1
            or look_through(tensors[0]) is not look_through(region.source)
        ):
            return None
        prefix = f"{call.fqn}." if call.fqn else ""
        if any(not s.weight.startswith(prefix) for s in _sites_of(region)):
            return None
        return answer

    def _answers_bias(self, region: Region) -> bool:
        """Whether a module returns the exit's output and its bias apart, for its caller to add (Megatron's MLP)."""
        bare = region.exit.bare
        if bare is None or bare.meta["call"] is None:
            return False
        first = min(e.out.meta["seq"] for e in region.entries)
        for index in self.trace.ancestors(bare.meta["call"]):
            call = self.trace.calls[index]
            if call.start <= first and isinstance(call.output, tuple) and len(call.output) == 2:
                out, bias = call.output
                fqn = str(bias.target) if isinstance(bias, fx.Node) else bias
                return (
                    isinstance(out, fx.Node)
                    and look_through(out) is look_through(bare)
                    and fqn == region.exit.bias
                )
        return False

    def _span(self, call: ModuleCall) -> list[fx.Node]:
        """The call nodes that ran inside ``call``."""
        return [n for n in self.calls_by_seq[call.start : call.end] if n is not None]

    def _pads(self, node: fx.Node, region: Region) -> bool:
        """A cast or reshape of the output or of the source."""
        return op_name(node) in CASTS | RESHAPES and look_through(node) in (
            look_through(region.exit.out),
            look_through(region.source),
        )

    def _calls_around(self, region: Region) -> list[int]:
        """The module calls that contain the whole region, innermost first."""
        seqs = [n.meta["seq"] for n in region.nodes() if n.op == "call_function" and not parameter_only(n)]
        low, high = min(seqs), max(seqs)
        start = region.exit.out.meta["call"]
        if start is None:
            return []
        calls = self.trace.calls
        return [c for c in self.trace.ancestors(start) if calls[c].start <= low and high < calls[c].end]

    def _swappable(self, region: Region) -> bool:
        """Whether every linear is a module of its own, and all entries read one tensor object."""
        if len({id(e.x) for e in region.entries}) > 1:
            return False
        return all(self._linear_call(site) is not None for site in _sites_of(region))

    def _linear_call(self, site: LinearSite) -> ModuleCall | None:
        """The module call that is exactly this linear."""
        owner = site.owner
        if site.weight != f"{owner}.weight" or site.bias not in (None, f"{owner}.bias"):
            return None
        for index in self.trace.ancestors(site.node_call) if site.node_call is not None else ():
            call = self.trace.calls[index]
            if call.fqn == owner:
                exact = isinstance(call.output, fx.Node) and look_through(call.output) is look_through(
                    site.out
                )
                return call if exact and not call.has_other_inputs else None
        return None

    # -- the record ----------------------------------------------------------------------------------------------
    def _record(
        self, regions: list[Region], refusal: Refusal | None, form: Form, fqn: str, known: KnownBody | None
    ) -> FFNMatch:
        region = regions[0]
        sites = _sites_of(region)
        splits = any(op_name(n) in SPLITS or op_name(n) == "getitem" for n in region.body)
        return FFNMatch(
            fqn=fqn,
            entries=tuple(e.name for e in region.entries),
            exit=region.exit.name,
            kind="glu" if len(region.entries) > 1 or splits else "mlp",
            activation=known.activation if known is not None else _op_names(region),
            d_model=region.exit.out_features,
            d_hidden=region.exit.in_features,
            bias=any(s.bias is not None for s in sites),
            form=form,
            calls=len(regions),
            params=sum(s.in_features * s.out_features + s.out_features * bool(s.bias) for s in sites),
            multiply_adds=sum(s.in_features * s.out_features for s in sites),
            code=refusal[0] if refusal else None,
            reason=refusal[1] if refusal else None,
        )

    def _probe(self, region: Region) -> KnownBody | None:
        """What the body computes, found by running it on numbers; None when it has parameters or is not known."""
        if region.issues:
            return None
        graph = body_graph(self.trace, region, None)
        if any(n.op == "get_attr" for n in graph.nodes):
            return None
        signature = f"{graph} {[e.out_features for e in region.entries]}"
        if signature not in self._known:
            body = fx.GraphModule(torch.nn.Module(), graph)
            widths = [e.out_features for e in region.entries]
            self._known[signature] = classify_body(body.forward, widths)  # a call would print on errors
        return self._known[signature]


def _op_names(region: Region) -> str:
    """The names of the body's ops, for a body that is none of the known ones."""
    plain = CASTS | RESHAPES | SPLITS | DROPOUTS | {"getitem", "mul"}
    names = [op_name(n) for n in region.body if not parameter_only(n)]
    return "+".join(dict.fromkeys(n for n in names if n not in plain)) or "product"


def _answer(call: ModuleCall, region: Region) -> tuple[str, bool] | None:
    """The owner's FQN and whether it answers ``(out, bias)``, when its result is the exit's output.

    Notes the dropout behind the exit as ``region.tail`` and a bias that is answered apart as the exit's.
    """
    out, bias, pair = call.output, region.exit.bias, False
    if isinstance(out, tuple) and len(out) == 2:
        (out, second), pair = out, True
        bias = str(second.target) if isinstance(second, fx.Node) and second.op == "get_attr" else second
        prefix = f"{call.fqn}." if call.fqn else ""
        owned = bias is None or (isinstance(bias, str) and bias.startswith(prefix))
        if not owned or region.exit.bias not in (None, bias):
            return None
    tail = _dropout_tail(out, region.exit.out) if isinstance(out, fx.Node) else None
    if tail is None:
        return None
    region.tail, region.exit.bias = tail, cast("str | None", bias)
    return call.fqn, pair


def _dropout_tail(out: fx.Node, exit_out: fx.Node) -> list[fx.Node] | None:
    """The dropouts between the exit and the owner's result; None when anything else lies there."""
    tail, node = [], out
    while node is not exit_out:
        name = op_name(node)
        if name in DROPOUTS:
            tail.append(node)
        elif node.op != "call_function" or not (
            name in CASTS or (name in RESHAPES and keeps_last_axis(node))
        ):
            return [] if look_through(exit_out) is look_through(out) else None
        node = tensor_inputs(node)[0]
    return tail[::-1]


def _graph_visible(region: Region) -> bool:
    """Whether the caller's graph has a node of its own for the source and for each linear."""
    ends = [site.out.meta["origin"] for site in _sites_of(region)]
    visible = all(node is not None for node in (*ends, region.source.meta["origin"]))
    return visible and len(set(ends)) == len(ends)


def _linear_problem(region: Region) -> Refusal | None:
    return next((s.problem for s in _sites_of(region) if s.problem), None)


def _width(region: Region) -> Refusal | None:
    widths = {e.in_features for e in region.entries}
    if widths != {region.exit.out_features}:
        return "width-change", f"its width changes from {widths.pop()} to {region.exit.out_features}"
    if any(e.axis != region.exit.axis for e in region.entries):
        return "feature-axis", "its linears act on different axes"
    return None


def _is_lora(region: Region) -> bool:
    marks = (".base_layer.", ".lora_A.", ".lora_B.", "lora_")
    return any(mark in f"{s.weight}." for s in _sites_of(region) for mark in marks)


def _sites_of(region: Region) -> list[LinearSite]:
    return [*region.entries, region.exit]


def _dead_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Call nodes whose value reaches no output."""
    dead: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and all(user in dead for user in node.users):
            dead.add(node)
    return dead


def _common_fqn(names: list[str]) -> str:
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
