"""GShard: two experts per token; in training the second one is dropped at random (Lepikhin et al. 2020, algorithm 1).

T tokens, E experts.

    g = softmax over the 2 largest logits     the second is dropped if 2 * g2 < U(0, 1)     weights are not renormalised
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.nn.routers.base import Router, register_router
from moefy.nn.routing.routing import Choice


def random_second(choice: Choice, num_experts: int) -> Choice:
    """``choice`` with its second slots dropped where ``2 * g2 < U(0, 1)``."""
    weights_T2 = choice.weights
    drop_T = 2 * weights_T2[:, 1].detach() < torch.rand_like(weights_T2[:, 1])
    drop_T2 = torch.stack([torch.zeros_like(drop_T), drop_T], dim=1)
    return dataclasses.replace(
        choice,
        index=choice.index.masked_fill(drop_T2, num_experts),
        weights=weights_T2.masked_fill(drop_T2, 0.0),
    )


@register_router("gshard")
class GShardRouter(Router):
    """GShard's router. K is 2. GShard's limit per expert is a separate option, ``Capacity(rule="gshard")``.

    Args:
        random_routing: whether the second expert is dropped at random in training.
        options: of ``Router``.
    """

    formula: ClassVar[str] = "K = 2; the second dropped if 2 w2 < U[0, 1]"
    source: ClassVar[str] = "Lepikhin et al. 2020"
    only_top_k: ClassVar[int | None] = 2

    def __init__(
        self, d_model: int, num_experts: int, top_k: int = 2, *, random_routing: bool = True, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        self.random_routing = random_routing

    @property
    def sums_to_one(self) -> bool:
        """Whether no second expert is dropped; evaluation drops none."""
        return not self.random_routing

    def choose(self, logits_TE: Tensor, top_k: int) -> Choice:
        """The two best experts; in training the second one is dropped at random."""
        choice = super().choose(logits_TE, top_k)
        if not self.training or not self.random_routing:
            return choice
        return random_second(choice, self.num_experts)
