"""The z-loss and the coefficient of variation with hand-written gradients, since autograd's chains are long.

Contract: value and gradient are those of the plain formula, to any order. A compiler fuses the plain formula and
functorch transforms it, so they get that one. In eager mode a z-loss with its gradient takes 10 launches instead of 24,
a coefficient of variation 10 instead of 18.

    >>> mean_squared_logsumexp(torch.zeros(1, 1) + 3.0, None, None)
    tensor(9.)

Shape letters: T tokens, E experts. Axes in front are batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-10


def eager() -> bool:
    """Whether ops run one by one: nothing compiles, and functorch is not active."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


# -- logsumexp -----------------------------------------------------------------------------------------------------
def mean_squared_logsumexp(logits_TE: Tensor, mask_T: Tensor | None, softmax_TE: Tensor | None) -> Tensor:
    """``mean_t logsumexp(logits_t)^2`` over the tokens where ``mask_T``; 0 when there are none.

    Args:
        logits_TE: ``[..., T, E]``, fp32 or fp64.
        mask_T: ``[..., T]`` bool; ``None`` means all.
        softmax_TE: the softmax of ``logits_TE``, where the caller has it. It gets no gradient. A softmax of another
            dtype is not used.

    Returns:
        ``[...]``.
    """
    if eager():
        if softmax_TE is not None:
            softmax_TE = softmax_TE.detach() if softmax_TE.dtype is logits_TE.dtype else None
        return _MeanSquaredLogSumExp.apply(logits_TE, mask_T, softmax_TE)  # type: ignore[no-any-return]
    if mask_T is not None:  # a masked NaN must not count, nor get a gradient
        logits_TE = torch.where(mask_T.unsqueeze(-1), logits_TE, 0.0)
    lse_T = _masked(torch.logsumexp(logits_TE, -1), mask_T)
    return lse_T.square().sum(-1) / _tokens(logits_TE, mask_T)


class _MeanSquaredLogSumExp(torch.autograd.Function):
    """Saves the softmax: it is the gradient of the logsumexp, and the logsumexp follows from it."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, mask_T: Tensor | None, softmax_TE: Tensor | None) -> Tensor:
        if softmax_TE is None:
            softmax_TE = torch.softmax(logits_TE, -1)
        # The largest probability is exp(max - logsumexp), and never small.
        lse_T = _masked(logits_TE.amax(-1) - softmax_TE.amax(-1).log_(), mask_T)
        ctx.tokens = _tokens(logits_TE, mask_T)
        ctx.save_for_backward(logits_TE, mask_T, softmax_TE, lse_T)
        square_T = lse_T.square()
        return square_T.mean(-1) if mask_T is None and square_T.shape[-1] else square_T.sum(-1) / ctx.tokens

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        logits_TE, mask_T, softmax_TE, lse_T = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: saved tensors need a graph
            softmax_TE = torch.softmax(logits_TE, -1)
            lse_T = _masked(torch.logsumexp(logits_TE, -1), mask_T)
        twice = grads[0] * (2 / ctx.tokens) if mask_T is None else grads[0] * 2 / ctx.tokens
        share_T = lse_T * twice.unsqueeze(-1)
        dlogits_TE = softmax_TE * share_T.unsqueeze(-1)
        if mask_T is not None:
            dlogits_TE = torch.where(mask_T.unsqueeze(-1), dlogits_TE, 0.0)
        return dlogits_TE, None, None


def _tokens(like_TE: Tensor, mask_T: Tensor | None) -> Tensor | int:
    """How many tokens there are to divide by, at least 1."""
    return max(like_TE.shape[-2], 1) if mask_T is None else mask_T.sum(-1).clamp(min=1)


def _masked(value_T: Tensor, mask_T: Tensor | None) -> Tensor:
    return value_T if mask_T is None else torch.where(mask_T, value_T, 0.0)


# -- the squared coefficient of variation --------------------------------------------------------------------------
def cv_squared(value_E: Tensor) -> Tensor:
    """``var / (mean^2 + 1e-10)`` over the last axis, E > 1, with the unbiased variance: ``[...]``."""
    if eager():
        return _CvSquared.apply(value_E)  # type: ignore[no-any-return]
    return value_E.var(-1) / (value_E.mean(-1).square() + EPSILON)


class _CvSquared(torch.autograd.Function):
    """``d/dv_e = 2 * ((v_e - mean) / (E - 1) - cv^2 * mean / E) / (mean^2 + 1e-10)``."""

    @staticmethod
    def forward(ctx: Any, value_E: Tensor) -> Tensor:
        mean_1, square_1, cv_1 = _moments(value_E)
        ctx.save_for_backward(value_E, mean_1, square_1, cv_1)
        return cv_1.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        value_E, mean_1, square_1, cv_1 = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative: saved tensors need a graph
            mean_1, square_1, cv_1 = _moments(value_E)
        experts = value_E.shape[-1]
        centred_E = torch.sub(value_E - mean_1, cv_1 * mean_1, alpha=(experts - 1) / experts)
        return centred_E * (grads[0].unsqueeze(-1) * (2 / (experts - 1)) / square_1)


def _moments(value_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[..., 1]`` each: the mean, its square as a divisor, the squared coefficient of variation."""
    var_1, mean_1 = torch.var_mean(value_E, -1, keepdim=True)
    square_1 = mean_1.square() + EPSILON
    return mean_1, square_1, var_1 / square_1
