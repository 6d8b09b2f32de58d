"""The gradient of the experts' hidden values, and all that follows from it tile by tile.

T tokens, D output width, H hidden width, E experts, K top-k, N = T*K rows sorted by expert.

Contract, for row r of token t and slot s: ``g = grad[t] @ w_down[e]`` is the hidden gradient without the routing weight
``q[s]``. From it and the saved pre-activations the tile computes, with nothing stored between:

    dup, dgate  = q * g through the derivative of the activation        [N, H] each
    weighted    = q * hidden, what the gradient of w_down multiplies    [N, H]
    dq[s]       = <g, hidden>, in parts of one column tile each         summed in a fixed order by ``weights_grad``

The routing gradient needs no expert output again (as in SonicMoE, Guo et al. 2025): <grad, hidden @ w.T> is
<grad @ w, hidden>. Rows of dropped slots are zero.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# Triton types the iterator of its own range as one that cannot be iterated.

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from moefy.triton_ops import hopper
from moefy.triton_ops.shared.activations import device_functions
from moefy.triton_ops.shared.blocks import (
    blocks,
    cdiv,
    describable,
    descriptor,
    has_tma,
    precision,
    processors,
)
from moefy.triton_ops.shared.calls import HiddenGradCall
from moefy.triton_ops.shared.forms import Form, anything, form_for
from moefy.triton_ops.shared.launch import jit, kernel
from moefy.triton_ops.shared.tiles import Schedule, count_tiles, locate, store

_, activate_backward = device_functions()


def hidden_grad_form(call: HiddenGradCall) -> Form:
    """How to compute ``call``: ``form.run(call)``.

    It fills ``dgate_NH``, ``dup_NH`` and ``weighted_NH`` and returns the parts of the routing gradient, [parts, N].
    The form "hopper" runs calls without ``gather`` alone: the caller copies the rows, which it may need elsewhere too.
    """
    return form_for(FORMS, call)


def _takes_hopper(call: HiddenGradCall) -> bool:
    return hopper.takes_hidden_grad(call.grad, call.w_down, call.gate_NH, call.up_NH)


def _run_hopper(call: HiddenGradCall) -> Tensor:
    from moefy.triton_ops.hopper.hidden_grad import hidden_grad as hidden_grad_on_hopper

    assert not call.gather
    return hidden_grad_on_hopper(call)


def _takes_descriptors(call: HiddenGradCall) -> bool:
    return has_tma(call.grad.device) and describable(call.w_down)


def _run(call: HiddenGradCall, by_descriptor: bool) -> Tensor:
    """Launch the Triton kernel; ``by_descriptor`` says how it reads the exit's matrix."""
    grad, w_down, schedule = call.grad, call.w_down, call.schedule
    up_NH, dup_NH, weighted_NH = call.up_NH, call.dup_NH, call.weighted_NH
    (rows, width), depth = up_NH.shape, grad.shape[1]
    block = blocks("hidden_grad", grad.dtype, rows, schedule.num_experts, grad.device)
    pieces, column_tiles = block.pieces_for(call.gate_NH is not None), cdiv(width, block.n)
    parts = torch.empty((column_tiles, rows), dtype=torch.float32, device=grad.device)
    if not rows or not width:
        return parts
    glu = call.gate_NH is not None
    gate, dgate = (
        (up_NH, dup_NH) if call.gate_NH is None or call.dgate_NH is None else (call.gate_NH, call.dgate_NH)
    )
    a = grad if call.gather or not by_descriptor else descriptor(grad, block.m, block.k)
    outs = (dgate, dup_NH, weighted_NH)
    by_store = block.store and by_descriptor and describable(*outs)
    tiles = [descriptor(out, block.m, block.n // pieces) if by_store else out for out in outs]
    programs = min(schedule.max_tiles * column_tiles, block.per_processor * processors(grad.device))
    _hidden_grad_kernel[(programs,)](
        a, call.weights_TK, call.order_N, descriptor(w_down, 1, block.k, block.n) if by_descriptor else w_down,
        gate, up_NH, *outs, *tiles, parts,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width, rows,
        grad.stride(0), w_down.stride(0), w_down.stride(1), up_NH.stride(0), dup_NH.stride(0),
        weighted_NH.stride(0),
        K=call.weights_TK.shape[1], ACT=call.activation, GLU=glu, TMA=by_descriptor,
        EVEN=depth % block.k == 0, PRECISION=precision(grad.dtype),
        M=block.m, N=block.n, STEP=block.k, GROUP=block.group, FLATTEN=block.flatten, STORE=by_store,
        GATHER=call.gather, PIECES=pieces, **block.options,
    )  # fmt: skip
    return parts


FORMS = (
    Form("hopper", _takes_hopper, _run_hopper),
    Form("descriptor", _takes_descriptors, functools.partial(_run, by_descriptor=True)),
    Form("pointer", anything, functools.partial(_run, by_descriptor=False)),
)


@kernel
def _hidden_grad_kernel(
    grad, weights, order, w_down, gate, up, dgate, dup, weighted, dgate_tiles, dup_tiles, weighted_tiles, parts,
    expert_of_tile, experts, num_experts, depth, width, num_rows,
    stride_grad, stride_we, stride_wd, stride_h, stride_dh, stride_weighted,
    K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, STORE: tl.constexpr, GATHER: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, N)
    total = count_tiles(experts, num_experts) * column_tiles
    ks = tl.arange(0, STEP)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        rows = row + tl.arange(0, M)
        inside = rows < end
        slot = tl.load(order + rows, inside, other=0)
        columns = column * N + tl.arange(0, N)
        known = columns < width
        if GATHER:
            g_rows = grad + (slot // K).to(tl.int64)[:, None] * stride_grad + ks[None, :]
        w_rows = w_down
        if not TMA:
            w_rows = w_down + expert.to(tl.int64) * stride_we + columns[None, :]
        steps = tl.where(expert < num_experts, depth, 0)
        g = tl.zeros((M, N), tl.float32)
        for k in tl.range(0, steps, STEP):
            if not GATHER:
                a = grad.load([row, k])
            elif EVEN:
                a = tl.load(g_rows + k)
            else:
                a = tl.load(g_rows + k, (k + ks < depth)[None, :], other=0.0)
            if TMA:
                b = w_down.load([expert, k, column * N]).reshape(STEP, N)
            else:
                mask = (k + ks < depth)[:, None] & known[None, :]
                b = tl.load(w_rows + (k + ks).to(tl.int64)[:, None] * stride_wd, mask, other=0.0)
            g = tl.dot(a, b, g, input_precision=PRECISION)
        # read again, rather than kept in registers through the products
        slot = tl.load(order + row + tl.arange(0, M), row + tl.arange(0, M) < end, other=0)
        q = tl.load(weights + slot).to(tl.float32)[:, None]
        q = tl.where(expert < num_experts, q, 0.0)
        part = _columns(
            g, q, row, end, column * N, width, gate, up, dgate, dup, weighted, dgate_tiles, dup_tiles, weighted_tiles,
            stride_h, stride_dh, stride_weighted, ACT, GLU, TMA, STORE, M, N, PIECES,
        )  # fmt: skip
        tl.store(
            parts + column.to(tl.int64) * num_rows + row + tl.arange(0, M), part, row + tl.arange(0, M) < end
        )


@jit
def _columns(
    g, q, row, end, column, width, gate, up, dgate, dup, weighted, dgate_tiles, dup_tiles, weighted_tiles,
    stride_h, stride_dh, stride_weighted,
    ACT: tl.constexpr, GLU: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """The epilogue of columns ``column .. column + N``, by halves of halves; returns ``<g, hidden>`` of each row."""
    if PIECES > 1:
        left, right = g.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        part = _columns(
            left, q, row, end, column, width, gate, up, dgate, dup, weighted, dgate_tiles, dup_tiles, weighted_tiles,
            stride_h, stride_dh, stride_weighted, ACT, GLU, TMA, STORE, M, N // 2, PIECES // 2,
        )  # fmt: skip
        part += _columns(
            right, q, row, end, column + N // 2, width, gate, up, dgate, dup, weighted,
            dgate_tiles, dup_tiles, weighted_tiles,
            stride_h, stride_dh, stride_weighted, ACT, GLU, TMA, STORE, M, N // 2, PIECES // 2,
        )  # fmt: skip
    else:
        # int64 to the tile, int32 within it: whole tiles of 64-bit addresses would not fit the registers
        ms = tl.arange(0, M)[:, None]
        ns = tl.arange(0, N)[None, :]
        mask = (row + ms < end) & (column + ns < width)
        here = row.to(tl.int64) * stride_h + column
        u = tl.load(up + here + (ms * stride_h + ns), mask, other=0.0).to(tl.float32)
        if GLU:
            z = tl.load(gate + here + (ms * stride_h + ns), mask, other=0.0).to(tl.float32)
            act, dact = activate_backward(z, ACT)
            hidden = act * u
        else:
            hidden, dact = activate_backward(u, ACT)
        # columns behind the last one have g = 0; by descriptor a lane has several, and to choose would spill on sm_100
        part = tl.sum(g * hidden, 1) if TMA else _sum_of_products(g * hidden, mask)
        store(weighted, weighted_tiles, q * hidden, row, end, column, width, stride_weighted, STORE, M, N)
        g *= q
        if GLU:
            store(dgate, dgate_tiles, g * u * dact, row, end, column, width, stride_dh, STORE, M, N)
            store(dup, dup_tiles, g * act, row, end, column, width, stride_dh, STORE, M, N)
        else:
            store(dup, dup_tiles, g * dact, row, end, column, width, stride_dh, STORE, M, N)
    return part


@jit
def _sum_of_products(products, known):
    """Sums along the columns, of the products that are ``known``: the others are zero anyway.

    A lane with one product would have it fused with its neighbour's, which is rounded where its own is not, so that
    lanes that hold the same sum would differ in the last bits. What was chosen is not fused.
    """
    return tl.sum(tl.where(known, products, 0.0), 1)


def weights_grad(
    parts: Tensor,
    order_N: Tensor,
    grad_TD: Tensor,
    b_down: Tensor | None,
    schedule: Schedule,
    out_TK: Tensor,
) -> None:
    """Fill ``out_TK``, the routing gradient: the parts of ``hidden_grad`` in their order, and ``<grad, b_down>``."""
    rows = order_N.shape[0]
    if not rows:
        return
    block_rows = schedule.block_rows
    _weights_grad_kernel[(schedule.max_tiles,)](
        parts, order_N, grad_TD, b_down if b_down is not None else grad_TD, out_TK,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, rows, parts.shape[0], grad_TD.shape[1],
        grad_TD.stride(0),
        K=out_TK.shape[1], BIAS=b_down is not None, M=block_rows, STEP=32, num_warps=4,
    )  # fmt: skip


@kernel
def _weights_grad_kernel(
    parts, order, grad, b_down, out,
    expert_of_tile, experts, num_experts, num_rows, num_parts, depth, stride_grad,
    K: tl.constexpr, BIAS: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= count_tiles(experts, num_experts):
        return
    expert, row, end, _ = locate(tl.program_id(0), 1, expert_of_tile, experts, M, 1)
    rows = row + tl.arange(0, M)
    inside = rows < end
    slot = tl.load(order + rows, inside, other=0)
    total = tl.zeros((M,), tl.float32)
    at = parts + rows
    for _ in range(0, num_parts):
        total += tl.load(at, inside, other=0.0)
        at += num_rows
    if BIAS:
        ks = tl.arange(0, STEP)
        token = (slot // K).to(tl.int64)
        for k in range(0, tl.where(expert < num_experts, depth, 0), STEP):
            known = k + ks < depth
            bias = tl.load(b_down + expert.to(tl.int64) * depth + k + ks, known, other=0.0).to(tl.float32)
            g_rows = grad + token[:, None] * stride_grad + (k + ks)[None, :]
            g = tl.load(g_rows, inside[:, None] & known[None, :], other=0.0).to(tl.float32)
            total += _sum_of_products(g * bias[None, :], known[None, :])
    tl.store(out + slot, tl.where(expert < num_experts, total, 0.0).to(out.dtype.element_ty), inside)
