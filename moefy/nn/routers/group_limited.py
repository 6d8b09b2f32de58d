"""Group-limited top-k: experts lie in groups (nodes), and a token chooses among those of its few best groups.

T tokens, E experts, n groups, K top-k.

    group score = sum of its best K / topk_groups scores     keep the best topk_groups     the K best in them

DeepSeek-V2 (2024, section 2.2.2) scores a group by its best expert, DeepSeek-V3 (2024, section 2.1.2) by the best
K / topk_groups, its code and torchtitan by the best two.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.config.fields import is_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import register_router
from moefy.nn.routers.scored import Score, ScoreTopK, top_k_index


def limit_to_groups(scores_TE: Tensor, n_groups: int, topk_groups: int, best: int) -> Tensor:
    """``scores_TE`` with -inf for the experts outside each token's best groups; carries no gradient.

    Args:
        scores_TE: what the experts are ranked by, group after group.
        n_groups: a divisor of E.
        topk_groups: how many groups a token keeps.
        best: how many experts count in a group's score.
    """
    grouped_TGS = scores_TE.detach().unflatten(1, (n_groups, -1))
    group_TG = grouped_TGS.topk(best, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG = kept_TG.scatter(1, top_k_index(group_TG, topk_groups), True)
    return grouped_TGS.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(1)


@register_router("group_limited")
class GroupLimitedRouter(ScoreTopK):
    """Sigmoid scores by default, as DeepSeek-V3.

    Args:
        top_k: K, at most the experts in ``topk_groups`` groups.
        n_groups: how many groups; 1 limits nothing.
        topk_groups: how many of them a token may use; ``None`` is half of them.
        group_best: how many experts make a group's score; ``None`` is ``K // topk_groups``, at least 1.
        options: of ``ScoreTopK``.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "top K within each token's best groups of experts"
    source: ClassVar[str] = "DeepSeek-V2 and V3"
    own_score: ClassVar[Score] = "sigmoid"
    own_renormalize: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        n_groups: int = 1,
        topk_groups: int | None = None,
        group_best: int | None = None,
        **options: Any,
    ) -> None:
        if not is_int(n_groups, 1) or num_experts % n_groups:
            expected = f"a divisor of num_experts = {num_experts}"
            raise ConfigError("n_groups", got=n_groups, expected=expected)
        topk_groups = max(1, n_groups // 2) if topk_groups is None else topk_groups
        if not (is_int(topk_groups, 1) and topk_groups <= n_groups):
            raise ConfigError("topk_groups", got=topk_groups, expected=f"1 <= topk_groups <= {n_groups}")
        size = num_experts // n_groups
        if group_best is not None and not (is_int(group_best, 1) and group_best <= size):
            raise ConfigError("group_best", got=group_best, expected=f"1 <= group_best <= {size}")
        self.n_groups, self.topk_groups, self.group_best = n_groups, topk_groups, group_best
        super().__init__(d_model, num_experts, top_k, **options)

    def check_top_k(self, top_k: int) -> None:
        """Raise ``ConfigError`` also when the chosen groups hold fewer than K experts."""
        super().check_top_k(top_k)
        limit = self.topk_groups * (self.num_experts // self.n_groups)
        if top_k > limit:
            raise ConfigError("top_k", got=top_k, expected=f"top_k <= {limit}, the experts in topk_groups")

    @property
    def ranks_logits(self) -> bool:
        """Whether there is one group only, so that the logits alone pick the experts."""
        return self.n_groups == 1

    def ranking(self, scores_TE: Tensor, top_k: int) -> Tensor:
        """The scores, -inf outside each token's best groups."""
        if self.n_groups == 1:
            return scores_TE
        best = max(1, top_k // self.topk_groups) if self.group_best is None else self.group_best
        best = min(best, self.num_experts // self.n_groups)
        return limit_to_groups(scores_TE, self.n_groups, self.topk_groups, best)
