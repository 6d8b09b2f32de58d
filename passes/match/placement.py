"""Where an FFN stands: the module whose whole forward it is, or else its linears inside a larger one, or a graph.

Contract: everything here is a question; regions come back changed as copies. A region inside its owner may differ from
the region in the trace: its bias may be answered apart, and the owner may apply a dropout to the result.

    >>> placement = place(facts, [region])                 # x + self.mlp(x)
    >>> placement.form, placement.fqn, [n.name for n in placement.regions[0].tail]
    ('module', 'mlp', ['dropout_1'])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from moefy.passes.match.facts import Facts
from moefy.passes.match.linears import LinearSite
from moefy.passes.match.regions import Region, keeps_last_axis, look_through
from moefy.passes.trace import ModuleCall
from moefy.passes.trace.vocabulary import CASTS, DROPOUTS, RESHAPES, op_name, tensor_inputs
from moefy.records import Form


@dataclasses.dataclass(frozen=True)
class Owner:
    """A module whose whole forward is a region.

    Attributes:
        fqn: its name.
        returns_tuple: whether it answers ``(out, bias)`` for its caller to add, as Megatron's MLP does.
        region: the region as the owner computes it.
    """

    fqn: str
    returns_tuple: bool
    region: Region = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """How an FFN can be rewritten.

    Attributes:
        form: ``None`` when no form fits.
        fqn: the owner, or the deepest module that holds all linears.
        regions: the call sites, for the form "module" as the owner computes them.
        returns_tuple: of the owner.
    """

    form: Form | None
    fqn: str
    regions: tuple[Region, ...]
    returns_tuple: bool = False


def place(facts: Facts, regions: Sequence[Region]) -> Placement:
    """The placement of the FFN that is called at ``regions``."""
    owners = [find_owner(facts, region) for region in regions]
    owner = owners[0] if len(set(owners)) == 1 else None
    if facts.trace.source == "fx graph" and not (owner and _within_one_call(owner.region)):
        form: Form | None = "graph" if all(map(_graph_visible, regions)) else None
        return Placement(form, _common_fqn(facts, regions[0]), tuple(regions))
    if owner is None:
        return as_linears(facts, regions)
    inner = tuple(found.region for found in owners if found is not None)
    return Placement("module", owner.fqn, inner, owner.returns_tuple)


def as_linears(facts: Facts, regions: Sequence[Region]) -> Placement:
    """The linears swapped in place, where each is a module of its own."""
    swappable = all(_swappable(facts, region) for region in regions)
    return Placement("linears" if swappable else None, _common_fqn(facts, regions[0]), tuple(regions))


def find_owner(facts: Facts, region: Region) -> Owner | None:
    """The module whose whole forward is the region."""
    if _answers_bias(facts, region):
        region = dataclasses.replace(region, exit=region.exit.without_added_bias())
    index = next(iter(facts.calls_around(region)), None)
    if index is None:
        return None
    call = facts.trace.calls[index]
    owner = _answer(call, region)
    if owner is None or not _takes_the_source_alone(call, region):
        return None
    inside = region.nodes() | set(owner.region.tail)
    for node in facts.span(call):
        if node not in inside and node not in facts.dead and not _pads(node, region):
            return None
    prefix = f"{call.fqn}." if call.fqn else ""
    return owner if all(site.weight.startswith(prefix) for site in region.sites) else None


def _answers_bias(facts: Facts, region: Region) -> bool:
    """Whether a module returns the exit's output and its bias apart, for its caller to add (Megatron's MLP)."""
    bare = region.exit.bare
    if bare is None or bare.meta["call"] is None:
        return False
    first = min(entry.out.meta["seq"] for entry in region.entries)
    for index in facts.trace.ancestors(bare.meta["call"]):
        call = facts.trace.calls[index]
        if call.start <= first and isinstance(call.output, tuple) and len(call.output) == 2:
            out, bias = call.output
            fqn = str(bias.target) if isinstance(bias, fx.Node) else bias
            same = isinstance(out, fx.Node) and look_through(out) is look_through(bare)
            return same and fqn == region.exit.bias
    return False


def _answer(call: ModuleCall, region: Region) -> Owner | None:
    """The owner, when what the call returned is the exit's output."""
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
    exit_site = dataclasses.replace(region.exit, bias=bias)
    return Owner(call.fqn, pair, dataclasses.replace(region, exit=exit_site, tail=tail))


def _dropout_tail(out: fx.Node, exit_out: fx.Node) -> tuple[fx.Node, ...] | None:
    """The dropouts between the exit and the owner's result; ``None`` when anything else lies there."""
    tail: list[fx.Node] = []
    node = out
    while node is not exit_out:
        name = op_name(node)
        if name in DROPOUTS:
            tail.append(node)
        elif node.op != "call_function" or not (
            name in CASTS or (name in RESHAPES and keeps_last_axis(node))
        ):
            return () if look_through(exit_out) is look_through(out) else None
        node = tensor_inputs(node)[0]
    return tuple(reversed(tail))


def _takes_the_source_alone(call: ModuleCall, region: Region) -> bool:
    """Whether the region's source is the only argument of ``call``."""
    tensors = [node for node in call.inputs if node is not None]
    if call.has_other_inputs or len(tensors) != 1:
        return False
    return look_through(tensors[0]) is look_through(region.source)


def _pads(node: fx.Node, region: Region) -> bool:
    """Whether ``node`` is a cast or reshape of the output or of the source."""
    ends = (look_through(region.exit.out), look_through(region.source))
    return op_name(node) in CASTS | RESHAPES and look_through(node) in ends


def _swappable(facts: Facts, region: Region) -> bool:
    """Whether every linear is a module of its own, and all entries read one tensor object."""
    if len({id(entry.x) for entry in region.entries}) > 1:
        return False
    return all(facts.linear_call(site) is not None for site in region.sites)


def _within_one_call(region: Region) -> bool:
    """Whether one node of the caller's graph, a call of the owner, stands for the whole region."""
    origins = {node.meta["origin"] for node in region.nodes()}
    return len(origins) == 1 and next(iter(origins)) is not None


def _graph_visible(region: Region) -> bool:
    """Whether the caller's graph has a node of its own for the source and for each linear."""
    ends = [site.out.meta["origin"] for site in region.sites]
    visible = all(node is not None for node in (*ends, region.source.meta["origin"]))
    return visible and len(set(ends)) == len(ends)


def _common_fqn(facts: Facts, region: Region) -> str:
    """The deepest module that holds all linears."""
    common: list[str] = []
    names = [_name(facts, site) for site in region.sites]
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _name(facts: Facts, site: LinearSite) -> str:
    """FQN of the linear; of the module that ran it when its weight has no name of its own."""
    node = site.weight_node
    if node is not None and node.op == "get_attr" and not node.meta.get("unknown"):
        return site.name
    return facts.trace.calls[site.node_call].fqn if site.node_call is not None else ""
