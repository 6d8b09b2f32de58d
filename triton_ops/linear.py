"""Rows times their expert's matrix: the experts' exit, ``grouped_linear``, and the gradient of rows.

N rows sorted by expert, I input and O output features, E experts.

Contract: ``out[r] = a[r] @ w[e].T + bias[e]``, or with ``transposed`` ``a[r] @ w[e]``; a second pair ``(a2, w2)`` adds
its product in the same accumulator (the two entries of a GLU). fp32 accumulation, one rounding. Rows of dropped slots
are zero.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# Triton types the iterator of its own range as one that cannot be iterated.

from __future__ import annotations

import functools
from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from moefy.triton_ops import hopper
from moefy.triton_ops.shared.blocks import (
    Blocks,
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
from moefy.triton_ops.shared.tiles import Schedule, count_tiles, locate, store


def linear(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    schedule: Schedule,
    out: Tensor,
    *,
    transposed: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill ``out`` [N, O].

    Args:
        a: [N, I]; features side by side.
        w: [E, O, I]; [E, I, O] with ``transposed``.
        bias: [E, O] or None.
        schedule: the tiles of the rows; its ``block_rows`` is this kernel's.
        out: the result.
        transposed: whether ``w`` is used as it lies.
        second: another ``(a, w)`` of the same shapes and strides, whose product is added.
    """
    if out.numel():
        call = LinearCall(a, w, bias, schedule, out, transposed, second)
        form_for(FORMS, call).run(call)


class LinearCall(NamedTuple):
    """The arguments of ``linear``."""

    a: Tensor
    w: Tensor
    bias: Tensor | None
    schedule: Schedule
    out: Tensor
    transposed: bool
    second: tuple[Tensor, Tensor] | None

    @property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(a, w)`` and the second pair, or where there is none the first again."""
        return (self.a, self.w, *(self.second or (self.a, self.w)))


def _takes_hopper(call: LinearCall) -> bool:
    return hopper.takes_linear(call.a, call.w, call.out, call.transposed, call.second)


def _run_hopper(call: LinearCall) -> None:
    from moefy.triton_ops.hopper.linear import linear as linear_on_hopper

    linear_on_hopper(call.a, call.w, call.bias, call.schedule, call.out, call.transposed, call.second)


def _takes_descriptors(call: LinearCall) -> bool:
    return has_tma(call.a.device) and describable(*call.pairs)


def _run(call: LinearCall, by_descriptor: bool) -> None:
    """Launch the Triton kernel; ``by_descriptor`` says how it reads rows and matrices."""
    (a, w, a2, w2), bias, schedule, out = call.pairs, call.bias, call.schedule, call.out
    (rows, width), depth = out.shape, a.shape[1]
    block = blocks("linear", a.dtype, rows, schedule.num_experts, a.device)
    tiles = _descriptors(block, call.transposed, a, a2, w, w2) if by_descriptor else (a, a2, w, w2)
    by_store = block.store and by_descriptor and describable(out)
    programs = min(schedule.max_tiles * cdiv(width, block.n), block.per_processor * processors(a.device))
    _linear_kernel[(programs,)](
        *tiles, bias if bias is not None else out, out, descriptor(out, block.m, block.n) if by_store else out,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width,
        a.stride(0), w.stride(0), w.stride(1), out.stride(0),
        TRANSPOSED=call.transposed, TWO=call.second is not None, BIAS=bias is not None, TMA=by_descriptor,
        PRECISION=precision(a.dtype), M=block.m, N=block.n, STEP=block.k, GROUP=block.group,
        FLATTEN=block.flatten, STORE=by_store,
        **block.options,
    )  # fmt: skip


FORMS = (
    Form("hopper", _takes_hopper, _run_hopper),
    Form("descriptor", _takes_descriptors, functools.partial(_run, by_descriptor=True)),
    Form("pointer", anything, functools.partial(_run, by_descriptor=False)),
)


def _descriptors(block: Blocks, transposed: bool, a: Tensor, a2: Tensor, w: Tensor, w2: Tensor) -> tuple:
    tile = (1, block.k, block.n) if transposed else (1, block.n, block.k)
    return (
        *(descriptor(value, block.m, block.k) for value in (a, a2)),
        *(descriptor(value, *tile) for value in (w, w2)),
    )


@jit
def _load_a(a, row, rows, inside, k, ks, depth, stride, TMA: tl.constexpr):
    if TMA:
        tile = a.load([row, k])
    else:
        at = a + rows.to(tl.int64)[:, None] * stride + (k + ks)[None, :]
        tile = tl.load(at, inside[:, None] & (k + ks < depth)[None, :], other=0.0)
    return tile


@jit
def _load_w(
    w, expert, column, columns, known, k, ks, depth, stride_e, stride_n,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile [STEP, N] of the expert's matrix."""
    if TMA:
        if TRANSPOSED:
            tile = w.load([expert, k, column]).reshape(STEP, N)
        else:
            tile = w.load([expert, column, k]).reshape(N, STEP).T
    else:
        base = w + expert.to(tl.int64) * stride_e
        mask = (k + ks < depth)[:, None] & known[None, :]
        if TRANSPOSED:
            at = base + (k + ks).to(tl.int64)[:, None] * stride_n + columns[None, :]
        else:
            at = base + columns.to(tl.int64)[None, :] * stride_n + (k + ks)[:, None]
        tile = tl.load(at, mask, other=0.0)
    return tile


@kernel
def _linear_kernel(
    a, a2, w, w2, bias, out, out_tiles,
    expert_of_tile, experts, num_experts, depth, width,
    stride_a, stride_we, stride_wn, stride_out,
    TRANSPOSED: tl.constexpr, TWO: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, N)
    total = count_tiles(experts, num_experts) * column_tiles
    ks = tl.arange(0, STEP)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        rows = row + tl.arange(0, M)
        inside = rows < end
        columns = column * N + tl.arange(0, N)
        known = columns < width
        steps = tl.where(expert < num_experts, depth, 0)
        total_y = tl.zeros((M, N), tl.float32)
        for k in tl.range(0, steps, STEP):
            left = _load_a(a, row, rows, inside, k, ks, depth, stride_a, TMA)
            right = _load_w(
                w, expert, column * N, columns, known, k, ks, depth, stride_we, stride_wn, TRANSPOSED, TMA, N, STEP,
            )  # fmt: skip
            total_y = tl.dot(left, right, total_y, input_precision=PRECISION)
        if TWO:
            for k in tl.range(0, steps, STEP):
                left = _load_a(a2, row, rows, inside, k, ks, depth, stride_a, TMA)
                right = _load_w(
                    w2, expert, column * N, columns, known, k, ks, depth, stride_we, stride_wn, TRANSPOSED, TMA, N,
                    STEP,
                )  # fmt: skip
                total_y = tl.dot(left, right, total_y, input_precision=PRECISION)
        if BIAS:
            real = columns < tl.where(expert < num_experts, width, 0)
            total_y += tl.load(bias + expert.to(tl.int64) * width + columns, real, other=0.0).to(tl.float32)[
                None, :
            ]
        store(out, out_tiles, total_y, row, end, column * N, width, stride_out, STORE, M, N)
