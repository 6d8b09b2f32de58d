"""Back from rows to tokens: each token's K rows, weighted or not, added in the order of its choices.

Contract: ``out[t] = sum_k q[t, k] * y[row of slot t*K + k]`` in fp32, one rounding; no atomics, so the bits repeat.
The row of each slot comes from the schedule.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moefy.triton_ops.launch import jit


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
    block = min(2048, triton.next_power_of_2(width))
    _gather_sum_kernel[(tokens, triton.cdiv(width, block))](
        y_ND, weights_TK if weights_TK is not None else y_ND, row_of_slot_N, out_TD,
        width, y_ND.stride(0), out_TD.stride(0),
        K=top_k, WEIGHTED=weights_TK is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


@jit
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


def gather(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """[N, D]: the token of each row. A copy that pays where a product would read the rows again and again."""
    return x_TD.index_select(0, order_N if top_k == 1 else order_N // top_k)
