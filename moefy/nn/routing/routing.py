"""``Choice`` and ``Routing``: which experts a router picks for every token, and where each row goes.

A router makes a ``Choice``; capacity may drop slots of it; sorted by expert it is the ``Routing`` that entries, bodies
and exits read. Both are made once per forward.

Contract: rows are sorted by expert, stable by slot. Sorted row ``r`` holds slot
``order_N[r] = t * K + k``, and expert ``e`` owns rows ``offsets_E[e - 1] : offsets_E[e]``
(``offsets_E`` are exclusive ends, as grouped GEMMs read them).

Worked example, T=2 tokens, K=1, E=2, token 0 to expert 1 and token 1 to expert 0:

    top_k_index_TK = [[1], [0]]    order_N = [1, 0]    offsets_E = [1, 2]
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(eq=False)
class Choice:
    """What a router decided for T tokens and E experts, before anything is sorted.

    Attributes:
        index: ``[T, K]`` int64, the chosen experts, best first. An id outside ``[0, E)`` drops its slot.
        weights: ``[T, K]`` fp32 (fp64 for fp64 inputs), what multiplies each expert's output; 0 for a dropped slot.
        logits: ``[T, E]``, the raw scores.
        scores: ``[T, E]``, the scores that the weights and the balance losses are made of: a softmax or sigmoid of the
            logits. ``None`` means the softmax over all experts, which nobody needed yet.
        losses: losses of the router's own by name, scalars without a weight (noisy top-k's load and importance).
        mask: ``[T]`` bool, the tokens that count; ``None`` means all.
    """

    index: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor
    scores: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    mask: torch.Tensor | None = None

    def all_scores(self) -> torch.Tensor:
        """``scores``, or the softmax over all experts that they stand for."""
        return torch.softmax(self.logits, dim=-1) if self.scores is None else self.scores

    def masked(self, mask_T: torch.Tensor, num_experts: int) -> Choice:
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

    Attributes:
        top_k_index: ``[T, K]`` int64, the chosen experts, best first.
        top_k_weights: ``[T, K]`` fp32 (fp64 for fp64 inputs), their weights, which sum to 1 per token unless the
            router says otherwise.
        order: ``[N]`` int64, N = T*K, the slot of each sorted row.
        offsets: ``[E]`` int32, the end row of each expert.
        choice: what the router decided, before capacity dropped slots of it.
        leading: the source's shape without its feature axis; their product is T.
        top_k: K.
        feature_dim: the feature axis of the source.
        capacity: the seats of each expert, a 0-dim tensor where they depend on the need; ``None`` when nothing limits.
        residual: ``[T, D]``, the tokens that capacity left without any expert and that pass through, 0 for the others;
            ``None`` when none may.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor
    choice: Choice
    leading: tuple[int, ...]
    top_k: int
    feature_dim: int
    capacity: int | torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def router_logits(self) -> torch.Tensor:
        """``[T, E]``, the scores before top-k."""
        return self.choice.logits

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """``[E]`` int32: how many rows each expert gets."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))
