"""Cosine: the angle between a projected token and each expert's direction, over a learnable temperature (Tutel).

T tokens, D width, E experts, P projection width.

    logits = cos(projection(x), weight_e) * exp(min(tau, ln 100)),  tau = ln(1 / init_t) at first

X-MoE (Chi et al. 2022, equation 5) with Tutel's temperature, Swin V2's (Liu et al. 2022). Behind the logits it is
Tutel's top gate.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefy.config.fields import is_finite, positive_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import register_router, router_init_, router_logits
from moefy.nn.routers.tutel import TutelTopRouter

MAX_TAU = math.log(100.0)


def cosine_logits(projected_TP: Tensor, weight_EP: Tensor, tau: Tensor) -> Tensor:
    """``[T, E]`` in the dtype of ``projected_TP``: the cosines times ``exp(min(tau, ln 100))``."""
    dtype = projected_TP.dtype
    directions_EP = F.normalize(weight_EP.to(dtype), dim=1)
    cosine_TE = router_logits(F.normalize(projected_TP, dim=1), directions_EP)
    return cosine_TE * tau.to(dtype).clamp(max=MAX_TAU).exp()


@register_router("cosine")
class CosineRouter(TutelTopRouter):
    """Tutel's ``cosine_top`` gate.

    Args:
        proj_dim: P.
        init_t: the temperature at first.
        options: of ``TutelTopRouter``; ``bias`` is added to the logits.

    Parameters:
        ``projection_weight [P, D]``, ``projection_bias [P]``, ``weight [E, P]`` and ``tau [1]``.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "l = cos(P x, W_e) * exp(min(tau, ln 100)); tutel_top"
    source: ClassVar[str] = "Tutel, X-MoE"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        proj_dim: int = 256,
        init_t: float = 0.5,
        **options: Any,
    ) -> None:
        self.proj_dim = positive_int("proj_dim", proj_dim)
        if not (is_finite(init_t) and init_t > 0):
            raise ConfigError("init_t", got=init_t, expected="a finite number > 0")
        self.init_t = init_t
        super().__init__(d_model, num_experts, top_k, **options)

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create the projection, the experts' directions and the temperature."""
        self.projection_weight = nn.Parameter(torch.empty(self.proj_dim, self.d_model, **like))
        self.projection_bias = nn.Parameter(torch.empty(self.proj_dim, **like))
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.proj_dim, **like))
        self.bias = nn.Parameter(torch.empty(self.num_experts, **like)) if bias else None
        self.tau = nn.Parameter(torch.empty(1, **like))

    def reset_parameters(self) -> None:
        """Draw the directions; the projection has the variance of ``nn.Linear``'s."""
        super().reset_parameters()
        std = (3 * self.d_model) ** -0.5
        router_init_(self.projection_weight, self.seed, f"{self.fqn}:projection", std)
        nn.init.zeros_(self.projection_bias)
        nn.init.constant_(self.tau, math.log(1 / self.init_t))

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """``[T, E]`` cosines between projected tokens and directions, over the temperature."""
        projected_TP = router_logits(x, self.projection_weight, feature_dim)
        projected_TP = projected_TP + self.projection_bias.to(projected_TP.dtype)
        logits_TE = cosine_logits(projected_TP, self.weight, self.tau)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)
