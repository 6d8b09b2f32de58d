"""What the kernels for Hopper share: a ring of stages in shared memory, the products over it, a tile handed over.

Contract: a program has one group of warps that multiplies (the default partition, 8 warps) and up to four more warps.
Loaders fill stage after stage and wait on ``empty``; the products wait on ``full``. A finished tile goes to the stash,
one tile of shared memory, from which others finish it during the next tile's products: ``stash_full`` and
``stash_empty`` take turns. All walk through the same tiles in the same order, so nothing but these barriers is said.

A stash of fp32 would take the room of every stage but two. So a row is scaled by a power of two until its largest
value lies in [2^14, 2^15) and stored as fp16: 11 significant bits for every value down to 2^-28 of the largest, eight
times finer than the bf16 that is made of it.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# Gluon types its layouts and ranges as what they are outside a kernel.

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moefy.triton_ops.hopper import rows_apart
from moefy.triton_ops.tiles import count_tiles, locate


def _named(owner: Any, *names: str) -> Any:
    """The first of ``names`` that ``owner`` has: newer versions of Triton first, of which some keep dead names."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise AttributeError(f"{owner} has none of {names}")


jit: Any = gluon.jit
barrier = _named(gl, "barrier", "thread_barrier")
load_tile = _named(tma, "async_load", "async_copy_global_to_shared")
store_tile = _named(tma, "async_store", "async_copy_shared_to_global")
load_values = _named(async_copy, "async_load", "async_copy_global_to_shared")
reinterpret = _named(gl.shared_memory_descriptor, "reinterpret", "_reinterpret")
values_loaded = async_copy.mbarrier_arrive
store_wait = tma.store_wait

# A stash of rows, swizzled so that neither writing fragments nor reading rows meets in a bank; and a vector.
STASH = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def descriptor(tensor: Tensor, *block: int) -> Any:
    """A descriptor for tiles of ``block`` of a matrix, or of all experts' matrices [E, rows, columns] as one matrix.

    Without Gluon's own checks, which take microseconds of the host: ``moefy.triton_ops.hopper`` made them.
    """
    shape, strides = list(tensor.shape), list(tensor.stride())
    if tensor.dim() == 3:
        shape = [(shape[0] - 1) * rows_apart(tensor) + shape[1], shape[2]]
        strides = strides[1:]
    found: Any = object.__new__(TensorDescriptor)
    found.base, found.shape, found.strides = tensor, shape, strides
    found.block_shape, found.layout = list(block), _layout(block, tensor.dtype)
    found.padding, found.round_f32_to_tf32 = "zero", False
    return found


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    element = gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


@jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """The barriers ``(full, empty)`` of STAGES stages; ``full`` waits for ARRIVALS beside the bytes."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=ARRIVALS)
        mbarrier.init(empty.index(s), count=1)
    return full, empty


@jit
def turns(READERS: gl.constexpr):
    """The barriers ``(full, empty)`` of one buffer that READERS partitions read."""
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=READERS)
    return full, empty


@jit
def ready():
    """To be called once, when all barriers are made."""
    fence_async_shared()
    barrier()


@jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage; the phase turns with every round."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@jit
def _before(stage, STAGES: gl.constexpr):
    """The stage before. Not carried through the loop: a variable that starts as ``stage`` would stay what it was."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@jit
def accumulate(
    acc, a_buf, b_buf, full, empty, stage, phase, depth,
    A_LIES: gl.constexpr, B_STANDS: gl.constexpr, CLEAR: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``acc`` plus the products over ``depth``; also the stage and phase behind them.

    A stage holds a [M, STEP], with A_LIES [STEP, M], and b [STEP, N], with B_STANDS [N, STEP]. CLEAR zeroes what lies
    behind ``depth``: there are another expert's rows, and zero times another's NaN would be NaN.
    """
    for k in range(0, depth, STEP):
        mbarrier.wait(full.index(stage), phase)
        a = a_buf.index(stage)
        b = b_buf.index(stage)
        if CLEAR:  # noqa: SIM102 - settled when compiled, the inner one is not
            if k + STEP > depth:
                _clear(a, depth - k)
                _clear(b, depth - k)
                fence_async_shared()
                barrier()
        if A_LIES:
            a = a.permute([1, 0])
        if B_STANDS:
            b = b.permute([1, 0])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=k > 0)
        stage, phase = advance(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(_before(stage, STAGES)), count=1, pred=depth > 0)
    return acc, stage, phase


@jit
def multiply_rows(
    a_buf, b_buf, stash, scales, full, empty, stash_full, stash_empty,
    expert_of_tile, experts, num_experts, depth, width,
    COLUMNS: gl.constexpr, B_STANDS: gl.constexpr, WHOLE: gl.constexpr,
    M: gl.constexpr, N: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The multiplying partition of a kernel over rows: all its tiles, each handed over scaled.

    A tile moves on by COLUMNS of the ``width`` columns; N is a multiple of that for matrices side by side. Without
    WHOLE the columns behind the last one are another expert's, whose size must not set the scale.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 16])
    column_tiles = tl.cdiv(width, COLUMNS)
    stage = 0
    phase = 0
    turn = 0
    for tile in range(gl.program_id(0), count_tiles(experts, num_experts) * column_tiles, gl.num_programs(0)):
        expert, _, _, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        acc = gl.zeros([M, N], gl.float32, ACC)
        acc, stage, phase = accumulate(
            acc, a_buf, b_buf, full, empty, stage, phase, gl.where(expert < num_experts, depth, 0),
            False, B_STANDS, False, STEP, STAGES,
        )  # fmt: skip
        if not WHOLE:
            ns = gl.arange(0, N, gl.SliceLayout(0, ACC)) % COLUMNS
            acc = gl.where((column * COLUMNS + ns < width)[None, :], acc, 0.0)
        put_scaled(acc, stash, scales, stash_full, stash_empty, turn)
        turn ^= 1


@jit
def _clear(buffer, rows):
    """Zero ``buffer`` [STEP, W] from row ``rows`` on."""
    STEP: gl.constexpr = buffer.shape[0]
    W: gl.constexpr = buffer.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // W, W // 8], [gl.num_warps(), 1], [1, 0])
    values = buffer.load(L)
    kept = gl.arange(0, STEP, gl.SliceLayout(1, L)) < rows
    buffer.store(gl.where(kept[:, None], values, gl.zeros([STEP, W], values.dtype, L)))


@jit
def put_scaled(acc, stash, scales, stash_full, stash_empty, phase):
    """Hand ``acc`` over as fp16 with one power of two a row; ``scales`` [M] brings the values back."""
    # the exponent of the largest value; from 15 on the two powers of two below are normal numbers
    largest = gl.max(gl.abs(acc), 1).to(gl.int32, bitcast=True)
    exponent = gl.maximum((largest & 0x7F800000) >> 23, 15)
    # beside an infinity the others stay as they are
    exponent = gl.where(exponent == 255, 141, exponent)
    scale = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
    values = (acc * scale[:, None]).to(gl.float16)
    mbarrier.wait(stash_empty, phase ^ 1)
    scales.store(((exponent - 14) << 23).to(gl.float32, bitcast=True))
    stash.store(values)
    barrier()
    mbarrier.arrive(stash_full, count=1)


@jit
def put_rounded(acc, stash, stash_full, stash_empty, phase):
    """Hand ``acc`` over in the stash's own type, for a store by descriptor."""
    values = acc.to(stash.dtype)
    mbarrier.wait(stash_empty, phase ^ 1)
    stash.store(values)
    fence_async_shared()
    barrier()
    mbarrier.arrive(stash_full, count=1)


@jit
def release(stash_empty):
    """This partition has read the stash."""
    barrier()
    mbarrier.arrive(stash_empty, count=1)
