"""``expert_ffn``: all that follows the router as one op: permute, entry GEMMs, activation, exit GEMM, combine.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = H, or 2H for a merged entry.

Contract: token t gets ``sum_k w[t, k] * down_e(act(up_e(x[t])))`` with e its k-th expert; with a GLU the middle is
``act(gate) * up``. Saved for the backward are only the arguments and the pre-activations (on a CPU, unless the
gate is separate, also the activations); when these were not saved (no gradient was expected) the backward computes
them again. Dropped slots add nothing.

    >>> x_TD, w_TK = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
    >>> order_N, offsets_E = sort_by_expert(torch.tensor([[1], [0]]), 2)
    >>> one_E11, ten_E11 = torch.ones(2, 1, 1), torch.tensor([[[10.0]], [[100.0]]])
    >>> expert_ffn(x_TD, w_TK, order_N, offsets_E, one_E11, None, ten_E11, None, activation="relu")
    tensor([[100.], [ 20.]])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.errors import ConfigError, ShapeError
from moefy.ops import checks
from moefy.ops.combine import combine
from moefy.ops.cpu.ffn import ffn_backward_kernel, ffn_kernel
from moefy.ops.cuda.choose import by_triton
from moefy.ops.cuda.ffn import ffn_backward_cuda, ffn_cuda
from moefy.ops.ffn_args import FFNArgs, halves
from moefy.ops.grouped_linear import grouped_linear
from moefy.ops.library import autocast_off, differentiable, register
from moefy.ops.permute import permute
from moefy.records import GLU, GLU_FORMS
from moefy.triton_ops.shared.activations import ACTIVATIONS

_ARGS = (
    "Tensor x, Tensor top_k_weights, Tensor order, Tensor offsets, Tensor? w_gate, Tensor? b_gate, "
    "Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down"
)
# Positions of the differentiable arguments in _ARGS, the order of the backward's mask and results.
_DIFFERENTIABLE = (0, 1, 4, 5, 6, 7, 8, 9)


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *layer_args, save, _ = args
    layer = FFNArgs._make(layer_args)
    rows, x_TD = layer.order_N.shape[0], layer.x_TD
    second_shape = (rows, layer.w_down.shape[2]) if save and layer.saves_second else (0,)
    up_shape = (rows, layer.w_up.shape[1]) if save else (0,)
    out_TD = x_TD.new_empty((x_TD.shape[0], layer.w_down.shape[1]))
    return out_TD, x_TD.new_empty(second_shape), x_TD.new_empty(up_shape)


def _backward_fake(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    mask = args[-1]
    values = [args[i] for i in _DIFFERENTIABLE]
    return tuple(
        v.new_empty(v.shape) if wanted else grad_TD.new_empty(0)
        for v, wanted in zip(values, mask, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.glu, _, _ = inputs
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
    *tensors, _, _, ctx.activation, ctx.glu, ctx.mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *gg: Tensor | None) -> tuple[Tensor | None, ...]:
    """Second order through the small ops, which are differentiable to any order.

    Each input gets an alias of its own, so that a path from one input to another (weights that come from x) is not
    counted here again. The saved pre-activations are functions of the inputs, hence get no gradient themselves.
    """
    places = (1 + i for i in _DIFFERENTIABLE)
    asked = {p: g for p, g, m in zip(places, gg, ctx.mask, strict=True) if m and g is not None}
    if not asked:
        return (None,) * len(ctx.needs_input_grad)
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_off(ctx.saved_tensors[0].device.type):
        alias = [_alias(t, keep_graph) for t in ctx.saved_tensors]
        inputs = {1 + i: a for i in _DIFFERENTIABLE if (a := alias[1 + i]) is not None}
        out_TD = composed(FFNArgs._make((*alias[1:], ctx.activation, ctx.glu)))
        first = torch.autograd.grad(out_TD, [inputs[p] for p in asked], alias[0], create_graph=True)
        second = torch.autograd.grad(
            first,
            [alias[0], *inputs.values()],
            list(asked.values()),
            create_graph=keep_graph,
            allow_unused=True,
        )
    grads = dict(zip((0, *inputs), second, strict=True))
    return tuple(grads.get(p) if need else None for p, need in enumerate(ctx.needs_input_grad))


def _alias(value: Any, keep_graph: bool) -> Any:
    """A floating ``value`` as a tensor that requires grad, still attached to its history when a graph is wanted."""
    if value is None or not value.is_floating_point():
        return value
    if keep_graph and value.requires_grad:
        return value.view_as(value)
    return value.detach().requires_grad_()


def composed(layer: FFNArgs) -> Tensor:
    """The same function out of ``permute``, ``grouped_linear`` and ``combine``."""
    act = ACTIVATIONS[layer.activation].forward
    rows_ND = permute(layer.x_TD, layer.order_N, layer.weights_TK.shape[1])
    up_NP, gate_NH = grouped_linear(rows_ND, layer.w_up, layer.b_up, layer.offsets_E), None
    if layer.w_gate is not None:
        gate_NH = grouped_linear(rows_ND, layer.w_gate, layer.b_gate, layer.offsets_E)
    elif layer.glu != "none":
        gate_NH, up_NP = halves(up_NP, layer.glu)
    hidden_NH = act(up_NP) if gate_NH is None else act(gate_NH) * up_NP
    y_ND = grouped_linear(hidden_NH, layer.w_down, layer.b_down, layer.offsets_E)
    return combine(y_ND, layer.weights_TK, layer.order_N)


# ``private``: the caller drops the saved rows, so that only autograd holds them, and the backward may overwrite them.
_op = register(
    f"expert_ffn({_ARGS}, str activation, str glu, bool save, bool private) -> (Tensor, Tensor, Tensor)",
    kernel=ffn_kernel,
    fake=_fake,
    cuda=by_triton(ffn_cuda, ffn_kernel),
    gemm_args=("x", "w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down"),
)
_backward_op = register(
    f"expert_ffn_backward(Tensor grad, {_ARGS}, Tensor gate_rows, Tensor up_rows, str activation, str glu, "
    f"bool[8] mask) -> ({', '.join(['Tensor'] * 8)})",
    kernel=ffn_backward_kernel,
    fake=_backward_fake,
    cuda=by_triton(ffn_backward_cuda, ffn_backward_kernel),
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
    layer = FFNArgs(
        x_TD, top_k_weights_TK, order_N, offsets_E, w_gate, b_gate, w_up, b_up, w_down, b_down,
        activation, glu,
    )  # fmt: skip
    _check_options(layer)
    _check_routing(layer)
    _check_entries(layer)
    _check_exit(layer)
    save = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in layer)
    return _op(*layer, save, True)[0]


def _check_options(layer: FFNArgs) -> None:
    if layer.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ConfigError("activation", got=layer.activation, expected=f"one of {known}")
    if layer.glu not in GLU_FORMS:
        raise ConfigError("glu", got=layer.glu, expected=f"one of {', '.join(GLU_FORMS)}")
    if (layer.w_gate is not None) != (layer.glu == "separate"):
        given = "nothing" if layer.w_gate is None else "a tensor"
        raise ConfigError("w_gate", got=given, expected="a tensor if and only if glu='separate'")
    if layer.b_gate is not None and layer.w_gate is None:
        raise ConfigError("b_gate", got="a tensor", expected="None where there is no w_gate")


def _check_routing(layer: FFNArgs) -> None:
    op, x_TD, weights_TK, order_N = "expert_ffn", layer.x_TD, layer.weights_TK, layer.order_N
    checks.shape(op, "x", x_TD, "[T, D]", 2)
    checks.floating(op, "x", x_TD)
    checks.shape(op, "top_k_weights", weights_TK, "[T, K]", 2)
    checks.floating(op, "top_k_weights", weights_TK)
    checks.order(op, order_N)
    checks.same_device(op, "x", x_TD, {"top_k_weights": weights_TK, "order": order_N})
    checks.top_k(op, weights_TK.shape[1])
    checks.size(op, "top_k_weights.shape[0]", weights_TK.shape[0], x_TD.shape[0], "T")
    checks.size(op, "order length", order_N.shape[0], weights_TK.numel(), "T * K")


def _check_entries(layer: FFNArgs) -> None:
    op, w_up, w_gate = "expert_ffn", layer.w_up, layer.w_gate
    checks.linear(op, "x", layer.x_TD, "w_up", w_up, "b_up", layer.b_up)
    checks.offsets(op, "x", layer.x_TD, layer.offsets_E, w_up.shape[0])
    if w_gate is not None:
        checks.linear(op, "x", layer.x_TD, "w_gate", w_gate, "b_gate", layer.b_gate)
        checks.size(op, "w_gate.shape[0]", w_gate.shape[0], w_up.shape[0], "w_up.shape[0]")
        checks.size(op, "w_gate.shape[1]", w_gate.shape[1], w_up.shape[1], "w_up.shape[1]")


def _check_exit(layer: FFNArgs) -> None:
    op, w_down, width = "expert_ffn", layer.w_down, layer.w_up.shape[1]
    if layer.glu.startswith("merged"):
        if width % 2:
            raise ShapeError(
                f"moefy.{op}: w_up.shape[1] cannot be halved; got {width}; expected an even number for "
                f"glu={layer.glu!r}"
            )
        width //= 2
    checks.weight(op, "x", layer.x_TD, "w_down", w_down, "b_down", layer.b_down)
    checks.size(op, "w_down.shape[0]", w_down.shape[0], layer.w_up.shape[0], "w_up.shape[0]")
    checks.size(op, "w_down.shape[2]", w_down.shape[2], width, "hidden width")
