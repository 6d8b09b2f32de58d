"""The gradients of the experts' matrices on Hopper: see ``moefy.triton_ops.weight_grad``, whose contract this is.

Both sides come as rows sorted by expert. One warp takes tiles as the program becomes free, tells the others through a
small ring, and loads; two groups of four multiply; one stores the last tile by descriptor.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from moefy.triton_ops.hopper import TILE_M, TILE_N
from moefy.triton_ops.hopper.pipeline import (
    VECTOR,
    accumulate,
    advance,
    barrier,
    barriers,
    descriptor,
    jit,
    load_tile,
    mbarrier,
    put_rounded,
    ready,
    ring,
    store_tile,
    store_wait,
    turns,
)
from moefy.triton_ops.shared.blocks import cdiv, processors
from moefy.triton_ops.shared.launch import kernel
from moefy.triton_ops.shared.tiles import Schedule, locate_matrix

STEP, STAGES, GROUP, TAKEN = 32, 6, 16, 4


def weight_grad(
    g_NO: Tensor,
    x_NI: Tensor,
    schedule: Schedule,
    out_EOI: Tensor,
    also: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Fill ``out_EOI`` from rows; arguments as one level up."""
    experts, height, width = out_EOI.shape
    also_height, also_width = (0, 0) if also is None else also[2].shape[1:]
    tiles = _descriptors(g_NO, x_NI, out_EOI)
    also_tiles = tiles if also is None else _descriptors(*also)
    count = cdiv(height, TILE_M) * cdiv(width, TILE_N) + cdiv(also_height, TILE_M) * cdiv(also_width, TILE_N)
    _weight_grad_kernel[(min(experts * count, processors(g_NO.device)),)](
        *tiles, *also_tiles, schedule.experts, schedule.next_counter(), experts, height, width, also_height, also_width,
        TWO=also is not None,
        M=TILE_M, N=TILE_N, STEP=STEP, STAGES=STAGES, GROUP=GROUP, TAKEN=TAKEN, num_warps=4,
    )  # fmt: skip


def _descriptors(g_NO: Tensor, x_NI: Tensor, out_EOI: Tensor) -> tuple[Any, Any, Any]:
    tiles = descriptor(g_NO, STEP, TILE_M), descriptor(x_NI, STEP, TILE_N)
    return *tiles, descriptor(out_EOI, TILE_M // 2, TILE_N)


@kernel(by=jit, do_not_specialize=["counter", "also_height", "also_width"])
def _weight_grad_kernel(
    g_tiles, x_tiles, out_tiles, also_g_tiles, also_x_tiles, also_out_tiles,
    experts, counter, num_experts, height, width, also_height, also_width,
    TWO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, TAKEN: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(g_tiles.dtype, [STAGES, STEP, M], g_tiles.layout)
    b_buf = gl.allocate_shared_memory(x_tiles.dtype, [STAGES, STEP, N], x_tiles.layout)
    stash = gl.allocate_shared_memory(out_tiles.dtype, [2, M // 2, N], out_tiles.layout)
    full, empty = ring(STAGES, 1)
    stash_full, stash_empty = turns()
    taken = gl.allocate_shared_memory(gl.int32, [TAKEN, 1], VECTOR)
    taken_full = barriers(TAKEN, 1)
    taken_empty = barriers(TAKEN, 3)
    cleared = barriers(1, 2)
    ready()
    gl.warp_specialize(
        [
            (_multiply, (
                a_buf, b_buf, stash, full, empty, stash_full, stash_empty, cleared, taken, taken_full,
                taken_empty, experts, num_experts, height, width, also_height, also_width,
                TWO, 0, M, N, STEP, STAGES, GROUP, TAKEN,
            )),
            (_multiply, (
                a_buf, b_buf, stash, full, empty, stash_full, stash_empty, cleared, taken, taken_full,
                taken_empty, experts, num_experts, height, width, also_height, also_width,
                TWO, 1, M, N, STEP, STAGES, GROUP, TAKEN,
            )),
            (_store, (
                out_tiles, also_out_tiles, stash, stash_full, stash_empty, taken, taken_full, taken_empty,
                experts, num_experts, height, width, also_height, also_width, TWO, M, N, GROUP, TAKEN,
            )),
            (_load, (
                g_tiles, x_tiles, also_g_tiles, also_x_tiles, a_buf, b_buf, full, empty, taken, taken_full, taken_empty,
                experts, counter, num_experts, height, width, also_height, also_width,
                TWO, M, N, STEP, STAGES, GROUP, TAKEN,
            )),
        ],
        [4, 1, 1],
        [208, 40, 40],
    )  # fmt: skip


@jit
def _count(num_experts, height, width, also_height, also_width, M: gl.constexpr, N: gl.constexpr):
    """How many tiles the first product has, and both."""
    first = num_experts * tl.cdiv(height, M) * tl.cdiv(width, N)
    return first, first + num_experts * tl.cdiv(also_height, M) * tl.cdiv(also_width, N)


@jit
def _locate(
    tile, experts, num_experts, height, width, also_height, also_width, first_tiles,
    TWO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Whether the tile is of the second product, and where it lies in its own."""
    second = False
    if TWO:
        second = tile >= first_tiles
        tile = gl.where(second, tile - first_tiles, tile)
        height = gl.where(second, also_height, height)
        width = gl.where(second, also_width, width)
    expert, m0, n0, start, end = locate_matrix(
        tile, experts, num_experts, tl.cdiv(height, M), tl.cdiv(width, N), M, N, GROUP
    )
    return second, expert, m0, n0, start, end


@jit
def _tell(tile, taken, taken_full, taken_empty, turn, TAKEN: gl.constexpr):
    """Hand the ``turn``-th tile to the other warps; one behind the last tile ends their work."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    i = turn % TAKEN
    mbarrier.wait(taken_empty.index(i), (turn // TAKEN & 1) ^ 1)
    taken.index(i).store(gl.full([1], 0, gl.int32, L) + tile)
    barrier()
    mbarrier.arrive(taken_full.index(i), count=1)


@jit
def _hear(taken, taken_full, taken_empty, turn, TAKEN: gl.constexpr):
    """The ``turn``-th tile."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    i = turn % TAKEN
    mbarrier.wait(taken_full.index(i), turn // TAKEN & 1)
    tile = gl.max(taken.index(i).load(L), 0)
    barrier()
    mbarrier.arrive(taken_empty.index(i), count=1)
    return tile


@jit
def _load(
    g_tiles, x_tiles, also_g_tiles, also_x_tiles, a_buf, b_buf, full, empty, taken, taken_full, taken_empty,
    experts, counter, num_experts, height, width, also_height, also_width,
    TWO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, TAKEN: gl.constexpr,
):  # fmt: skip
    first_tiles, total = _count(num_experts, height, width, also_height, also_width, M, N)
    tile = gl.program_id(0)
    stage = 0
    phase = 0
    turn = 0
    while tile < total:
        following = gl.atomic_add(experts + counter, 1, sem="relaxed") + gl.num_programs(0)
        _tell(tile, taken, taken_full, taken_empty, turn, TAKEN)
        turn += 1
        second, _, m0, n0, start, end = _locate(
            tile, experts, num_experts, height, width, also_height, also_width, first_tiles, TWO, M, N, GROUP
        )
        for row in range(start, end, STEP):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (M + N) * STEP * 2)
            if second:
                load_tile(also_g_tiles, [row, m0], full.index(stage), a_buf.index(stage))
                load_tile(also_x_tiles, [row, n0], full.index(stage), b_buf.index(stage))
            else:
                load_tile(g_tiles, [row, m0], full.index(stage), a_buf.index(stage))
                load_tile(x_tiles, [row, n0], full.index(stage), b_buf.index(stage))
            stage, phase = advance(stage, phase, STAGES)
        tile = following
    _tell(total, taken, taken_full, taken_empty, turn, TAKEN)


@jit
def _multiply(
    a_buf, b_buf, stash, full, empty, stash_full, stash_empty, cleared, taken, taken_full, taken_empty,
    experts, num_experts, height, width, also_height, also_width,
    TWO: gl.constexpr, HALF: gl.constexpr, M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, TAKEN: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    first_tiles, total = _count(num_experts, height, width, also_height, also_width, M, N)
    stage = 0
    phase = 0
    turn = 0
    tails = 0
    tile = _hear(taken, taken_full, taken_empty, turn, TAKEN)
    while tile < total:
        _, _, _, _, start, end = _locate(
            tile, experts, num_experts, height, width, also_height, also_width, first_tiles, TWO, M, N, GROUP
        )
        acc = gl.zeros([M // 2, N], gl.float32, ACC)
        acc, stage, phase = accumulate(
            acc, a_buf, b_buf, full, empty, stage, phase, end - start, cleared.index(0), tails & 1,
            HALF, True, False, True, STEP, STAGES,
        )  # fmt: skip
        tails += ((end - start) % STEP != 0).to(gl.int32)
        put_rounded(acc, stash.index(HALF), stash_full.index(HALF), stash_empty.index(HALF), turn & 1)
        turn += 1
        tile = _hear(taken, taken_full, taken_empty, turn, TAKEN)


@jit
def _store(
    out_tiles, also_out_tiles, stash, stash_full, stash_empty, taken, taken_full, taken_empty,
    experts, num_experts, height, width, also_height, also_width,
    TWO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr, TAKEN: gl.constexpr,
):  # fmt: skip
    first_tiles, total = _count(num_experts, height, width, also_height, also_width, M, N)
    turn = 0
    tile = _hear(taken, taken_full, taken_empty, turn, TAKEN)
    while tile < total:
        second, expert, m0, n0, _, _ = _locate(
            tile, experts, num_experts, height, width, also_height, also_width, first_tiles, TWO, M, N, GROUP
        )
        for half in gl.static_range(2):
            mbarrier.wait(stash_full.index(half), turn & 1)
            if second:
                store_tile(
                    also_out_tiles, [expert * also_height + m0 + half * (M // 2), n0], stash.index(half)
                )
            else:
                store_tile(out_tiles, [expert * height + m0 + half * (M // 2), n0], stash.index(half))
            store_wait(0)
            mbarrier.arrive(stash_empty.index(half), count=1)
        turn += 1
        tile = _hear(taken, taken_full, taken_empty, turn, TAKEN)
