"""``z_loss``: keeps the router's logits small.

>>> z_loss(torch.zeros(1, 8))                # log(8)^2
tensor(4.3241)
"""

from __future__ import annotations

from torch import Tensor

from moefy.nn.losses import gradients
from moefy.nn.losses.counting import accumulated


def z_loss(logits_TE: Tensor, *, mask_T: Tensor | None = None, softmax_TE: Tensor | None = None) -> Tensor:
    """``mean_t logsumexp(logits_t)^2``, which keeps the logits small: ST-MoE (Zoph et al. 2022, equation 5).

    Args:
        logits_TE: ``[..., T, E]``.
        mask_T: ``[..., T]`` bool, True = a token that counts.
        softmax_TE: ``[..., T, E]``, their softmax where the caller has it in fp32 (fp64 for fp64 logits), to save the
            making. It gets no gradient.

    Returns:
        ``[...]``; ``log(E)^2`` for zero logits.
    """
    return gradients.mean_squared_logsumexp(accumulated(logits_TE), mask_T, softmax_TE)
