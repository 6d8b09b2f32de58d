"""The gradient of the experts' hidden values on Hopper: see ``moefy.triton_ops.hidden_grad``, whose contract this is.

The rows of the output's gradient come copied, in the order of the experts. One warp loads, eight multiply, three take
the products through the activation's derivative and the routing weights. These three read the pre-activations two
pieces ahead.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from moefy.triton_ops.activations import activate_backward
from moefy.triton_ops.blocks import cdiv, processors
from moefy.triton_ops.hopper import TILE_M, TILE_N
from moefy.triton_ops.hopper.pipeline import (
    STASH,
    VECTOR,
    advance,
    descriptor,
    jit,
    load_tile,
    mbarrier,
    multiply_rows,
    ready,
    reinterpret,
    release,
    ring,
    turns,
)
from moefy.triton_ops.launch import kernel
from moefy.triton_ops.tiles import Schedule, count_tiles, locate

STEP, STAGES, GROUP = 64, 3, 16


def hidden_grad(
    grad_ND: Tensor, weights_TK: Tensor, order_N: Tensor, schedule: Schedule, w_down: Tensor,
    gate_NH: Tensor | None, up_NH: Tensor, dgate_NH: Tensor | None, dup_NH: Tensor, weighted_NH: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """Fill ``dgate_NH``, ``dup_NH`` and ``weighted_NH``; return the parts of the routing gradient, [parts, N] fp32.

    Arguments as one level up, except ``grad_ND``: the output's gradient of each row.
    """
    (rows, width), depth = up_NH.shape, grad_ND.shape[1]
    column_tiles = cdiv(width, TILE_N)
    parts = torch.empty((column_tiles, rows), dtype=torch.float32, device=grad_ND.device)
    gate, dgate = (up_NH, dup_NH) if gate_NH is None or dgate_NH is None else (gate_NH, dgate_NH)
    programs = min(schedule.max_tiles * column_tiles, processors(grad_ND.device))
    _hidden_grad_kernel[(programs,)](
        descriptor(grad_ND, TILE_M, STEP), descriptor(w_down, STEP, TILE_N),
        weights_TK, order_N, gate, up_NH, dgate, dup_NH, weighted_NH, parts,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width, rows,
        up_NH.stride(0), dup_NH.stride(0), weighted_NH.stride(0),
        ACT=activation, GLU=gate_NH is not None, EVEN=width % TILE_N == 0,
        M=TILE_M, N=TILE_N, STEP=STEP, STAGES=STAGES, GROUP=GROUP, num_warps=8,
    )  # fmt: skip
    return parts


@kernel(by=jit)
def _hidden_grad_kernel(
    grad_tiles, w_tiles, weights, order, gate, up, dgate, dup, weighted, parts,
    expert_of_tile, experts, num_experts, depth, width, num_rows, stride_h, stride_dh, stride_weighted,
    ACT: gl.constexpr, GLU: gl.constexpr, EVEN: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(grad_tiles.dtype, [STAGES, M, STEP], grad_tiles.layout)
    b_buf = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, STEP, N], w_tiles.layout)
    stash = gl.allocate_shared_memory(gl.float16, [M, N], STASH)
    scales = gl.allocate_shared_memory(gl.float32, [M], VECTOR)
    two_q = gl.allocate_shared_memory(gl.float32, [M], VECTOR)
    one_q = gl.allocate_shared_memory(gl.float32, [M], VECTOR)
    full, empty = ring(STAGES, 1)
    stash_full, stash_empty = turns(2)
    ready()
    eights = reinterpret(stash, gl.float16, [M // 8, 8, N], STASH)
    scales_8 = reinterpret(scales, gl.float32, [M // 8, 8], VECTOR)
    gl.warp_specialize(
        [
            (multiply_rows, (
                a_buf, b_buf, stash, scales, full, empty, stash_full, stash_empty,
                expert_of_tile, experts, num_experts, depth, width, N, False, True, M, N, STEP, STAGES, GROUP,
            )),
            (_finish, (
                eights, scales_8, two_q, stash_full, stash_empty, weights, order, gate, up, dgate, dup, weighted, parts,
                expert_of_tile, experts, num_experts, width, num_rows, stride_h, stride_dh, stride_weighted,
                ACT, GLU, EVEN, M, N, 0, 11, GROUP,
            )),
            (_finish, (
                eights, scales_8, one_q, stash_full, stash_empty, weights, order, gate, up, dgate, dup, weighted, parts,
                expert_of_tile, experts, num_experts, width, num_rows, stride_h, stride_dh, stride_weighted,
                ACT, GLU, EVEN, M, N, 11, 16, GROUP,
            )),
            (_load, (
                grad_tiles, w_tiles, a_buf, b_buf, full, empty,
                expert_of_tile, experts, num_experts, depth, width, M, N, STEP, STAGES, GROUP,
            )),
        ],
        [2, 1, 1],
        [184, 184, 184],
    )  # fmt: skip


@jit
def _load(
    grad_tiles, w_tiles, a_buf, b_buf, full, empty, expert_of_tile, experts, num_experts, depth, width,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, N)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, _, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        for k in range(0, gl.where(expert < num_experts, depth, 0), STEP):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), (M + N) * STEP * 2)
            load_tile(grad_tiles, [row, k], full.index(stage), a_buf.index(stage))
            load_tile(w_tiles, [expert * depth + k, column * N], full.index(stage), b_buf.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@jit
def _fetch(
    piece, column, row, end, width, up, gate, stride_h, L: gl.constexpr, C: gl.constexpr, GLU: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """The pre-activations of eight rows by C columns, two in a word: single ones would each wait in a register."""
    ms = gl.arange(0, 8, gl.SliceLayout(1, L))
    ns = gl.arange(0, C // 2, gl.SliceLayout(0, L))
    base = row + piece * 8
    mask = (base + ms < end)[:, None] & (EVEN | (column + 2 * ns < width))[None, :]
    at = (base.to(gl.int64) * stride_h + column) // 2 + (ms[:, None] * (stride_h // 2) + ns[None, :])
    words = gl.load(up.to(gl.pointer_type(gl.int32)) + at, mask, other=0)
    gate_words = words
    if GLU:
        gate_words = gl.load(gate.to(gl.pointer_type(gl.int32)) + at, mask, other=0)
    return words, gate_words


@jit
def _values(words, L: gl.constexpr, C: gl.constexpr, dtype: gl.constexpr):
    low = (words & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([8, C]), L).to(gl.float32)


@jit
def _finish(
    stash, scales, qs, stash_full, stash_empty, weights, order, gate, up, dgate, dup, weighted, parts,
    expert_of_tile, experts, num_experts, width, num_rows, stride_h, stride_dh, stride_weighted,
    ACT: gl.constexpr, GLU: gl.constexpr, EVEN: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The epilogue of the pieces ``FIRST .. LAST`` of eight rows, 64 columns a warp at a time."""
    C: gl.constexpr = 64 * gl.num_warps()
    COUNT: gl.constexpr = N // C
    AHEAD: gl.constexpr = 2 if EVEN else 1  # with a mask of columns two do not fit the registers
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    dtype: gl.constexpr = up.dtype.element_ty
    column_tiles = tl.cdiv(width, N)
    ms = gl.arange(0, 8, gl.SliceLayout(1, L))
    ns = gl.arange(0, C, gl.SliceLayout(0, L))
    tile_rows = gl.arange(0, M, ROWS)
    qs_8 = reinterpret(qs, gl.float32, [M // 8, 8], VECTOR)
    turn = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        slot = gl.load(order + row + tile_rows, row + tile_rows < end, other=0)
        at = column * N
        u0, z0 = _fetch(FIRST, at, row, end, width, up, gate, stride_h, WORDS, C, GLU, EVEN)
        if AHEAD == 2:
            u1, z1 = _fetch(FIRST, at + C, row, end, width, up, gate, stride_h, WORDS, C, GLU, EVEN)
        qs.store(gl.where(expert < num_experts, gl.load(weights + slot).to(gl.float32), 0.0))
        mbarrier.wait(stash_full, turn)
        for piece in range(FIRST, LAST):
            base = row + piece * 8
            q = qs_8.index(piece).load(gl.SliceLayout(1, L))[:, None]
            scale = scales.index(piece).load(gl.SliceLayout(1, L))[:, None]
            part = gl.zeros([8], gl.float32, gl.SliceLayout(1, L))
            for i in gl.static_range(COUNT):
                at = column * N + i * C
                u = _values(u0, L, C, dtype)
                if GLU:
                    z = _values(z0, L, C, dtype)
                then = piece + (i + AHEAD) // COUNT
                u2, z2 = _fetch(
                    then, column * N + (i + AHEAD) % COUNT * C, row, gl.where(then < LAST, end, 0), width,
                    up, gate, stride_h, WORDS, C, GLU, EVEN,
                )  # fmt: skip
                if AHEAD == 2:
                    u0 = u1
                    z0 = z1
                    u1 = u2
                    z1 = z2
                else:
                    u0 = u2
                    z0 = z2
                g = stash.index(piece).slice(i * C, C, dim=1).load(L).to(gl.float32) * scale
                if GLU:
                    act, dact = activate_backward(z, ACT)
                    hidden = act * u
                else:
                    hidden, dact = activate_backward(u, ACT)
                part += gl.sum(g * hidden, 1)  # columns behind the last one have g = 0
                mask = (base + ms < end)[:, None] & (EVEN | (at + ns < width))[None, :]
                to = ms[:, None] * stride_weighted + ns[None, :]
                gl.store(
                    weighted + (base.to(gl.int64) * stride_weighted + at) + to, (q * hidden).to(dtype), mask
                )
                g = g * q
                here = base.to(gl.int64) * stride_dh + at
                to = ms[:, None] * stride_dh + ns[None, :]
                if GLU:
                    gl.store(dgate + here + to, (g * u * dact).to(dtype), mask)
                    gl.store(dup + here + to, (g * act).to(dtype), mask)
                else:
                    gl.store(dup + here + to, (g * dact).to(dtype), mask)
            gl.store(parts + column.to(gl.int64) * num_rows + base + ms, part, base + ms < end)
        release(stash_empty)
        turn ^= 1
