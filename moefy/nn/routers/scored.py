"""Scores of all experts first, then the K best: softmax (V-MoE, DeepSeek-MoE) or sigmoid (DeepSeek-V3).

T tokens, E experts, K top-k.

    softmax_top_k    s = softmax(logits)     w = s[chosen]                      renormalize: w / sum(w)
    sigmoid          s = sigmoid(logits)     w = s[chosen] / sum(s[chosen])     renormalize=False: s[chosen]

Contract: ``scale`` multiplies the weights at the end (DeepSeek's routed scaling factor). Scores rise with the logits,
so the logits pick the experts: no two of them tie because a sigmoid saturates.

    >>> renormalized(torch.tensor([[0.0, 0.0, -9.0]]), torch.tensor([[0, 1]]))
    tensor([[0.5000, 0.5000]])
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moefy import ops
from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn.routers.base import Router, register_router
from moefy.nn.routing.routing import Choice

Score = Literal["softmax", "sigmoid"]


def top_k_index(scores_TE: Tensor, top_k: int) -> Tensor:
    """``[T, K]`` int64: the K best, best first; ties go to the lowest id, NaN sorts first. Carries no gradient."""
    return ops.top_k_softmax(scores_TE.detach(), top_k)[1]


def all_scores(logits_TE: Tensor, score: Score) -> Tensor:
    """``[T, E]``: the scores of all experts."""
    return torch.softmax(logits_TE, dim=-1) if score == "softmax" else torch.sigmoid(logits_TE)


def renormalized(logits_TE: Tensor, index_TK: Tensor, score: Score = "softmax") -> Tensor:
    """``[T, K]``: the scores of the chosen experts, divided by their sum.

    Computed as a softmax over log-scores, which sums to 1 also where all scores underflow.
    """
    chosen_TK = logits_TE.gather(1, index_TK)
    return torch.softmax(chosen_TK if score == "softmax" else F.logsigmoid(chosen_TK), dim=-1)


@register_router("softmax_top_k")
class ScoreTopK(Router):
    """Softmax over all experts, then the K best.

    Args:
        renormalize: divide the K weights by their sum (Qwen's ``norm_topk_prob``, torchtitan's ``route_norm``).
            ``None`` is the class's own: False for "softmax_top_k", True for the others.
        scale: multiplies the weights; DeepSeek-V3 has 2.5.
        score: "softmax" or "sigmoid"; ``None`` is the class's own.
        options: of ``Router``.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "c = top K of s;  w = s[c], or divided by their sum"
    source: ClassVar[str] = "V-MoE, DeepSeek-MoE, Qwen"
    own_score: ClassVar[Score] = "softmax"
    own_renormalize: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool | None = None,
        scale: float = 1.0,
        score: Score | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        score = self.own_score if score is None else score
        if score not in get_args(Score):
            raise ConfigError("score", got=score, expected=f"one of {get_args(Score)}")
        if not (is_finite(scale) and scale > 0):
            raise ConfigError("scale", got=scale, expected="a finite number > 0")
        self.score: Score = score
        self.scale = scale
        self.renormalize = self.own_renormalize if renormalize is None else renormalize

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights are renormalised and not scaled."""
        return self.renormalize and self.scale == 1

    def ranking(self, scores_TE: Tensor, top_k: int) -> Tensor:
        """``[T, E]``: the values whose K best are chosen, unless ``ranks_logits``."""
        return scores_TE

    @property
    def ranks_logits(self) -> bool:
        """Whether the logits alone pick the experts."""
        return True

    def choose(self, logits_TE: Tensor, top_k: int) -> Choice:
        """The K best, weighted by their scores."""
        if self.ranks_logits and self.renormalize and self.score == "softmax":  # one fused op does it
            choice = super().choose(logits_TE, top_k)
            choice.weights = choice.weights * self.scale if self.scale != 1 else choice.weights
            return choice
        scores_TE = all_scores(logits_TE, self.score)
        ranked_TE = logits_TE if self.ranks_logits else self.ranking(scores_TE.detach(), top_k)
        index_TK = top_k_index(ranked_TE, top_k)
        if self.renormalize:
            weights_TK = renormalized(logits_TE, index_TK, self.score)
        else:
            weights_TK = scores_TE.gather(1, index_TK)
        if self.scale != 1:
            weights_TK = weights_TK * self.scale
        if self.score == "sigmoid":  # as DeepSeek-V3's balance loss takes them (2024, equation 19)
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE, scores=scores_TE)


@register_router("sigmoid")
class SigmoidTopK(ScoreTopK):
    """Sigmoid scores, the K best, divided by their sum: DeepSeek-V3 (2024, equations 13 to 15) without its bias."""

    formula: ClassVar[str] = "w = sigmoid(l)[c] / sum * scale"
    source: ClassVar[str] = "DeepSeek-V3"
    own_score: ClassVar[Score] = "sigmoid"
    own_renormalize: ClassVar[bool] = True
