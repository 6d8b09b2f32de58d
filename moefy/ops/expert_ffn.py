"""``expert_ffn``: a whole expert layer behind the router as one op. Permute, entry GEMMs, activation, exit GEMM, combine.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = H, or 2H for a merged entry.

Contract: token t gets ``sum_k w[t, k] * down_e(act(up_e(x[t])))`` with e its k-th expert; with a GLU the middle is
``act(gate) * up``. Saved for the backward are only the arguments and the pre-activations; when these were not saved
(no gradient was expected) the backward computes them again. Dropped slots add nothing.

    >>> x_TD, w_TK = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
    >>> order_N, offsets_E = sort_by_expert(torch.tensor([[1], [0]]), 2)
    >>> one_E11, ten_E11 = torch.ones(2, 1, 1), torch.tensor([[[10.0]], [[100.0]]])
    >>> expert_ffn(x_TD, w_TK, order_N, offsets_E, one_E11, None, ten_E11, None, activation="relu")
    tensor([[100.], [ 20.]])
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from moefy.errors import ConfigError
from moefy.ops import checks
from moefy.ops.activations import ACTIVATIONS
from moefy.ops.combine import combine
from moefy.ops.expert_kernels import ffn_backward_kernel, ffn_kernel, halves
from moefy.ops.grouped_linear import grouped_linear, linear_arguments, offsets_argument
from moefy.ops.library import differentiable, register
from moefy.ops.permute import permute

GLU = Literal["none", "separate", "merged_gate_first", "merged_gate_last"]
GLU_FORMS: tuple[GLU, ...] = ("none", "separate", "merged_gate_first", "merged_gate_last")

_ARGS = (
    "Tensor x, Tensor top_k_weights, Tensor order, Tensor offsets, Tensor? w_gate, Tensor? b_gate, "
    "Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down"
)
# Positions of the differentiable arguments in _ARGS, the order of the backward's mask and results.
_DIFFERENTIABLE = (0, 1, 4, 5, 6, 7, 8, 9)


def _fake(
    x_TD: Tensor,
    top_k_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    glu: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = order_N.shape[0]
    gate_shape = (rows, w_gate.shape[1]) if save and w_gate is not None else (0,)
    up_shape = (rows, w_up.shape[1]) if save else (0,)
    out_TD = x_TD.new_empty((x_TD.shape[0], w_down.shape[1]))
    return out_TD, x_TD.new_empty(gate_shape), x_TD.new_empty(up_shape)


def _backward_fake(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    mask = args[-1]
    values = [args[i] for i in _DIFFERENTIABLE]
    return tuple(
        v.new_empty(v.shape) if wanted else grad_TD.new_empty(0)
        for v, wanted in zip(values, mask, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.glu, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, grad_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    mask = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if grad_TD is not None:
        results = _backward_op(grad_TD, *ctx.saved_tensors, ctx.activation, ctx.glu, mask)
        for i, wanted, result in zip(_DIFFERENTIABLE, mask, results, strict=True):
            grads[i] = result if wanted else None
    return tuple(grads)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_TD, *tensors, ctx.activation, ctx.glu, ctx.mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_TD, *tensors[:-2])


def _double_backward(ctx: Any, *gg: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order through the small ops, which are differentiable to any order.

    Each input gets an alias of its own, so that a path from one input to another (weights that come from x) is not
    counted here again. The saved pre-activations are functions of the inputs, hence get no gradient themselves.
    """
    grad_TD, *tensors = ctx.saved_tensors
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad_TD.device.type, enabled=False):
        grad_alias, *alias = [_alias(t, keep_graph) for t in (grad_TD, *tensors)]
        wanted = [i for i, g in zip(_DIFFERENTIABLE, gg, strict=True) if g is not None]
        out_TD = composed(*alias, ctx.activation, ctx.glu)
        first = torch.autograd.grad(
            out_TD, [alias[i] for i in wanted], grad_alias, create_graph=True
        )
        places = [0, *(1 + i for i in _DIFFERENTIABLE if alias[i] is not None)]
        second = torch.autograd.grad(
            first,
            [(grad_alias, *alias)[p] for p in places],
            [g for g in gg if g is not None],
            create_graph=keep_graph,
            allow_unused=True,
        )
    grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for place, value in zip(places, second, strict=True):
        grads[place] = value if ctx.needs_input_grad[place] else None
    return tuple(grads)


def _alias(value: Tensor | None, keep_graph: bool) -> Tensor | None:
    """``value`` as a tensor that requires grad, still attached to its history when a graph is wanted."""
    if value is None or not value.is_floating_point():
        return value
    if keep_graph and value.requires_grad:
        return value.view_as(value)
    return value.detach().requires_grad_()


def composed(
    x_TD: Tensor,
    top_k_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str,
    glu: str,
) -> Tensor:
    """The same function out of ``permute``, ``grouped_linear`` and ``combine``."""
    act = ACTIVATIONS[activation].forward
    rows_ND = permute(x_TD, order_N, top_k_weights_TK.shape[1])
    up_NP = grouped_linear(rows_ND, w_up, b_up, offsets_E)
    gate_NH = None
    if w_gate is not None:
        gate_NH = grouped_linear(rows_ND, w_gate, b_gate, offsets_E)
    elif glu != "none":
        gate_NH, up_NP = halves(up_NP, glu)
    hidden_NH = act(up_NP) if gate_NH is None else act(gate_NH) * up_NP
    return combine(
        grouped_linear(hidden_NH, w_down, b_down, offsets_E), top_k_weights_TK, order_N
    )


_GEMM_ARGS = ("x", "w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")
_op = register(
    f"expert_ffn({_ARGS}, str activation, str glu, bool save) -> (Tensor, Tensor, Tensor)",
    kernel=ffn_kernel,
    fake=_fake,
    gemm_args=_GEMM_ARGS,
)
_backward_op = register(
    f"expert_ffn_backward(Tensor grad, {_ARGS}, Tensor gate_rows, Tensor up_rows, str activation, str glu, "
    f"bool[8] mask) -> ({', '.join(['Tensor'] * 8)})",
    kernel=ffn_backward_kernel,
    fake=_backward_fake,
)
differentiable(_op, setup=_setup, backward=_backward)
differentiable(_backward_op, setup=_setup_backward, backward=_double_backward)


def expert_ffn(
    x_TD: Tensor,
    top_k_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str,
    glu: GLU = "none",
) -> Tensor:
    """All experts' feed-forward networks on routed tokens.

    Args:
        x_TD: [T, D] floating point, any strides.
        top_k_weights_TK: [T, K] routing weights, fp32 (fp64 when x is).
        order_N: [T*K] int64 from ``sort_by_expert``.
        offsets_E: [E] int32 from ``sort_by_expert``.
        w_up: [E, H, D]; [E, 2H, D] when merged.
        b_up: [E, H], [E, 2H] when merged, or None.
        w_down: [E, D_out, H].
        b_down: [E, D_out] or None.
        w_gate: [E, H, D] for ``glu="separate"``, else None.
        b_gate: [E, H] or None.
        activation: a key of ``ACTIVATIONS``.
        glu: "none": act(up). "separate": act(gate) * up. "merged_gate_first" and "merged_gate_last": the same with
            gate and up as the two halves of the entry's features.

    Returns:
        [T, D_out] in x's dtype, or in autocast's. Differentiable in x, the routing weights, weights and biases.

    Raises:
        ConfigError: for an unknown activation or glu, or a gate that does not go with ``glu``.
        ShapeError, DtypeError, DeviceError: for tensors that are not as above.
        RoutingError: for an order or offsets that address rows that do not exist (CPU).
    """
    _check(x_TD, top_k_weights_TK, order_N, w_up, b_up, w_down, b_down, w_gate, b_gate, glu)
    _check_options(activation, glu, w_gate, b_gate)
    offsets_argument("expert_ffn", "x", x_TD, offsets_E, w_up.shape[0])
    tensors = (x_TD, top_k_weights_TK, w_gate, b_gate, w_up, b_up, w_down, b_down)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _op(
        x_TD, top_k_weights_TK, order_N, offsets_E, w_gate, b_gate, w_up, b_up, w_down, b_down,
        activation, glu, save,
    )[0]  # fmt: skip


def _check_options(activation: str, glu: str, w_gate: Tensor | None, b_gate: Tensor | None) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError("activation", got=activation, expected=f"one of {', '.join(ACTIVATIONS)}")
    if glu not in GLU_FORMS:
        raise ConfigError("glu", got=glu, expected=f"one of {', '.join(GLU_FORMS)}")
    if (w_gate is not None) != (glu == "separate"):
        given = "none" if w_gate is None else "a tensor"
        raise ConfigError("w_gate", got=given, expected="a tensor if and only if glu='separate'")
    if b_gate is not None and w_gate is None:
        raise ConfigError("b_gate", got="a tensor", expected="None without w_gate")


def _check(
    x_TD: Tensor,
    top_k_weights_TK: Tensor,
    order_N: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    glu: str,
) -> None:
    op = "expert_ffn"
    checks.shape(op, "x", x_TD, "[T, D]", 2)
    checks.floating(op, "x", x_TD)
    checks.shape(op, "top_k_weights", top_k_weights_TK, "[T, K]", 2)
    checks.floating(op, "top_k_weights", top_k_weights_TK)
    checks.shape(op, "order", order_N, "[T*K]", 1)
    checks.index(op, "order", order_N, torch.int64)
    checks.same_device(op, "x", x_TD, {"top_k_weights": top_k_weights_TK, "order": order_N})
    tokens, top_k = top_k_weights_TK.shape
    checks.top_k(op, top_k)
    checks.size(op, "top_k_weights.shape[0]", tokens, x_TD.shape[0], "T")
    checks.size(op, "order length", order_N.shape[0], tokens * top_k, "T * K")
    linear_arguments(op, "x", x_TD, "w_up", w_up, "b_up", b_up)
    if w_gate is not None:
        linear_arguments(op, "x", x_TD, "w_gate", w_gate, "b_gate", b_gate)
        checks.size(op, "w_gate.shape[0]", w_gate.shape[0], w_up.shape[0], "w_up.shape[0]")
        checks.size(op, "w_gate.shape[1]", w_gate.shape[1], w_up.shape[1], "w_up.shape[1]")
    hidden_EH = w_up.shape[1] // 2 if glu.startswith("merged") else w_up.shape[1]
    merged_EH = hidden_EH * 2 if glu.startswith("merged") else hidden_EH
    checks.size(op, "w_up.shape[1]", w_up.shape[1], merged_EH, "an even number")
    checks.shape(op, "w_down", w_down, "[E, out, H]", 3)
    checks.size(op, "w_down.shape[0]", w_down.shape[0], w_up.shape[0], "w_up.shape[0]")
    checks.size(op, "w_down.shape[2]", w_down.shape[2], hidden_EH, "H")
    if b_down is not None:
        checks.shape(op, "b_down", b_down, "[E, out]", 2)
        checks.size(op, "b_down.shape[0]", b_down.shape[0], w_down.shape[0], "w_down.shape[0]")
        checks.size(op, "b_down.shape[1]", b_down.shape[1], w_down.shape[1], "w_down.shape[1]")
    checks.same_device(op, "x", x_TD, {"w_down": w_down, "b_down": b_down})
    checks.same_dtype(op, "x", x_TD, {"w_down": w_down, "b_down": b_down})
