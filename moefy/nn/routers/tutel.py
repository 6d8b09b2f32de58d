"""Tutel's top gate: noise on the logits, a softmax over all experts, the K best divided by their sum.

T tokens, E experts, K top-k.

    s = softmax(logits + gate_noise * N(0, 1) / E)     w = s[chosen], for K > 1 divided by their sum

Contract: with noise, in training, ``Choice.losses["load_importance"]`` holds Tutel's load-importance loss
(``moefy.nn.losses.load_importance``): with every term in logits, or with ``mixed_units`` in the units of the original.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn import losses
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.scored import top_k_index
from moefy.nn.routing.routing import Choice


@register_router("tutel_top")
class TutelTopRouter(Router):
    """Tutel's ``top`` gate.

    Args:
        gate_noise: the standard deviation of the noise in training, times E; 0 is none.
        normalize_gate: divide the weights by their sum where K > 1.
        mixed_units: take the load loss as Tutel does, from clean probabilities and noisy logits.
        options: of ``Router``.

    Raises:
        ConfigError: for negative noise.
    """

    formula: ClassVar[str] = "s of l + noise * N / E;  w = s[c] / sum"
    source: ClassVar[str] = "Tutel"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        gate_noise: float = 0.0,
        normalize_gate: bool = True,
        mixed_units: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not (is_finite(gate_noise) and gate_noise >= 0):
            raise ConfigError("gate_noise", got=gate_noise, expected="a finite number >= 0")
        self.gate_noise, self.normalize_gate, self.mixed_units = gate_noise, normalize_gate, mixed_units

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights are divided by their sum, which takes two of them."""
        return self.normalize_gate and self.top_k > 1

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The K best scores; in training they are noisy, and the loss is computed too."""
        clean_TE = self.logits(x, call.feature_dim)
        if not self.training or self.gate_noise == 0:
            return self.choose(clean_TE, call.top_k)
        std = self.gate_noise / self.num_experts
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std
        choice = self.choose(noisy_TE, call.top_k)
        loss = losses.tutel_load_importance if self.mixed_units else losses.load_importance
        value = loss(clean_TE, noisy_TE, choice.index, std, mask_T=call.mask)
        choice.losses = {"load_importance": value}
        return choice

    def choose(self, logits_TE: Tensor, top_k: int) -> Choice:
        """The K best of a softmax over all experts."""
        if self.normalize_gate and top_k > 1:  # the same number as the softmax over the chosen
            return super().choose(logits_TE, top_k)
        scores_TE = torch.softmax(logits_TE, dim=-1)
        index_TK = top_k_index(logits_TE, top_k)
        weights_TK = scores_TE.gather(1, index_TK)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE, scores=scores_TE)
