"""Linear maps on the feature axis, in every spelling: one ``LinearSite`` each.

Understood: ``F.linear``, ``addmm`` (Hugging Face ``Conv1D``), ``x @ W``, ``x @ W.T``, either with ``+ b``, ``einsum``
with a 2-D parameter, and 1x1 convolutions. A site that is a linear map but cannot become experts carries a
``problem`` (code and text): grouped, quantised, computed or unregistered weights.

    >>> sites = find_linears(trace_module(torch.nn.Linear(4, 6), (torch.ones(2, 4),)))
    >>> [(s.weight, s.layout, s.in_features, s.out_features) for s in sites.values()]
    [('weight', 'out_in', 4, 6)]
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import fx

from moefy.passes.match.codes import Refusal
from moefy.passes.trace import Trace
from moefy.passes.trace.vocabulary import (
    CASTS,
    CONVS,
    PERMUTES,
    RESHAPES,
    namespace,
    op_name,
    parameter_only,
    shape_of,
)

Layout = Literal["out_in", "in_out", "conv"]


@dataclasses.dataclass(frozen=True, eq=False)
class LinearSite:
    """One linear map at one place of the trace. Two sites are the same only when they are one object.

    Attributes:
        x: the input.
        out: the last of its nodes.
        weight: FQN of the weight; the node's name when the weight has none.
        layout: how the dense weight is stored.
        in_features: width of the input.
        out_features: width of the output.
        nodes: all its trace nodes: the product, casts and transposes of the weight, an added bias.
        bias: FQN of the bias.
        axis: the feature axis of input and output: -1, or 1 for convolutions.
        problem: why it cannot become experts.
        weight_node: the weight in the trace, behind transposes and casts.
        bias_node: the bias in the trace, likewise.
        bare: the value before a bias that was added apart.
    """

    x: fx.Node
    out: fx.Node
    weight: str
    layout: Layout
    in_features: int
    out_features: int
    nodes: frozenset[fx.Node]
    bias: str | None = None
    axis: int = -1
    problem: Refusal | None = None
    weight_node: fx.Node | None = None
    bias_node: fx.Node | None = None
    bare: fx.Node | None = None

    def without_added_bias(self) -> LinearSite:
        """The site without the ``+ b`` behind it: the owner returns ``(out, bias)``, and its caller adds them."""
        assert self.bare is not None
        nodes = self.nodes - {self.out}
        return dataclasses.replace(self, nodes=nodes, out=self.bare, bare=None, bias_node=None)

    @property
    def node_call(self) -> int | None:
        """Index of the innermost module call that ran the linear."""
        return self.out.meta["call"]

    @property
    def name(self) -> str:
        """FQN of the linear's module; of the weight itself when that is no module's ``weight``."""
        return self.weight.removesuffix(".weight")

    @property
    def owner(self) -> str:
        """FQN of the module that holds the weight."""
        return self.weight.rpartition(".")[0]


def find_linears(trace: Trace) -> dict[fx.Node, LinearSite]:
    """Every linear map of the trace, by each of its call nodes."""
    sites: dict[fx.Node, LinearSite] = {}
    for node in trace.graph.nodes:
        if node.op == "call_function" and node not in sites:
            site = _linear(node)
            if site is not None:
                site = _with_added_bias(site)
                sites.update(dict.fromkeys((n for n in site.nodes if n.op == "call_function"), site))
    return sites


def _linear(node: fx.Node) -> LinearSite | None:
    name = op_name(node)
    if (namespace(node) == "quantized" and "linear" in name) or (
        name.startswith("opaque_") and "Linear" in name
    ):
        return _opaque_site(node, ("quantized", "the linear is quantised"))
    if name in _PRODUCTS and (stack := next(filter(_is_stacked, node.all_input_nodes), None)):
        problem: Refusal = ("grouped", "the linear is grouped: its weight holds a stack of matrices")
        return _opaque_site(node, problem, weight=stack)
    if name == "linear":
        return _from_linear(node)
    if name == "addmm":
        return _from_addmm(node)
    if name in ("matmul", "rmatmul"):
        return _from_matmul(node)
    if name == "einsum":
        return _from_einsum(node)
    if name in CONVS:
        return _from_conv(node)
    return None


_PRODUCTS = frozenset(
    ["linear", "matmul", "rmatmul", "bmm", "baddbmm", "addmm", "einsum", "_grouped_mm", "grouped_mm"]
)
_INDEXING = frozenset(["getitem", "select", "index_select", "unbind"])


def _is_stacked(weight: fx.Node) -> bool:
    """Whether ``weight`` is a parameter of 3 axes, or matrices picked from one: existing experts or heads."""
    rank, picked = len(shape_of(weight)), False
    while weight.op == "call_function" and op_name(weight) in _INDEXING | CASTS | PERMUTES:
        picked |= _picks_first(weight)
        weight = weight.all_input_nodes[0]
    return weight.op == "get_attr" and len(shape_of(weight)) >= 3 and (picked or rank == 3)


def _picks_first(node: fx.Node) -> bool:
    """Whether ``node`` indexes the first axis: ``w[e]``, not the ``w[:, :, 0]`` of a 1x1 convolution's weight."""
    if op_name(node) in ("select", "index_select", "unbind"):
        return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) == 0)
    index = node.args[1] if op_name(node) == "getitem" else None
    first = index[0] if isinstance(index, tuple | list) and index else index
    return isinstance(first, int | fx.Node)


def _from_linear(node: fx.Node) -> LinearSite | None:
    x, weight, bias = _arguments(node, ("input", "weight", "bias"))
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    site = _site(node, x, weight, "out_in")
    return _with_bias(site, bias)


def _from_addmm(node: fx.Node) -> LinearSite | None:
    bias, x, weight = _arguments(node, ("input", "mat1", "mat2"))
    if not all(isinstance(n, fx.Node) for n in (bias, x, weight)):
        return None
    if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return None
    if not parameter_only(bias):  # type: ignore[arg-type]
        return None
    return _with_bias(_site(node, x, weight, "in_out"), bias)  # type: ignore[arg-type]


def _from_matmul(node: fx.Node) -> LinearSite | None:
    x, weight = _arguments(node, ("input", "other"))
    if op_name(node) == "rmatmul":
        x, weight = weight, x
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or parameter_only(x):
        return None
    return _site(node, x, weight, "in_out") if len(shape_of(weight)) == 2 else None


def _from_einsum(node: fx.Node) -> LinearSite | None:
    if not node.args or not isinstance(node.args[0], str):
        return None
    operands = [n for n in node.all_input_nodes]
    if len(operands) != 2 or "->" not in node.args[0]:
        return None
    inputs, output = node.args[0].replace(" ", "").replace("...", "?").split("->")
    terms = inputs.split(",")
    if parameter_only(operands[0]):
        operands, terms = operands[::-1], terms[::-1]
    (x, weight), (x_term, w_term) = operands, terms
    if parameter_only(x) or not parameter_only(weight):
        return None
    if len(w_term) != 2 or x_term[-1] not in w_term or output[:-1] != x_term[:-1]:
        return None
    if output[-1] in x_term or output[-1] not in w_term:
        return None
    layout: Layout = "in_out" if w_term[0] == x_term[-1] else "out_in"
    return _site(node, x, weight, layout)


def _from_conv(node: fx.Node) -> LinearSite | None:
    x, weight, bias, stride, padding, _dilation = _arguments(
        node, ("input", "weight", "bias", "stride", "padding", "dilation")
    )
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or "transpose" in op_name(node):
        return None
    shape = shape_of(weight)
    if not parameter_only(weight) or any(k != 1 for k in shape[2:]) or len(shape_of(x)) != len(shape):
        return None
    if not _all_equal(stride, 1) or not (padding == "valid" or padding == "same" or _all_equal(padding, 0)):
        return None
    if shape[1] != shape_of(x)[1]:
        return _opaque_site(node, ("grouped", "the 1x1 convolution is grouped"), axis=1)
    return _with_bias(_site(node, x, weight, "conv", axis=1), bias)


def _site(node: fx.Node, x: fx.Node, weight: fx.Node, layout: Layout, axis: int = -1) -> LinearSite | None:
    """The site of ``node``. The weight is looked for behind transposes and casts."""
    if not parameter_only(weight):
        return None
    nodes = {node}
    while weight.op == "call_function":
        name = op_name(weight)
        if name in ("t", "T", "mT", "transpose", "permute", "swapaxes") and len(shape_of(weight)) == 2:
            layout = "in_out" if layout == "out_in" else "out_in"
        elif name not in CASTS:
            break
        nodes.add(weight)
        weight = weight.all_input_nodes[0]
    problem = _weight_problem(weight)
    shape = shape_of(weight)
    if len(shape) < 2:
        return None
    out_f, in_f = (shape[1], shape[0]) if layout == "in_out" else (shape[0], shape[1])
    target = str(weight.target) if weight.op == "get_attr" else weight.name
    return LinearSite(
        x, node, target, layout, in_f, out_f, frozenset(nodes), axis=axis, problem=problem, weight_node=weight
    )


def _weight_problem(weight: fx.Node) -> Refusal | None:
    dtype = weight.meta.get("dtype")
    if weight.op != "get_attr":
        inputs = [n for n in _leaves(weight) if n.op == "get_attr"]
        if any(n.meta["dtype"] in (torch.int8, torch.uint8, torch.int32) for n in inputs):
            return "quantized", "the weight is dequantised from integers at run time"
        return "computed-weight", "the weight is computed at run time (a parametrization or weight norm)"
    if weight.meta.get("subclass") == "DTensor":
        return "sharded", "the weight is a DTensor; transform the model before it is sharded"
    if weight.meta.get("subclass"):
        return "quantized", f"the weight is a {weight.meta['subclass']}, not a plain tensor"
    if weight.meta.get("unknown"):
        return "unregistered-weight", "the weight is no registered parameter of the model"
    if dtype is None or not dtype.is_floating_point:
        return "quantized", f"the weight has dtype {dtype}"
    return None


def _opaque_site(
    node: fx.Node, problem: Refusal, axis: int = -1, weight: fx.Node | None = None
) -> LinearSite | None:
    """A linear map that will be refused: only its place and widths are known."""
    x = next((n for n in node.all_input_nodes if n is not weight and not parameter_only(n)), None)
    if x is None or not shape_of(x) or not shape_of(node):
        return None
    weight = weight or next((n for n in node.all_input_nodes if n.op == "get_attr"), node)
    while weight is not node and weight.op == "call_function" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    target = str(weight.target) if weight.op == "get_attr" else node.name
    widths, nodes = (shape_of(x)[axis], shape_of(node)[axis]), frozenset((node,))
    return LinearSite(
        x, node, target, "out_in", *widths, nodes, axis=axis, problem=problem, weight_node=weight
    )


def _with_bias(site: LinearSite | None, bias: object) -> LinearSite | None:
    """``site`` with the bias argument of its call."""
    if site is None or bias is None:
        return site
    if not isinstance(bias, fx.Node):
        return None
    casts: list[fx.Node] = []
    while bias.op == "call_function" and op_name(bias) in CASTS | RESHAPES:
        casts.append(bias)
        bias = bias.all_input_nodes[0]
    nodes = site.nodes.union(casts)
    if bias.op != "get_attr" or bias.meta.get("unknown"):
        problem = site.problem or ("computed-weight", "the bias is computed at run time")
        return dataclasses.replace(site, nodes=nodes, problem=problem)
    return dataclasses.replace(site, nodes=nodes, bias=str(bias.target), bias_node=bias)


def _with_added_bias(site: LinearSite) -> LinearSite:
    """``site`` with the ``+ b`` behind it, when it has no bias and ``b`` is a parameter over the features."""
    if site.bias is not None or site.problem is not None or site.axis != -1:
        return site
    value, reshapes = site.out, []
    while len(value.users) == 1:
        user = next(iter(value.users))
        if user.op != "call_function":
            return site
        if op_name(user) in RESHAPES and shape_of(user)[-1:] == shape_of(value)[-1:]:
            reshapes.append(user)
            value = user
            continue
        bias = _addend(user, value, site.out_features)
        if bias is None:
            return site
        nodes = site.nodes.union(reshapes, (user,))
        return dataclasses.replace(
            site, out=user, nodes=nodes, bias=str(bias.target), bias_node=bias, bare=site.out
        )
    return site


def _addend(add: fx.Node, value: fx.Node, width: int) -> fx.Node | None:
    """The parameter of ``width`` features that ``add`` adds to ``value``; ``None`` for any other node."""
    if op_name(add) != "add" or "alpha" in add.kwargs:
        return None
    others = [n for n in add.all_input_nodes if n is not value]
    if len(others) != 1 or others[0].op != "get_attr" or others[0].meta.get("unknown"):
        return None
    shape = shape_of(others[0])
    along_features = shape[-1:] == (width,) and math.prod(shape) == width
    return others[0] if along_features and others[0].meta.get("parameter") else None


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[object]:
    values: list[object] = list(node.args[: len(names)])
    return values + [node.kwargs.get(name) for name in names[len(values) :]]


def _all_equal(value: object, expected: int) -> bool:
    if value is None:
        return True
    return all(v == expected for v in value) if isinstance(value, list | tuple) else value == expected


def _leaves(node: fx.Node) -> list[fx.Node]:
    found, stack = [], [node]
    while stack:
        current = stack.pop()
        inputs = list(current.all_input_nodes)
        stack.extend(inputs)
        if not inputs:
            found.append(current)
    return found
