"""``permute``: copy each token once per chosen expert, sorted by expert; its gradient sums the copies.

T tokens, D width, K top-k, N = T*K rows.

Contract: row r is token ``order[r] // K``. The backward op ``sum_slots`` adds a token's K rows in the order of its
choices, in fp32 (fp64 for fp64), and rounds once; no atomics, so the bits repeat. The two are each other's gradient.

    >>> permute(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0, 2, 3]), top_k=2).T
    tensor([[1., 1., 2., 2.]])
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moefy.ops import checks
from moefy.ops.cpu.sums import weighted_sum
from moefy.ops.cuda.choose import by_triton
from moefy.ops.cuda.rows import sum_slots_cuda
from moefy.ops.library import differentiable, register


def _kernel(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return x_TD.index_select(0, checks.slots("permute", order_N) // top_k)


def _fake(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return x_TD.new_empty((order_N.shape[0], x_TD.shape[1]))


def _sum_kernel(rows_ND: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return weighted_sum(rows_ND, None, checks.slots("sum_slots", order_N), top_k)


def _sum_fake(rows_ND: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return rows_ND.new_empty((order_N.shape[0] // top_k, rows_ND.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order_N, ctx.top_k = inputs
    ctx.save_for_backward(order_N)


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
    return _sum_op(grad_ND, ctx.saved_tensors[0], ctx.top_k), None, None


def _sum_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
    return _op(grad_TD, ctx.saved_tensors[0], ctx.top_k), None, None


_op = register("permute(Tensor x, Tensor order, int top_k) -> Tensor", kernel=_kernel, fake=_fake)
_sum_op = register(
    "sum_slots(Tensor rows, Tensor order, int top_k) -> Tensor",
    kernel=_sum_kernel,
    fake=_sum_fake,
    cuda=by_triton(sum_slots_cuda, _sum_kernel),
)
differentiable(_op, setup=_setup, backward=_backward)
differentiable(_sum_op, setup=_setup, backward=_sum_backward)


def permute(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Rows of ``x`` sorted by expert: ``x[order // top_k]``.

    Args:
        x_TD: [T, D] floating point, any strides.
        order_N: [T*K] int64 from ``sort_by_expert``.
        top_k: K >= 1.

    Returns:
        [T*K, D] in x's dtype. Differentiable in x, to any order.

    Raises:
        ShapeError, DtypeError, DeviceError, ConfigError: for arguments that are not as above.
        RoutingError: for an ``order`` entry outside ``[0, T*K)`` (CPU).
    """
    checks.shape("permute", "x", x_TD, "[T, D]", 2)
    checks.floating("permute", "x", x_TD)
    checks.order("permute", order_N)
    checks.top_k("permute", top_k)
    checks.same_device("permute", "x", x_TD, {"order": order_N})
    checks.size("permute", "order length", order_N.shape[0], x_TD.shape[0] * top_k, "T * top_k")
    return _op(x_TD, order_N, top_k)
