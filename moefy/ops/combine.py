"""``combine``: back from rows sorted by expert to tokens, as the sum weighted by the router.

T tokens, D width, K top-k, N = T*K rows.

Contract: ``out[t] = sum_k w[t, k] * y[row of slot t*K + k]``, added in the order of the choices in fp32 (fp64 if y or
w is fp64) and rounded once to y's dtype. Rows of dropped slots are zero by contract of ``grouped_linear``. No atomics:
the bits repeat.

    >>> y_ND, w_TK = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.25, 0.75]])
    >>> combine(y_ND, w_TK, order_N=torch.tensor([1, 0]))       # row 0 holds slot 1
    tensor([[1.7500]])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.ops import checks
from moefy.ops.cpu.sums import accumulation_dtype, weighted_sum
from moefy.ops.cuda.choose import by_triton
from moefy.ops.cuda.rows import combine_cuda
from moefy.ops.library import differentiable, register


def _kernel(y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    checks.slots("combine", order_N)
    return weighted_sum(y_ND, top_k_weights_TK, order_N, top_k_weights_TK.shape[1])


def _fake(y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    return y_ND.new_empty((top_k_weights_TK.shape[0], y_ND.shape[1]))


def _backward_kernel(
    grad_TD: Tensor, y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    """``dy[r] = w[slot r] * grad[token r]`` and ``dw[slot r] = <grad[token r], y[r]>``."""
    checks.slots("combine_backward", order_N)
    dtype = accumulation_dtype(y_ND, top_k_weights_TK)
    grad_ND = grad_TD.index_select(0, order_N // top_k_weights_TK.shape[1]).to(dtype)
    weight_N1 = top_k_weights_TK.reshape(-1).index_select(0, order_N).unsqueeze(1).to(dtype)
    dw_N = torch.linalg.vecdot(grad_ND, y_ND.to(dtype)).to(top_k_weights_TK.dtype)
    dw_TK = torch.zeros_like(dw_N).scatter_(0, order_N, dw_N).view(top_k_weights_TK.shape)
    return grad_ND.mul_(weight_N1).to(y_ND.dtype), dw_TK


def _backward_fake(
    grad_TD: Tensor, y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    return y_ND.new_empty(y_ND.shape), top_k_weights_TK.new_empty(top_k_weights_TK.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
    y_ND, weights_TK, order_N = ctx.saved_tensors
    return *_backward_op(grad_TD, y_ND, weights_TK, order_N), None


def _double_backward(ctx: Any, ggy_ND: Tensor, ggw_TK: Tensor) -> tuple[Tensor | None, ...]:
    """The backward is linear in grad and bilinear in (grad, (y, w)), so its gradients are the same two ops."""
    grad_TD, y_ND, weights_TK, order_N = ctx.saved_tensors
    ggy_ND = ggy_ND.to(y_ND.dtype)
    dgrad_TD = _op(ggy_ND, weights_TK, order_N) + _op(y_ND, ggw_TK, order_N)
    return dgrad_TD, *_backward_op(grad_TD, ggy_ND, ggw_TK, order_N), None


_op = register(
    "combine(Tensor y, Tensor top_k_weights, Tensor order) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    cuda=by_triton(combine_cuda, _kernel),
)
_backward_op = register(
    "combine_backward(Tensor grad, Tensor y, Tensor top_k_weights, Tensor order) -> (Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
)
differentiable(_op, setup=_setup, backward=_backward)
differentiable(_backward_op, setup=_setup, backward=_double_backward)


def combine(y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """Weighted sum of each token's rows.

    Args:
        y_ND: [T*K, D] expert outputs sorted by expert, floating point, any strides.
        top_k_weights_TK: [T, K] floating point; fp32 in a MoE layer (fp64 when it runs in fp64).
        order_N: [T*K] int64 from ``sort_by_expert``.

    Returns:
        [T, D] in y's dtype. Differentiable in y and in the weights, to any order.

    Raises:
        ShapeError, DtypeError, DeviceError: for arguments that are not as above.
        RoutingError: for an ``order`` entry outside ``[0, T*K)`` (CPU).
    """
    checks.shape("combine", "y", y_ND, "[T*K, D]", 2)
    checks.floating("combine", "y", y_ND)
    checks.shape("combine", "top_k_weights", top_k_weights_TK, "[T, K]", 2)
    checks.floating("combine", "top_k_weights", top_k_weights_TK)
    checks.order("combine", order_N)
    checks.same_device("combine", "y", y_ND, {"top_k_weights": top_k_weights_TK, "order": order_N})
    checks.top_k("combine", top_k_weights_TK.shape[1])
    slots = top_k_weights_TK.shape[0] * top_k_weights_TK.shape[1]
    checks.size("combine", "order length", order_N.shape[0], slots, "T * K")
    checks.size("combine", "number of rows of y", y_ND.shape[0], slots, "T * K")
    return _op(y_ND, top_k_weights_TK, order_N)
