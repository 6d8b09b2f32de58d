"""``top_k_softmax``: each token's K best experts and the softmax over their scores alone.

T tokens, E experts, K top-k.

Contract: ``index[t]`` holds K different ids, best first; ties go to the lowest id. NaN counts as the largest score and
gives NaN weights for its own token, but still valid ids. The softmax is computed in fp32 (fp64 for fp64) and rounded
once to the scores' dtype. Its gradient is another op, dense in E: zero where nothing was chosen.

    >>> top_k_softmax(torch.tensor([[0.0, 2.0, 2.0]]), top_k=2)
    (tensor([[0.5000, 0.5000]]), tensor([[1, 2]]))

The formula is Mixtral's (Jiang et al. 2024, section 2.1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.errors import ConfigError
from moefy.ops import checks
from moefy.ops.cpu.sums import accumulation_dtype
from moefy.ops.cuda.routing import top_k_backward_cuda, top_k_cuda
from moefy.ops.library import autocast_off, differentiable, register


def _kernel(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values_TK, index_TK = _largest(logits_TE, top_k)
    return torch.softmax(values_TK, dim=-1), index_TK


def _largest(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest, best first, ties and NaN as the contract says.

    A stable sort says which of two equal scores comes first; ``topk`` does not, but takes a quarter of the time (1.4
    against 5.8 ms, T=1024, E=256). So a CPU takes it unless there are ties; a GPU would have to wait for the answer.
    """
    if logits_TE.device.type == "cpu":
        values_TJ, index_TJ = logits_TE.topk(min(top_k + 1, logits_TE.shape[1]), dim=-1)
        if bool((values_TJ[:, :-1] > values_TJ[:, 1:]).all()):  # nothing is greater than NaN
            return values_TJ[:, :top_k], index_TJ[:, :top_k].contiguous()
    sorted_TE, index_TE = torch.sort(logits_TE, dim=-1, descending=True, stable=True)
    return sorted_TE[:, :top_k], index_TE[:, :top_k].contiguous()


def _fake(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape), logits_TE.new_empty(shape, dtype=torch.int64)


def _softmax_backward(grad_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """``w * (grad - sum(w * grad))``."""
    return weights_TK * (grad_TK - (weights_TK * grad_TK).sum(1, keepdim=True))


def _backward_kernel(grad_TK: Tensor, weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    dtype = accumulation_dtype(weights_TK)
    chosen_TK = _softmax_backward(grad_TK.to(dtype), weights_TK.to(dtype)).to(weights_TK.dtype)
    return weights_TK.new_zeros((weights_TK.shape[0], num_experts)).scatter_(1, index_TK, chosen_TK)


def _backward_fake(grad_TK: Tensor, weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    return weights_TK.new_empty((weights_TK.shape[0], num_experts))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.num_experts = inputs[0].shape[1]


def _backward(ctx: Any, grad_TK: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    return _backward_op(grad_TK, *ctx.saved_tensors, ctx.num_experts), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _double_backward(ctx: Any, gg_TE: Tensor) -> tuple[Tensor | None, ...]:
    """Of ``sum_k gg_k * w_k * (grad_k - s)``, where ``s = sum(w * grad)``, in torch's ops: to any order."""
    grad_TK, weights_TK, index_TK = ctx.saved_tensors
    dtype = accumulation_dtype(weights_TK)
    with autocast_off(gg_TE.device.type):
        grad, weights = grad_TK.to(dtype), weights_TK.to(dtype)
        gg_TK = gg_TE.gather(1, index_TK).to(dtype)
        centred = grad - (weights * grad).sum(1, keepdim=True)
        dweights = gg_TK * centred - grad * (weights * gg_TK).sum(1, keepdim=True)
        dgrad = _softmax_backward(gg_TK, weights)
    return dgrad.to(grad_TK.dtype), dweights.to(weights_TK.dtype), None, None


_op = register(
    "top_k_softmax(Tensor logits, int top_k) -> (Tensor, Tensor)",
    kernel=_kernel,
    cuda=top_k_cuda(_kernel),
    fake=_fake,
)
_backward_op = register(
    "top_k_softmax_backward(Tensor grad, Tensor weights, Tensor index, SymInt num_experts) -> Tensor",
    kernel=_backward_kernel,
    cuda=top_k_backward_cuda(_backward_kernel),
    fake=_backward_fake,
)
differentiable(_op, setup=_setup, backward=_backward)
differentiable(_backward_op, setup=_setup_backward, backward=_double_backward)


def top_k_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose ``top_k`` experts per token.

    Args:
        logits_TE: [T, E] scores, floating point, any strides; fp32 in a MoE layer (fp64 when it runs in fp64).
        top_k: 1 <= K <= E.

    Returns:
        ``weights`` [T, K] in the scores' dtype, differentiable to any order, and ``index`` [T, K] int64.

    Raises:
        ShapeError, DtypeError, ConfigError: for arguments that are not as above.
    """
    checks.shape("top_k_softmax", "logits", logits_TE, "[T, E]", 2)
    checks.floating("top_k_softmax", "logits", logits_TE)
    checks.top_k("top_k_softmax", top_k)
    if top_k > logits_TE.shape[1]:
        raise ConfigError(
            "top_k", got=top_k, expected=f"top_k <= E = {logits_TE.shape[1]} (moefy.top_k_softmax)"
        )
    return _op(logits_TE, top_k)
