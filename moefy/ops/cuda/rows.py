"""The CUDA side of ``grouped_linear``, ``combine`` and ``permute``'s gradient.

Contract: the same results as the kernels in plain torch, to rounding, without waiting for the device.
"""

from __future__ import annotations

from torch import Tensor

from moefy.ops.cuda.choose import rows_contiguous


def grouped_linear_cuda(
    x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor
) -> Tensor:
    """``grouped_linear`` by Triton kernels."""
    from moefy.triton_ops.expert_ffn import Schedules
    from moefy.triton_ops.linear import linear

    out_NO = x_NI.new_empty((x_NI.shape[0], weight_EOI.shape[1]))
    tiles = Schedules(offsets_E, x_NI.shape[0], x_NI.dtype).of("linear")
    bias_EO = None if bias_EO is None else bias_EO.contiguous()
    linear(rows_contiguous(x_NI), rows_contiguous(weight_EOI), bias_EO, tiles, out_NO)
    return out_NO


def grouped_linear_backward_cuda(
    grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """``grouped_linear_backward`` by Triton kernels."""
    from moefy.triton_ops.expert_ffn import Schedules
    from moefy.triton_ops.linear import linear
    from moefy.triton_ops.weight_grad import bias_grad, weight_grad

    grad_NO, x_NI = rows_contiguous(grad_NO), rows_contiguous(x_NI)
    tiles = Schedules(offsets_E, x_NI.shape[0], x_NI.dtype).of("linear")
    shapes = (x_NI.shape, weight_EOI.shape, weight_EOI.shape[:2])
    dx_NI, dw_EOI, db_EO = (
        grad_NO.new_empty(s if wanted else (0,)) for s, wanted in zip(shapes, mask, strict=True)
    )
    no_order = offsets_E  # nothing is gathered
    if mask[0]:
        linear(grad_NO, rows_contiguous(weight_EOI), None, tiles, dx_NI, transposed=True)
    if mask[1]:
        weight_grad(grad_NO, x_NI, no_order, 1, tiles, dw_EOI)
    if mask[2]:
        bias_grad(grad_NO, None, no_order, 1, tiles, db_EO)
    return dx_NI, dw_EOI, db_EO


def combine_cuda(y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """``combine`` by a Triton kernel."""
    from moefy.triton_ops.gather_sum import gather_sum
    from moefy.triton_ops.shared.tiles import row_of_slot

    out_TD = y_ND.new_empty((top_k_weights_TK.shape[0], y_ND.shape[1]))
    weights_TK = top_k_weights_TK.contiguous()
    gather_sum(rows_contiguous(y_ND), weights_TK, row_of_slot(order_N), weights_TK.shape[1], out_TD)
    return out_TD


def sum_slots_cuda(rows_ND: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """``sum_slots`` by a Triton kernel."""
    from moefy.triton_ops.gather_sum import gather_sum
    from moefy.triton_ops.shared.tiles import row_of_slot

    out_TD = rows_ND.new_empty((order_N.shape[0] // top_k, rows_ND.shape[1]))
    gather_sum(rows_contiguous(rows_ND), None, row_of_slot(order_N), top_k, out_TD)
    return out_TD
