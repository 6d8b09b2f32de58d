"""Why a candidate region is no FFN that can become an MoE: the rules, and the code and text of each refusal.

A region is an FFN when its linears are plain, nothing in it escapes, its body is element-wise, its width comes out as
it went in, its output is added to the stream that it reads, and the linears act on that stream's feature axis. The
first rule that refuses is named; ``codes`` lists what it can say.

    >>> Refusals(facts).of([region])           # a head: linear, relu, linear, and no residual
    ('no-residual', 'its output is not added to the stream that it reads (a head, gate or projector)')
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from moefy.passes.match.codes import Code, Refusal
from moefy.passes.match.facts import Facts
from moefy.passes.match.regions import Region
from moefy.passes.match.residual import find_residual
from moefy.passes.trace import ModuleCall
from moefy.passes.trace.vocabulary import ROUTING, op_name, parameter_only, shape_of

# A body may have several issues. The first of this order is named.
_ISSUE_ORDER: tuple[Code, ...] = (
    "conv-between",
    "concat-between",
    "norm-between",
    "reduction-between",
    "opaque-between",
    "feature-axis",
    "different-source",
)
_NORM_PARTS = frozenset(("rsqrt", "sqrt", "var", "std", "norm", "linalg_vector_norm"))


class Refusals:
    """The rules over one trace."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    def of(self, regions: Sequence[Region]) -> Refusal | None:
        """Why the FFN that is called at ``regions`` cannot become an MoE; ``None`` when it can."""
        found = next((refusal for region in regions if (refusal := self._of_region(region))), None)
        return found or self._shared_weight(regions)

    def unwritable(self, region: Region) -> Refusal:
        """The refusal of an FFN that no form of rewriting fits."""
        entries = {id(e.x) for e in region.entries}
        if len(entries) > 1 and all(self.facts.linear_call(s) is not None for s in region.sites):
            return "different-source", "its entries read different tensor objects of the same value"
        return "raw-parameters", (
            "its weights are used without a linear module of their own, inside a forward that does more; "
            "move the FFN into its own module"
        )

    def _of_region(self, region: Region) -> Refusal | None:
        if is_lora(region):
            return "lora", "a linear carries a LoRA adapter; merge or unload it first"
        rules: Sequence[Callable[[Region], Refusal | None]] = (
            self._router_above,
            _linear_problem,
            self._escape,
            _body_issue,
            _width,
            self._no_residual,
            self._token_mixing,
        )
        return next((refusal for rule in rules if (refusal := rule(region))), None)

    def _escape(self, region: Region) -> Refusal | None:
        inside = region.nodes()
        inner = (n for n in inside - region.exit.nodes if n.op == "call_function" and not parameter_only(n))
        for node in sorted(inner, key=lambda n: n.meta["seq"]):  # a set's order changes from run to run
            for user in node.users:
                if user not in inside and user not in self.facts.dead:
                    where = op_name(user) if user.op != "output" else "the model's output"
                    return "escape", f"{op_name(node)} inside the FFN is also used outside it, by {where}"
        return None

    def _router_above(self, region: Region) -> Refusal | None:
        residual = find_residual(region, self.facts.sites)
        inside = region.nodes()
        for index in self.facts.calls_around(region):
            call = self.facts.trace.calls[index]
            if call.fqn == "" or (residual is not None and call.start <= residual.meta["seq"] < call.end):
                break
            if self._holds_router(call, inside):
                return "router-above", f"{call.fqn} already routes to experts"
        return None

    def _holds_router(self, call: ModuleCall, inside: set[fx.Node]) -> bool:
        if any(n not in inside and op_name(n) in ROUTING for n in self.facts.span(call)):
            return True
        routers = (f"{call.fqn}.router.", f"{call.fqn}.experts.")
        return any(target.startswith(routers) for target in self.facts.attributes)

    def _no_residual(self, region: Region) -> Refusal | None:
        if find_residual(region, self.facts.sites) is not None:
            return None
        text = "its output is not added to the stream that it reads (a head, gate or projector)"
        return "no-residual", text

    def _token_mixing(self, region: Region) -> Refusal | None:
        axis, rank = self.facts.axes.of(region.source), len(shape_of(region.source))
        if axis is None or not rank or axis == region.exit.axis % rank:
            return None
        return "feature-axis", f"it mixes axis {region.exit.axis % rank}, but the features lie on axis {axis}"

    def _shared_weight(self, regions: Sequence[Region]) -> Refusal | None:
        sites = regions[0].sites
        weights = [site.weight for site in sites]
        if len(set(weights)) < len(weights):
            return "shared-weight", f"{weights[-1]} serves two of its linears"
        allowed = set().union(*(region.nodes() for region in regions), self.facts.dead)
        for parameter in (node for site in sites for node in (site.weight_node, site.bias_node)):
            if parameter is not None and any(user not in allowed for user in parameter.users):
                return "shared-weight", f"{parameter.target} is also used elsewhere"
        return None


def is_lora(region: Region) -> bool:
    """Whether one of the linears carries a LoRA adapter."""
    marks = (".base_layer.", ".lora_A.", ".lora_B.", "lora_")
    return any(mark in f"{site.weight}." for site in region.sites for mark in marks)


def _linear_problem(region: Region) -> Refusal | None:
    return next((site.problem for site in region.sites if site.problem), None)


def _body_issue(region: Region) -> Refusal | None:
    if not region.same_source:
        return "different-source", "its first linears read different values"
    code: Code | None = next((code for code in _ISSUE_ORDER if code in region.issues), None)
    if code is None:
        return None
    if code == "reduction-between" and any(op_name(node) in _NORM_PARTS for node in region.body):
        return "norm-between", "a hand-written norm between the linears"
    return code, region.issues[code]


def _width(region: Region) -> Refusal | None:
    widths = {entry.in_features for entry in region.entries}
    if widths != {region.exit.out_features}:
        return "width-change", f"its width changes from {widths.pop()} to {region.exit.out_features}"
    if any(entry.axis != region.exit.axis for entry in region.entries):
        return "feature-axis", "its linears act on different axes"
    return None
