"""The gradient of the experts' hidden values on Hopper: see ``moefy.triton_ops.hidden_grad``, whose contract this is.

The rows of the output's gradient come copied, in the order of the experts. Eight warps load and multiply, four take the
products through the activation's derivative and the routing weights; these read the pre-activations two pieces ahead.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from moefy.triton_ops.hopper import TILE_M, TILE_N
from moefy.triton_ops.hopper.pipeline import (
    STASH,
    VECTOR,
    advance,
    barrier,
    barriers,
    before,
    descriptor,
    jit,
    load_tile,
    mbarrier,
    put_scaled,
    ready,
    reinterpret,
    release,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from moefy.triton_ops.shared.activations import device_functions
from moefy.triton_ops.shared.blocks import cdiv, processors
from moefy.triton_ops.shared.calls import HiddenGradCall
from moefy.triton_ops.shared.launch import kernel
from moefy.triton_ops.shared.tiles import count_tiles, locate

STEP, STAGES, GROUP = 64, 3, 16
# Rows and columns that are finished at a time: as many values a lane as fit the registers, of which a GLU has two.
PIECE, GLU_WIDE = 16, 128

_, activate_backward = device_functions()


def hidden_grad(call: HiddenGradCall) -> Tensor:
    """Fill ``dgate_NH``, ``dup_NH`` and ``weighted_NH``; return the parts of the routing gradient, [parts, N] fp32.

    ``call`` is one without ``gather``.
    """
    grad_ND, w_down, schedule = call.grad, call.w_down, call.schedule
    gate_NH, up_NH, dgate_NH, dup_NH = call.gate_NH, call.up_NH, call.dgate_NH, call.dup_NH
    (rows, width), depth = up_NH.shape, grad_ND.shape[1]
    assert schedule.block_rows == TILE_M and depth >= STAGES * STEP
    column_tiles = cdiv(width, TILE_N)
    parts = torch.empty((column_tiles, rows), dtype=torch.float32, device=grad_ND.device)
    gate, dgate = (up_NH, dup_NH) if gate_NH is None or dgate_NH is None else (gate_NH, dgate_NH)
    programs = min(schedule.max_tiles * column_tiles, processors(grad_ND.device))
    _hidden_grad_kernel[(programs,)](
        descriptor(grad_ND, TILE_M, STEP), descriptor(w_down, STEP, TILE_N),
        call.weights_TK, call.order_N, gate, up_NH, dgate, dup_NH, call.weighted_NH, parts,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width, rows,
        up_NH.stride(0), dup_NH.stride(0), call.weighted_NH.stride(0),
        ACT=call.activation, GLU=gate_NH is not None, EVEN=width % TILE_N == 0,
        M=TILE_M, N=TILE_N, STEP=STEP, STAGES=STAGES, GROUP=GROUP,
        PIECE=PIECE, WIDE=TILE_N if gate_NH is None else GLU_WIDE, num_warps=8,
    )  # fmt: skip
    return parts


@kernel(by=jit)
def _hidden_grad_kernel(
    grad_tiles, w_tiles, weights, order, gate, up, dgate, dup, weighted, parts,
    expert_of_tile, experts, num_experts, depth, width, num_rows, stride_h, stride_dh, stride_weighted,
    ACT: gl.constexpr, GLU: gl.constexpr, EVEN: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    PIECE: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    a_buf = gl.allocate_shared_memory(grad_tiles.dtype, [STAGES, M, STEP], grad_tiles.layout)
    b_buf = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, STEP, N], w_tiles.layout)
    stash = gl.allocate_shared_memory(gl.float16, [M, N], STASH)
    scales = gl.allocate_shared_memory(gl.float32, [M], VECTOR)
    qs = gl.allocate_shared_memory(gl.float32, [M], VECTOR)
    full = barriers(STAGES, 1)
    stash_full = barriers(1, 1).index(0)
    stash_empty = barriers(1, 1).index(0)
    ready()
    pieces = reinterpret(stash, gl.float16, [M // PIECE, PIECE, N], STASH)
    scale_pieces = reinterpret(scales, gl.float32, [M // PIECE, PIECE], VECTOR)
    gl.warp_specialize(
        [
            (_multiply, (
                grad_tiles, w_tiles, a_buf, b_buf, stash, scales, full, stash_full, stash_empty,
                expert_of_tile, experts, num_experts, depth, width, M, N, STEP, STAGES, GROUP,
            )),
            (_finish, (
                pieces, scale_pieces, qs, stash_full, stash_empty,
                weights, order, gate, up, dgate, dup, weighted, parts,
                expert_of_tile, experts, num_experts, width, num_rows, stride_h, stride_dh, stride_weighted,
                ACT, GLU, EVEN, M, N, GROUP, PIECE, WIDE,
            )),
        ],
        [4],
        [184],
    )  # fmt: skip


@jit
def _multiply(
    grad_tiles, w_tiles, a_buf, b_buf, stash, scales, full, stash_full, stash_empty,
    expert_of_tile, experts, num_experts, depth, width,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """All products. A stage is filled again as soon as its product is done: no warp but these is needed for that."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_tiles = tl.cdiv(width, N)
    total = count_tiles(experts, num_experts) * column_tiles
    stage = 0
    phase = 0
    turn = 0
    expert, row, _, column = locate(
        gl.minimum(gl.program_id(0), total - 1), column_tiles, expert_of_tile, experts, M, GROUP
    )
    for s in gl.static_range(STAGES):
        _fill(
            grad_tiles, w_tiles, a_buf, b_buf, full, s, row, expert * depth, column * N, s * STEP,
            (gl.program_id(0) < total) & (expert < num_experts), M, N, STEP,
        )  # fmt: skip
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        following = tile + gl.num_programs(0)
        then_expert, then_row, _, then_column = locate(
            gl.minimum(following, total - 1), column_tiles, expert_of_tile, experts, M, GROUP
        )
        goes_on = (following < total) & (then_expert < num_experts)
        acc = gl.zeros([M, N], gl.float32, ACC)
        real = expert < num_experts
        for k in range(0, gl.where(real, depth, 0), STEP):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(a_buf.index(stage), b_buf.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            barrier()
            ahead = k + (STAGES - 1) * STEP
            here = ahead < depth
            _fill(
                grad_tiles, w_tiles, a_buf, b_buf, full, before(stage, STAGES), gl.where(here, row, then_row),
                gl.where(here, expert, then_expert) * depth, gl.where(here, column, then_column) * N,
                gl.where(here, ahead, ahead - depth), (k > 0) & (here | goes_on), M, N, STEP,
            )  # fmt: skip
            stage, phase = advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()
        _fill(
            grad_tiles, w_tiles, a_buf, b_buf, full, before(stage, STAGES), then_row, then_expert * depth,
            then_column * N, (STAGES - 1) * STEP, real & goes_on, M, N, STEP,
        )  # fmt: skip
        put_scaled(acc, stash, scales, stash_full, stash_empty, turn)
        turn ^= 1
        expert = then_expert
        row = then_row
        column = then_column


@jit
def _fill(
    grad_tiles, w_tiles, a_buf, b_buf, full, stage, row, first, column, k, pred,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr,
):  # fmt: skip
    """Ask for one step's tiles."""
    mbarrier.expect(full.index(stage), (M + N) * STEP * 2, pred=pred)
    load_tile(grad_tiles, [row, k], full.index(stage), a_buf.index(stage), pred=pred)
    load_tile(w_tiles, [first + k, column], full.index(stage), b_buf.index(stage), pred=pred)


@jit
def _fetch(
    piece, column, row, end, width, up, gate, stride_h, L: gl.constexpr, C: gl.constexpr, GLU: gl.constexpr,
    EVEN: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """The pre-activations of a piece by C columns, two in a word: single ones would each wait in a register."""
    ms = gl.arange(0, PIECE, gl.SliceLayout(1, L))
    ns = gl.arange(0, C // 2, gl.SliceLayout(0, L))
    base = row + piece * PIECE
    mask = (base + ms < end)[:, None] & (EVEN | (column + 2 * ns < width))[None, :]
    at = (base.to(gl.int64) * stride_h + column) // 2 + (ms[:, None] * (stride_h // 2) + ns[None, :])
    words = gl.load(up.to(gl.pointer_type(gl.int32)) + at, mask, other=0)
    gate_words = words
    if GLU:
        gate_words = gl.load(gate.to(gl.pointer_type(gl.int32)) + at, mask, other=0)
    return words, gate_words


@jit
def _values(words, L: gl.constexpr, C: gl.constexpr, dtype: gl.constexpr, PIECE: gl.constexpr):
    low = (words & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape([PIECE, C]), L).to(gl.float32)


@jit
def _finish(
    stash, scales, qs, stash_full, stash_empty, weights, order, gate, up, dgate, dup, weighted, parts,
    expert_of_tile, experts, num_experts, width, num_rows, stride_h, stride_dh, stride_weighted,
    ACT: gl.constexpr, GLU: gl.constexpr, EVEN: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, GROUP: gl.constexpr, PIECE: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """The epilogue, PIECE rows by C columns at a time."""
    COUNT: gl.constexpr = N // C
    AHEAD: gl.constexpr = 2 if EVEN else 1  # with a mask of columns two do not fit the registers
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [256 // C, C // 8], [gl.num_warps(), 1], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    PIECES: gl.constexpr = M // PIECE
    dtype: gl.constexpr = up.dtype.element_ty
    column_tiles = tl.cdiv(width, N)
    ms = gl.arange(0, PIECE, gl.SliceLayout(1, L))
    ns = gl.arange(0, C, gl.SliceLayout(0, L))
    tile_rows = gl.arange(0, M, ROWS)
    q_pieces = reinterpret(qs, gl.float32, [PIECES, PIECE], VECTOR)
    turn = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        slot = gl.load(order + row + tile_rows, row + tile_rows < end, other=0)
        at = column * N
        u0, z0 = _fetch(0, at, row, end, width, up, gate, stride_h, WORDS, C, GLU, EVEN, PIECE)
        if AHEAD == 2:
            u1, z1 = _fetch(
                1 // COUNT, at + 1 % COUNT * C, row, end, width, up, gate, stride_h, WORDS, C, GLU, EVEN, PIECE
            )  # fmt: skip
        qs.store(gl.where(expert < num_experts, gl.load(weights + slot).to(gl.float32), 0.0))
        mbarrier.wait(stash_full, turn)
        for piece in range(0, PIECES):
            base = row + piece * PIECE
            q = q_pieces.index(piece).load(gl.SliceLayout(1, L))[:, None]
            scale = scales.index(piece).load(gl.SliceLayout(1, L))[:, None]
            part = gl.zeros([PIECE], gl.float32, gl.SliceLayout(1, L))
            for i in gl.static_range(COUNT):
                at = column * N + i * C
                u = _values(u0, L, C, dtype, PIECE)
                if GLU:
                    z = _values(z0, L, C, dtype, PIECE)
                then = piece + (i + AHEAD) // COUNT
                u2, z2 = _fetch(
                    then, column * N + (i + AHEAD) % COUNT * C, row, gl.where(then < PIECES, end, 0), width,
                    up, gate, stride_h, WORDS, C, GLU, EVEN, PIECE,
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
