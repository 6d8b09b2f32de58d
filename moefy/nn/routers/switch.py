"""Switch: one expert per token, weighted by its share of the softmax over all (Fedus et al. 2022, section 2.2).

D width, E experts.

    s = softmax(W @ (x * u)),  u ~ U[1 - jitter, 1 + jitter] per element, in training     e = argmax s     w = s[e]

FastMoE's gate adds the noise to the logits instead (``noise="fastmoe"``). There its mean of 1 falls out of the softmax.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn.routers.base import register_router
from moefy.nn.routers.scored import ScoreTopK

Noise = Literal["input", "fastmoe"]


def uniform_around_one(like: Tensor, jitter: float) -> Tensor:
    """U[1 - jitter, 1 + jitter] in the shape of ``like``, in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.rand_like(like, dtype=dtype) * (2 * jitter) + (1 - jitter)


@register_router("switch")
class SwitchRouter(ScoreTopK):
    """Switch Transformer's router. K is 1.

    Args:
        jitter: half the width of the noise in training; 0 is none. The paper has 0.01, FastMoE 0.1.
        noise: "input" multiplies the router's input, "fastmoe" is added to the logits.
        options: of ``ScoreTopK``.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "l of x * U[1 - j, 1 + j];  K = 1;  w = s[c]"
    source: ClassVar[str] = "Fedus et al. 2022"
    only_top_k: ClassVar[int | None] = 1

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        jitter: float = 0.01,
        noise: Noise = "input",
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not (is_finite(jitter) and 0 <= jitter < 1):
            raise ConfigError("jitter", got=jitter, expected="0 <= jitter < 1")
        if noise not in get_args(Noise):
            raise ConfigError("noise", got=noise, expected=f"one of {get_args(Noise)}")
        self.jitter, self.noise = jitter, noise

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """``[T, E]`` scores, with the noise in training."""
        if not self.training or self.jitter == 0:
            return super().logits(x, feature_dim)
        if self.noise == "input":
            return super().logits(x * uniform_around_one(x, self.jitter), feature_dim)
        logits_TE = super().logits(x, feature_dim)
        return logits_TE + uniform_around_one(logits_TE, self.jitter)
