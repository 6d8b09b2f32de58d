"""The gradients of the experts' matrices and biases.

N rows sorted by expert, O and I the two widths, E experts.

Contract: ``out[e] = g[rows of e].T @ x[rows of e]``, [E, O, I], fp32 accumulation over the rows in their order; an
expert without rows gets exact zeros. Either side may be given as tokens, which are gathered while they are read.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# Triton types the iterator of its own range as one that cannot be iterated.

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from moefy.triton_ops import hopper
from moefy.triton_ops.shared.blocks import (
    Kernel,
    blocks,
    cdiv,
    describable,
    descriptor,
    has_tma,
    precision,
    processors,
)
from moefy.triton_ops.shared.forms import Form, anything, form_for
from moefy.triton_ops.shared.launch import jit, kernel
from moefy.triton_ops.shared.tiles import Schedule, locate_matrix

Product = tuple[Tensor, Tensor, Tensor]
"""``(g, x, out)`` of a weight gradient."""


def weight_grad(
    g: Tensor, x: Tensor, order_N: Tensor, top_k: int, schedule: Schedule, out_EOI: Tensor,
    *, gather_g: bool = False, gather_x: bool = False, also: Product | None = None,
) -> None:  # fmt: skip
    """Fill ``out_EOI``, and what ``also`` asks for, in one launch where the kernel can.

    Args:
        g: [N, O], or tokens [T, O] with ``gather_g``; features side by side.
        x: [N, I], or tokens [T, I] with ``gather_x``; features side by side.
        order_N: [N] int64, the slot of each row.
        top_k: K.
        schedule: where each expert's rows lie; any tile size.
        out_EOI: the result: contiguous, or a block of columns of such a tensor.
        gather_g: whether row r of ``g`` is that of token ``order[r] // K``.
        gather_x: the same for ``x``.
        also: another ``(g, x, out)`` over the same rows, nothing of which is gathered.
    """
    call = WeightGradCall(g, x, order_N, top_k, schedule, out_EOI, gather_g, gather_x)
    form = form_for(FORMS, call)
    if also is not None and form.name == "hopper" and hopper.takes_weight_grad(*also):
        call = call._replace(also=also)
    elif also is not None:
        weight_grad(*also[:2], order_N, top_k, schedule, also[2])
    if out_EOI.numel():
        form.run(call)


class WeightGradCall(NamedTuple):
    """The arguments of ``weight_grad``; ``also`` only where the form takes both in one launch."""

    g: Tensor
    x: Tensor
    order_N: Tensor
    top_k: int
    schedule: Schedule
    out_EOI: Tensor
    gather_g: bool
    gather_x: bool
    also: Product | None = None


def _takes_hopper(call: WeightGradCall) -> bool:
    return not call.gather_g and not call.gather_x and hopper.takes_weight_grad(call.g, call.x, call.out_EOI)


def _run_hopper(call: WeightGradCall) -> None:
    from moefy.triton_ops.hopper.weight_grad import weight_grad as weight_grad_on_hopper

    weight_grad_on_hopper(call.g, call.x, call.schedule, call.out_EOI, call.also)


def _run(call: WeightGradCall) -> None:
    """Launch the Triton kernel, which reads either side by descriptor or by pointer."""
    g, x, order_N, schedule, out_EOI = call.g, call.x, call.order_N, call.schedule, call.out_EOI
    experts, height, width = out_EOI.shape
    kernel: Kernel = "gathered_weight_grad" if call.gather_g or call.gather_x else "weight_grad"
    block = blocks(kernel, g.dtype, order_N.shape[0], experts, g.device)
    tma = has_tma(g.device)
    g_tma, x_tma = tma and not call.gather_g and describable(g), tma and not call.gather_x and describable(x)
    tiles = experts * cdiv(height, block.m) * cdiv(width, block.n)
    _weight_grad_kernel[(min(tiles, block.per_processor * processors(g.device)),)](
        descriptor(g, block.k, block.m) if g_tma else g, descriptor(x, block.k, block.n) if x_tma else x,
        g, x, order_N, out_EOI,
        schedule.experts, schedule.next_counter(), experts, height, width, g.stride(0), x.stride(0), out_EOI.stride(1),
        K=call.top_k, GATHER_G=call.gather_g, GATHER_X=call.gather_x, G_TMA=g_tma, X_TMA=x_tma,
        PRECISION=precision(g.dtype), M=block.m, N=block.n, STEP=block.k, GROUP=block.group,
        **block.options,
    )  # fmt: skip


FORMS = (Form("hopper", _takes_hopper, _run_hopper), Form("pointer", anything, _run))


@jit
def _gather(
    base, order, row, end, columns, width, stride,
    K: tl.constexpr, GATHER: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """[STEP, columns] of rows from ``row`` on; those from ``end`` on are zero with ``MASKED``."""
    rows = row + tl.arange(0, STEP)
    mask = (columns < width)[None, :]
    if MASKED:
        mask = mask & (rows < end)[:, None]
    if GATHER and MASKED:
        rows = tl.load(order + rows, rows < end, other=0) // K
    elif GATHER:
        rows = tl.load(order + rows) // K
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask, other=0.0)


@kernel(do_not_specialize=["counter"])
def _weight_grad_kernel(
    g_tiles, x_tiles, g, x, order, out,
    experts, counter, num_experts, height, width, stride_g, stride_x, stride_out,
    K: tl.constexpr, GATHER_G: tl.constexpr, GATHER_X: tl.constexpr, G_TMA: tl.constexpr, X_TMA: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(height, M)
    column_tiles = tl.cdiv(width, N)
    tile = tl.program_id(0)
    # a program takes the next tile when it is free: those of hot experts take as much longer as they have more rows
    while tile < num_experts * row_tiles * column_tiles:
        following = tl.atomic_add(experts + counter, 1, sem="relaxed") + tl.num_programs(0)
        expert, m0, n0, start, end = locate_matrix(
            tile, experts, num_experts, row_tiles, column_tiles, M, N, GROUP
        )
        ms = m0 + tl.arange(0, M)
        ns = n0 + tl.arange(0, N)
        whole = start + (end - start) // STEP * STEP
        total = tl.zeros((M, N), tl.float32)
        for row in tl.range(start, whole, STEP):
            if G_TMA:
                left = g_tiles.load([row, m0])
            else:
                left = _gather(g, order, row, end, ms, height, stride_g, K, GATHER_G, False, STEP)
            if X_TMA:
                right = x_tiles.load([row, n0])
            else:
                right = _gather(x, order, row, end, ns, width, stride_x, K, GATHER_X, False, STEP)
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        if whole < end:
            left = _gather(g, order, whole, end, ms, height, stride_g, K, GATHER_G, True, STEP)
            right = _gather(x, order, whole, end, ns, width, stride_x, K, GATHER_X, True, STEP)
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        value = total.to(out.dtype.element_ty)
        at = out + (ms + expert * height).to(tl.int64)[:, None] * stride_out + ns[None, :]
        tl.store(at, value, (ms < height)[:, None] & (ns < width)[None, :])
        tile = following


def bias_grad(
    g: Tensor, weights_TK: Tensor | None, order_N: Tensor, top_k: int, schedule: Schedule, out_EO: Tensor,
    *, gather: bool = False,
) -> None:  # fmt: skip
    """Fill ``out_EO`` with the sum of each expert's rows of ``g``, times their routing weight where given."""
    experts, width = out_EO.shape
    if not experts or not width:
        return
    block = 64
    _bias_grad_kernel[(experts, cdiv(width, block))](
        g, weights_TK if weights_TK is not None else g, order_N, out_EO, schedule.experts, width, g.stride(0),
        K=top_k, GATHER=gather, WEIGHTED=weights_TK is not None, N=block, STEP=64, num_warps=4,
    )  # fmt: skip


@kernel
def _bias_grad_kernel(
    g, weights, order, out, experts, width, stride,
    K: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    start = tl.load(experts + 4 * expert + 2)
    end = tl.load(experts + 4 * expert + 3)
    total = tl.zeros((STEP, N), tl.float32)
    for row in range(start, end, STEP):
        values = _gather(g, order, row, end, columns, width, stride, K, GATHER, True, STEP).to(tl.float32)
        if WEIGHTED:
            rows = row + tl.arange(0, STEP)
            slot = tl.load(order + rows, rows < end, other=0)
            values *= tl.load(weights + slot, rows < end, other=0.0).to(tl.float32)[:, None]
        total += values
    tl.store(out + expert * width + columns, tl.sum(total, 0).to(out.dtype.element_ty), columns < width)
