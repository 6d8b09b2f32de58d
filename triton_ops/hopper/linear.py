"""Rows times their expert's matrix on Hopper: see ``moefy.triton_ops.linear``, whose contract this is.

One warp loads, two groups of four multiply, one stores the last tile: whole halves by descriptor, an expert's last rows
by themselves.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from moefy.triton_ops.hopper import TILE_M, TILE_N, rows_apart
from moefy.triton_ops.hopper.pipeline import (
    accumulate,
    advance,
    descriptor,
    jit,
    load_tile,
    mbarrier,
    pass_over,
    put_rounded,
    ready,
    release,
    ring,
    store_tile,
    store_wait,
    turns,
)
from moefy.triton_ops.shared.blocks import cdiv, processors
from moefy.triton_ops.shared.launch import kernel
from moefy.triton_ops.shared.tiles import Schedule, count_tiles, locate

STEP, STAGES, GROUP = 64, 3, 16


def linear(
    a: Tensor, w: Tensor, bias: Tensor | None, schedule: Schedule, out: Tensor, transposed: bool,
    second: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """Fill ``out`` [N, O]; arguments as one level up."""
    assert schedule.block_rows == TILE_M
    (_, width), depth = out.shape, a.shape[1]
    a2, w2 = (a, w) if second is None else second
    box = (STEP, TILE_N) if transposed else (TILE_N, STEP)
    tiles = [descriptor(a, TILE_M, STEP), descriptor(w, *box)]
    more = tiles if second is None else [descriptor(a2, TILE_M, STEP), descriptor(w2, *box)]
    programs = min(schedule.max_tiles * cdiv(width, TILE_N), processors(a.device))
    _linear_kernel[(programs,)](
        *tiles, *more, bias if bias is not None else out, out, descriptor(out, TILE_M // 2, TILE_N),
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width,
        rows_apart(w), rows_apart(w2), out.stride(0),
        TRANSPOSED=transposed, TWO=second is not None, BIAS=bias is not None,
        M=TILE_M, N=TILE_N, STEP=STEP, STAGES=STAGES, GROUP=GROUP, num_warps=4,
    )  # fmt: skip


@kernel(by=jit)
def _linear_kernel(
    a_tiles, w_tiles, a2_tiles, w2_tiles, bias, out, out_tiles,
    expert_of_tile, experts, num_experts, depth, width, w_apart, w2_apart, stride_out,
    TRANSPOSED: gl.constexpr, TWO: gl.constexpr, BIAS: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(a_tiles.dtype, [STAGES, M, STEP], a_tiles.layout)
    b_buf = gl.allocate_shared_memory(
        w_tiles.dtype, [STAGES, STEP, N] if TRANSPOSED else [STAGES, N, STEP], w_tiles.layout
    )
    stash = gl.allocate_shared_memory(out_tiles.dtype, [2, M // 2, N], out_tiles.layout)
    full, empty = ring(STAGES, 1)
    stash_full, stash_empty = turns()
    ready()
    gl.warp_specialize(
        [
            (_multiply, (
                a_buf, b_buf, stash, full, empty, stash_full, stash_empty, bias,
                expert_of_tile, experts, num_experts, depth, width,
                TRANSPOSED, TWO, BIAS, 0, M, N, STEP, STAGES, GROUP,
            )),
            (_multiply, (
                a_buf, b_buf, stash, full, empty, stash_full, stash_empty, bias,
                expert_of_tile, experts, num_experts, depth, width,
                TRANSPOSED, TWO, BIAS, 1, M, N, STEP, STAGES, GROUP,
            )),
            (_store, (
                out, out_tiles, stash, stash_full, stash_empty,
                expert_of_tile, experts, num_experts, width, stride_out, M, N, GROUP,
            )),
            (_load, (
                a_tiles, a2_tiles, w_tiles, w2_tiles, a_buf, b_buf, full, empty,
                expert_of_tile, experts, num_experts, depth, width, w_apart, w2_apart,
                TRANSPOSED, TWO, M, N, STEP, STAGES, GROUP,
            )),
        ],
        [4, 1, 1],
        [200, 96, 96],
    )  # fmt: skip


@jit
def _load(
    a_tiles, a2_tiles, w_tiles, w2_tiles, a_buf, b_buf, full, empty,
    expert_of_tile, experts, num_experts, depth, width, w_apart, w2_apart,
    TRANSPOSED: gl.constexpr, TWO: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, N)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, _, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        steps = gl.where(expert < num_experts, depth, 0)
        stage, phase = _load_product(
            a_tiles, w_tiles, a_buf, b_buf, full, empty, stage, phase, steps, row, expert * w_apart, column * N,
            TRANSPOSED, M, N, STEP, STAGES,
        )  # fmt: skip
        if TWO:
            stage, phase = _load_product(
                a2_tiles, w2_tiles, a_buf, b_buf, full, empty, stage, phase, steps, row, expert * w2_apart, column * N,
                TRANSPOSED, M, N, STEP, STAGES,
            )  # fmt: skip


@jit
def _load_product(
    a_tiles, w_tiles, a_buf, b_buf, full, empty, stage, phase, depth, row, first, column,
    TRANSPOSED: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the stages of one product, from the expert's matrix that begins at row ``first``."""
    for k in range(0, depth, STEP):
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), (M + N) * STEP * 2)
        load_tile(a_tiles, [row, k], full.index(stage), a_buf.index(stage))
        if TRANSPOSED:
            load_tile(w_tiles, [first + k, column], full.index(stage), b_buf.index(stage))
        else:
            load_tile(w_tiles, [first + column, k], full.index(stage), b_buf.index(stage))
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@jit
def _multiply(
    a_buf, b_buf, stash, full, empty, stash_full, stash_empty, bias,
    expert_of_tile, experts, num_experts, depth, width,
    TRANSPOSED: gl.constexpr, TWO: gl.constexpr, BIAS: gl.constexpr, HALF: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_tiles = tl.cdiv(width, N)
    steps = tl.cdiv(depth, STEP) * STEP
    if TWO:
        steps = steps * 2
    stage = 0
    phase = 0
    turn = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        depth_here = gl.where(expert < num_experts, steps, 0)
        if row + HALF * (M // 2) < end:
            acc = gl.zeros([M // 2, N], gl.float32, ACC)
            if BIAS:
                ns = column * N + gl.arange(0, N, gl.SliceLayout(0, ACC))
                real = ns < gl.where(expert < num_experts, width, 0)
                values = gl.load(bias + expert.to(gl.int64) * width + ns, real, other=0.0)
                acc += values.to(gl.float32)[None, :]
            acc, stage, phase = accumulate(
                acc, a_buf, b_buf, full, empty, stage, phase, depth_here, empty, 0,
                HALF, False, not TRANSPOSED, False, STEP, STAGES,
            )  # fmt: skip
            put_rounded(acc, stash.index(HALF), stash_full.index(HALF), stash_empty.index(HALF), turn)
            turn ^= 1
        else:
            stage, phase = pass_over(full, empty, stage, phase, depth_here, STEP, STAGES)


@jit
def _store(
    out, out_tiles, stash, stash_full, stash_empty, expert_of_tile, experts, num_experts, width, stride_out,
    M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Write tiles; of an expert's last one only its rows, since the next expert's follow."""
    C: gl.constexpr = 64
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    column_tiles = tl.cdiv(width, N)
    ms = gl.arange(0, 16, gl.SliceLayout(1, L))
    ns = gl.arange(0, C, gl.SliceLayout(0, L))
    turn = 0
    second_turn = 0  # the second half's, which tiles with few rows leave out
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        _, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        for half in range(0, gl.where(row + M // 2 < end, 2, 1)):
            first = row + half * (M // 2)
            mbarrier.wait(stash_full.index(half), gl.where(half == 0, turn, second_turn))
            if first + M // 2 <= end:
                store_tile(out_tiles, [first, column * N], stash.index(half))
                store_wait(0)
            else:
                for m in gl.static_range(0, M // 2, 16):
                    if first + m < end:
                        for n in gl.static_range(0, N, C):
                            values = stash.index(half).slice(m, 16, dim=0).slice(n, C, dim=1).load(L)
                            at = out + ((first + m).to(gl.int64) * stride_out + column * N + n)
                            mask = (first + m + ms < end)[:, None] & (column * N + n + ns < width)[None, :]
                            gl.store(at + (ms[:, None] * stride_out + ns[None, :]), values, mask)
            release(stash_empty.index(half))
        turn ^= 1
        second_turn = gl.where(row + M // 2 < end, second_turn ^ 1, second_turn)
