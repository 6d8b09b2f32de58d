"""Aux-loss-free balancing: a bias per expert picks the experts and is moved against the load (Wang et al. 2024).

T tokens, E experts, K top-k.

    c = the K best of s + b     w = s[c] / sum(s[c])     after each step:  b_e += rate * sign(mean n - n_e)

Contract: n counts the slots of all training forwards since the last step, over all ranks, recomputed ones once, padding
not at all. The update comes by itself right before an optimizer that holds ``weight`` steps (torchtitan's hook), so
that accumulation counts the whole batch and a step that GradScaler skips counts on. By hand: ``update_bias()``. The
bias is the DeepSeek-V3 ``e_score_correction_bias``; gradients do not reach it.

    >>> router = BiasBalancedRouter(16, 8, 2, rate=1e-3, n_groups=4, topk_groups=2, scale=2.5)      # DeepSeek-V3
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moefy.config.fields import is_finite
from moefy.errors import ConfigError
from moefy.nn import execution, losses
from moefy.nn.routers.base import Call, register_router
from moefy.nn.routers.group_limited import GroupLimitedRouter
from moefy.nn.routing.routing import Choice


def bias_step(counts_E: Tensor, rate: float) -> Tensor:
    """``[E]`` fp32: ``rate * sign(mean n - n_e)``; exact, since it compares ``sum n`` with ``E * n_e``."""
    return rate * torch.sign(counts_E.sum() - counts_E.shape[0] * counts_E).float()


@register_router("bias_balanced")
class BiasBalancedRouter(GroupLimitedRouter):
    """Selection by score + bias, weights by score.

    Args:
        rate: how far the bias moves at each step; 0.001 in DeepSeek-V3.
        auto_update: whether optimizers update the bias; if not, the training loop calls ``update_bias``.
        options: of ``GroupLimitedRouter``: ``n_groups``, ``score``, ``renormalize``, ``scale``, ...

    Buffers:
        ``expert_bias [E]``, saved with the model, fp32 whatever the model's dtype (0.001 is lost on a bf16 bias).

    Attributes:
        counts: ``[E]`` int64, the slots since the last update on this rank. No buffer, since DistributedDataParallel
            would overwrite it with the first rank's.
        group: the ranks whose counts are summed; ``None`` is all of them once ``torch.distributed`` is up.

    Raises:
        ConfigError: for values outside their domain.
    """

    formula: ClassVar[str] = "c = top K of score + b;  b += rate * sign(mean n - n)"
    source: ClassVar[str] = "Wang et al. 2024, DeepSeek-V3"
    expert_bias: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        rate: float = 1e-3,
        auto_update: bool = True,
        **options: Any,
    ) -> None:
        if not (is_finite(rate) and rate >= 0):
            raise ConfigError("rate", got=rate, expected="a finite number >= 0")
        self.rate, self.auto_update = rate, auto_update
        super().__init__(d_model, num_experts, top_k, **options)
        self.group: Any = None
        _ROUTERS.add(self)

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create the scorer, the bias per expert and the counts."""
        super().make_parameters(bias, **like)
        device = like.get("device")
        self.register_buffer("expert_bias", torch.empty(self.num_experts, dtype=torch.float32, device=device))
        counts = torch.empty(self.num_experts, dtype=torch.int64, device=device)
        self.counts = execution.static_counter(counts)

    def reset_parameters(self) -> None:
        """Draw ``weight``; the bias and the counts are zero."""
        super().reset_parameters()
        self.expert_bias.zero_()
        self.counts.zero_()

    @property
    def ranks_logits(self) -> bool:
        """False: scores plus bias pick the experts."""
        return False

    def ranking(self, scores_TE: Tensor, top_k: int) -> Tensor:
        """Scores and bias, -inf outside each token's groups."""
        return super().ranking(scores_TE + self.expert_bias.to(scores_TE.dtype), top_k)

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The experts by score and bias; a training forward counts them."""
        choice = super().decide(x, call)
        if self.training:
            self.count(choice.index, call.mask)
        return choice

    @torch.no_grad()
    def count(self, index_TK: Tensor, mask_T: Tensor | None = None) -> None:
        """Add these slots to ``counts``, unless a checkpoint runs the forward again."""
        if execution.is_forward():
            counts_E = losses.assignment_totals(index_TK, self.num_experts, mask_T)[:-1]
            if not torch.compiler.is_dynamo_compiling() and self.counts.is_meta and not counts_E.is_meta:
                self.counts = execution.static_counter(torch.zeros_like(counts_E))
            execution.accumulate(self.counts, counts_E)

    def update_bias(self) -> None:
        """Move the bias against the load since the last update, of all ranks of ``group``; all must call it."""
        update_biases([self])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype not in (torch.float32, torch.float64):
            self.expert_bias = bias.to(self.expert_bias.device)
        self.counts = execution.static_counter(fn(self.counts))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}  # process groups do not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _ROUTERS.add(self)


@torch.no_grad()
def update_biases(routers: Sequence[BiasBalancedRouter]) -> None:
    """``update_bias`` of several routers, with one all-reduce for those of one group and device."""
    by_place: dict[tuple[int, torch.device], list[BiasBalancedRouter]] = {}
    for router in routers:
        by_place.setdefault((id(router.group), router.counts.device), []).append(router)
    for together in by_place.values():
        counts = torch.cat([router.counts for router in together])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=together[0].group)
        pieces = counts.split([router.num_experts for router in together])
        for router, counts_E in zip(together, pieces, strict=True):
            router.expert_bias.add_(bias_step(counts_E, router.rate))
            router.counts.zero_()


_ROUTERS: weakref.WeakSet[BiasBalancedRouter] = weakref.WeakSet()
# Optimizers that step inside another one's step: a ZeroRedundancyOptimizer's own, which holds this rank's share alone.
_INNER: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Update the routers whose ``weight`` the optimizer holds, on every rank in the order of its parameters."""
    if optimizer in _INNER:
        return
    _INNER.update(value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    place = {id(p): i for i, p in enumerate(held)}
    due = [r for r in _ROUTERS if r.auto_update and r.training and id(r.weight) in place]
    update_biases(sorted(due, key=lambda router: place[id(router.weight)]))


register_optimizer_step_pre_hook(_before_step)
