"""The providers of ``moefy bench layer`` that need nothing but torch and moefy.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = 2H with a gate, else H.

Contract: "moefy" is ``moefy.ops`` as a layer calls it, eager, compiled in one graph, and compiled with
``mode="reduce-overhead"``, which replays CUDA graphs; "grouped_mm+ compiled" is the
best that torch alone does (sort, gather and combine with hand-written backwards, ``grouped_mm``, Inductor); "loop" is
the loop over experts; "dense" is no MoE layer but the products that any must do, as single matrices: the ceiling.

    >>> [provider.name for provider in OWN]
    ['moefy', 'moefy compiled', 'moefy CUDA graph', 'grouped_mm+ compiled', 'loop', 'dense']
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy.bench.layer.contract import (
    BoundLayer,
    LayerFunction,
    Leaves,
    Provider,
    Unsupported,
    activate,
    choose,
    differentiable,
    expert_loop,
    from_function,
)
from moefy.bench.layer.shapes import Inputs, Shape
from moefy.ops import expert_ffn, sort_by_expert, top_k_softmax


def moefy_layer(
    x_TD: Tensor, logits_TE: Tensor, w1_EPD: Tensor, w2_EDH: Tensor, top_k: int, gated: bool
) -> Tensor:
    """moefy's layer, given router logits."""
    weights_TK, index_TK = top_k_softmax(logits_TE, top_k)
    order_N, offsets_E = sort_by_expert(index_TK, w1_EPD.shape[0])
    return expert_ffn(
        x_TD,
        weights_TK,
        order_N,
        offsets_E,
        w1_EPD,
        None,
        w2_EDH,
        None,
        activation="silu" if gated else "gelu_tanh",
        glu="merged_gate_first" if gated else "none",
    )


class _Gather(torch.autograd.Function):
    """Tokens to sorted rows. Backward: each token adds up its K rows, read by position: no atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        (row_TK,) = ctx.saved_tensors
        return grad_ND[row_TK].sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Sorted rows to tokens, weighted in fp32. Backward by position as well."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, slot_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, slot_N, row_TK)
        rows_TKD = y_ND[row_TK].to(weights_TK.dtype)
        out_TD = (rows_TKD * weights_TK.unsqueeze(2)).sum(dim=1)
        # A cast that changes nothing makes compiled code of torch 2.11 lose all gradients here.
        return out_TD if out_TD.dtype is y_ND.dtype else out_TD.to(y_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weights_TK, slot_N, row_TK = ctx.saved_tensors
        grad_ND = grad_TD.index_select(0, slot_N // weights_TK.shape[1]).to(weights_TK.dtype)
        dy_ND = grad_ND * weights_TK.flatten()[slot_N].unsqueeze(1)
        dweights_N = (grad_ND * y_ND).sum(dim=1)
        return dy_ND.to(y_ND.dtype), dweights_N[row_TK], None, None


def grouped_layer(
    x_TD: Tensor, logits_TE: Tensor, w1_EPD: Tensor, w2_EDH: Tensor, top_k: int, gated: bool
) -> Tensor:
    """The layer around torch's grouped matrix product."""
    weights_TK, index_TK = choose(logits_TE, top_k)
    expert_N, slot_N = index_TK.flatten().sort(stable=True)
    place_N = torch.arange(slot_N.shape[0], device=slot_N.device)
    row_TK = torch.empty_like(slot_N).scatter_(0, slot_N, place_N).view(index_TK.shape)
    ids_E = torch.arange(w1_EPD.shape[0], device=expert_N.device)
    offsets_E = torch.searchsorted(expert_N, ids_E, right=True, out_int32=True)
    product = _grouped_mm if x_TD.is_cuda else _untraced_grouped_mm
    rows_ND: Any = _Gather.apply(x_TD, slot_N // top_k, row_TK)
    hidden_NH = activate(product(rows_ND, w1_EPD.transpose(1, 2), offs=offsets_E), gated)
    y_ND = product(hidden_NH, w2_EDH.transpose(1, 2), offs=offsets_E)
    out_TD: Any = _Combine.apply(y_ND, weights_TK, slot_N, row_TK)
    return out_TD


# The public name is younger than the private one.
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm")  # noqa: B009
# torch 2.13 runs it in fp32 on a CPU but refuses to trace that: there it breaks the graph.
_untraced_grouped_mm: Any = torch.compiler.disable(_grouped_mm)


@functools.cache
def _compiled(function: LayerFunction, on_gpu: bool) -> LayerFunction:
    """Sizes are constants on a GPU, where that pays, and symbols on a CPU, where that saves compilations."""
    return torch.compile(function, fullgraph=on_gpu or function is moefy_layer, dynamic=not on_gpu)


def _build_compiled(function: LayerFunction) -> Callable[[Inputs], BoundLayer]:
    return lambda inputs: from_function(_compiled(function, inputs.x_TD.is_cuda))(inputs)


def build_graphed(inputs: Inputs) -> BoundLayer:
    """The compiled layer as CUDA graphs. Its weights stay where they are, as a module's parameters do."""
    if not inputs.x_TD.is_cuda or inputs.shape.decode:
        raise Unsupported("training on CUDA only; decoding is captured for every provider")

    def bind(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
        for weight in (leaves.w1_EPD, leaves.w2_EDH):
            torch._dynamo.mark_static_address(weight)
        layer = torch.compile(moefy_layer, fullgraph=True, mode="reduce-overhead")
        return lambda: layer(*leaves, shape.top_k, shape.gated)

    return differentiable(inputs, bind)


def build_dense(inputs: Inputs) -> BoundLayer:
    """The two products of the forward and the four of the backward, T*K rows through one expert's matrices.

    All operands are drawn beforehand: what a product reads has the same spread in every run (a GPU's clock depends on
    it). Decoding is bound by reading weights, not by products; there the ceiling reads all that are hit, in one batch.
    """
    if inputs.shape.decode:
        return _dense_decode(inputs)
    shape, w1_PD, w2_DH = inputs.shape, inputs.w1_EPD[0], inputs.w2_EDH[0]
    x_ND, dy_ND = _rows(inputs, shape.d_model), _rows(inputs, shape.d_model)
    dh_NP, a_NH = _rows(inputs, shape.entry_width), _rows(inputs, shape.d_hidden)

    def forward() -> Tensor:
        torch.mm(x_ND, w1_PD.t())
        return torch.mm(a_NH, w2_DH.t())

    def step() -> None:
        forward()
        torch.mm(dy_ND, w2_DH)
        torch.mm(dy_ND.t(), a_NH)
        torch.mm(dh_NP, w1_PD)
        torch.mm(dh_NP.t(), x_ND)

    return BoundLayer(forward=forward, step=step, answer=None, clear=lambda: None)


def _rows(inputs: Inputs, width: int) -> Tensor:
    return torch.randn(inputs.shape.rows, width, device=inputs.x_TD.device, dtype=inputs.x_TD.dtype)


def _dense_decode(inputs: Inputs) -> BoundLayer:
    shape, hit = inputs.shape, inputs.hit
    each = -(-shape.rows // hit)
    x_EMD = inputs.x_TD.new_empty(hit, each, shape.d_model).normal_()
    a_EMH = inputs.x_TD.new_empty(hit, each, shape.d_hidden).normal_()
    w1_EDP, w2_EHD = inputs.w1_EPD[:hit].transpose(1, 2), inputs.w2_EDH[:hit].transpose(1, 2)

    def forward() -> Tensor:
        torch.bmm(x_EMD, w1_EDP)
        return torch.bmm(a_EMH, w2_EHD)

    return BoundLayer(forward=forward, step=forward, answer=None, clear=lambda: None)


OWN: tuple[Provider, ...] = (
    Provider(name="moefy", build=from_function(moefy_layer)),
    Provider(name="moefy compiled", build=_build_compiled(moefy_layer)),
    Provider(name="moefy CUDA graph", build=build_graphed),
    Provider(name="grouped_mm+ compiled", build=_build_compiled(grouped_layer)),
    Provider(name="loop", build=from_function(expert_loop)),
    Provider(name="dense", build=build_dense),
)
