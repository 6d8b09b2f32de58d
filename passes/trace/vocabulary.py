"""The vocabulary of the matcher: one name per operation, whatever spelling the graph uses, and its class.

``torch.add``, ``Tensor.add_``, ``Tensor.__radd__``, ``operator.add`` and ``aten.add.Tensor`` are all ``"add"``.
Element-wise operations are not a list: they are the aten ops with ``torch.Tag.pointwise``. A function that is no aten
op by name is run once on small tensors, which shows the aten ops that it is made of.

    >>> gm = torch.fx.symbolic_trace(lambda x: operator.iadd(x, 1))
    >>> [op_name(node) for node in gm.graph.nodes]
    ['placeholder', 'add', 'output']
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

RESHAPES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "view_as",
        "reshape_as",
        "expand",
        "expand_as",
    ]
)
CASTS = frozenset(
    [
        "to",
        "float",
        "half",
        "double",
        "bfloat16",
        "type",
        "type_as",
        "_to_copy",
        "contiguous",
        "clone",
        "detach",
        "data",
        "alias",
        "lift_fresh",
        "cpu",
        "cuda",
        "requires_grad",
        "positive",
    ]
)
DROPOUTS = frozenset(("dropout", "alpha_dropout", "native_dropout"))
SPLITS = frozenset(["chunk", "split", "split_with_sizes", "tensor_split", "narrow", "unbind", "glu"])
NORMS = frozenset(
    [
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "group_norm",
        "native_group_norm",
        "batch_norm",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "instance_norm",
        "normalize",
        "local_response_norm",
    ]
)
REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "var",
        "std",
        "softmax",
        "log_softmax",
        "_softmax",
        "norm",
        "linalg_vector_norm",
        "amax",
        "amin",
        "max",
        "min",
        "logsumexp",
        "cumsum",
        "cumprod",
        "prod",
        "var_mean",
        "std_mean",
        "avg_pool1d",
        "avg_pool2d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "max_pool1d",
        "max_pool2d",
    ]
)
CONCATS = frozenset(
    [
        "cat",
        "concat",
        "concatenate",
        "stack",
        "hstack",
        "vstack",
        "dstack",
        "pad",
        "constant_pad_nd",
        "roll",
        "repeat",
        "repeat_interleave",
        "tile",
        "flip",
    ]
)
PERMUTES = frozenset(
    [
        "permute",
        "transpose",
        "movedim",
        "moveaxis",
        "swapaxes",
        "swapdims",
        "T",
        "mT",
        "H",
        "mH",
        "t",
        "adjoint",
    ]
)
CONVS = frozenset(
    ["conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
)
ROUTING = frozenset(["topk", "argmax", "multinomial", "one_hot"])
LINEAR_POINTWISE = frozenset(
    ["add", "sub", "rsub", "neg", "positive", "div_scalar", "clone", "fill", "zeros_like"]
)
_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "truediv": "div",
    "rtruediv": "rdiv",
    "true_divide": "div",
    "subtract": "sub",
    "radd": "add",
    "rmul": "mul",
    "iadd": "add",
    "imul": "mul",
    "isub": "sub",
    "itruediv": "div",
    "rmatmul": "rmatmul",
    "imatmul": "matmul",
    "mm": "matmul",
    "negative": "neg",
    "ipow": "pow",
}


def op_name(node: fx.Node) -> str:
    """The one name of a node's operation, e.g. ``"add"``; the op itself for placeholders and attributes."""
    if node.op != "call_function":
        return node.op
    name = _name_of(node.target)
    if name in ("min", "max") and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        return f"{name}imum"  # torch.min(a, b) is element-wise, torch.min(a, dim) a reduction
    return name


def qualified_op_name(node: fx.Node) -> str:
    """What a call node calls, for people: ``"linear"``, ``"moefy.expert_ffn"``."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


@functools.lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target.overloadpacket.__name__
    else:
        name = getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def namespace(node: fx.Node) -> str:
    """The op library of the node's target (``"quantized"``, ``"aten"``), or an empty string."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace
    qualified = getattr(target, "_qualified_op_name", "")
    return qualified.split("::")[0] if "::" in qualified else ""


def is_pointwise(node: fx.Node) -> bool:
    """Whether the node computes each element of its result from the same element of its inputs."""
    name = op_name(node)
    if _pointwise_by_tag(name):
        return True
    if name in _NEVER_POINTWISE or node.meta.get("shape") is None:
        return False
    if "pointwise" not in node.meta:
        node.meta["pointwise"] = _pointwise_by_running(node)
    return node.meta["pointwise"]


@functools.lru_cache(maxsize=4096)
def _pointwise_by_tag(name: str) -> bool | None:
    """True from the tags of the aten op of that name; None when there is no such op, or it bears no such tag."""
    name = {"rsub": "sub", "rdiv": "div", "rpow": "pow"}.get(name, name)
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if packet is None or name in _NEVER_POINTWISE:
        return None
    tagged = any(torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads())
    return True if tagged else None


_NEVER_POINTWISE = (
    RESHAPES
    | SPLITS
    | NORMS
    | REDUCTIONS
    | CONCATS
    | PERMUTES
    | CONVS
    | DROPOUTS
    | frozenset(
        [
            "linear",
            "matmul",
            "einsum",
            "embedding",
            "getitem",
            "scaled_dot_product_attention",
            "multi_head_attention_forward",
            "bmm",
        ]
    )
)


# element-wise aten ops without the tag (torch 2.11 to 2.14), and views that broadcast a parameter
_UNTAGGED = frozenset(
    [
        "hardswish",
        "leaky_relu",
        "floor_divide",
        "_prelu_kernel",
        "log_sigmoid_forward",
        "view",
        "expand",
        "unsqueeze",
        "_unsafe_view",
        "ones_like",
        "_to_copy",
    ]
)


class _OpLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[torch._ops.OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def _pointwise_by_running(node: fx.Node) -> bool:
    """Run the function on small tensors of the node's ranks and look at the aten ops that it is made of."""

    def small(value: Any) -> Any:
        if isinstance(value, fx.Node):
            shape, dtype = value.meta.get("shape"), value.meta.get("dtype")
            return None if shape is None else torch.ones([min(s, 2) for s in shape], dtype=dtype)
        return value

    args, kwargs = tree_map(
        small, (list(node.args), dict(node.kwargs)), is_leaf=lambda v: isinstance(v, fx.Node)
    )
    log = _OpLog()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), log:
            out = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # a user's function may raise anything on tensors that are not its own
        return False
    return isinstance(out, Tensor) and bool(log.ops) and all(_is_elementwise_op(op) for op in log.ops)


def _is_elementwise_op(op: torch._ops.OpOverload) -> bool:
    name = op.overloadpacket.__name__
    if name.endswith("_"):  # in-place forms lack the tag more often than the others
        name = name[:-1]
    return bool(_pointwise_by_tag(name)) or name in CASTS or name in _UNTAGGED


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes that the node reads, in order, each once."""
    return node.all_input_nodes


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the node's value; empty for tuples."""
    return node.meta.get("shape") or ()


def parameter_only(node: fx.Node) -> bool:
    """Whether the value depends on parameters, buffers and constants alone (``softplus(self.alpha)``).

    Remembered in ``node.meta``: traces are not changed once they are made.
    """
    known = node.meta.get("parameter_only")
    if known is None:
        known = node.meta["parameter_only"] = _parameter_only(node)
    return known


def _parameter_only(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return not node.meta.get("unknown") or _numel(node) == 1
    if node.op != "call_function":
        return False
    inputs = tensor_inputs(node)
    if not inputs:  # a constant such as torch.tensor(0.5); random tensors are activations
        return _numel(node) == 1 and "rand" not in op_name(node)
    return all(map(parameter_only, inputs))


def _numel(node: fx.Node) -> int:
    return math.prod(shape_of(node))


def moved_axis(node: fx.Node, axis: int) -> int | None:
    """Where the input's non-negative ``axis`` stands in the result of a permuting node; None when unclear."""
    name, rank = op_name(node), len(shape_of(node))
    args: list[Any] = list(node.args[1:])
    if name in ("T", "H", "mT", "mH", "t", "adjoint"):
        order = list(range(rank))
        if rank >= 2:
            order = order[::-1] if name in ("T", "H") else [*order[:-2], order[-1], order[-2]]
        return order.index(axis) if axis in order else None
    if name == "permute":
        dims = node.kwargs.get("dims") or (
            args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
        )
        order = [d % rank for d in dims]  # type: ignore[union-attr, operator]
        return order.index(axis) if axis in order else None
    if name in ("transpose", "swapaxes", "swapdims"):
        keys = ("dim0", "dim1") if "dim0" in node.kwargs else ("axis0", "axis1")
        pair = [*args, *(node.kwargs[k] for k in keys if k in node.kwargs)]
        a, b = (d % rank for d in pair)  # type: ignore[operator]
        return b if axis == a else a if axis == b else axis
    if name in ("movedim", "moveaxis"):
        pair: list[Any] = [*args, *(node.kwargs[k] for k in ("source", "destination") if k in node.kwargs)]
        if len(pair) == 2 and all(isinstance(d, int) for d in pair):
            order = [i for i in range(rank) if i != pair[0] % rank]
            order.insert(pair[1] % rank, pair[0] % rank)
            return order.index(axis) if axis in order else None
    return None
