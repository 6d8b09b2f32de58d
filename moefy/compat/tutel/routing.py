"""Tutel's functional pieces: scores to seats, tokens into the experts' buffers and back.

Contract: ``crit`` is Tutel's tuple ``(E, indices, locations, gates, capacity, dispatch_count)``; indices, locations and
gates are lists of K tensors ``[T]``: the expert, the place in its queue and the weight of each token's k-th choice. A
place from ``capacity`` on is no seat.

    >>> crit, l_aux = top_k_routing(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), top_k=1)
    >>> crit[1], crit[2], crit[4]
    ([tensor([0, 0, 1])], [tensor([0, 1, 0])], 2)
    >>> buffers_ECD = fast_encode(x_TD, crit)          # [2, 2, D]
    >>> y_TD = fast_decode(buffers_ECD, crit)

Shape letters: T tokens, D width, E experts, C capacity, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from moefy.compat.single_process import group_size, refuse_ranks
from moefy.errors import ConfigError, UnknownOption
from moefy.nn import losses
from moefy.nn.routers.scored import top_k_index
from moefy.nn.routing.capacity import queue_ranks
from moefy.ops.cpu.sums import accumulation_dtype

TRAPS = frozenset({"zero_capacity_factor", "batch_priority_need", "load_loss_units"})
"""Tutel's surprises that can be switched off; ``moefy.compat.tutel`` explains them."""

Critical = tuple[int, list[Tensor], list[Tensor], list[Tensor], int, Tensor]


def checked_traps(traps: Collection[str], known: Collection[str]) -> frozenset[str]:
    """``traps`` as a set.

    Raises:
        UnknownOption: for a name that does not exist.
    """
    for name in traps:
        if name not in known:
            raise UnknownOption(name, sorted(known), where="traps")
    return frozenset(traps)


def gshard_loss(scores_w_noise: Tensor, top_ids: Tensor) -> Tensor:
    """``E * sum_e mean_t(score_te) * share of tokens whose best expert is e``."""
    return losses.gshard(scores_w_noise, top_ids, scores_w_noise.shape[1])


def load_importance_loss(
    scores_wo_noise: Tensor, topk_logits: Tensor, num_global_experts: int, gate_noise: float
) -> Tensor:
    """Half the squared coefficients of variation of importance and load, with the trap "load_loss_units".

    Args:
        scores_wo_noise: ``[T, E]`` softmax of the logits without noise.
        topk_logits: ``[T, K]`` the chosen logits with noise.
        num_global_experts: E.
        gate_noise: > 0; the noise's standard deviation times E.
    """
    if not gate_noise > 0:
        raise ConfigError("gate_noise", got=gate_noise, expected="a number > 0 for the load loss")
    over_TE = scores_wo_noise.float() - topk_logits[:, -1:].float()
    load_E = torch.special.ndtr(over_TE / (gate_noise / num_global_experts)).sum(0)
    return (losses.cv_squared(scores_wo_noise.float().sum(0)) + losses.cv_squared(load_E)) / 2


def extract_critical(
    scores: Tensor,
    top_k: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = gshard_loss,
    capacity_factor: float = 1.0,
    batch_prioritized_routing: bool = False,
    normalize_gate: bool = True,
    alignment: int = 1,
    group: Any = None,
    inequivalent_tokens: bool = False,
    *,
    traps: Collection[str] = TRAPS,
) -> tuple[Critical, Tensor | None]:
    """``(crit, l_aux)`` of scores ``[T, E]``.

    Args:
        scores: what the gate gives every expert.
        top_k: K, at most E.
        loss_fn: of the scores and the chosen ids ``[T, K]``; ``None``: no loss.
        capacity_factor: > 0: the capacity is ``K * int(factor * ceil(T / E))``. 0: the need. < 0: the need, at most
            that of ``|factor|``. Up to 0 the number is read from the device.
        batch_prioritized_routing: whether tokens are seated by falling best score.
        normalize_gate: whether the K weights are divided by their sum (K > 1).
        alignment: the capacity is rounded up to a multiple of it.
        group: of one process.
        inequivalent_tokens: no difference in one process.
        traps: see ``moefy.compat.tutel``.

    Raises:
        ParallelismNeeded: for a group of several processes.
    """
    refuse_ranks("tutel: group", group_size(group))
    tokens, num_experts = scores.shape
    top_k = min(top_k, num_experts)
    index_TK = top_k_index(scores, top_k)
    gates_TK = scores.gather(1, index_TK)
    if normalize_gate and top_k > 1:
        gates_TK = gates_TK / gates_TK.sum(1, keepdim=True).clamp(min=torch.finfo(gates_TK.dtype).eps)
    places_TK = _places(scores, index_TK, batch_prioritized_routing)
    need_E = _need(index_TK, places_TK, num_experts, batch_prioritized_routing, traps)
    capacity = _capacity(capacity_factor, tokens, num_experts, top_k, need_E)
    capacity = -(-capacity // alignment) * alignment
    need_E.topk_ids = index_TK  # pyright: ignore[reportAttributeAccessIssue]
    indices, locations, gates = (list(v.unbind(1)) for v in (index_TK.int(), places_TK.int(), gates_TK))
    crit = (num_experts, indices, locations, gates, capacity, need_E)
    return crit, None if loss_fn is None else loss_fn(scores, index_TK)


top_k_routing = extract_critical


def get_dispatch_count(critial_data: Critical) -> Tensor:
    """``[E]``: how many slots want each expert."""
    return critial_data[-1]


def get_topk_selection(critial_data: Critical) -> tuple[Tensor, Tensor]:
    """``([T, K], [E])``: the chosen ids and the dispatch count."""
    return critial_data[-1].topk_ids, critial_data[-1]  # pyright: ignore[reportAttributeAccessIssue]


def fast_encode(data: Tensor, critial_data: Critical, is_postscore: bool = True) -> Tensor:
    """``[E, C, D]``: the tokens ``[T, D]`` at their seats, zeros elsewhere; weighted unless ``is_postscore``."""
    num_experts, _, _, gates, capacity, _ = critial_data
    seat_TK, _ = _seats(critial_data)
    rows_TKD = data.unsqueeze(1).expand(*seat_TK.shape, data.shape[1])
    if not is_postscore:
        rows_TKD = rows_TKD * torch.stack(gates, 1).unsqueeze(2)
    buffer_XD = data.new_zeros(num_experts * capacity + 1, data.shape[1])
    rows_ND = rows_TKD.reshape(seat_TK.numel(), data.shape[1]).to(data.dtype)
    buffer_XD = buffer_XD.index_copy(0, seat_TK.reshape(-1), rows_ND)
    return buffer_XD[:-1].view(num_experts, capacity, data.shape[1])


def fast_decode(data: Tensor, critial_data: Critical, is_postscore: bool = True) -> Tensor:
    """``[T, D]``: the sum over each token's seats in ``[E, C, D]``; weighted if ``is_postscore``."""
    num_experts, _, _, gates, capacity, _ = critial_data
    seat_TK, keep_TK = _seats(critial_data)
    rows_XD = data.reshape(num_experts * capacity, data.shape[-1]).to(accumulation_dtype(data))
    rows_XD = torch.cat([rows_XD, rows_XD.new_zeros(1, rows_XD.shape[1])])
    rows_TKD = rows_XD.index_select(0, seat_TK.reshape(-1)).view(*seat_TK.shape, data.shape[-1])
    if is_postscore:
        rows_TKD = rows_TKD * (torch.stack(gates, 1) * keep_TK).unsqueeze(2)
    return rows_TKD.sum(1).to(data.dtype)


def fast_cumsum_sub_one(data: Tensor, dim: int = 0) -> Tensor:
    """``cumsum - 1``: places in queues from a one-hot ``[T, E]``."""
    return data.cumsum(dim) - 1


def _seats(critial_data: Critical) -> tuple[Tensor, Tensor]:
    """``[T, K]`` rows of the flat buffers (``E * C`` without a seat), and ``[T, K]`` whether the slot has a seat."""
    num_experts, indices, locations, _, capacity, _ = critial_data
    index_TK, place_TK = (torch.stack(value, 1).long() for value in (indices, locations))
    keep_TK = place_TK < capacity
    return torch.where(keep_TK, index_TK * capacity + place_TK, num_experts * capacity), keep_TK


def _places(scores: Tensor, index_TK: Tensor, by_priority: bool) -> Tensor:
    """``[T, K]``: each slot's place in its expert's queue; all first choices come before any second one."""
    if not by_priority:
        return queue_ranks(index_TK, scores.shape[1], "choice")
    first_T = scores.detach().amax(1).argsort(descending=True, stable=True)
    ranks_TK = queue_ranks(index_TK.index_select(0, first_T), scores.shape[1], "choice")
    return torch.zeros_like(ranks_TK).index_copy(0, first_T, ranks_TK)


def _need(
    index_TK: Tensor, places_TK: Tensor, num_experts: int, by_priority: bool, traps: Collection[str]
) -> Tensor:
    """``[E]``: the seats that each expert needs, as Tutel counts them."""
    if not (by_priority and "batch_priority_need" in traps) or not index_TK.shape[0]:
        return losses.assignment_totals(index_TK, num_experts)[:-1]
    # The last row of the table of places holds the last token's own place and, for every other expert, what the
    # earlier choices took.
    earlier_E = losses.assignment_totals(index_TK[:, :-1], num_experts)[:-1]
    return earlier_E.scatter(0, index_TK[-1, -1:], places_TK[-1, -1:]) + 1


def _capacity(factor: float, tokens: int, num_experts: int, top_k: int, need_E: Tensor) -> int:
    per_expert = -(-tokens // num_experts)
    limit = top_k * math.floor(abs(factor) * per_expert)
    if factor > 0:
        return limit
    need = int(need_E.max())
    return need if factor == 0 else min(need, limit)
