"""Topology-aware: few tokens leave their node, the others choose among its experts (FasterMoE, He et al. 2022).

T tokens, E experts in nodes of G, K top-k, f the outgoing fraction, S = floor(f * T).

    fewer than S tokens prefer an expert of another node:   K best, as usual
    else:   K best of the own node; the S tokens that prefer another node most (by their best logit) get that expert in
            their last slot
    w = softmax over the chosen logits

Contract: it changes the model, not only its speed. Which experts are near depends on ``node``, an argument. Both cases
are computed and one is selected on the device.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.config.fields import is_finite, is_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.scored import renormalized, top_k_index
from moefy.nn.routing.routing import Choice


def topology_index(
    logits_TE: Tensor, top_k: int, near_E: Tensor, outgoing: int, mask_T: Tensor | None = None
) -> Tensor:
    """``[T, K]``: the experts of each token when at most ``outgoing`` tokens leave.

    Args:
        logits_TE: the scores.
        top_k: K.
        near_E: bool, the experts of the own node, at least K.
        outgoing: how many tokens may leave.
        mask_T: the tokens that count.
    """
    best_TK = top_k_index(logits_TE, top_k)
    top1_T = best_TK[:, 0]
    leaves_T = ~near_E[top1_T]
    if mask_T is not None:
        leaves_T = leaves_T & mask_T
    eager_T = logits_TE.detach().gather(1, top1_T.unsqueeze(1)).squeeze(1)
    order_T = eager_T.masked_fill(~leaves_T, float("-inf")).argsort(descending=True, stable=True)
    place_T = torch.zeros_like(order_T).scatter(
        0, order_T, torch.arange(order_T.shape[0], device=order_T.device)
    )
    sent_T = leaves_T & (place_T < outgoing)
    near_TK = top_k_index(logits_TE.detach().masked_fill(~near_E, float("-inf")), top_k)
    last_T = torch.where(sent_T, top1_T, near_TK[:, -1])
    limited_TK = torch.cat([near_TK[:, :-1], last_T.unsqueeze(1)], dim=1)
    return torch.where(leaves_T.sum() < outgoing, best_TK, limited_TK)


@register_router("topology")
class TopologyRouter(Router):
    """FasterMoE's topology-aware gate, which has K=2.

    Args:
        experts_per_node: G; ``None`` is E, one node.
        outgoing_fraction: f, the share of tokens that may leave.
        node: which node this is; its experts are ``[node * G, (node + 1) * G)``. A rank of R experts is on node
            ``rank * R // G``.
        options: of ``Router``.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "top K of the own node, a share f of tokens may leave"
    source: ClassVar[str] = "FasterMoE"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        experts_per_node: int | None = None,
        outgoing_fraction: float = 0.14,
        node: int = 0,
        **options: Any,
    ) -> None:
        size = num_experts if experts_per_node is None else experts_per_node
        if not is_int(size, 1) or num_experts % size:
            raise ConfigError(
                "experts_per_node", got=size, expected=f"a divisor of num_experts = {num_experts}"
            )
        if not (is_int(node, 0) and node < num_experts // size):
            raise ConfigError("node", got=node, expected=f"0 <= node < {num_experts // size}")
        if not (is_finite(outgoing_fraction) and 0 <= outgoing_fraction <= 1):
            raise ConfigError("outgoing_fraction", got=outgoing_fraction, expected="0 <= fraction <= 1")
        self.experts_per_node = size
        super().__init__(d_model, num_experts, top_k, **options)
        self.outgoing_fraction, self.node = outgoing_fraction, node

    def check_top_k(self, top_k: int) -> None:
        """Raise ``ConfigError`` also when the own node has fewer than K experts."""
        super().check_top_k(top_k)
        if top_k > self.experts_per_node:
            expected = f"top_k <= experts_per_node = {self.experts_per_node}"
            raise ConfigError("top_k", got=top_k, expected=expected)

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The K best experts, limited to the own node for all but a few tokens."""
        logits_TE = self.logits(x, call.feature_dim)
        ids_E = torch.arange(self.num_experts, device=logits_TE.device)
        near_E = ids_E // self.experts_per_node == self.node
        outgoing = math.floor(logits_TE.shape[0] * self.outgoing_fraction)
        index_TK = topology_index(logits_TE, call.top_k, near_E, outgoing, call.mask)
        weights_TK = renormalized(logits_TE, index_TK)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE)
