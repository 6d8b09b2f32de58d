"""Auxiliary losses of a router, as pure functions of its scores and of the experts it chose.

Contract: a balance loss is ``f(scores_TE, index_TK, num_experts, *, mask_T=None) -> scalar`` without a weight;
``BALANCE_LOSSES`` has them by name. Gradients flow through the scores alone: counts carry none. Slots with an id
outside ``[0, E)`` are dropped and count for no expert; tokens with ``mask_T = False`` are padding and count nowhere.
No tokens give 0. Axes in front of T are batches, and the result keeps them. Nothing waits for the device. A caller
that has sorted the slots passes ``offsets_E``, so that they are not counted again.

Worked example, E=2: all tokens to expert 0 with certainty is the worst case, E; a uniform router gives 1.

    >>> switch(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0], [0]]), 2)
    tensor(2.)

Scopes. *Micro-batch*: the function as it is. *Sequence*: ``per_sequence``. *Global batch*:
``reduce=GlobalCounts(...)``, which sums the counts over ranks and micro-batches while the scores stay local.

Shape letters: T tokens, E experts, K top-k. n_e: slots of expert e. f_e: its share of them. P_e: mean score of e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from moefy.errors import ConfigError, ShapeError
from moefy.nn.losses import gradients as by_hand

Reduce = Callable[[Tensor], Tensor]
"""Maps the totals of these tokens to those of the scope; see ``assignment_totals``."""


class BalanceLoss(Protocol):
    """The signature that all of ``BALANCE_LOSSES`` share."""

    def __call__(
        self,
        scores_TE: Tensor,
        index_TK: Tensor,
        num_experts: int,
        *,
        mask_T: Tensor | None = None,
        reduce: Reduce | None = None,
        offsets_E: Tensor | None = None,
    ) -> Tensor:
        """``[...]``, one number per batch."""
        ...


# -- products of the share and the mean score ----------------------------------------------------------------------
def switch(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
) -> Tensor:
    """``E * sum_e f_e * P_e`` with ``f_e = n_e / (T * K)``: the canonical form.

    1 for a uniform router, E when all slots go to one expert with certainty. Switch Transformer (Fedus et al. 2022,
    equations 4 to 6) for K=1. Megatron-Core's ``E / (K * T^2) * sum_e n_e * sum_t p_te`` is the same number, and
    MegaBlocks' loss over L layers is its mean over them.

    Args:
        scores_TE: ``[..., T, E]`` what the router gives every expert, a row summing to 1.
        index_TK: ``[..., T, K]`` the chosen experts, before capacity drops any.
        num_experts: E.
        mask_T: ``[..., T]`` bool, True = a token that counts.
        reduce: makes the counts those of a wider scope.
        offsets_E: ``[..., E]``, those of ``ops.sort_by_expert`` for ``index_TK`` without the slots of masked tokens.

    Returns:
        ``[...]`` in fp32, fp64 for fp64 scores.
    """
    factor = num_experts / index_TK.shape[-1]
    return _times_mean_scores(factor, scores_TE, index_TK, num_experts, mask_T, reduce, offsets_E)


def gshard(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
) -> Tensor:
    """``switch`` with the first choices alone: ``f_e`` is the share of tokens whose best expert is e.

    GShard (Lepikhin et al. 2020, algorithm 1) up to its factor 1/E. Tutel's, whose scores are the noisy ones, and
    DeepSpeed's for K = 1 and 2.
    """
    first_T1, offsets_E = _first_choices(index_TK, offsets_E)
    return switch(scores_TE, first_T1, num_experts, mask_T=mask_T, reduce=reduce, offsets_E=offsets_E)


def mixtral(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
) -> Tensor:
    """``K * switch``, so a uniform router gives K: ``load_balancing_loss_func`` of Hugging Face's Mixtral."""
    return _times_mean_scores(num_experts, scores_TE, index_TK, num_experts, mask_T, reduce, offsets_E)


def fastmoe_gshard(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
    experts_per_worker: int | None = None,
) -> Tensor:
    """FastMoE's ``GShardGate``: ``gshard / W^2`` for W workers, so a uniform router gives 1 / W^2.

    Its factor is the square of the number of experts on *one* worker, over a mean of all E.

    Args:
        scores_TE: as in ``switch``.
        index_TK: as in ``switch``.
        num_experts: E, over all workers.
        mask_T: as in ``switch``.
        reduce: as in ``switch``.
        offsets_E: as in ``switch``.
        experts_per_worker: FastMoE's ``num_expert``, E / W; by default E, one worker.
    """
    per_worker = num_experts if experts_per_worker is None else experts_per_worker
    first_T1, offsets_E = _first_choices(index_TK, offsets_E)
    factor = per_worker**2 / num_experts
    return _times_mean_scores(factor, scores_TE, first_T1, num_experts, mask_T, reduce, offsets_E)


def fastmoe_switch(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
) -> Tensor:
    """FastMoE's ``SwitchGate``: ``E * sum_e (n_e / kept) * (sum_t p_te / kept)``, counted after capacity dropped.

    ``index_TK`` holds an id outside ``[0, E)`` for every dropped slot; ``kept`` is the number of the others. Nothing
    dropped and K=1: ``switch``.
    """
    own_E = _counts(index_TK, num_experts, mask_T, offsets_E)
    counts_E = own_E if reduce is None else reduce(_totals(own_E, index_TK, mask_T))[..., :-1]
    kept = own_E.sum(-1)
    kept_of_scope = kept if reduce is None else counts_E.sum(-1)
    return _product(num_experts, _sum_scores(scores_TE, mask_T), counts_E, kept_of_scope * kept)


def _times_mean_scores(
    factor: float,
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    mask_T: Tensor | None,
    reduce: Reduce | None,
    offsets_E: Tensor | None,
) -> Tensor:
    """``factor * sum_e (n_e / T) * P_e``, n_e and its T those of the scope."""
    tokens = tokens_of_scope = _tokens(index_TK, mask_T)
    counts_E = _counts(index_TK, num_experts, mask_T, offsets_E)
    if reduce is not None:
        totals_X = reduce(_totals(counts_E, index_TK, mask_T))
        counts_E, tokens_of_scope = totals_X[..., :-1], totals_X[..., -1]
    return _product(factor, _sum_scores(scores_TE, mask_T), counts_E, tokens_of_scope * tokens)


def _product(factor: float, sums_E: Tensor, counts_E: Tensor, divisor: Tensor | int) -> Tensor:
    """``factor * sum_e counts_e * sums_e / divisor``; nothing to divide by gives 0."""
    product = (sums_E * counts_E).sum(-1)
    if isinstance(divisor, Tensor):
        return factor * product / divisor.clamp(min=1)
    return product * (factor / max(divisor, 1))


def _first_choices(index_TK: Tensor, offsets_E: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``[..., T, 1]`` and its offsets, if ``offsets_E`` are these."""
    return index_TK[..., :1], offsets_E if index_TK.shape[-1] == 1 else None


# -- squared coefficients of variation -----------------------------------------------------------------------------
def cv_squared(value_E: Tensor) -> Tensor:
    """``var / (mean^2 + 1e-10)`` over the last axis with the unbiased variance; 0 for one expert.

    Shazeer et al. 2017, equation 7.
    """
    return torch.zeros_like(value_E[..., 0]) if value_E.shape[-1] == 1 else by_hand.cv_squared(value_E)


def importance(
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    mask_T: Tensor | None = None,
    reduce: Reduce | None = None,
    offsets_E: Tensor | None = None,
) -> Tensor:
    """``CV^2`` of the experts' summed scores: 0 for a uniform router, E when all goes to one expert with certainty.

    V-MoE (Riquelme et al. 2021, appendix A) and Tutel take the softmax over all experts; Shazeer et al. 2017
    (equation 6) the sparse gates, for which there is ``sparse_importance``. ``index_TK`` and ``offsets_E`` are not
    read.

    Raises:
        ConfigError: for a ``reduce``: no slots are counted, so there is no global-batch scope.
    """
    if reduce is not None:
        raise ConfigError(
            "reduce", got=reduce, expected=f"None: importance counts no slots; {sorted(COUNTED)} do"
        )
    return cv_squared(_sum_scores(scores_TE, mask_T))


def sparse_importance(
    weights_TK: Tensor, index_TK: Tensor, num_experts: int, *, mask_T: Tensor | None = None
) -> Tensor:
    """``CV^2`` of the experts' summed routing weights: Shazeer et al. 2017, equation 6.

    Args:
        weights_TK: ``[..., T, K]`` the weights of the chosen experts.
        index_TK: ``[..., T, K]`` these experts.
        num_experts: E.
        mask_T: ``[..., T]`` bool, True = a token that counts.
    """
    slot_N = _slots(index_TK, num_experts, mask_T)
    weights_N = _accumulated(weights_TK).flatten(-2)
    sums_X = weights_N.new_zeros((*weights_N.shape[:-1], num_experts + 2))
    return cv_squared(sums_X.scatter_add(-1, slot_N, weights_N)[..., 1:-1])


def load(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    std: Tensor | float,
    top_k: int,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """``CV^2`` of a smooth estimate of each expert's load: Shazeer et al. 2017, equations 8 to 11.

    ``load_e = sum_t Phi((clean_te - threshold_te) / std_te)``, the probability that e is among the K best when its
    noise is drawn again; the threshold is the K-th largest noisy score of the *other* experts. 0 for K = E.

    Args:
        clean_TE: ``[..., T, E]`` scores without noise.
        noisy_TE: ``[..., T, E]`` the same with noise.
        std: ``[..., T, E]`` or a number, the noise's standard deviation, > 0.
        top_k: K.
        mask_T: ``[..., T]`` bool, True = a token that counts.
    """
    clean_TE, noisy_TE = _accumulated(clean_TE), _accumulated(noisy_TE)
    if top_k == clean_TE.shape[-1]:
        return clean_TE.new_zeros(clean_TE.shape[:-2])
    best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    inside, outside = best_TK[..., top_k, None], best_TK[..., top_k - 1, None]
    threshold_TE = torch.where(noisy_TE > inside, inside, outside)
    return cv_squared(_sum_scores(torch.special.ndtr((clean_TE - threshold_TE) / std), mask_T))


def load_importance(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Half of ``CV^2(sum_t softmax(clean_te))`` plus ``CV^2(sum_t Phi((clean_te - threshold_t) / std))``, in logits.

    Tutel's load and importance loss with both sides of the difference in one unit. ``threshold_t`` is the noisy logit
    of the last chosen expert. Tutel's ``std`` is its ``gate_noise / E``.

    Args:
        clean_TE: ``[..., T, E]`` logits without noise.
        noisy_TE: ``[..., T, E]`` the same with noise.
        index_TK: ``[..., T, K]`` the chosen experts, best first, all inside ``[0, E)``.
        std: the noise's standard deviation, > 0.
        mask_T: ``[..., T]`` bool, True = a token that counts.

    Raises:
        ConfigError: for a ``std`` that is not positive.
    """
    return _load_importance(clean_TE, clean_TE, noisy_TE, index_TK, std, mask_T)


def tutel_load_importance(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """``load_importance`` as Tutel computes it: *probabilities* minus a threshold in logits, inside ``Phi``."""
    return _load_importance(
        torch.softmax(_accumulated(clean_TE), -1), clean_TE, noisy_TE, index_TK, std, mask_T
    )


def _load_importance(
    minuend_TE: Tensor,
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    mask_T: Tensor | None,
) -> Tensor:
    if not std > 0:
        raise ConfigError("std", got=std, expected="a number > 0: the load loss needs a noisy router")
    threshold_T1 = _accumulated(noisy_TE).gather(-1, index_TK[..., -1:])
    load_TE = torch.special.ndtr((_accumulated(minuend_TE) - threshold_T1) / std)
    scores_TE = torch.softmax(_accumulated(clean_TE), -1)
    return (cv_squared(_sum_scores(scores_TE, mask_T)) + cv_squared(_sum_scores(load_TE, mask_T))) / 2


# -- the size of the logits ----------------------------------------------------------------------------------------
def z_loss(logits_TE: Tensor, *, mask_T: Tensor | None = None, softmax_TE: Tensor | None = None) -> Tensor:
    """``mean_t logsumexp(logits_t)^2``, which keeps the logits small: ST-MoE (Zoph et al. 2022, equation 5).

    Args:
        logits_TE: ``[..., T, E]``.
        mask_T: ``[..., T]`` bool, True = a token that counts.
        softmax_TE: ``[..., T, E]``, their softmax where the caller has it in fp32 (fp64 for fp64 logits), to save the
            making. It gets no gradient.

    Returns:
        ``[...]``; ``log(E)^2`` for zero logits.
    """
    return by_hand.mean_squared_logsumexp(_accumulated(logits_TE), mask_T, softmax_TE)


# -- scopes --------------------------------------------------------------------------------------------------------
def per_sequence(
    loss: BalanceLoss,
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    sequences: int,
    mask_T: Tensor | None = None,
) -> Tensor:
    """The mean of ``loss`` over sequences, each by itself; those of padding alone do not count.

    Megatron-Core's ``seq_aux_loss``; DeepSeek-V3 (2024, equations 17 to 20).

    Args:
        loss: one of ``BALANCE_LOSSES``.
        scores_TE: ``[T, E]``, sequence after sequence.
        index_TK: ``[T, K]``.
        num_experts: E.
        sequences: how many; all have T / sequences tokens.
        mask_T: ``[T]`` bool, True = a token that counts.

    Raises:
        ShapeError: when T is no multiple of ``sequences``.
    """
    tokens = scores_TE.shape[0]
    if tokens % max(sequences, 1):
        raise ShapeError(f"per_sequence: {tokens} tokens are not {sequences} sequences of one length")
    length = tokens // max(sequences, 1)
    mask_BS = None if mask_T is None else mask_T.view(sequences, length)
    values_B = loss(
        scores_TE.reshape(sequences, length, scores_TE.shape[1]),
        index_TK.reshape(sequences, length, index_TK.shape[1]),
        num_experts,
        mask_T=mask_BS,
    )
    if mask_BS is None:
        return values_B.sum() / max(sequences, 1)
    return values_B.sum() / mask_BS.any(-1).sum().clamp(min=1)


class GlobalCounts:
    """``reduce`` for the global batch: totals summed over the ranks of a group and over micro-batches.

    The scores stay local, so that the mean over ranks of ``E * sum_e f_e * P_e``, which data parallelism takes anyway,
    is the loss of the whole batch (Qiu et al. 2025; Megatron-Core's ``global_aux_loss``). Ranks with unequal numbers of
    tokens weigh the same. A micro-batch sees the counts of those before it and its own, not of those to come.

        counts = GlobalCounts(group, past_X)
        loss = switch(scores_TE, index_TK, E, reduce=counts)
        past_X = counts.totals

    Args:
        group: the process group whose ranks share the batch; ``None`` is this process alone.
        past: ``[E + 1]`` totals of the earlier micro-batches, summed over the group; ``None`` for the first.

    Attributes:
        totals: after the loss was computed, ``[E + 1]`` int64 with these tokens added.
    """

    totals: Tensor

    def __init__(self, group: Any = None, past: Tensor | None = None) -> None:
        self.group, self.past = group, past

    def __call__(self, totals_X: Tensor) -> Tensor:
        """The totals of the global batch so far."""
        if self.group is not None:
            from torch.distributed import _functional_collectives as collectives

            totals_X = collectives.all_reduce(totals_X, "sum", self.group)
        self.totals = totals_X if self.past is None else totals_X + self.past
        return self.totals


# -- what they are made of -----------------------------------------------------------------------------------------
def assignment_totals(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """``[..., E + 1]`` int64: the slots of each expert and, last, the tokens that count."""
    return _totals(_counts(index_TK, num_experts, mask_T, None), index_TK, mask_T)


def _totals(counts_E: Tensor, index_TK: Tensor, mask_T: Tensor | None) -> Tensor:
    tokens = _tokens(index_TK, mask_T)
    if not isinstance(tokens, Tensor):
        tokens = counts_E.new_full(counts_E.shape[:-1], tokens, dtype=torch.int64)
    return torch.cat([counts_E.to(torch.int64), tokens.unsqueeze(-1)], -1)


def _counts(index_TK: Tensor, num_experts: int, mask_T: Tensor | None, offsets_E: Tensor | None) -> Tensor:
    """``[..., E]`` int32: n."""
    if offsets_E is not None:
        counts_E = offsets_E.clone()
        counts_E[..., 1:].sub_(offsets_E[..., :-1])
        return counts_E
    slot_N = _slots(index_TK, num_experts, mask_T)
    # int32: Inductor has no int64 atomics. N fits, as ops.sort_by_expert demands.
    counts_X = slot_N.new_zeros((*slot_N.shape[:-1], num_experts + 2), dtype=torch.int32)
    one = slot_N.new_ones((), dtype=torch.int32)
    return counts_X.scatter_add(-1, slot_N, one.expand(slot_N.shape))[..., 1:-1]


def _slots(index_TK: Tensor, num_experts: int, mask_T: Tensor | None) -> Tensor:
    """``[..., N]`` expert ids plus 1; 0 or E + 1 for slots that do not count."""
    slot_TK = index_TK.to(torch.int64).clamp(-1, num_experts) + 1
    if mask_T is not None:
        slot_TK = torch.where(mask_T.unsqueeze(-1), slot_TK, 0)
    return slot_TK.flatten(-2)


def _tokens(like_TX: Tensor, mask_T: Tensor | None) -> Tensor | int:
    """How many tokens count: ``[...]`` int64; in eager mode without a mask a number, which launches nothing."""
    if mask_T is not None:
        return mask_T.sum(-1)
    if torch.compiler.is_compiling():  # the square of a symbol might not fit the int32 of a kernel's indices
        return torch.full(like_TX.shape[:-2], like_TX.shape[-2], dtype=torch.int64, device=like_TX.device)
    return like_TX.shape[-2]


def _sum_scores(scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """``[..., E]``: the sum over the tokens that count."""
    scores_TE = _accumulated(scores_TE)
    if mask_T is not None:  # where, not a product: a masked NaN must not count
        scores_TE = torch.where(mask_T.unsqueeze(-1), scores_TE, 0.0)
    return scores_TE.sum(-2)


def _accumulated(value: Tensor) -> Tensor:
    """In fp32, fp64 stays."""
    return value if value.dtype is torch.float64 else value.float()


BALANCE_LOSSES: dict[str, BalanceLoss] = {
    "switch": switch,
    "gshard": gshard,
    "mixtral": mixtral,
    "importance": importance,
    "megatron": switch,
    "megablocks": switch,
    "tutel_gshard": gshard,
    "deepspeed": gshard,
    "fastmoe_gshard": fastmoe_gshard,
    "fastmoe_switch": fastmoe_switch,
}
AFTER_DROPS = frozenset({"fastmoe_switch"})
"""Losses that read the experts after capacity dropped slots (``Routing.top_k_index``), not the router's choice."""
COUNTED = frozenset(BALANCE_LOSSES) - {"importance"}
"""Losses that count slots, and so take ``reduce``: those with a global-batch scope."""
