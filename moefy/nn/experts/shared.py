"""Shared experts: a dense FFN beside the routed ones, which every token passes.

Contract: S shared experts of width H are one FFN of width S * H, since their outputs are summed (DeepSeekMoE, Dai et
al. 2024, section 3.2). ``y = experts(x) + shared(x)``, or ``+ sigmoid(shared_gate(x)) * shared(x)`` with a gate, one
number per token (Qwen2-MoE: Yang et al. 2024).

    >>> DenseFFN(16, 128, 16, activation="silu", glu=True, bias=False)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from moefy.nn.experts.activation import Activation, body_of


class DenseFFN(nn.Module):
    """``down(act(up(x)))``, with ``glu`` ``down(act(gate(x)) * up(x))``.

    Args:
        d_model: D.
        d_hidden: its hidden width, summed over all shared experts.
        d_out: width of its output.
        activation: as for ``MoE``; a module is copied, so that it has parameters of its own.
        glu: whether it is gated.
        bias: whether its linears have biases.
        device: where the parameters live.
        dtype: their dtype.

    Parameters:
        ``gate_proj``, ``up_proj``, ``down_proj``: ``nn.Linear``.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        d_out: int,
        *,
        activation: Activation,
        glu: bool,
        bias: bool,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.names = ("gate_proj", "up_proj") if glu else ("up_proj",)
        for name in self.names:
            self.add_module(name, nn.Linear(d_model, d_hidden, bias, device=device, dtype=dtype))
        self.down_proj = nn.Linear(d_hidden, d_out, bias, device=device, dtype=dtype)
        own = copy.deepcopy(activation) if isinstance(activation, nn.Module) else activation
        self.body, module = body_of(own, glu)
        if module is not None:
            self.activation = module

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., d_out]``, every token through the whole FFN."""
        return self.down_proj(self.body(self, *(self.get_submodule(name)(x) for name in self.names)))


def shared_output(shared: nn.Module, gate: nn.Module | None, x: Tensor) -> Tensor:
    """``[..., d_out]``: the shared experts' share of the layer's output for ``x``."""
    return shared(x) if gate is None else torch.sigmoid(gate(x)) * shared(x)
