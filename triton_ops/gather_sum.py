"""Between tokens and rows: each token's K rows added in the order of its choices, and a token copied to its K rows.

Contract: ``out[t] = sum_k q[t, k] * y[row of slot t*K + k]`` in fp32, one rounding; no atomics, so the bits repeat.
The row of each slot comes from the schedule.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from moefy.triton_ops.shared.blocks import cdiv, next_power_of_2
from moefy.triton_ops.shared.launch import kernel


def gather_sum(
    y_ND: Tensor, weights_TK: Tensor | None, row_of_slot_N: Tensor | None, top_k: int, out_TD: Tensor
) -> None:
    """Fill ``out_TD``.

    Args:
        y_ND: rows; features side by side.
        weights_TK: [T, K] contiguous, or None for a plain sum.
        row_of_slot_N: [N] int32, from a schedule.
        top_k: K.
        out_TD: the result; features side by side.
    """
    assert row_of_slot_N is not None, "the schedule was made without the order"
    tokens, width = out_TD.shape
    if not tokens or not width:
        return
    block = min(2048, next_power_of_2(width))
    _gather_sum_kernel[(tokens, cdiv(width, block))](
        y_ND, weights_TK if weights_TK is not None else y_ND, row_of_slot_N, out_TD,
        width, y_ND.stride(0), out_TD.stride(0),
        K=top_k, WEIGHTED=weights_TK is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


@kernel
def _gather_sum_kernel(
    y, weights, row_of_slot, out, width, stride_y, stride_out,
    K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        row = tl.load(row_of_slot + token * K + k).to(tl.int64)
        value = tl.load(y + row * stride_y + columns, known, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k).to(tl.float32)
        total += value
    tl.store(out + token * stride_out + columns, total.to(out.dtype.element_ty), known)


def spread(x_TD: Tensor, row_of_slot_N: Tensor | None, top_k: int) -> Tensor:
    """[N, D]: the token of each row. A copy that pays where a product would read the rows again and again.

    Each token is read once and written K times, so a copy moves hardly more than what it writes.
    """
    assert row_of_slot_N is not None, "the schedule was made without the order"
    tokens, width = x_TD.shape
    rows_ND = torch.empty((tokens * top_k, width), dtype=x_TD.dtype, device=x_TD.device)
    if not tokens or not width:
        return rows_ND
    block = min(2048, next_power_of_2(width))
    _spread_kernel[(tokens, cdiv(width, block))](
        x_TD, row_of_slot_N, rows_ND, width, x_TD.stride(0),
        K=top_k, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return rows_ND


@kernel
def _spread_kernel(x, row_of_slot, rows, width, stride_x, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < width
    value = tl.load(x + token * stride_x + columns, known, other=0.0)
    for k in range(K):
        row = tl.load(row_of_slot + token * K + k).to(tl.int64)
        tl.store(rows + row * width + columns, value, known)
