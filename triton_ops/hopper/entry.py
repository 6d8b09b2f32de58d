"""The experts' entry on Hopper: see ``moefy.triton_ops.entry``, whose contract this is.

Two warps gather the tokens' rows and ask for the weights, two groups of four multiply, two add the bias, activate and
store.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

import triton.language as tl
from triton.experimental.gluon import language as gl

from moefy.triton_ops.hopper import TILE_M, TILE_N, rows_apart
from moefy.triton_ops.hopper.pipeline import (
    STASH,
    VECTOR,
    accumulate,
    advance,
    descriptor,
    jit,
    load_tile,
    load_values,
    mbarrier,
    pass_over,
    put_scaled,
    ready,
    reinterpret,
    release,
    ring,
    turns,
    values_loaded,
)
from moefy.triton_ops.shared.activations import ACTIVATIONS, device_functions
from moefy.triton_ops.shared.blocks import cdiv, processors
from moefy.triton_ops.shared.calls import EntryCall
from moefy.triton_ops.shared.launch import kernel
from moefy.triton_ops.shared.tiles import count_tiles, locate

# Six stages of 32 columns took up to 1.7 times as long as three of 64.
STEP, STAGES, GROUP = 64, 3, 16

activate, _ = device_functions()


def entry(call: EntryCall) -> None:
    """Fill ``hidden_NH`` and, where given, ``gate_out`` and ``up_out``."""
    x_TD, schedule, w_gate, w_up, hidden_NH = call.x_TD, call.schedule, call.w_gate, call.w_up, call.hidden_NH
    b_gate, b_up = call.b_gate, call.b_up
    assert schedule.block_rows == TILE_M
    width, depth = hidden_NH.shape[1], x_TD.shape[1]
    columns = TILE_N if w_gate is None else TILE_N // 2
    tiles = schedule.max_tiles * cdiv(width, columns)
    up_tiles = descriptor(w_up, columns, STEP)
    gate_tiles = up_tiles if w_gate is None else descriptor(w_gate, columns, STEP)
    bias = b_up if b_up is not None else b_gate
    given = [hidden_NH if t is None else t for t in (b_gate, b_up, call.gate_out, call.up_out)]
    _entry_kernel[(min(tiles, processors(x_TD.device)),)](
        x_TD, call.order_N, gate_tiles, up_tiles, *given, hidden_NH,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width,
        0 if w_gate is None else rows_apart(w_gate), rows_apart(w_up),
        x_TD.stride(0), given[2].stride(0), given[3].stride(0), hidden_NH.stride(0),
        0 if bias is None else bias.stride(0),
        K=call.top_k, ACT=call.activation, GLU=w_gate is not None, GATE_BIAS=b_gate is not None,
        UP_BIAS=b_up is not None, SAVE=call.up_out is not None,
        CLEAR=w_gate is None and not ACTIVATIONS[call.activation].zero_at_zero,
        EVEN=depth % STEP == 0, WHOLE=width % columns == 0,
        M=TILE_M, N=TILE_N, STEP=STEP, STAGES=STAGES, GROUP=GROUP,
        num_warps=4,
    )  # fmt: skip


@kernel(by=jit)
def _entry_kernel(
    x, order, gate_tiles, up_tiles, b_gate, b_up, gate_out, up_out, hidden_out,
    expert_of_tile, experts, num_experts, depth, width, gate_apart, up_apart,
    stride_x, stride_gate, stride_up, stride_hidden, stride_bias,
    K: gl.constexpr, ACT: gl.constexpr, GLU: gl.constexpr, GATE_BIAS: gl.constexpr, UP_BIAS: gl.constexpr,
    SAVE: gl.constexpr, CLEAR: gl.constexpr, EVEN: gl.constexpr, WHOLE: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = N // 2 if GLU else N
    dtype: gl.constexpr = x.dtype.element_ty
    a_buf = gl.allocate_shared_memory(
        dtype, [STAGES, M, STEP], gl.NVMMASharedLayout.get_default_for([M, STEP], dtype)
    )
    b_buf = gl.allocate_shared_memory(dtype, [STAGES, N, STEP], up_tiles.layout)
    stash = gl.allocate_shared_memory(gl.float16, [2, M // 2, N], STASH)
    scales = gl.allocate_shared_memory(gl.float32, [2, M // 2], VECTOR)
    full, empty = ring(STAGES, 1 + 2 * 32)
    stash_full, stash_empty = turns()
    ready()
    eights = reinterpret(stash, gl.float16, [M // 8, 8, N], STASH)
    scales_8 = reinterpret(scales, gl.float32, [M // 8, 8], VECTOR)
    gl.warp_specialize(
        [
            (_multiply, (
                a_buf, b_buf, stash, scales, full, empty, stash_full, stash_empty,
                expert_of_tile, experts, num_experts, depth, width, 0, C, WHOLE, M, N, STEP, STAGES, GROUP,
            )),
            (_multiply, (
                a_buf, b_buf, stash, scales, full, empty, stash_full, stash_empty,
                expert_of_tile, experts, num_experts, depth, width, 1, C, WHOLE, M, N, STEP, STAGES, GROUP,
            )),
            (_finish, (
                eights, scales_8, stash_full, stash_empty, b_gate, b_up, gate_out, up_out, hidden_out,
                expert_of_tile, experts, num_experts, width, stride_gate, stride_up, stride_hidden, stride_bias,
                ACT, GLU, GATE_BIAS, UP_BIAS, SAVE, CLEAR, M, N, GROUP,
            )),
            (_load, (
                x, order, gate_tiles, up_tiles, a_buf, b_buf, full, empty,
                expert_of_tile, experts, num_experts, depth, width, gate_apart, up_apart, stride_x,
                K, GLU, EVEN, M, N, STEP, STAGES, GROUP,
            )),
        ],
        [4, 2, 2],
        [168, 160, 160],
    )  # fmt: skip


@jit
def _load(
    x, order, gate_tiles, up_tiles, a_buf, b_buf, full, empty,
    expert_of_tile, experts, num_experts, depth, width, gate_apart, up_apart, stride_x,
    K: gl.constexpr, GLU: gl.constexpr, EVEN: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // STEP, STEP // 8], [gl.num_warps(), 1], [1, 0])
    C: gl.constexpr = N // 2 if GLU else N
    column_tiles = tl.cdiv(width, C)
    ms = gl.arange(0, M, gl.SliceLayout(1, L))
    ks = gl.arange(0, STEP, gl.SliceLayout(0, L))
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        slot = gl.load(order + row + ms, row + ms < end, other=0)
        at = x + ((slot // K).to(gl.int64) * stride_x)[:, None] + ks[None, :]
        for k in range(0, gl.where(expert < num_experts, depth, 0), STEP):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            if EVEN:
                load_values(a_buf.index(stage), at + k)
            else:
                load_values(a_buf.index(stage), at + k, (ms >= 0)[:, None] & (k + ks < depth)[None, :])
            values_loaded(full.index(stage), increment_count=False)
            mbarrier.expect(full.index(stage), N * STEP * 2)
            up_at = expert * up_apart + column * C
            if GLU:
                gate_at = expert * gate_apart + column * C
                load_tile(gate_tiles, [gate_at, k], full.index(stage), b_buf.index(stage).slice(0, C, dim=0))
                load_tile(up_tiles, [up_at, k], full.index(stage), b_buf.index(stage).slice(C, C, dim=0))
            else:
                load_tile(up_tiles, [up_at, k], full.index(stage), b_buf.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@jit
def _multiply(
    a_buf, b_buf, stash, scales, full, empty, stash_full, stash_empty,
    expert_of_tile, experts, num_experts, depth, width,
    HALF: gl.constexpr, COLUMNS: gl.constexpr, WHOLE: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The products of a HALF of all tiles, each handed over scaled; a half without rows is left out.

    A tile moves on by COLUMNS of the ``width`` columns; N is a multiple of that for matrices side by side. Without
    WHOLE the columns behind the last one are another expert's, whose size must not set the scale.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_tiles = tl.cdiv(width, COLUMNS)
    stage = 0
    phase = 0
    turn = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        steps = gl.where(expert < num_experts, depth, 0)
        if row + HALF * (M // 2) < end:
            acc = gl.zeros([M // 2, N], gl.float32, ACC)
            acc, stage, phase = accumulate(
                acc, a_buf, b_buf, full, empty, stage, phase, steps, empty, 0,
                HALF, False, True, False, STEP, STAGES,
            )  # fmt: skip
            if not WHOLE:
                ns = gl.arange(0, N, gl.SliceLayout(0, ACC)) % COLUMNS
                acc = gl.where((column * COLUMNS + ns < width)[None, :], acc, 0.0)
            put_scaled(
                acc, stash.index(HALF), scales.index(HALF), stash_full.index(HALF), stash_empty.index(HALF), turn
            )  # fmt: skip
            turn ^= 1
        else:
            stage, phase = pass_over(full, empty, stage, phase, steps, STEP, STAGES)


@jit
def _finish(
    stash, scales, stash_full, stash_empty, b_gate, b_up, gate_out, up_out, hidden_out,
    expert_of_tile, experts, num_experts, width, stride_gate, stride_up, stride_hidden, stride_bias,
    ACT: gl.constexpr, GLU: gl.constexpr, GATE_BIAS: gl.constexpr, UP_BIAS: gl.constexpr, SAVE: gl.constexpr,
    CLEAR: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Bias, activation and stores, eight rows by 128 columns at a time."""
    C: gl.constexpr = 128
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    W: gl.constexpr = N // 2 if GLU else N
    UP: gl.constexpr = N // 2 if GLU else 0
    dtype: gl.constexpr = hidden_out.dtype.element_ty
    column_tiles = tl.cdiv(width, W)
    ms = gl.arange(0, 8, gl.SliceLayout(1, L))
    ns = gl.arange(0, C, gl.SliceLayout(0, L))
    turn = 0
    second_turn = 0  # the second half's, which tiles with few rows leave out
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        real = gl.where(expert < num_experts, width, 0)
        pieces = gl.minimum(tl.cdiv(end - row, 8), M // 8)
        for piece in range(0, pieces):
            half = piece // (M // 16)
            if piece % (M // 16) == 0:
                mbarrier.wait(stash_full.index(half), gl.where(half == 0, turn, second_turn))
            base = row + piece * 8
            scale = scales.index(piece).load(gl.SliceLayout(1, L))[:, None]
            for first in gl.static_range(0, W, C):
                at = column * W + first
                mask = (base + ms < end)[:, None] & (at + ns < width)[None, :]
                bias_at = expert.to(gl.int64) * stride_bias + at + ns
                up = stash.index(piece).slice(UP + first, C, dim=1).load(L).to(gl.float32) * scale
                if UP_BIAS:
                    up += gl.load(b_up + bias_at, at + ns < real, other=0.0).to(gl.float32)[None, :]
                if SAVE:
                    out = up_out + (base.to(gl.int64) * stride_up + at)
                    gl.store(out + (ms[:, None] * stride_up + ns[None, :]), up.to(dtype), mask)
                if GLU:
                    gate = stash.index(piece).slice(first, C, dim=1).load(L).to(gl.float32) * scale
                    if GATE_BIAS:
                        gate += gl.load(b_gate + bias_at, at + ns < real, other=0.0).to(gl.float32)[None, :]
                    if SAVE:
                        out = gate_out + (base.to(gl.int64) * stride_gate + at)
                        gl.store(out + (ms[:, None] * stride_gate + ns[None, :]), gate.to(dtype), mask)
                    hidden = activate(gate, ACT) * up
                else:
                    hidden = activate(up, ACT)
                if CLEAR:  # act(0) is not 0, and dropped rows have no hidden value
                    hidden = gl.where(real > 0, hidden, 0.0)
                out = hidden_out + (base.to(gl.int64) * stride_hidden + at)
                gl.store(out + (ms[:, None] * stride_hidden + ns[None, :]), hidden.to(dtype), mask)
            if (piece == pieces - 1) | (piece % (M // 16) == M // 16 - 1):
                release(stash_empty.index(half))
        turn ^= 1
        second_turn = gl.where(row + M // 2 < end, second_turn ^ 1, second_turn)
