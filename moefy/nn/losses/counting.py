"""What balance losses are made of: which slots went to which expert, counted, and the scores summed.

Contract: counts carry no gradient. Slots with an id outside ``[0, E)`` are dropped and count for no expert; tokens with
``mask_T = False`` are padding and count nowhere. Axes in front of T are batches. Nothing waits for the device.

    >>> counts(Assignment(torch.tensor([[0], [0], [2]]), 3))
    tensor([2, 0, 1], dtype=torch.int32)

Shape letters: T tokens, E experts, K top-k, N = T*K slots, X = E + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Maps the totals of these tokens to those of a wider scope; see ``assignment_totals``."""


@dataclasses.dataclass(eq=False)
class Assignment:
    """Which experts the tokens were assigned to.

    Attributes:
        index_TK: ``[..., T, K]`` the experts of each token.
        num_experts: E.
        mask_T: ``[..., T]`` bool, True = a token that counts; ``None`` means all.
        reduce: makes the counts those of a wider scope; ``None`` keeps them.
        offsets_E: ``[..., E]``, the slots sorted by expert, where the caller has sorted them; ``None`` counts.
    """

    index_TK: Tensor
    num_experts: int
    mask_T: Tensor | None = None
    reduce: Reduce | None = None
    offsets_E: Tensor | None = None

    @property
    def top_k(self) -> int:
        """K."""
        return self.index_TK.shape[-1]

    def first_choices(self) -> Assignment:
        """The best expert of each token alone."""
        offsets_E = self.offsets_E if self.top_k == 1 else None
        return Assignment(self.index_TK[..., :1], self.num_experts, self.mask_T, self.reduce, offsets_E)


def assignment_totals(index_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """``[..., E + 1]`` int64: the slots of each expert and, last, the tokens that count."""
    slots = Assignment(index_TK, num_experts, mask_T)
    return totals(slots, counts(slots))


def totals(slots: Assignment, counts_E: Tensor) -> Tensor:
    """``counts_E`` in int64 with the number of tokens behind."""
    number = tokens(slots)
    if not isinstance(number, Tensor):
        number = counts_E.new_full(counts_E.shape[:-1], number, dtype=torch.int64)
    return torch.cat([counts_E.to(torch.int64), number.unsqueeze(-1)], -1)


def counts(slots: Assignment) -> Tensor:
    """``[..., E]`` int32: how many slots each expert has."""
    if slots.offsets_E is not None:
        counts_E = slots.offsets_E.clone()
        counts_E[..., 1:].sub_(slots.offsets_E[..., :-1])
        return counts_E
    slot_N = slot_ids(slots)
    # int32: Inductor has no int64 atomics. N fits, as ops.sort_by_expert demands.
    counts_X = slot_N.new_zeros((*slot_N.shape[:-1], slots.num_experts + 2), dtype=torch.int32)
    one = slot_N.new_ones((), dtype=torch.int32)
    return counts_X.scatter_add(-1, slot_N, one.expand(slot_N.shape))[..., 1:-1]


def slot_ids(slots: Assignment) -> Tensor:
    """``[..., N]`` expert ids plus 1; 0 or E + 1 for slots that do not count."""
    slot_TK = slots.index_TK.to(torch.int64).clamp(-1, slots.num_experts) + 1
    if slots.mask_T is not None:
        slot_TK = torch.where(slots.mask_T.unsqueeze(-1), slot_TK, 0)
    return slot_TK.flatten(-2)


def tokens(slots: Assignment) -> Tensor | int:
    """How many tokens count: ``[...]`` int64; in eager mode without a mask a number, which launches nothing."""
    if slots.mask_T is not None:
        return slots.mask_T.sum(-1)
    like = slots.index_TK
    if torch.compiler.is_compiling():  # the square of a symbol might not fit the int32 of a kernel's indices
        return torch.full(like.shape[:-2], like.shape[-2], dtype=torch.int64, device=like.device)
    return like.shape[-2]


def sum_scores(scores_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """``[..., E]``: the sum over the tokens that count."""
    scores_TE = accumulated(scores_TE)
    if mask_T is not None:  # where, not a product: a masked NaN must not count
        scores_TE = torch.where(mask_T.unsqueeze(-1), scores_TE, 0.0)
    return scores_TE.sum(-2)


def accumulated(value: Tensor) -> Tensor:
    """``value`` in fp32; fp64 stays."""
    return value if value.dtype is torch.float64 else value.float()
