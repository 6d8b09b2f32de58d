"""Tutel's gates: modules from tokens ``[T, D]`` to logits ``[T, E]``, with their ``top_k``.

Contract: the constructor takes ``model_dim``, ``num_global_experts`` and the gate's dict without its ``type``;
parameters have Tutel's names and initial distribution.

    >>> LinearTopKGate(16, 8, k=2)(torch.randn(5, 16)).shape
    torch.Size([5, 8])
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefy.errors import UnknownOption

LAYER_OPTIONS = ("capacity_factor", "gate_noise")
"""Options in a gate's dict that the layer reads."""


class LinearTopKGate(nn.Module):
    """``type: top``: a linear without bias.

    Args:
        model_dim: D.
        num_global_experts: E.
        k: K, cut to E.
        fp32_gate: whether it computes in fp32.
        options: ``LAYER_OPTIONS``, which the layer reads.
    """

    def __init__(
        self, model_dim: int, num_global_experts: int, k: int = 1, fp32_gate: bool = False, **options: Any
    ) -> None:
        super().__init__()
        check_options(options, ("k", "fp32_gate"))
        dtype = torch.float32 if fp32_gate else None
        self.wg = nn.Linear(model_dim, num_global_experts, bias=False, dtype=dtype)
        self.top_k, self.fp32_gate = min(num_global_experts, int(k)), fp32_gate

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D] -> [T, E]``, the logits."""
        weight = self.wg.weight.float() if self.fp32_gate else self.wg.weight
        return F.linear(x.to(weight.dtype), weight)


class CosineTopKGate(nn.Module):
    """``type: cosine_top``: cosine of a projection and a column per expert, times ``exp(min(tau, ln 100))``.

    Args:
        model_dim: D.
        num_global_experts: E.
        k: K, cut to E.
        fp32_gate: whether it computes in fp32.
        proj_dim: width of the projection.
        init_t: initial temperature; ``tau = ln(1 / init_t)`` is learnt.
        options: ``LAYER_OPTIONS``, which the layer reads.
    """

    def __init__(
        self,
        model_dim: int,
        num_global_experts: int,
        k: int = 1,
        fp32_gate: bool = False,
        proj_dim: int = 256,
        init_t: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__()
        check_options(options, ("k", "fp32_gate", "proj_dim", "init_t"))
        self.top_k, self.fp32_gate = min(num_global_experts, int(k)), fp32_gate
        self.temperature = nn.Parameter(torch.log(torch.full([1], 1.0 / init_t)))
        self.cosine_projector = nn.Linear(model_dim, proj_dim)
        self.sim_matrix = nn.Parameter(torch.randn(proj_dim, num_global_experts))
        nn.init.normal_(self.sim_matrix, 0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, D] -> [T, E]``, the logits."""
        values = (x, self.cosine_projector.weight, self.cosine_projector.bias, self.sim_matrix)
        x, weight, bias, columns = (v.float() if self.fp32_gate else v for v in values)
        cosine_TE = F.normalize(F.linear(x, weight, bias), dim=1) @ F.normalize(columns, dim=0)
        return cosine_TE * self.temperature.clamp(max=math.log(100.0)).exp()


GATES: dict[str, type[nn.Module]] = {"top": LinearTopKGate, "cosine_top": CosineTopKGate}


def check_options(options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise ``UnknownOption`` for an option that neither the gate nor the layer reads."""
    for name in options:
        if name not in LAYER_OPTIONS:
            raise UnknownOption(name, (*known, *LAYER_OPTIONS), where="tutel gate")
