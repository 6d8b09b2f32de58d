"""The kernels behind ``expert_ffn`` and its backward, in plain torch: gather once, multiply expert by expert.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = H, or 2H for a merged entry.

Contract: as ``moefy/ops/expert_ffn.py``. The gradient of the routing weights needs no expert output again (as in
SonicMoE, Guo et al. 2025): ``<grad, h @ W.T + b> = <grad @ W, h> + <grad, b>``, and ``grad @ W`` is needed anyway.

    >>> gate_NH, up_NH = halves(torch.tensor([[1.0, 2.0]]), "merged_gate_last")
    >>> gate_NH, up_NH
    (tensor([[2.]]), tensor([[1.]]))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefy.ops import checks
from moefy.ops.activations import ACTIVATIONS
from moefy.ops.grouped_gemm import Bounds, outer_products, row_sums, rows_times
from moefy.ops.permute import accumulation_dtype, weighted_sum


class Layer(NamedTuple):
    """The arguments of ``expert_ffn`` in schema order."""

    x_TD: Tensor
    weights_TK: Tensor
    order_N: Tensor
    offsets_E: Tensor
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None
    activation: str
    glu: str

    def token_N(self, op: str) -> Tensor:
        """The token of each row."""
        return checks.slots(op, self.order_N) // self.weights_TK.shape[1]

    def bounds(self, op: str) -> Bounds:
        """First and end row of each expert."""
        return checks.bounds(op, self.offsets_E, self.order_N.shape[0])


class Wanted(NamedTuple):
    """Which gradients to compute, in the order of the backward's results."""

    x: bool
    weights: bool
    w_gate: bool
    b_gate: bool
    w_up: bool
    b_up: bool
    w_down: bool
    b_down: bool


def halves(merged_NP: Tensor, glu: str) -> tuple[Tensor, Tensor]:
    """``(gate, up)``, views of a merged entry's output."""
    first_NH, last_NH = merged_NP.chunk(2, dim=1)
    return (first_NH, last_NH) if glu == "merged_gate_first" else (last_NH, first_NH)


def ffn_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, pre-activations of a separate gate, of the other entry)``; what is not saved is empty."""
    *layer_args, save, _ = args
    layer = Layer._make(layer_args)
    bounds = layer.bounds("expert_ffn")
    rows_ND = layer.x_TD.index_select(0, layer.token_N("expert_ffn"))
    gate_rows, up_rows = _entry(layer, rows_ND, bounds)
    del rows_ND
    hidden_NH = _body(layer, gate_rows, up_rows)
    saved_gate = gate_rows if save and gate_rows is not None else layer.x_TD.new_empty(0)
    saved_up = up_rows if save else layer.x_TD.new_empty(0)
    del gate_rows, up_rows
    y_ND = rows_times(hidden_NH, layer.w_down, layer.b_down, bounds)
    out_TD = weighted_sum(y_ND, layer.weights_TK, layer.order_N, layer.weights_TK.shape[1])
    return out_TD, saved_gate, saved_up


def ffn_backward_kernel(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of (x, top_k_weights, w_gate, b_gate, w_up, b_up, w_down, b_down); unasked ones are empty."""
    *tensors, gate_rows, up_rows, activation, glu, mask = args
    layer, want = Layer._make((*tensors, activation, glu)), Wanted._make(mask)
    bounds, token_N = layer.bounds("expert_ffn_backward"), layer.token_N("expert_ffn_backward")
    rows_ND = layer.x_TD.index_select(0, token_N)
    gate_rows = None if layer.w_gate is None else gate_rows
    if up_rows.dim() == 1:  # not saved
        gate_rows, up_rows = _entry(layer, rows_ND, bounds)

    grad_ND = grad_TD.index_select(0, token_N)
    weight_N1 = layer.weights_TK.reshape(-1).index_select(0, layer.order_N).unsqueeze(1)
    dhidden_NH = rows_times(grad_ND, layer.w_down.transpose(1, 2), None, bounds)
    hidden_NH = _body(layer, gate_rows, up_rows)
    result: dict[str, Tensor | None] = dict.fromkeys(Wanted._fields)
    if want.weights:
        result["weights"] = _weights_grad(layer, grad_ND, dhidden_NH, hidden_NH, bounds)
    grad_ND = _scaled(grad_ND, weight_N1)
    if want.w_down:
        result["w_down"] = outer_products(grad_ND, hidden_NH, bounds)
    if want.b_down:
        result["b_down"] = row_sums(grad_ND, bounds)
    del grad_ND, hidden_NH
    if any((want.x, want.w_gate, want.b_gate, want.w_up, want.b_up)):
        dgate, dup = _body_backward(layer, gate_rows, up_rows, _scaled(dhidden_NH, weight_N1))
        result |= _entry_backward(layer, want, rows_ND, dgate, dup, bounds)
    return tuple(grad_TD.new_empty(0) if g is None else g for g in result.values())


def _entry(layer: Layer, rows_ND: Tensor, bounds: Bounds) -> tuple[Tensor | None, Tensor]:
    """Pre-activations: of the gate if it is separate, and of the other (or merged) entry."""
    gate = None
    if layer.w_gate is not None:
        gate = rows_times(rows_ND, layer.w_gate, layer.b_gate, bounds)
    return gate, rows_times(rows_ND, layer.w_up, layer.b_up, bounds)


def _gate_and_up(layer: Layer, gate_rows: Tensor | None, up_rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """``(gate or None, up)``, whatever the GLU form."""
    return halves(up_rows, layer.glu) if layer.glu.startswith("merged") else (gate_rows, up_rows)


def _body(layer: Layer, gate_rows: Tensor | None, up_rows: Tensor) -> Tensor:
    """From pre-activations to the exit's input."""
    act = ACTIVATIONS[layer.activation].forward
    gate_NH, up_NH = _gate_and_up(layer, gate_rows, up_rows)
    return act(up_NH) if gate_NH is None else act(gate_NH) * up_NH


def _body_backward(
    layer: Layer, gate_rows: Tensor | None, up_rows: Tensor, dhidden_NH: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the pre-activations, in the form in which ``_entry`` gives them."""
    act = ACTIVATIONS[layer.activation]
    gate_NH, up_NH = _gate_and_up(layer, gate_rows, up_rows)
    if gate_NH is None:
        return None, act.backward(dhidden_NH, up_NH)
    dgate_NH = act.backward(dhidden_NH * up_NH, gate_NH)
    dup_NH = dhidden_NH * act.forward(gate_NH)
    if layer.glu == "separate":
        return dgate_NH, dup_NH
    pair = (dgate_NH, dup_NH) if layer.glu == "merged_gate_first" else (dup_NH, dgate_NH)
    return None, torch.cat(pair, dim=1)


def _entry_backward(
    layer: Layer,
    want: Wanted,
    rows_ND: Tensor,
    dgate_NH: Tensor | None,
    dup_NP: Tensor,
    bounds: Bounds,
) -> dict[str, Tensor]:
    """Gradients of x and of the entries' weights and biases, as far as they are wanted."""
    result: dict[str, Tensor] = {}
    for name, drows in (("gate", dgate_NH), ("up", dup_NP)):
        if drows is not None and getattr(want, f"w_{name}"):
            result[f"w_{name}"] = outer_products(drows, rows_ND, bounds)
        if drows is not None and getattr(want, f"b_{name}"):
            result[f"b_{name}"] = row_sums(drows, bounds)
    if want.x:
        dx_ND = rows_times(dup_NP, layer.w_up.transpose(1, 2), None, bounds)
        if dgate_NH is not None and layer.w_gate is not None:
            dx_ND += rows_times(dgate_NH, layer.w_gate.transpose(1, 2), None, bounds)
        result["x"] = weighted_sum(dx_ND, None, layer.order_N, layer.weights_TK.shape[1])
    return result


def _weights_grad(
    layer: Layer, grad_ND: Tensor, dhidden_NH: Tensor, hidden_NH: Tensor, bounds: Bounds
) -> Tensor:
    """``<grad @ W_down, hidden> + <grad, b_down>`` per slot; ``dhidden`` is still without routing weights."""
    dtype = accumulation_dtype(grad_ND, layer.weights_TK)
    dw_N = torch.linalg.vecdot(dhidden_NH.to(dtype), hidden_NH.to(dtype))
    if layer.b_down is not None:
        for (first, end), bias_D in zip(bounds, layer.b_down.unbind(0), strict=True):
            if end > first:
                dw_N[first:end] += grad_ND[first:end].to(dtype) @ bias_D.to(dtype)
    dw_N = dw_N.to(layer.weights_TK.dtype)
    return torch.zeros_like(dw_N).scatter_(0, layer.order_N, dw_N).view(layer.weights_TK.shape)


def _scaled(rows: Tensor, weight_N1: Tensor) -> Tensor:
    """``rows * weight``, rounded once to rows' dtype."""
    if rows.dtype is weight_N1.dtype:
        return rows * weight_N1
    return (rows * weight_N1.to(accumulation_dtype(rows, weight_N1))).to(rows.dtype)
