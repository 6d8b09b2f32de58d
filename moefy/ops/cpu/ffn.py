"""The kernels behind ``expert_ffn`` and its backward, in plain torch: gather once, multiply expert by expert.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; W = H, or 2H for a merged entry. A
tensor whose first letter is P lies by place, as ``moefy/ops/cpu/layout.py`` says; one whose first letter is N, by row.

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
from moefy.ops.cpu.expert_groups import ExpertGroup, expert_groups
from moefy.ops.cpu.layout import InRows, Layout
from moefy.ops.cpu.products import outer_products, row_sums, rows_dot, rows_times
from moefy.ops.cpu.sums import WIDE_ELEMENTS, accumulation_dtype, place_of_slot, sum_places
from moefy.ops.ffn_args import FFNArgs, Wanted, halves
from moefy.ops.saved_rows import SavedRows, claim, promise_private
from moefy.triton_ops.shared.activations import ACTIVATIONS

# Gradients that are made by place: x's is summed over each token's slots, the weights' is read by slot.
BY_PLACE = frozenset(("x", "weights"))


def _at(whole: Tensor | None, where: slice) -> Tensor | None:
    return None if whole is None else whole[where]


def _places(plan: list[ExpertGroup], order_N: Tensor, top_k: int) -> Tensor:
    """The place of each slot: [T, K]."""
    place = [group.layout.place_N(order_N.device) for group in plan]
    if len(plan) > 1:
        place = [torch.cat([p + group.places.start for p, group in zip(place, plan, strict=True)])]
    return place_of_slot(order_N, place[0], top_k)


def ffn_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, gate_or_acted, up)``: the layer's output, and the rows saved as ``SavedRows``; empty if not saved."""
    *layer_args, save, private = args
    layer = FFNArgs._make(layer_args)
    checks.slots("expert_ffn", layer.order_N)
    plan = expert_groups(layer, layer.bounds("expert_ffn"), products=1, saved=save * layer.saved_features)
    whole = Forward(None, None, None)
    if len(plan) > 1:
        new, rows, (width, size_h) = layer.x_TD.new_empty, len(layer.order_N), layer.w_down.shape[1:]
        whole = Forward(
            y_PD=new(plan[-1].places.stop, width),
            gate_or_acted=new(rows, size_h) if save and layer.saves_second else None,
            up=new(rows, layer.w_up.shape[1]) if save else None,
        )
    for group in plan:
        into = Forward(
            _at(whole.y_PD, group.places), _at(whole.gate_or_acted, group.rows), _at(whole.up, group.rows)
        )
        done = _forward(group.of(layer), group.layout, save, into)
        whole = done if len(plan) == 1 else whole
        del done
    assert whole.y_PD is not None
    place_TK = _places(plan, layer.order_N, layer.weights_TK.shape[1])
    out_TD = sum_places(whole.y_PD, layer.weights_TK, place_TK)
    gate_or_acted, up = (out_TD.new_empty(0) if rows is None else rows for rows in whole[1:])
    if save and private:
        promise_private(gate_or_acted, up)
    return out_TD, gate_or_acted, up


class Forward(NamedTuple):
    """Results of the forward: the experts' outputs, by place, and the rows saved for the backward, by row.

    As an argument, the tensors to write them to; None for a new tensor.
    """

    y_PD: Tensor | None
    gate_or_acted: Tensor | None
    up: Tensor | None


def _forward(layer: FFNArgs, layout: Layout, save: bool, into: Forward) -> Forward:
    """One group of experts; the results are written to the tensors of ``into`` where it has any."""
    x_PD = layer.x_TD.index_select(0, layout.spread(layer.order_N) // layer.weights_TK.shape[1])
    to_gate = None if layer.saves_acted else into.gate_or_acted
    gate, up = _entry(layer, x_PD, layout, to_gate, into.up)
    del x_PD
    gate_or_acted = None
    if save and layer.saves_acted:
        acted_PH, hidden_PH = _acted(layer, gate, up)
        gate_or_acted = layout.collect(acted_PH, into.gate_or_acted)
        del acted_PH
    else:
        hidden_PH = _body(layer, gate, up)
        if save and gate is not None:
            gate_or_acted = layout.collect(gate, into.gate_or_acted)
    saved_up = layout.collect(up, into.up) if save else None
    del gate, up
    return Forward(
        rows_times(hidden_PH, layer.w_down, layer.b_down, layout, out_PO=into.y_PD), gate_or_acted, saved_up
    )


def ffn_backward_kernel(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of (x, top_k_weights, w_gate, b_gate, w_up, b_up, w_down, b_down); those not asked for are empty."""
    *tensors, second_rows, up_rows, activation, glu, mask = args
    layer, want = FFNArgs._make((*tensors, activation, glu)), Wanted._make(mask)
    checks.slots("expert_ffn_backward", layer.order_N)
    saved = claim(second_rows, up_rows)
    features = 0 if saved.up is None else layer.saved_features
    plan = expert_groups(layer, layer.bounds("expert_ffn_backward"), products=2, saved=features)
    whole: dict[str, Tensor] = {}
    if len(plan) > 1:
        whole = _gradients(layer, want, plan[-1].places.stop)
    for group in plan:
        rows = SavedRows(_at(saved.gate_or_acted, group.rows), _at(saved.up, group.rows), saved.overwrite)
        into = {n: g[group.places if n in BY_PLACE else group.experts] for n, g in whole.items()}
        done = _backward(group.of(layer), want, group.layout, grad_TD, rows, into)
        whole = done if len(plan) == 1 else whole
        del done
    place_TK = _places(plan, layer.order_N, layer.weights_TK.shape[1])
    if want.x:
        whole["x"] = sum_places(whole["x"], None, place_TK)
    if want.weights:
        whole["weights"] = whole["weights"].index_select(0, place_TK.view(-1)).view(place_TK.shape)
    return tuple(
        whole[n] if wanted else grad_TD.new_empty(0) for n, wanted in zip(want._fields, want, strict=True)
    )


def _gradients(layer: FFNArgs, want: Wanted, places: int) -> dict[str, Tensor]:
    """Empty tensors for the wanted gradients; those of x and of the routing weights by place."""
    like = {
        "x": layer.x_TD.new_empty(places, layer.x_TD.shape[1]),
        "weights": layer.weights_TK.new_empty(places),
        **dict(zip(want._fields[2:], layer[4:10], strict=True)),
    }
    return {
        name: value if name in BY_PLACE else value.new_empty(value.shape)
        for (name, value), wanted in zip(like.items(), want, strict=True)
        if wanted and value is not None
    }


def _backward(
    layer: FFNArgs,
    want: Wanted,
    layout: Layout,
    grad_TD: Tensor,
    saved: SavedRows,
    into: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The wanted gradients of one group, those of x and of the routing weights by place; in ``into`` if it has any."""
    slot_P, top_k = layout.spread(layer.order_N), layer.weights_TK.shape[1]
    token_P = slot_P // top_k
    weight_P1 = layer.weights_TK.reshape(-1).index_select(0, slot_P).unsqueeze(1)
    x_PD = layout.cleared(layer.x_TD.index_select(0, token_P))
    grad_PD = layout.cleared(grad_TD.index_select(0, token_P))
    gate_or_acted = None if saved.gate_or_acted is None else layout.spread(saved.gate_or_acted, zero=True)
    gate, acted_PH = (None, gate_or_acted) if layer.saves_acted else (gate_or_acted, None)
    if saved.up is None:
        gate, up = (None if t is None else layout.cleared(t) for t in _entry(layer, x_PD, layout))
        assert up is not None
    else:
        up = layout.spread(saved.up, zero=True)
    dhidden_PH = layout.cleared(rows_times(grad_PD, layer.w_down.transpose(1, 2), None, layout))
    acted_PH, hidden_PH = _acted(layer, gate, up, acted_PH)
    result: dict[str, Tensor] = {}
    on_bias_P = None
    if want.weights and layer.b_down is not None:
        on_bias_P = rows_dot(grad_PD, layer.b_down, layout, accumulation_dtype(grad_PD, layer.weights_TK))
    grad_PD.mul_(weight_P1)  # in the wider of the two dtypes, rounded once
    if want.w_down:
        result["w_down"] = outer_products(grad_PD, hidden_PH, layout, out_EOI=into.get("w_down"))
    if want.b_down:
        result["b_down"] = row_sums(grad_PD, layout, out_EO=into.get("b_down"))
    del grad_PD
    overwrite = saved.overwrite or not isinstance(layout, InRows)
    dw_P = _weigh(dhidden_PH, hidden_PH, weight_P1, want, overwrite or acted_PH is not hidden_PH)
    if want.weights:
        dw_P = (dw_P if on_bias_P is None else dw_P.add_(on_bias_P)).to(layer.weights_TK.dtype)
        result["weights"] = into["weights"].copy_(dw_P) if into else dw_P
    if any((want.x, want.w_gate, want.b_gate, want.w_up, want.b_up)):
        dgate, dup = _body_backward(layer, gate, up, acted_PH, dhidden_PH, hidden_PH, overwrite)
        result |= _entry_backward(layer, want, layout, x_PD, dgate, dup, into)
    return result


def _entry(
    layer: FFNArgs,
    x_PD: Tensor,
    layout: Layout,
    to_gate: Tensor | None = None,
    to_up: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Pre-activations: of the gate if it is separate, and of the other (or merged) entry.

    They are written to ``to_gate`` and ``to_up`` [N, ...] if these are given and the layout is by row.
    """
    if not isinstance(layout, InRows):
        to_gate = to_up = None
    gate = None
    if layer.w_gate is not None:
        gate = rows_times(x_PD, layer.w_gate, layer.b_gate, layout, out_PO=to_gate)
    return gate, rows_times(x_PD, layer.w_up, layer.b_up, layout, out_PO=to_up)


def _body(layer: FFNArgs, gate: Tensor | None, up: Tensor) -> Tensor:
    """From pre-activations to the exit's input."""
    act = ACTIVATIONS[layer.activation].forward
    gate_PH, up_PH = layer.gate_and_up(gate, up)
    if gate_PH is None:
        return act(up_PH)
    acted_PH = act(gate_PH)
    return acted_PH * up_PH if acted_PH is gate_PH else acted_PH.mul_(up_PH)


def _acted(
    layer: FFNArgs, gate: Tensor | None, up: Tensor, acted_PH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(activations, the exit's input)``, one tensor where there is no gate, and no alias of the pre-activations."""
    gate_PH, up_PH = layer.gate_and_up(gate, up)
    before_PH = up_PH if gate_PH is None else gate_PH
    if acted_PH is None:
        acted_PH = ACTIVATIONS[layer.activation].forward(before_PH)
    if acted_PH is before_PH:
        acted_PH = before_PH.clone()
    return acted_PH, acted_PH if gate_PH is None else acted_PH * up_PH


def _body_backward(
    layer: FFNArgs,
    gate: Tensor | None,
    up: Tensor,
    acted_PH: Tensor,
    dhidden_PH: Tensor,
    hidden_PH: Tensor,
    overwrite: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the pre-activations, in the form in which ``_entry`` gives them.

    The call overwrites ``dhidden``, with a gate ``hidden`` as well, and with ``overwrite`` the pre-activations.
    """
    backward = ACTIVATIONS[layer.activation].backward
    gate_PH, up_PH = layer.gate_and_up(gate, up)
    if gate_PH is None:
        backward(dhidden_PH, up_PH, dhidden_PH)
        return None, dhidden_PH
    torch.mul(dhidden_PH, up_PH, out=hidden_PH)
    if layer.glu == "separate":
        backward(hidden_PH, gate_PH, hidden_PH)
        return hidden_PH, dhidden_PH.mul_(acted_PH)
    merged_PW = up if overwrite else up.new_empty(up.shape)
    dgate_PH, dup_PH = halves(merged_PW, layer.glu)
    torch.mul(dhidden_PH, acted_PH, out=dup_PH)
    backward(hidden_PH, gate_PH, dgate_PH)
    return None, merged_PW


def _entry_backward(
    layer: FFNArgs,
    want: Wanted,
    layout: Layout,
    x_PD: Tensor,
    dgate: Tensor | None,
    dup: Tensor,
    into: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The wanted gradients of x, by place, and of the entries' weights and biases."""
    result: dict[str, Tensor] = {}
    for name, drows in (("gate", dgate), ("up", dup)):
        if drows is not None and getattr(want, w := f"w_{name}"):
            result[w] = outer_products(drows, x_PD, layout, out_EOI=into.get(w))
        if drows is not None and getattr(want, b := f"b_{name}"):
            result[b] = row_sums(drows, layout, out_EO=into.get(b))
    if want.x:
        dx_PD = rows_times(dup, layer.w_up.transpose(1, 2), None, layout, out_PO=into.get("x"))
        if dgate is not None and layer.w_gate is not None:
            rows_times(dgate, layer.w_gate.transpose(1, 2), None, layout, onto_PO=dx_PD)
        result["x"] = dx_PD
    return result


def _weigh(dhidden_PH: Tensor, hidden_PH: Tensor, weight_P1: Tensor, want: Wanted, overwrite: bool) -> Tensor:
    """Multiply ``dhidden`` by the routing weights, in place; return ``<dhidden, hidden>`` from before, by place.

    The result is empty if the weights' gradient is not wanted. With ``overwrite`` the call overwrites ``hidden``.
    """
    dtype = accumulation_dtype(dhidden_PH, weight_P1)
    if not want.weights:
        dw_P = weight_P1.new_empty(0)
    elif dhidden_PH.dtype is dtype:
        dw_P = (hidden_PH.mul_(dhidden_PH) if overwrite else hidden_PH * dhidden_PH).sum(1)
    elif dhidden_PH.dtype is torch.bfloat16 and dtype is weight_P1.dtype:
        return _weigh_wide(dhidden_PH, hidden_PH, weight_P1, overwrite)
    else:
        dw_P = torch.linalg.vecdot(dhidden_PH.to(dtype), hidden_PH.to(dtype))
    dhidden_PH.mul_(weight_P1)
    return dw_P


def _weigh_wide(dhidden_PH: Tensor, hidden_PH: Tensor, weight_P1: Tensor, overwrite: bool) -> Tensor:
    """``_weigh`` of bf16 in fp32, some rows at a time; products are rounded like ``dhidden`` itself, added in fp32.

    All rows at once take fresh memory for wide copies: on 2 cores, 1024 rows of 896 features, 3.4 ms against 0.6.
    """
    places, size_h = dhidden_PH.shape
    rows = max(1, WIDE_ELEMENTS // size_h)
    dw_P, wide = weight_P1.new_empty(places), weight_P1.new_empty(min(rows, places), size_h)
    parts = zip(*(t.split(rows) for t in (dhidden_PH, hidden_PH, weight_P1, dw_P)), strict=True)
    for dhidden_MH, hidden_MH, weight_M1, dw_M in parts:
        wide_MH = wide[: len(dhidden_MH)]
        wide_MH.copy_(hidden_MH.mul_(dhidden_MH) if overwrite else hidden_MH * dhidden_MH)
        torch.sum(wide_MH, 1, out=dw_M)
        dhidden_MH.copy_(wide_MH.copy_(dhidden_MH).mul_(weight_M1))
    return dw_P
