"""``permute``: copy each token once per chosen expert, sorted by expert; its gradient sums the copies.

T tokens, D width, K top-k, N = T*K rows.

Contract: row r is token ``order[r] // K``. The backward op ``sum_slots`` adds a token's K rows in the order of its
choices, in fp32 (fp64 for fp64), and rounds once; no atomics, so the bits repeat. The two are each other's gradient.

    >>> permute(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0, 2, 3]), top_k=2).T
    tensor([[1., 1., 2., 2.]])
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.ops import checks
from moefy.ops.cuda.rows import by_triton, sum_slots_cuda
from moefy.ops.library import differentiable, register

# How many elements a CPU widens at a time, 512 KiB in fp32; 16 or 32 Ki elements took up to twice the time.
WIDE_ELEMENTS = 1 << 17


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 when any of ``tensors`` is fp64."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def place_of_slot(order_N: Tensor, place_N: Tensor, top_k: int) -> Tensor:
    """``place[row of slot]`` as [T, K], where ``order`` is the slot of each row."""
    return torch.zeros_like(order_N).scatter_(0, order_N, place_N).view(-1, top_k)


def sum_places(y_PD: Tensor, weights_TK: Tensor | None, place_TK: Tensor) -> Tensor:
    """Per token the sum of ``y`` at its K places, weighted if ``weights_TK`` is given: [T, D] in y's dtype.

    ``embedding_bag`` reads each row once and adds in registers, in the order of the choices. On 2 CPU cores, T=2048,
    D=768, K=2 in fp32: 0.39 ms; K gathers and multiply-adds of [T, D] 0.97 ms, a gather and a sum 8 ms. A CPU widens
    half types some tokens at a time, which takes no fresh memory.
    """
    if weights_TK is None:  # half types are added in fp32 by themselves
        return F.embedding_bag(place_TK, y_PD, mode="sum")
    weights_TK = weights_TK.to(accumulation_dtype(y_PD, weights_TK))
    if y_PD.dtype is weights_TK.dtype or y_PD.device.type != "cpu":
        return _bags(y_PD, weights_TK, place_TK).to(y_PD.dtype)
    tokens = max(1, WIDE_ELEMENTS // max(1, place_TK.shape[1] * y_PD.shape[1]))
    out_TD = y_PD.new_empty(place_TK.shape[0], y_PD.shape[1])
    for out_MD, weights_MK, place_MK in zip(
        out_TD.split(tokens), weights_TK.split(tokens), place_TK.split(tokens), strict=True
    ):
        rows = y_PD.index_select(0, place_MK.reshape(-1))
        there_MK = torch.arange(len(rows)).view(place_MK.shape)
        out_MD.copy_(_bags(rows, weights_MK, there_MK))
    return out_TD


def _bags(y_PD: Tensor, weights_TK: Tensor, place_TK: Tensor) -> Tensor:
    """In the dtype of the weights."""
    return F.embedding_bag(place_TK, y_PD.to(weights_TK.dtype), mode="sum", per_sample_weights=weights_TK)


def weighted_sum(y_ND: Tensor, weights_TK: Tensor | None, order_N: Tensor, top_k: int) -> Tensor:
    """``sum_places`` of rows that lie as they are sorted."""
    rows_N = torch.arange(order_N.shape[0], device=order_N.device)
    return sum_places(y_ND, weights_TK, place_of_slot(order_N, rows_N, top_k))


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
