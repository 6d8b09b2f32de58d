"""``Routing``: where every token goes. Made once per forward by a router, read by entries, bodies and exits.

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
class Routing:
    """The routing of T tokens to K of E experts each.

    Attributes:
        top_k_index: ``[T, K]`` int64, the chosen experts, best first.
        top_k_weights: ``[T, K]`` fp32 (fp64 for fp64 inputs), their weights; they sum to 1 per token.
        order: ``[N]`` int64, N = T*K, the slot of each sorted row.
        offsets: ``[E]`` int32, the end row of each expert.
        router_logits: ``[T, E]``, the scores before top-k.
        leading: the source's shape without its feature axis; their product is T.
        top_k: K.
        feature_dim: the feature axis of the source.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    order: torch.Tensor
    offsets: torch.Tensor
    router_logits: torch.Tensor
    leading: tuple[int, ...]
    top_k: int
    feature_dim: int

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        """``[E]`` int32: how many rows each expert gets."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))
