"""Expert choice: each expert takes the C tokens that score it highest (Zhou et al. 2022, section 3.1).

T tokens, E experts, C = min(T, ceil(T * factor / E)) tokens per expert.

    S = softmax(logits) over the experts     expert e takes the C largest of S[:, e]     w = S[t, e]

Contract: every expert gets the same number of tokens, without a loss. NOT CAUSAL: whether a token is taken depends on
all tokens of the batch, later ones included, so a decoder must not generate with it. A token may have any number of
experts, also none; it has K = E slots, slot e for expert e, and the slots that were not taken are dropped. Of equal
scores the lower token wins.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routing.routing import Choice


def taken_tokens(scores_TE: Tensor, seats: int | Tensor, mask_T: Tensor | None = None) -> Tensor:
    """``[T, E]`` bool: whether the expert takes the token.

    Args:
        scores_TE: what tokens are ranked by; NaN ranks first.
        seats: C.
        mask_T: the tokens that may be taken.
    """
    ranked_TE = scores_TE.detach()
    if mask_T is not None:
        ranked_TE = ranked_TE.masked_fill(~mask_T.unsqueeze(1), float("-inf"))
    order_TE = ranked_TE.argsort(dim=0, descending=True, stable=True)
    place_T1 = torch.arange(scores_TE.shape[0], device=scores_TE.device).unsqueeze(1)
    place_TE = torch.zeros_like(order_TE).scatter(0, order_TE, place_T1.expand_as(order_TE))
    taken_TE = place_TE < seats
    return taken_TE if mask_T is None else taken_TE & mask_T.unsqueeze(1)


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Expert choice. Not causal.

    Args:
        top_k: experts per token on average, unless ``factor`` says otherwise.
        factor: experts per token on average, the paper's capacity factor; ``None`` is ``top_k``.
        options: of ``Router``.

    Raises:
        ConfigError: for a factor outside ``(0, E]``.
    """

    formula: ClassVar[str] = "each expert takes its C best tokens; not causal"
    source: ClassVar[str] = "Zhou et al. 2022"

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, factor: float | None = None, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if factor is not None and not (is_finite(factor) and 0 < factor <= num_experts):
            raise ConfigError("factor", got=factor, expected=f"0 < factor <= num_experts = {num_experts}")
        self.factor = factor

    @property
    def sums_to_one(self) -> bool:
        """False: a token has as many experts as take it, also none."""
        return False

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The tokens of each expert, as slots of the tokens."""
        logits_TE = self.logits(x, call.feature_dim)
        scores_TE = torch.softmax(logits_TE, dim=-1)
        factor = Fraction(call.top_k if self.factor is None else self.factor).limit_denominator(10**6)
        share, parts = factor.numerator, factor.denominator * self.num_experts
        tokens = logits_TE.shape[0] if call.mask is None else call.mask.sum()
        taken_TE = taken_tokens(scores_TE, -(-(tokens * share) // parts), call.mask)
        ids_E = torch.arange(self.num_experts, device=logits_TE.device)
        return Choice(
            index=torch.where(taken_TE, ids_E, self.num_experts),
            weights=scores_TE.masked_fill(~taken_TE, 0.0),
            logits=logits_TE,
            scores=scores_TE,
        )
