"""Tutel's experts: one module for all, from buffers ``[E, C, D]`` to ``[E, C, D_out]``.

Contract: the constructor takes ``model_dim``, ``num_experts_per_device``, ``sharded_count`` (1) and the experts' dict
without its ``type``; ``forward(x, ctx)`` gets the layer as ``ctx``. Parameters have Tutel's names, shapes and initial
distribution, drawn in its order.

    >>> FusedExpertsNetwork(16, 32, 4, 1)(torch.randn(4, 3, 16), None).shape
    torch.Size([4, 3, 16])
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefy.errors import ConfigError


class FusedExpertsNetwork(nn.Module):
    """``type: ffn``: ``act(x @ W1 + b1) @ W2 + b2``.

    Args:
        model_dim: D.
        hidden_size_per_expert: H.
        num_experts_per_device: E.
        sharded_count: 1.
        activation_fn: relu by default; a module is trained with the layer.
        activation_fn_with_self: the same with this module as second argument; one of the two.
        output_dim: D_out, by default D.
        has_fc1_bias: whether there is b1.
        has_fc2_bias: whether there is b2.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_size_per_expert: int,
        num_experts_per_device: int,
        sharded_count: int,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        activation_fn_with_self: Callable[[Tensor, nn.Module], Tensor] | None = None,
        output_dim: int | None = None,
        has_fc1_bias: bool = True,
        has_fc2_bias: bool = True,
    ) -> None:
        super().__init__()
        if activation_fn is not None and activation_fn_with_self is not None:
            raise ConfigError(
                "activation_fn", got=activation_fn, expected="None beside activation_fn_with_self"
            )
        self.skip_expert = os.environ.get("SKIP_EXPERT", "0") != "0"
        self.activation_fn = F.relu if activation_fn is None else activation_fn
        self.activation_fn_with_self = activation_fn_with_self
        self.output_dim = output_dim or model_dim
        experts, hidden = num_experts_per_device, hidden_size_per_expert
        self.batched_fc1_w = nn.Parameter(torch.empty(experts, hidden, model_dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(experts, hidden, self.output_dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(experts, hidden)) if has_fc1_bias else None
        self.batched_fc2_bias = nn.Parameter(torch.empty(experts, self.output_dim)) if has_fc2_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within ``1 / sqrt(fan in)``, expert by expert; biases zero."""
        for pair in zip(self.batched_fc1_w, self.batched_fc2_w, strict=True):
            for weight, fan_in in zip(
                pair, (self.batched_fc1_w.shape[2], self.batched_fc1_w.shape[1]), strict=True
            ):
                bound = 1 / math.sqrt(fan_in)
                draw = torch.rand(weight.shape, dtype=torch.float32, device=weight.device)
                weight.copy_(draw * (2 * bound) - bound)
        for bias in (self.batched_fc1_bias, self.batched_fc2_bias):
            if bias is not None:
                bias.zero_()

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        """``[E, C, D] -> [E, C, D_out]``."""
        if self.skip_expert:
            return x
        hidden = torch.matmul(x, self.batched_fc1_w.transpose(1, 2))
        if self.batched_fc1_bias is not None:
            hidden = hidden + self.batched_fc1_bias.unsqueeze(1)
        if self.activation_fn_with_self is not None:
            hidden = self.activation_fn_with_self(hidden, self)
        else:
            hidden = self.activation_fn(hidden)
        y = torch.matmul(hidden, self.batched_fc2_w)
        return y if self.batched_fc2_bias is None else y + self.batched_fc2_bias.unsqueeze(1)


class LlamaFFNNetwork(nn.Module):
    """``type: llama_ffn``: ``(act(x @ W1) * (x @ W2)) @ W3``.

    Args:
        model_dim: D.
        hidden_size_per_expert: H.
        num_experts_per_device: E.
        sharded_count: 1.
        activation_fn: silu by default.

    Parameters:
        ``W_fc1``, ``W_fc2`` and ``W_fc3``, flat, as Tutel stores them; N(0, 0.01^2).
    """

    def __init__(
        self,
        model_dim: int,
        hidden_size_per_expert: int,
        num_experts_per_device: int,
        sharded_count: int,
        activation_fn: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:
        super().__init__()
        entry = (num_experts_per_device, model_dim, hidden_size_per_expert)
        self.shapes = (entry, entry, (entry[0], entry[2], entry[1]))
        for name, shape in zip(("W_fc1", "W_fc2", "W_fc3"), self.shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(math.prod(shape))))
        self.activation_fn = activation_fn
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the three weights from N(0, 0.01^2)."""
        for weight in self._flat():
            nn.init.normal_(weight, 0, 0.01)

    def _flat(self) -> list[nn.Parameter]:
        return [self.get_parameter(name) for name in ("W_fc1", "W_fc2", "W_fc3")]

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        """``[E, C, D] -> [E, C, D]``."""
        w1, w2, w3 = (weight.view(shape) for weight, shape in zip(self._flat(), self.shapes, strict=True))
        return (self.activation_fn(x @ w1) * (x @ w2)) @ w3


EXPERTS: dict[str, type[nn.Module]] = {"ffn": FusedExpertsNetwork, "llama_ffn": LlamaFFNNetwork}
