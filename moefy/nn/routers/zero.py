"""Zero: everything to expert 0, the worst load there is (FastMoE's ZeroGate). A load generator for tests and benches.

    index = 0, w = 1 / K for all K slots

It has no parameters. Its logits are constants, 0 for expert 0 and -inf for the others, whose softmax is all expert 0.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.nn.routers.base import Router, register_router
from moefy.nn.routing.layout import TokenLayout
from moefy.nn.routing.routing import Choice


@register_router("zero")
class ZeroRouter(Router):
    """Everything to expert 0.

    Args:
        top_k: K, all of whose slots go to expert 0.
        options: of ``Router``; they initialise nothing here.
    """

    formula: ClassVar[str] = "c = 0 for all K slots;  w = 1 / K"
    source: ClassVar[str] = "FastMoE"

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create no parameters."""
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """There is nothing to draw."""

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """``[T, E]`` constants: 0 for expert 0, -inf for the others."""
        tokens = TokenLayout.of(x, feature_dim).num_tokens
        dtype = torch.promote_types(x.dtype, torch.float32)
        ids_E = torch.arange(self.num_experts, device=x.device)
        logits_E = torch.zeros_like(ids_E, dtype=dtype).masked_fill(ids_E > 0, float("-inf"))
        return logits_E.expand(tokens, self.num_experts)

    def choose(self, logits_TE: Tensor, top_k: int) -> Choice:
        """Expert 0 in all K slots, with equal weights."""
        shape = (logits_TE.shape[0], top_k)
        index_TK = torch.zeros(shape, dtype=torch.int64, device=logits_TE.device)
        return Choice(index=index_TK, weights=logits_TE.new_full(shape, 1 / top_k), logits=logits_TE)
