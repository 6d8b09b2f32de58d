"""What the kernels for Hopper share: a ring of stages in shared memory, the products over it, a tile handed over.

Contract: the first two groups of four warps multiply, each its half of a tile's rows, so that one multiplies while
the other hands its half over; more warps load and finish. Loaders fill stage after stage and wait on ``empty``; the
products wait on ``full``. A finished half goes to the stash, one tile of shared memory, from which others finish it
during the next tile's products: ``stash_full`` and ``stash_empty`` take turns. All walk through the same tiles in the
same order; in the weight gradient, which takes tiles as it becomes free, the loader tells the others. The hidden
gradient alone multiplies with all eight warps at once, which also load, so that four finish.

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
    return barriers(STAGES, ARRIVALS), barriers(STAGES, 2)


@jit
def turns():
    """The barriers ``(full, empty)`` of the stash's halves."""
    return barriers(2, 1), barriers(2, 1)


@jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that wait for ARRIVALS each."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


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
def before(stage, STAGES: gl.constexpr):
    """The stage before. Not carried through the loop: a variable that starts as ``stage`` would stay what it was."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@jit
def accumulate(
    acc, a_buf, b_buf, full, empty, stage, phase, depth, cleared, turn,
    HALF: gl.constexpr, A_LIES: gl.constexpr, B_STANDS: gl.constexpr, CLEAR: gl.constexpr,
    STEP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``acc`` plus the products over ``depth`` of this HALF of a; also the stage and phase behind them.

    A stage holds a [M, STEP], with A_LIES [STEP, M], and b [STEP, N], with B_STANDS [N, STEP]. CLEAR zeroes what lies
    behind ``depth``: there are another expert's rows, and zero times another's NaN would be NaN. The first half clears
    b for both, which meet at ``cleared``, at its ``turn``; without CLEAR these two are of no use.
    """
    R: gl.constexpr = acc.shape[0]
    for k in range(0, depth, STEP):
        mbarrier.wait(full.index(stage), phase)
        a = a_buf.index(stage).slice(HALF * R, R, dim=1 if A_LIES else 0)
        b = b_buf.index(stage)
        if CLEAR:  # noqa: SIM102 - settled when compiled, the inner one is not
            if k + STEP > depth:
                _clear(a, depth - k)
                if HALF == 0:
                    _clear(b, depth - k)
                fence_async_shared()
                barrier()
                # both arrive, so that neither is ever two turns ahead: the other could no longer tell them apart
                mbarrier.arrive(cleared, count=1)
                mbarrier.wait(cleared, turn)
        if A_LIES:
            a = a.permute([1, 0])
        if B_STANDS:
            b = b.permute([1, 0])
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=k > 0)
        stage, phase = advance(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(before(stage, STAGES)), count=1, pred=depth > 0)
    return acc, stage, phase


@jit
def pass_over(full, empty, stage, phase, depth, STEP: gl.constexpr, STAGES: gl.constexpr):
    """Let the stages of a product go by that is not needed; the stage and phase behind them."""
    for _ in range(0, depth, STEP):
        mbarrier.wait(full.index(stage), phase)
        barrier()  # one thread arrives for all, who must have seen this phase
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


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
