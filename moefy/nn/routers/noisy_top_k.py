"""Noisy top-k: learnable noise on the logits, and two losses that balance the experts (Shazeer et al. 2017).

T tokens, E experts, K top-k.

    H = x @ W_g + N(0, 1) * (softplus(x @ W_n) + epsilon)      w = softmax(the K largest of H)       (equations 3 to 5)

Contract: in training ``Choice.losses`` holds "importance" (equations 6 and 7) and "load" (equations 8 to 11), without a
weight. In evaluation there is no noise and no loss: the load is defined by the noise alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn import losses
from moefy.nn.routers.base import Call, Router, register_router, router_logits
from moefy.nn.routing.routing import Choice


@register_router("noisy_top_k")
class NoisyTopKRouter(Router):
    """Shazeer's router, FastMoE's NoisyGate.

    Args:
        noise_epsilon: the least standard deviation of the noise; 0.01 in the authors' code and in FastMoE.
        options: of ``Router``.

    Parameters:
        ``weight [E, D]``, W_g; ``noise_weight [E, D]``, W_n, zero at first as in the paper's appendix A.

    Raises:
        ConfigError: for an epsilon that is not positive, which the load divides by.
    """

    formula: ClassVar[str] = "l + N * (softplus(x W_n) + eps);  w = softmax(l[c])"
    source: ClassVar[str] = "Shazeer et al. 2017"

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, noise_epsilon: float = 1e-2, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not (is_finite(noise_epsilon) and noise_epsilon > 0):
            raise ConfigError("noise_epsilon", got=noise_epsilon, expected="a finite number > 0")
        self.noise_epsilon = noise_epsilon

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create the matrix of the logits and that of the noise."""
        super().make_parameters(bias, **like)
        self.noise_weight = nn.Parameter(torch.empty(self.num_experts, self.d_model, **like))

    def reset_parameters(self) -> None:
        """Draw ``weight``, and set ``noise_weight`` to zero."""
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def noise_std(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """``[T, E]``: the standard deviation of each logit's noise."""
        return F.softplus(router_logits(x, self.noise_weight, feature_dim)) + self.noise_epsilon

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The K best logits, noisy in training, where the two losses are computed too."""
        clean_TE = self.logits(x, call.feature_dim)
        if not self.training:
            return self.choose(clean_TE, call.top_k)
        std_TE = self.noise_std(x, call.feature_dim)
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        choice = self.choose(noisy_TE, call.top_k)
        importance = losses.sparse_importance(
            choice.weights, choice.index, self.num_experts, mask_T=call.mask
        )
        load = losses.smooth_load(clean_TE, noisy_TE, std_TE, call.top_k, mask_T=call.mask)
        choice.losses = {"importance": importance, "load": load}
        return choice
