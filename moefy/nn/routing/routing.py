"""``Choice`` and ``Routing``: which experts a router picks for every token, and where each row goes.

A router makes a ``Choice``. Capacity may drop slots of it. Sorted by expert it is a ``Routing``, which counters and
losses read and a dispatcher moves rows by. Both are made once per forward.

Contract: rows are sorted by expert, stable by slot. Sorted row ``r`` holds slot
``order_N[r] = t * K + k``, and expert ``e`` owns rows ``offsets_E[e - 1] : offsets_E[e]``
(``offsets_E`` are exclusive ends, as grouped GEMMs read them).

Worked example, T=2 tokens, K=1, E=2, token 0 to expert 1 and token 1 to expert 0:

    top_k_index_TK = [[1], [0]]    order_N = [1, 0]    offsets_E = [1, 2]

Shape letters: T tokens, E experts, K top-k, N = T*K slots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moefy.nn.routing.layout import TokenLayout


@dataclasses.dataclass(eq=False)
class Choice:
    """What a router decided for T tokens and E experts, before anything is sorted.

    Attributes:
        index: ``[T, K]`` int64, the chosen experts, best first. An id outside ``[0, E)`` drops its slot.
        weights: ``[T, K]`` fp32 (fp64 for fp64 inputs), what multiplies each expert's output; 0 for a dropped slot.
        logits: ``[T, E]``, the raw scores.
        scores: ``[T, E]``, the scores that the weights and the balance losses are made of: a softmax or sigmoid of the
            logits. ``None``: the softmax over all experts, which ``all_scores`` computes when it is asked for.
        losses: the router's own losses by name, 0-dim tensors without a weight (noisy top-k's load and importance).
        mask: ``[T]`` bool, the tokens that count; ``None`` means all.
    """

    index: Tensor
    weights: Tensor
    logits: Tensor
    scores: Tensor | None = None
    losses: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    mask: Tensor | None = None

    def all_scores(self) -> Tensor:
        """``[T, E]``: ``scores``, or the softmax over all experts where they are ``None``."""
        return torch.softmax(self.logits, dim=-1) if self.scores is None else self.scores

    def masked(self, mask_T: Tensor, num_experts: int) -> Choice:
        """The choice in which the slots of the tokens where ``mask_T`` is False are dropped."""
        drop_T1 = ~mask_T.unsqueeze(1)
        return Choice(
            index=self.index.masked_fill(drop_T1, num_experts),
            weights=self.weights.masked_fill(drop_T1, 0.0),
            logits=self.logits,
            scores=self.scores,
            losses=self.losses,
            mask=mask_T,
        )


@dataclasses.dataclass(eq=False)
class Routing:
    """The routing of T tokens to K of E experts each.

    A ``Routing`` is the plan of the local dispatcher, whose rows lie in its ``order``; see ``moefy.nn.dispatch``.

    Attributes:
        top_k_index: ``[T, K]`` int64, the chosen experts, best first; an id outside ``[0, E)`` for a dropped slot.
        top_k_weights: ``[T, K]`` fp32 (fp64 for fp64 inputs), their weights, which sum to 1 per token unless the
            router says otherwise; 0 for a dropped slot.
        order: ``[N]`` int64, the slot of each sorted row.
        offsets: ``[E]`` int32, the end row of each expert; dropped slots come behind the last one.
        choice: what the router decided, before capacity dropped slots of it.
        layout: how the T tokens lie in the tensor that was routed.
        capacity: the most rows of one expert: an int, or a 0-dim int64 tensor where it depends on the need; ``None``
            when nothing limits.
        stranded: ``[T]`` bool, the tokens that lost all their slots and pass through; ``None`` unless
            ``Capacity.residual``.
    """

    top_k_index: Tensor
    top_k_weights: Tensor
    order: Tensor
    offsets: Tensor
    choice: Choice
    layout: TokenLayout
    capacity: int | Tensor | None = None
    stranded: Tensor | None = None

    @property
    def top_k(self) -> int:
        """K, the slots of a token."""
        return self.top_k_index.shape[1]

    @property
    def num_experts(self) -> int:
        """E, the experts of the layer on all ranks."""
        return self.offsets.shape[0]

    @property
    def num_rows(self) -> int:
        """N, dropped slots included."""
        return self.order.shape[0]

    @property
    def leading(self) -> tuple[int, ...]:
        """The routed tensor's shape without its feature axis; the product is T."""
        return self.layout.leading

    @property
    def router_logits(self) -> Tensor:
        """``[T, E]``, the scores before top-k."""
        return self.choice.logits

    @property
    def tokens_per_expert(self) -> Tensor:
        """``[E]`` int32: how many rows each expert gets."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))
