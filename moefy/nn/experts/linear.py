"""``ExpertLinear``: E linears stacked in one parameter, ``weight [E, out, in]`` and ``bias [E, out]``.

Contract: it keeps the FQN of the linear it replaces with one dimension more, and the attributes that models read from a
linear (``weight.dtype``, ``bias``, ``in_features``, ``out_features``). It owns weights; layers compute with them.

    >>> ExpertLinear(4, 8, num_experts=3).weight.shape
    torch.Size([3, 8, 4])
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from moefy.config.fields import positive_int


class ExpertLinear(nn.Module):
    """E linears ``y = x @ weight[e].T + bias[e]`` as one module.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        num_experts: E.
        bias: whether the experts have biases.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ConfigError: for a size that is not an int of at least 1.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = positive_int("in_features", in_features)
        self.out_features = positive_int("out_features", out_features)
        self.num_experts = positive_int("num_experts", num_experts)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **like))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **like)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert as ``nn.Linear`` draws its weights (uniform, bound ``1 / sqrt(in_features)``)."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Raises ``NotImplementedError``: a linear of experts needs a routing."""
        raise NotImplementedError("ExpertLinear holds weights; call the MoE or the entry that owns it")

    def extra_repr(self) -> str:
        """Widths, number of experts and whether they have biases."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={self.num_experts}, bias={self.bias is not None}"
        )
