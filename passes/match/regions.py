"""Feed-forward regions: what lies between one exit linear and the entry linears above it.

``find_regions`` walks up from every linear through whatever is element-wise (and, noting an *issue*, through norms,
convolutions, concatenations) until only linears are left. A candidate is a region with an activation, or a product of
two branches, whose entries read one source. ``refusals`` says whether a candidate may become an MoE.

    x -> up -> gelu -> down      exit "down", body (gelu,), entries (up,), source x
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import operator
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from moefy.passes.match.codes import Code, Refusal
from moefy.passes.match.linears import LinearSite
from moefy.passes.trace import Trace
from moefy.passes.trace.vocabulary import (
    CASTS,
    CONCATS,
    CONVS,
    DROPOUTS,
    LINEAR_POINTWISE,
    NORMS,
    PERMUTES,
    REDUCTIONS,
    RESHAPES,
    SPLITS,
    is_pointwise,
    moved_axis,
    op_name,
    parameter_only,
    shape_of,
    tensor_inputs,
)

# Bounds the cost of one walk: it goes no further above a body of this many nodes, and the candidate is refused as
# opaque. Among the 343 models of the test zoo the largest body has 36 nodes, the largest of an accepted FFN 15.
MAX_BODY = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Entries, body and exit of one candidate at one place of the trace.

    Attributes:
        entries: the first linears, in execution order.
        exit: the last linear.
        body: the nodes strictly between, parameter expressions included, in execution order.
        issues: what the body must not contain, by code.
        source: the value that the first entry reads.
        same_source: whether all entries read that value.
        tail: the dropouts that the owner applies to the exit's output, when the owner's whole forward is the FFN
            (``placement`` finds them).
    """

    entries: tuple[LinearSite, ...]
    exit: LinearSite
    body: tuple[fx.Node, ...]
    issues: Mapping[Code, str]
    source: fx.Node
    same_source: bool
    tail: tuple[fx.Node, ...] = ()

    @property
    def key(self) -> tuple[tuple[str, ...], str]:
        """The weights: the same key at several places is one FFN called several times."""
        return tuple(e.weight for e in self.entries), self.exit.weight

    @property
    def feature_dim(self) -> int:
        """The feature axis of the source, counted from the back: -1, or -3 for a 1x1 ``nn.Conv2d``."""
        axis = self.exit.axis
        return -1 if axis == -1 else axis - len(self.source.meta["shape"])

    @property
    def sites(self) -> tuple[LinearSite, ...]:
        """The entries in the order of their calls, then the exit."""
        return (*self.entries, self.exit)

    def nodes(self) -> set[fx.Node]:
        """All call nodes of entries, body and exit, and the reshapes and casts between body and exit."""
        found = set(self.body) | self.exit.nodes
        for entry in self.entries:
            found |= entry.nodes
        return found | set(_between(self.exit.x, stop=found))


def find_regions(trace: Trace, sites: dict[fx.Node, LinearSite]) -> list[Region]:
    """Every candidate region of the trace, in execution order of their exits."""
    exits = dict.fromkeys(sites[n] for n in trace.graph.nodes if n in sites)
    regions = (_walk_up(site, sites) for site in exits)
    return [r for r in regions if r is not None]


def look_through(node: fx.Node) -> fx.Node:
    """The value behind reshapes that keep the last axis, and casts."""
    while node.op == "call_function":
        name = op_name(node)
        inputs = tensor_inputs(node)
        if not inputs or not (name in CASTS or (name in RESHAPES and keeps_last_axis(node))):
            return node
        node = inputs[0]
    return node


def keeps_last_axis(node: fx.Node) -> bool:
    """Whether a reshape leaves the last axis alone."""
    inputs = tensor_inputs(node)
    if not inputs:
        return False
    before, after = shape_of(inputs[0]), shape_of(node)
    return bool(before) and bool(after) and before[-1] == after[-1]


def _walk_up(exit_site: LinearSite, sites: dict[fx.Node, LinearSite]) -> Region | None:
    walk = _Walk(exit_site, sites)
    if not walk.run():
        return None
    body = tuple(sorted(walk.body, key=lambda n: n.meta["seq"]))
    entries = tuple(sorted(walk.entries, key=lambda site: site.out.meta["seq"]))
    check = _BodyCheck(entries, walk.issues)
    axes = check.run(body)
    if not any(_activates(node, axes[node]) for node in body if node in axes):
        return None
    start = look_through(exit_site.x) if exit_site.axis == -1 else exit_site.x
    if start in axes and axes[start] != exit_site.axis % len(shape_of(start)):
        check.issues.setdefault("feature-axis", "the body moves the feature axis")
    same_source = len({_source(entry) for entry in entries}) == 1
    return Region(entries, exit_site, body, check.issues, _source(entries[0]), same_source)


class _Walk:
    """The walk up from one exit, latest nodes first: a branch is visited before the value that it came from.

    ``suspicious`` tells that the body will have an issue; ``_may_differ`` then prunes the walk.
    """

    def __init__(self, exit_site: LinearSite, sites: dict[fx.Node, LinearSite]) -> None:
        self.exit, self.sites = exit_site, sites
        self.entries: list[LinearSite] = []
        self.body: set[fx.Node] = set()
        self.issues: dict[Code, str] = {}
        self.suspicious = False
        self._heap: list[tuple[int, fx.Node]] = []
        self._queued: set[fx.Node] = set()

    def run(self) -> bool:
        """Walk until only linears are left. Returns whether there is a candidate."""
        self._push(look_through(self.exit.x) if self.exit.axis == -1 else self.exit.x)
        while self._heap:
            if not self._visit(heapq.heappop(self._heap)[1]):
                return False
        return bool(self.entries)

    def _visit(self, node: fx.Node) -> bool:
        """Go on through ``node``. Returns whether there can still be a candidate."""
        site = self.sites.get(node)
        if site is not None and node is site.out:
            self.entries.append(site)
            return site is not self.exit and (not self.suspicious or _may_differ(self.entries))
        if self.entries and node is _source(self.entries[0]):
            self.issues.setdefault("different-source", "the body also reads the FFN's own input")
        elif parameter_only(node) or self._passes(node):
            if node.op == "call_function":
                self.body.add(node)
            for value in tensor_inputs(node):
                self._push(value)
        else:
            self.issues.setdefault("opaque-between", _opaque_text(node))
            self.suspicious = True
        return True

    def _push(self, node: fx.Node) -> None:
        if node not in self._queued:
            self._queued.add(node)
            heapq.heappush(self._heap, (-node.meta["seq"], node))

    def _passes(self, node: fx.Node) -> bool:
        """Whether the walk goes on above ``node``: a body may hold it, or the refusal will name it."""
        if node.op != "call_function" or len(self.body) > MAX_BODY:
            return False
        named = any(op_name(node) in names for names, _, _ in _ISSUES)
        self.suspicious |= named
        return named or _belongs(node)


class _BodyCheck:
    """Follows the feature axis through a body, in execution order, and notes what a body must not contain.

    A value that comes neither from the entries nor from parameters alone is foreign.
    """

    def __init__(self, entries: Sequence[LinearSite], issues: Mapping[Code, str]) -> None:
        self.issues = dict(issues)
        self._axes = {e.out: e.axis % len(shape_of(e.out)) for e in entries if shape_of(e.out)}

    def run(self, body: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The feature axis of every body value that comes from the entries."""
        foreign = False
        for node in body:
            known = [value for value in tensor_inputs(node) if value in self._axes]
            if known:
                self._visit(node, known[0])
            elif not parameter_only(node):
                foreign = True
        if foreign:
            text = "the body reads a value that does not come from its first linears"
            self.issues.setdefault("different-source", text)
        return self._axes

    def _visit(self, node: fx.Node, value: fx.Node) -> None:
        axis = self._axes[value]
        problem = _problem(node, value, axis)
        if problem is not None:
            self.issues.setdefault(*problem)
        moved = moved_axis(node, axis) if op_name(node) in PERMUTES else axis
        if op_name(node) in RESHAPES and shape_of(value) and axis == len(shape_of(value)) - 1:
            moved = len(shape_of(node)) - 1
        self._axes[node] = axis if moved is None else moved


def _may_differ(entries: Sequence[LinearSite]) -> bool:
    """Whether a suspicious walk goes on: its entries read one source so far, or carry a LoRA adapter.

    Two sources and an issue together are no candidate (``match``), whatever follows. Such a walk started at an ordinary
    linear (a query projection behind a norm) and climbs the residual stream up to the model's input. Pruned, the walks
    over 80 transformer blocks visit 1,356 nodes; unpruned 26,320, for the same matches.
    """
    if any("lora_" in entry.weight or ".base_layer." in entry.weight for entry in entries):
        return True
    return len({_source(entry) for entry in entries}) == 1


def _source(entry: LinearSite) -> fx.Node:
    return look_through(entry.x) if entry.axis == -1 else entry.x


def _problem(node: fx.Node, value: fx.Node, axis: int) -> Refusal | None:
    """What a body must not contain about ``node``, which reads ``value`` with its features on ``axis``."""
    name, rank = op_name(node), len(shape_of(value))
    if name in RESHAPES and not (keeps_last_axis(node) and axis == rank - 1):
        return "feature-axis", f"{name} between the linears changes the feature axis"
    if name in PERMUTES and moved_axis(node, axis) is None:
        return "feature-axis", f"{name} between the linears moves the feature axis"
    if (name == "getitem" or name in SPLITS) and not splits_features(node, axis):
        return "opaque-between", f"{name} between the linears takes other than features"
    for names, code, text in _ISSUES:
        if name in names:
            return code, text.format(name)
    if is_pointwise(node) and not _operands_fit(node, axis):
        return "opaque-between", "a parameter in the body does not lie along the feature axis"
    return None


def _belongs(node: fx.Node) -> bool:
    """Whether ``node`` may be in a body."""
    name = op_name(node)
    return name in CASTS | DROPOUTS | RESHAPES | SPLITS | PERMUTES or name == "getitem" or is_pointwise(node)


# operations, the code of the refusal, and its text; a walk goes on through them, so that the refusal can name them
_ISSUES: tuple[tuple[frozenset[str], Code, str], ...] = (
    (CONVS, "conv-between", "a convolution ({}) between the linears mixes positions"),
    (CONCATS, "concat-between", "{} between the linears"),
    (NORMS, "norm-between", "a norm ({}) between the linears"),
    (REDUCTIONS, "reduction-between", "a reduction ({}) between the linears"),
)


def _operands_fit(node: fx.Node, axis: int) -> bool:
    """Whether every parameter that ``node`` reads is a scalar or lies along the feature axis."""
    rank = len(shape_of(node))
    parameters = [shape_of(value) for value in tensor_inputs(node) if parameter_only(value)]
    if op_name(node) == "prelu":  # by definition its weight lies along axis 1
        return all(math.prod(shape) == 1 or axis == 1 for shape in parameters)
    return all(
        size == 1 or rank - len(shape) + i == axis for shape in parameters for i, size in enumerate(shape)
    )


def splits_features(node: fx.Node, axis: int) -> bool:
    """Whether a split, chunk or index takes parts of the feature axis (non-negative) and leaves the others whole."""
    name = op_name(node)
    if (
        node.target is operator.getitem
        and isinstance(node.args[1], int)
        and not shape_of(tensor_inputs(node)[0])
    ):
        return True  # one of the parts of a split
    rank = len(shape_of(tensor_inputs(node)[0]))
    if rank == 0 or name == "unbind":
        return False
    if name == "getitem":
        index = node.args[1]
        return _feature_slice(list(index) if isinstance(index, tuple | list) else [index], rank, axis)
    position = {"glu": 1, "narrow": 1}.get(name, 2)
    default = -1 if name == "glu" else 0
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return isinstance(dim, int) and dim % rank == axis


def _feature_slice(index: Sequence[object], rank: int, axis: int) -> bool:
    if any(not (i is Ellipsis or isinstance(i, slice)) for i in index):
        return False
    position = 0
    for item in index:
        if item is Ellipsis:
            position = rank - (len(index) - index.index(Ellipsis) - 1)
            continue
        if item != slice(None) and position != axis:
            return False
        position += 1
    return True


_NONLINEAR_REDUCTIONS = frozenset(("softmax", "log_softmax", "amax", "amin", "max", "min"))


def _activates(node: fx.Node, axis: int) -> bool:
    """Whether ``node`` is non-linear: an activation, or the product of two branches."""
    name = op_name(node)
    if parameter_only(node):
        return False
    if name == "glu" or name in _NONLINEAR_REDUCTIONS:
        return True
    if name in _LINEAR or name == "getitem":
        return False
    return is_pointwise(node) and not _is_scale(node, axis) and not _serves_a_norm(node, axis)


_LINEAR = (
    CASTS | RESHAPES | DROPOUTS | PERMUTES | NORMS | REDUCTIONS | CONVS | CONCATS | SPLITS | LINEAR_POINTWISE
)


def _is_scale(node: fx.Node, axis: int) -> bool:
    """Whether ``node`` is a product with a scalar, a parameter, or one factor per position."""
    if op_name(node) not in ("mul", "div") or _squares(node):
        return False
    operands = [v for v in tensor_inputs(node) if not parameter_only(v)]
    return len(operands) < 2 or any(_width(v, axis) == 1 for v in operands)


def _serves_a_norm(node: fx.Node, axis: int) -> bool:
    """Whether ``node`` is part of a hand-written norm: the square under its mean, or the factor that it yields."""
    users = [op_name(u) for u in node.users]
    return _width(node, axis) == 1 or (bool(users) and all(u in REDUCTIONS for u in users))


def _width(node: fx.Node, axis: int) -> int:
    shape = shape_of(node)
    return shape[axis] if len(shape) >= 2 and -len(shape) <= axis < len(shape) else 0


def _squares(node: fx.Node) -> bool:
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    return len(nodes) == 2 and nodes[0] is nodes[1]


def _between(node: fx.Node, stop: set[fx.Node]) -> Iterator[fx.Node]:
    while node not in stop and node.op == "call_function":
        if op_name(node) not in CASTS | RESHAPES:
            return
        yield node
        node = tensor_inputs(node)[0]


def _opaque_text(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the body reads an input of the model"
    if node.op == "get_attr":
        return "the body reads a tensor that is no registered parameter"
    return f"{op_name(node)} between the linears is not element-wise"
