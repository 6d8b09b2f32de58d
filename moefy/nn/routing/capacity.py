"""Capacity: how many tokens an expert takes, and which slots lose their seat when more come.

Contract: every expert has a queue of its slots. The first ``expert_capacity`` of a queue keep their seats; the others
get the id E and the weight 0, which the ops read as "dropped". Shapes do not depend on the data, nothing waits for the
device, and nothing larger than ``[T, K]`` is made.

Worked example, three tokens to expert 0 of 2, K=1, a capacity of 2: the first two stay.

    >>> queue_ranks(torch.tensor([[0], [0], [0]]), 2).T
    tensor([[0, 1, 2]])

Shape letters: T tokens, E experts, K top-k, N = T*K slots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moefy import ops
from moefy.config import CAPACITY_RULES, Capacity
from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn.routing.routing import Choice

DEFAULT_CAPACITY = Capacity()
"""What a call's capacity factor means to a router without a capacity of its own."""


@dataclasses.dataclass(eq=False)
class Seats:
    """Who kept a seat.

    Attributes:
        index: ``[T, K]`` int64, E for a slot that lost.
        weights: ``[T, K]``, 0 for a slot that lost.
        capacity: the seats of each expert; a 0-dim int64 tensor where it depends on the need.
        stranded: ``[T]`` bool, the tokens that had a slot and lost all; ``None`` unless ``Capacity.residual``.
    """

    index: Tensor
    weights: Tensor
    capacity: int | Tensor
    stranded: Tensor | None


def seat(
    choice: Choice,
    capacity: Capacity,
    num_experts: int,
    top_k: int,
    *,
    training: bool,
    factor: float | None = None,
) -> Seats:
    """Seat the slots of ``choice``.

    Args:
        choice: the router's; slots with an id outside ``[0, E)`` take no seat.
        capacity: how.
        num_experts: E.
        top_k: K of the formulas. A router whose tokens have any number of experts has more slots than that.
        training: takes ``capacity.factor``, else ``capacity.eval_factor``.
        factor: this factor instead; 0 is a factor like any other.

    T counts masked tokens too, since the number of the others is on the device: padding leaves seats empty.

    Raises:
        ConfigError: for a factor that is not finite.
    """
    factor = call_factor(capacity, training) if factor is None else factor
    if not is_finite(factor):
        raise ConfigError("capacity_factor", got=factor, expected="a finite number")
    index_TK = choice.index
    seats = expert_capacity(index_TK, num_experts, top_k, capacity, factor)
    valid_TK = (index_TK >= 0) & (index_TK < num_experts)
    keep_TK = valid_TK
    if factor != 0:  # with the need as the capacity everybody is seated
        keep_TK = valid_TK & (slot_ranks(choice, capacity, num_experts, training=training) < seats)
    weights_TK = kept_weights(choice.weights, keep_TK, capacity.renormalize)
    stranded_T = valid_TK.any(1) & ~keep_TK.any(1) if capacity.residual else None
    return Seats(index_TK.masked_fill(~keep_TK, num_experts), weights_TK, seats, stranded_T)


def call_factor(capacity: Capacity, training: bool) -> float:
    """The factor of this mode."""
    return capacity.factor if training or capacity.eval_factor is None else capacity.eval_factor


def expert_capacity(
    index_TK: Tensor, num_experts: int, top_k: int, capacity: Capacity, factor: float
) -> int | Tensor:
    """The seats of each expert: an int for a factor > 0, else a 0-dim int64 tensor.

    Args:
        index_TK: ``[T, K]`` the chosen experts, of which the need is the largest count.
        num_experts: E.
        top_k: K.
        capacity: its rule, least capacity and alignment; its own factors are not read.
        factor: > 0: the rule's. 0: the need. < 0: the need, at most the rule's of ``|factor|``.
    """
    limit = rule_capacity(capacity, abs(factor), index_TK.shape[0], top_k, num_experts)
    if factor > 0:
        return aligned(limit, capacity.align)
    need = _counts(index_TK, num_experts).max()
    return aligned(need if factor == 0 else need.clamp(max=limit), capacity.align)


def rule_capacity(capacity: Capacity, factor: float, tokens: int, top_k: int, num_experts: int) -> int:
    """What the rule gives for a factor >= 0, at least its minimum, before alignment."""
    rule = CAPACITY_RULES[capacity.rule]
    least = rule.min_capacity if capacity.min_capacity is None else capacity.min_capacity
    per_worker = num_experts if capacity.experts_per_worker is None else capacity.experts_per_worker
    return max(least, rule.formula(factor, tokens, top_k, num_experts, per_worker))


def aligned(size: int | Tensor, multiple: int) -> int | Tensor:
    """``size`` rounded up to a multiple."""
    return size if multiple == 1 else (size + multiple - 1) // multiple * multiple


def slot_ranks(choice: Choice, capacity: Capacity, num_experts: int, *, training: bool) -> Tensor:
    """``[T, K]`` int64: each slot's place in its expert's queue, from 0. Evaluation draws no lots."""
    order = capacity.order or CAPACITY_RULES[capacity.rule].order
    if capacity.drop == "position" or (capacity.drop == "random" and not training):
        return queue_ranks(choice.index, num_experts, order)
    if capacity.drop == "probability":
        return _ranks_by_weight(choice, num_experts, order)
    if capacity.drop == "batch_prioritized":
        key_T = choice.all_scores().detach().amax(1)
    else:
        key_T = torch.rand(choice.index.shape[0], device=choice.index.device)
    first_T = key_T.argsort(descending=True, stable=True)
    ranks_TK = queue_ranks(choice.index.index_select(0, first_T), num_experts, order)
    return torch.zeros_like(ranks_TK).index_copy(0, first_T, ranks_TK)


def queue_ranks(index_TK: Tensor, num_experts: int, order: str = "token") -> Tensor:
    """``[T, K]`` int64: each slot's place in its expert's queue, from 0; any number for dropped slots.

    Args:
        index_TK: ``[T, K]`` the chosen experts.
        num_experts: E.
        order: "token": token by token. "choice": all first choices, then all second ones, each by token.
    """
    queue = index_TK if order == "token" else index_TK.t()
    id_N = queue.reshape(-1)
    slot_N, end_E = ops.sort_by_expert(id_N.unsqueeze(1), num_experts)
    end_E = end_E.to(torch.int64)
    start_X = torch.cat([end_E.new_zeros(1), end_E])
    id_N = id_N.index_select(0, slot_N)
    id_N = torch.where((id_N >= 0) & (id_N < num_experts), id_N, num_experts)
    place_N = torch.arange(slot_N.shape[0], device=slot_N.device) - start_X.index_select(0, id_N)
    ranks = torch.zeros_like(place_N).scatter(0, slot_N, place_N).view(queue.shape)
    return ranks if order == "token" else ranks.t()


def _ranks_by_weight(choice: Choice, num_experts: int, order: str) -> Tensor:
    """Queues by falling weight; equal weights in ``order``."""
    by_choice = order == "choice"
    index, weight = (v.t() if by_choice else v for v in (choice.index, choice.weights.detach()))
    first_N = weight.reshape(-1).argsort(descending=True, stable=True)
    ranks_N = queue_ranks(index.reshape(-1).index_select(0, first_N).unsqueeze(1), num_experts).squeeze(1)
    ranks = torch.zeros_like(ranks_N).scatter(0, first_N, ranks_N).view(index.shape)
    return ranks.t() if by_choice else ranks


def kept_weights(weights_TK: Tensor, keep_TK: Tensor, renormalize: bool) -> Tensor:
    """The weights with those of lost slots 0; renormalised, the kept ones sum to what all of them did."""
    kept_TK = weights_TK.masked_fill(~keep_TK, 0.0)
    if not renormalize:
        return kept_TK
    sum_T1 = kept_TK.sum(1, keepdim=True)
    scale_T1 = weights_TK.sum(1, keepdim=True) / sum_T1.masked_fill(sum_T1 == 0, 1.0)
    return kept_TK * scale_T1


def _counts(index_TK: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64: how many slots want each expert."""
    end_E = ops.sort_by_expert(index_TK, num_experts)[1].to(torch.int64)
    return torch.diff(end_E, prepend=end_E.new_zeros(1))
