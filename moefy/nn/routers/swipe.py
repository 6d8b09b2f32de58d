"""Swipe: every worker gets exactly the same number of tokens (FastMoE's SwipeGate, after BaGuaLu, Ma et al. 2022).

T tokens of all workers, E experts, W workers of E / W experts each, K top-k.

    round k: every token asks the worker of its k-th best expert. A worker takes them in the order of tokens until its
    quota is gone, which is its share of T * K at first and carries over to later rounds. The others fill, in order, the
    workers with quota left, and land on their expert number k mod (E / W).
    w = softmax over the logits of the experts that the token ends up with

Contract: the reference of the algorithm, for all workers in one process: tokens are in the order of the ranks. Only
training swipes; evaluation is plain top-k. A token may get the same expert twice.

    >>> swipe_round(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 2]), experts_per_worker=1, landing=0)
    (tensor([0, 0, 1, 1]), tensor([0, 0]))
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.config.fields import is_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.scored import renormalized, top_k_index
from moefy.nn.routing.routing import Choice


def swipe_round(
    index_T: Tensor, quota_W: Tensor, experts_per_worker: int, landing: int, mask_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One round: ``(new index_T, quota left)``.

    Args:
        index_T: the expert that each token asks for.
        quota_W: how many tokens each worker still takes.
        experts_per_worker: E / W.
        landing: on which of its experts a worker puts the tokens that did not ask for it.
        mask_T: the tokens that count.
    """
    workers_W = torch.arange(quota_W.shape[0], device=index_T.device)
    asks_TW = (index_T // experts_per_worker).unsqueeze(1) == workers_W
    if mask_T is not None:
        asks_TW = asks_TW & mask_T.unsqueeze(1)
    place_TW = asks_TW.long().cumsum(0)
    taken_TW = asks_TW & (place_TW <= quota_W)
    left_W = quota_W - taken_TW.sum(0)
    rejected_T = asks_TW.any(1) & ~taken_TW.any(1)
    number_T = rejected_T.long().cumsum(0) - 1
    worker_T = torch.searchsorted(left_W.cumsum(0), number_T.clamp(min=0), right=True)
    moved_T = worker_T.clamp(max=quota_W.shape[0] - 1) * experts_per_worker + landing
    filled_W = (rejected_T.unsqueeze(1) & (worker_T.unsqueeze(1) == workers_W)).sum(0)
    return torch.where(rejected_T, moved_T, index_T), left_W - filled_W


def worker_quota(tokens: Tensor, num_workers: int, top_k: int) -> Tensor:
    """``[W]`` int64: K times the tokens of each worker, the first ones having one more where they do not divide."""
    workers_W = torch.arange(num_workers, device=tokens.device)
    return (tokens // num_workers + (workers_W < tokens % num_workers)) * top_k


@register_router("swipe")
class SwipeRouter(Router):
    """FastMoE's SwipeGate.

    Args:
        num_workers: W, a divisor of E.
        options: of ``Router``.

    Raises:
        ConfigError: for a number of workers that does not divide E.
    """

    formula: ClassVar[str] = "top K, moved until all workers have equally many"
    source: ClassVar[str] = "FastMoE, BaGuaLu"

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, num_workers: int = 1, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not is_int(num_workers, 1) or num_experts % num_workers:
            expected = f"a divisor of num_experts = {num_experts}"
            raise ConfigError("num_workers", got=num_workers, expected=expected)
        self.num_workers = num_workers

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The K best experts, in training moved until the workers are balanced."""
        logits_TE = self.logits(x, call.feature_dim)
        if not self.training:
            return self.choose(logits_TE, call.top_k)
        index_TK = self.balanced(top_k_index(logits_TE, call.top_k), call.mask)
        weights_TK = renormalized(logits_TE, index_TK)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE)

    def balanced(self, index_TK: Tensor, mask_T: Tensor | None = None) -> Tensor:
        """``[T, K]``: ``index_TK`` after K rounds, when every worker has its share."""
        tokens, top_k = index_TK.shape
        device = index_TK.device
        count = torch.full((), tokens, device=device) if mask_T is None else mask_T.sum()
        quota_W = worker_quota(count, self.num_workers, top_k)
        experts_per_worker = self.num_experts // self.num_workers
        rounds = []
        for k in range(top_k):
            index_T, quota_W = swipe_round(
                index_TK[:, k], quota_W, experts_per_worker, k % experts_per_worker, mask_T
            )
            rounds.append(index_T)
        return torch.stack(rounds, dim=1)
