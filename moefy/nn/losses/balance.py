"""Balance losses that are products of an expert's share of the slots and its mean score.

Worked example, E=2: all tokens to expert 0 with certainty is the worst case, E; a uniform router gives 1.

    >>> switch(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0], [0]]), 2)
    tensor(2.)

``registry.BalanceLoss`` documents the arguments that all of them take. A formula gets them as ``scores_TE`` and
``slots``; no tokens give 0.

Shape letters: T tokens, E experts, K top-k. n_e: slots of expert e. f_e: its share of them. P_e: mean score of e.
"""

from __future__ import annotations

from torch import Tensor

from moefy.nn.losses.counting import Assignment, counts, sum_scores, tokens, totals
from moefy.nn.losses.registry import balance_loss


@balance_loss("switch", "megatron", "megablocks")
def switch(scores_TE: Tensor, slots: Assignment) -> Tensor:
    """``E * sum_e f_e * P_e`` with ``f_e = n_e / (T * K)``: the canonical form.

    1 for a uniform router, E when all slots go to one expert with certainty. Switch Transformer (Fedus et al. 2022,
    equations 4 to 6) for K=1. Megatron-Core's ``E / (K * T^2) * sum_e n_e * sum_t p_te`` is the same number, and
    MegaBlocks' loss over L layers is its mean over them.
    """
    return _times_mean_scores(slots.num_experts / slots.top_k, scores_TE, slots)


@balance_loss("gshard", "tutel_gshard", "deepspeed")
def gshard(scores_TE: Tensor, slots: Assignment) -> Tensor:
    """``switch`` with the first choices alone: ``f_e`` is the share of tokens whose best expert is e.

    GShard (Lepikhin et al. 2020, algorithm 1) up to its factor 1/E. Tutel's, whose scores are the noisy ones, and
    DeepSpeed's for K = 1 and 2.
    """
    return _times_mean_scores(slots.num_experts, scores_TE, slots.first_choices())


@balance_loss("mixtral")
def mixtral(scores_TE: Tensor, slots: Assignment) -> Tensor:
    """``K * switch``, so a uniform router gives K: ``load_balancing_loss_func`` of Hugging Face's Mixtral."""
    return _times_mean_scores(slots.num_experts, scores_TE, slots)


@balance_loss("fastmoe_gshard")
def fastmoe_gshard(scores_TE: Tensor, slots: Assignment, *, experts_per_worker: int | None = None) -> Tensor:
    """FastMoE's ``GShardGate``: ``gshard / W^2`` for W workers, so a uniform router gives 1 / W^2.

    Its factor is the square of the number of experts on *one* worker, over a mean of all E. ``experts_per_worker`` is
    FastMoE's ``num_expert``, E / W; by default E, one worker.
    """
    per_worker = slots.num_experts if experts_per_worker is None else experts_per_worker
    return _times_mean_scores(per_worker**2 / slots.num_experts, scores_TE, slots.first_choices())


@balance_loss("fastmoe_switch", after_drops=True)
def fastmoe_switch(scores_TE: Tensor, slots: Assignment) -> Tensor:
    """FastMoE's ``SwitchGate``: ``E * sum_e (n_e / kept) * (sum_t p_te / kept)``, counted after capacity dropped.

    The experts hold an id outside ``[0, E)`` for every dropped slot; ``kept`` is the number of the others. Nothing
    dropped and K=1: ``switch``.
    """
    own_E = counts(slots)
    counts_E = own_E if slots.reduce is None else slots.reduce(totals(slots, own_E))[..., :-1]
    kept = own_E.sum(-1)
    kept_of_scope = kept if slots.reduce is None else counts_E.sum(-1)
    return _product(slots.num_experts, sum_scores(scores_TE, slots.mask_T), counts_E, kept_of_scope * kept)


def _times_mean_scores(factor: float, scores_TE: Tensor, slots: Assignment) -> Tensor:
    """``factor * sum_e (n_e / T) * P_e``, n_e and its T those of the scope."""
    own = of_scope = tokens(slots)
    counts_E = counts(slots)
    if slots.reduce is not None:
        totals_X = slots.reduce(totals(slots, counts_E))
        counts_E, of_scope = totals_X[..., :-1], totals_X[..., -1]
    return _product(factor, sum_scores(scores_TE, slots.mask_T), counts_E, of_scope * own)


def _product(factor: float, sums_E: Tensor, counts_E: Tensor, divisor: Tensor | int) -> Tensor:
    """``factor * sum_e counts_e * sums_e / divisor``; nothing to divide by gives 0."""
    product = (sums_E * counts_E).sum(-1)
    if isinstance(divisor, Tensor):
        return factor * product / divisor.clamp(min=1)
    return product * (factor / max(divisor, 1))
