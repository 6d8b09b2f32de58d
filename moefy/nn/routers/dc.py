"""DC: GShard's two experts under a limit per expert that counts all workers (FastMoE's distributed capacity gate).

T tokens of all workers, E experts, W workers.

    an expert keeps its first ceil(rate * T / W) slots, in the order of tokens; then as GShard

Contract: a slot that is dropped at random afterwards has taken its seat. FastMoE seats slots in the order in which its
atomics run, which differs from run to run; here the order is that of tokens and choices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from moefy.config import Capacity
from moefy.config.fields import is_finite, positive_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.gshard import GShardRouter, random_second
from moefy.nn.routing.capacity import queue_ranks, rule_capacity
from moefy.nn.routing.routing import Choice

_RULE = Capacity(rule="fastmoe_dc")


def limit_slots(choice: Choice, seats: int, num_experts: int) -> Choice:
    """``choice`` without the slots behind the first ``seats`` of their expert."""
    drop_TK = queue_ranks(choice.index, num_experts) >= seats
    return dataclasses.replace(
        choice,
        index=choice.index.masked_fill(drop_TK, num_experts),
        weights=choice.weights.masked_fill(drop_TK, 0.0),
    )


@register_router("dc")
class DCRouter(GShardRouter):
    """FastMoE's DCGate. K is 2.

    Args:
        rates: seats of an expert per token of one worker, in training and in evaluation.
        num_workers: W, over whose tokens T counts.
        options: of ``GShardRouter``.

    Raises:
        ConfigError: for rates that are not positive, or no worker.
    """

    formula: ClassVar[str] = "gshard, an expert taking ceil(rate * T / W) slots"
    source: ClassVar[str] = "FastMoE"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 2,
        *,
        rates: tuple[float, float] = (1.2, 2.4),
        num_workers: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        pair = isinstance(rates, tuple | list) and len(rates) == 2
        if not (pair and all(is_finite(rate) and rate > 0 for rate in rates)):
            raise ConfigError("rates", got=rates, expected="two numbers > 0, for training and evaluation")
        self.rates, self.num_workers = tuple(rates), positive_int("num_workers", num_workers)

    @property
    def sums_to_one(self) -> bool:
        """Whether every expert has a seat for every token and no second expert is dropped at random."""
        return min(self.rates) >= self.num_workers and not self.random_routing

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The two best experts, limited to the seats; in training the second is dropped at random after that."""
        choice = Router.choose(self, self.logits(x, call.feature_dim), call.top_k)
        if call.mask is not None:
            choice = choice.masked(call.mask, self.num_experts)
        rate = self.rates[0] if self.training else self.rates[1]
        own_tokens = -(-choice.index.shape[0] // self.num_workers)
        seats = rule_capacity(_RULE, rate, own_tokens, call.top_k, self.num_experts)
        choice = limit_slots(choice, seats, self.num_experts)
        if not self.training or not self.random_routing:
            return choice
        return random_second(choice, self.num_experts)
