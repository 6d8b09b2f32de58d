"""Losses that are squared coefficients of variation: of the experts' scores (importance), of their estimated load.

    >>> cv_squared(torch.tensor([1.0, 1.0])), cv_squared(torch.tensor([2.0, 0.0]))
    (tensor(0.), tensor(2.))

Shape letters: T tokens, E experts, K top-k. Axes in front of T are batches, and the result keeps them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.errors import ConfigError
from moefy.nn.losses import gradients
from moefy.nn.losses.counting import Assignment, accumulated, slot_ids, sum_scores
from moefy.nn.losses.registry import balance_loss


def cv_squared(value_E: Tensor) -> Tensor:
    """``var / (mean^2 + 1e-10)`` over the last axis with the unbiased variance; 0 for one expert.

    Shazeer et al. 2017, equation 7.
    """
    return torch.zeros_like(value_E[..., 0]) if value_E.shape[-1] == 1 else gradients.cv_squared(value_E)


@balance_loss("importance", counted=False)
def importance(scores_TE: Tensor, slots: Assignment) -> Tensor:
    """``CV^2`` of the experts' summed scores: 0 for a uniform router, E when all goes to one expert with certainty.

    V-MoE (Riquelme et al. 2021, appendix A) and Tutel take the softmax over all experts; Shazeer et al. 2017
    (equation 6) the sparse gates, for which there is ``sparse_importance``. The slots are not read.

    Raises:
        ConfigError: for a ``reduce``: no slots are counted, so there is no global-batch scope.
    """
    if slots.reduce is not None:
        raise ConfigError("reduce", got=slots.reduce, expected="None: importance counts no slots")
    return cv_squared(sum_scores(scores_TE, slots.mask_T))


def sparse_importance(
    weights_TK: Tensor, index_TK: Tensor, num_experts: int, *, mask_T: Tensor | None = None
) -> Tensor:
    """``CV^2`` of the experts' summed routing weights: Shazeer et al. 2017, equation 6.

    Args:
        weights_TK: ``[..., T, K]`` the weights of the chosen experts.
        index_TK: ``[..., T, K]`` these experts.
        num_experts: E.
        mask_T: ``[..., T]`` bool, True = a token that counts.
    """
    slot_N = slot_ids(Assignment(index_TK, num_experts, mask_T))
    weights_N = accumulated(weights_TK).flatten(-2)
    sums_X = weights_N.new_zeros((*weights_N.shape[:-1], num_experts + 2))
    return cv_squared(sums_X.scatter_add(-1, slot_N, weights_N)[..., 1:-1])


def smooth_load(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    std: Tensor | float,
    top_k: int,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """``CV^2`` of a smooth estimate of each expert's load: Shazeer et al. 2017, equations 8 to 11.

    ``load_e = sum_t Phi((clean_te - threshold_te) / std_te)``, the probability that e is among the K best when its
    noise is drawn again; the threshold is the K-th largest noisy score of the *other* experts. 0 for K = E.

    Args:
        clean_TE: ``[..., T, E]`` scores without noise.
        noisy_TE: ``[..., T, E]`` the same with noise.
        std: ``[..., T, E]`` or a number, the noise's standard deviation, > 0.
        top_k: K.
        mask_T: ``[..., T]`` bool, True = a token that counts.
    """
    clean_TE, noisy_TE = accumulated(clean_TE), accumulated(noisy_TE)
    if top_k == clean_TE.shape[-1]:
        return clean_TE.new_zeros(clean_TE.shape[:-2])
    best_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    inside, outside = best_TK[..., top_k, None], best_TK[..., top_k - 1, None]
    threshold_TE = torch.where(noisy_TE > inside, inside, outside)
    return cv_squared(sum_scores(torch.special.ndtr((clean_TE - threshold_TE) / std), mask_T))


def load_importance(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """Half of ``CV^2(sum_t softmax(clean_te))`` plus ``CV^2(sum_t Phi((clean_te - threshold_t) / std))``, in logits.

    Tutel's load and importance loss with both sides of the difference in one unit. ``threshold_t`` is the noisy logit
    of the last chosen expert. Tutel's ``std`` is its ``gate_noise / E``.

    Args:
        clean_TE: ``[..., T, E]`` logits without noise.
        noisy_TE: ``[..., T, E]`` the same with noise.
        index_TK: ``[..., T, K]`` the chosen experts, best first, all inside ``[0, E)``.
        std: the noise's standard deviation, > 0.
        mask_T: ``[..., T]`` bool, True = a token that counts.

    Raises:
        ConfigError: for a ``std`` that is not positive.
    """
    return _load_importance(clean_TE, clean_TE, noisy_TE, index_TK, std, mask_T)


def tutel_load_importance(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    *,
    mask_T: Tensor | None = None,
) -> Tensor:
    """``load_importance`` as Tutel computes it: *probabilities* minus a threshold in logits, inside ``Phi``."""
    return _load_importance(
        torch.softmax(accumulated(clean_TE), -1), clean_TE, noisy_TE, index_TK, std, mask_T
    )


def _load_importance(
    minuend_TE: Tensor,
    clean_TE: Tensor,
    noisy_TE: Tensor,
    index_TK: Tensor,
    std: float,
    mask_T: Tensor | None,
) -> Tensor:
    if not std > 0:
        raise ConfigError("std", got=std, expected="a number > 0: the load loss needs a noisy router")
    threshold_T1 = accumulated(noisy_TE).gather(-1, index_TK[..., -1:])
    load_TE = torch.special.ndtr((accumulated(minuend_TE) - threshold_T1) / std)
    scores_TE = torch.softmax(accumulated(clean_TE), -1)
    return (cv_squared(sum_scores(scores_TE, mask_T)) + cv_squared(sum_scores(load_TE, mask_T))) / 2
