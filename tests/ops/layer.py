"""A small routed layer out of moefy's ops, as a function of tensors, for the tests of compile, export and autocast.

>>> out_TD = routed(x_TD, *parameters(), fused=True)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefy import ops
from moefy.ops.library import autocast_off

D, H, E, K = 6, 8, 4, 2


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Router, gate, up, down weights and a bias, all requiring grad."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((E, D), (E, H, D), (E, H, D), (E, H), (E, D, H))
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [m.to(device, dtype).requires_grad_() for m in made]


def tokens(count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(count)
    x_TD = torch.randn(count, D, generator=generator, dtype=torch.float64)
    return x_TD.to(device, dtype).requires_grad_()


def routed(
    x_TD: Tensor,
    router_ED: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_up: Tensor,
    w_down: Tensor,
    *,
    fused: bool,
) -> Tensor:
    with autocast_off(x_TD.device.type):
        wide = torch.float64 if x_TD.dtype is torch.float64 else torch.float32
        weights_TK, index_TK = (x_TD.to(wide) @ router_ED.to(wide).t()).softmax(-1).topk(K)
    order_N, offsets_E = ops.sort_by_expert(index_TK, E)
    if fused:
        return ops.expert_ffn(
            x_TD, weights_TK, order_N, offsets_E, w_up, b_up, w_down, None,
            w_gate=w_gate, activation="silu", glu="separate",
        )  # fmt: skip
    rows_ND = ops.permute(x_TD, order_N, K)
    gate_NH = ops.grouped_linear(rows_ND, w_gate, None, offsets_E)
    hidden_NH = F.silu(gate_NH) * ops.grouped_linear(rows_ND, w_up, b_up, offsets_E)
    y_ND = ops.grouped_linear(hidden_NH, w_down, None, offsets_E)
    return ops.combine(y_ND, weights_TK, order_N)


def results(function, x_TD: Tensor, weights: list[Tensor], autocast: torch.dtype | None = None, **options):
    """Output and all gradients, the output's gradient being stride-0 as ``sum()`` makes it.

    Autocast covers the forward only, as in a training loop: torch's own matmul backwards would be cast by it too.
    """
    with torch.autocast(x_TD.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        out = function(x_TD, *weights, **options)
    return [out.detach(), *torch.autograd.grad(out.float().sum(), [x_TD, *weights])]
