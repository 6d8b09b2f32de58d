"""The third-party providers of ``moefy bench layer``. Each is imported when its layer is built, never before.

T tokens, D model width, H expert hidden width, E experts, K top-k; P = 2H with a gate, else H.

Contract: each peer runs through the functions that its own MoE block calls, given the routing weights and ids of
``choose`` (sonic-moe: given the logits), with the autotuning it ships with. What a peer cannot do by design raises
``Unsupported``; an interface that has changed since raises whatever it raises. Both become a row that says so.

Seen to run: sonic-moe 0.1.2.post1, ScatterMoE 0.3.0, Liger 0.8.5, transformers 5.17 (H100, torch 2.11).

    >>> [peer.package for peer in PEERS]
    ['sonicmoe', 'scattermoe', 'liger_kernel', 'transformers']
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moefy.bench.layer.contract import (
    BoundLayer,
    Leaves,
    Provider,
    Unsupported,
    activate,
    choose,
    differentiable,
)
from moefy.bench.layer.shapes import Inputs, Shape


def _require(inputs: Inputs, *, gated: bool = False) -> None:
    if not inputs.x_TD.is_cuda:
        raise Unsupported("runs on CUDA only")
    if gated and not inputs.shape.gated:
        raise Unsupported("GLU activations only")


def build_sonic(inputs: Inputs) -> BoundLayer:
    """sonic-moe. Its W1 has the gate's and the up projection's rows in turn."""
    _require(inputs, gated=True)
    return differentiable(inputs, _bind_sonic, pack=interleave, unpack=deinterleave)


def interleave(w_EPD: Tensor) -> Tensor:
    """Rows g0 g1 .. u0 u1 .. to g0 u0 g1 u1 .."""
    num_experts, width, d_model = w_EPD.shape
    halves = w_EPD.view(num_experts, 2, width // 2, d_model)
    return halves.transpose(1, 2).reshape(num_experts, width, d_model)


def deinterleave(w_EPD: Tensor) -> Tensor:
    """The inverse of ``interleave``."""
    num_experts, width, d_model = w_EPD.shape
    pairs = w_EPD.reshape(num_experts, width // 2, 2, d_model)
    return pairs.transpose(1, 2).reshape(num_experts, width, d_model)


def _bind_sonic(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
    sonic = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    experts, top_k, rows = shape.num_experts, shape.top_k, shape.rows

    def ints(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=leaves.x_TD.device)

    def forward() -> Tensor:
        scores_TK, index_TK = sonic.TC_Softmax_Topk_Router_Function.apply(
            leaves.logits_TE, experts, top_k, True, False
        )
        counts_E, starts, gather = ints(experts), ints(experts + 1), ints(rows)
        scatter, inverse = ints(rows), ints(rows)
        sonic.TC_topk_router_metadata_triton(index_TK, experts, counts_E, starts, gather, scatter, inverse)
        routing = (gather, scatter, inverse, None, False, swiglu)
        hidden, before = sonic._UpProjection.apply(
            leaves.x_TD, leaves.w1_EPD.permute(1, 2, 0), None, starts, rows, top_k,
            *routing, not torch.is_grad_enabled(), False,
        )  # fmt: skip
        return sonic._DownProjection.apply(
            hidden, before, leaves.w2_EDH.permute(1, 2, 0), None, scores_TK, starts, shape.tokens, top_k, *routing
        )  # fmt: skip

    return forward


def build_scatter(inputs: Inputs) -> BoundLayer:
    """ScatterMoE: its two grouped products, torch's activation between them."""
    _require(inputs)
    return differentiable(inputs, _bind_scatter)


def _bind_scatter(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
    scatter = importlib.import_module("scattermoe.parallel_experts")

    def forward() -> Tensor:
        weights_TK, index_TK = choose(leaves.logits_TE, shape.top_k)
        routing = scatter.flatten_sort_count(index_TK, num_experts=shape.num_experts)
        entry, exit_ = leaves.w1_EPD.transpose(1, 2), leaves.w2_EDH.transpose(1, 2)
        rows_NP = scatter.parallel_linear(leaves.x_TD, entry, shape.top_k, *routing, grouped_out=True)
        hidden_NH = activate(rows_NP, shape.gated)
        gates_TK = weights_TK.to(hidden_NH.dtype)
        return scatter.parallel_linear(hidden_NH, exit_, 1, *routing, grouped_in=True, gates=gates_TK)

    return forward


def build_liger(inputs: Inputs) -> BoundLayer:
    """Liger's fused MoE."""
    _require(inputs, gated=True)
    return differentiable(inputs, _bind_liger)


def _bind_liger(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
    fused = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def forward() -> Tensor:
        weights_TK, index_TK = choose(leaves.logits_TE, shape.top_k)
        return fused.apply(leaves.x_TD, leaves.w1_EPD, leaves.w2_EDH, index_TK.int(), weights_TK)

    return forward


def build_transformers(inputs: Inputs) -> BoundLayer:
    """The experts module of transformers' Mixtral and its like, in the ``grouped_mm`` implementation."""
    return differentiable(inputs, _bind_transformers)


def _bind_transformers(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
    experts: Any = _experts_class(shape)(types.SimpleNamespace(_experts_implementation="grouped_mm"))
    setattr(experts, "gate_up_proj" if shape.gated else "up_proj", leaves.w1_EPD)
    experts.down_proj = leaves.w2_EDH

    def forward() -> Tensor:
        weights_TK, index_TK = choose(leaves.logits_TE, shape.top_k)
        return experts(leaves.x_TD, index_TK, weights_TK.to(leaves.x_TD.dtype))

    return forward


def _experts_class(shape: Shape) -> type[nn.Module]:
    moe = importlib.import_module("transformers.integrations.moe")

    class Experts(nn.Module):
        """What the decorator needs of an experts module: sizes, an activation, a forward to replace."""

        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts = shape.num_experts
            self.hidden_dim = shape.d_model
            self.intermediate_dim = shape.d_hidden

        def act_fn(self, rows_NH: Tensor) -> Tensor:
            """The activation without its gate, which the decorator adds."""
            return nn.functional.silu(rows_NH) if shape.gated else activate(rows_NH, gated=False)

        def forward(self, *args: Tensor) -> Tensor:
            """Replaced by the decorator."""
            raise RuntimeError("transformers did not replace the experts' forward")

    return moe.use_experts_implementation(Experts, has_gate=shape.gated)


PEERS: tuple[Provider, ...] = (
    Provider(name="sonic-moe", build=build_sonic, package="sonicmoe"),
    Provider(name="scattermoe", build=build_scatter, package="scattermoe"),
    Provider(name="liger", build=build_liger, package="liger_kernel"),
    Provider(name="transformers", build=build_transformers, package="transformers"),
)
