"""What a balance loss is taken over, beside the micro-batch: each sequence, or the global batch.

*Micro-batch*: the loss as it is. *Sequence*: ``per_sequence``. *Global batch*: ``reduce=GlobalCounts(...)``, which sums
the counts over ranks and micro-batches while the scores stay local.

Shape letters: T tokens, E experts, K top-k, B sequences, S tokens of one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moefy.errors import ShapeError
from moefy.nn.losses.registry import BalanceLoss


def per_sequence(
    loss: BalanceLoss,
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    *,
    sequences: int,
    mask_T: Tensor | None = None,
) -> Tensor:
    """The mean of ``loss`` over sequences, each by itself. A sequence of padding alone does not count.

    Megatron-Core's ``seq_aux_loss``; DeepSeek-V3 (2024, equations 17 to 20).

    Args:
        loss: one of ``BALANCE_LOSSES``.
        scores_TE: ``[T, E]``, sequence after sequence.
        index_TK: ``[T, K]``.
        num_experts: E.
        sequences: B, the number of sequences. Each has T / B tokens.
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
    tokens weigh the same. A micro-batch sees its own counts and those of earlier micro-batches, not of later ones.

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
