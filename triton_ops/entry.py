"""The experts' entry: gather each row's token, multiply by its expert's up (and gate) matrix, bias, activation.

T tokens, D model width, H hidden width, E experts, K top-k, N = T*K rows sorted by expert.

Contract: row r is token ``order[r] // K``; it gives ``up = x @ w_up[e].T + b_up[e]``, with a gate likewise, and
``hidden = act(up)`` or ``act(gate) * up``. The rows are gathered while they are read. The pre-activations are stored
only when the backward will want them. Rows of dropped slots are zero.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# Triton types the iterator of its own range as one that cannot be iterated.

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import triton.language as tl
from torch import Tensor

from moefy.triton_ops import hopper
from moefy.triton_ops.gather_sum import spread
from moefy.triton_ops.shared.activations import device_functions
from moefy.triton_ops.shared.blocks import (
    Blocks,
    blocks,
    cdiv,
    describable,
    describe,
    descriptor,
    has_tma,
    precision,
    processors,
)
from moefy.triton_ops.shared.calls import EntryCall
from moefy.triton_ops.shared.forms import Form, anything, form_for
from moefy.triton_ops.shared.launch import jit, kernel
from moefy.triton_ops.shared.tiles import count_tiles, locate, store

# Experts of this hidden width and more read copied rows, where these come by descriptor (H100, bf16, H=14336: 6.36 ms
# against 5.93 + 0.10).
COPY_TOKENS_FROM = 8192

activate, _ = device_functions()


def entry(call: EntryCall) -> None:
    """Fill ``hidden_NH`` and, where given, ``gate_out`` and ``up_out``."""
    if call.hidden_NH.numel():
        form_for(FORMS, call).run(call)


def _takes_hopper(call: EntryCall) -> bool:
    rows, width = call.hidden_NH.shape
    return width < COPY_TOKENS_FROM and hopper.takes_entry(call.x_TD, call.w_gate, call.w_up, rows)


def _run_hopper(call: EntryCall) -> None:
    from moefy.triton_ops.hopper.entry import entry as entry_on_hopper

    entry_on_hopper(call)


def _takes_descriptors(call: EntryCall) -> bool:
    return has_tma(call.x_TD.device) and describable(call.w_up, call.gate)


def _run(call: EntryCall, by_descriptor: bool) -> None:
    """Launch the Triton kernel; ``by_descriptor`` says how it reads the weights."""
    x_TD, w_up, gate, schedule = call.x_TD, call.w_up, call.gate, call.schedule
    b_gate, b_up, gate_out, up_out, hidden_NH = (
        call.b_gate,
        call.b_up,
        call.gate_out,
        call.up_out,
        call.hidden_NH,
    )
    (rows, width), depth, glu = hidden_NH.shape, x_TD.shape[1], call.w_gate is not None
    block = blocks("glu_entry" if glu else "entry", x_TD.dtype, rows, schedule.num_experts, x_TD.device)
    copy = by_descriptor and width >= COPY_TOKENS_FROM
    if copy:
        block = dataclasses.replace(block, store=True, flatten=True)
        x_TD = spread(x_TD, call.row_of_slot_N, call.top_k)
    pair = _pair(gate, w_up, block) if glu and by_descriptor and block.pair else None
    weights = [descriptor(w, 1, block.n, block.k) if by_descriptor else w for w in (gate, w_up)]
    if pair is not None:
        weights = [pair, pair]
    programs = min(schedule.max_tiles * cdiv(width, block.n), block.per_processor * processors(x_TD.device))
    nothing = hidden_NH
    outs = [out if out is not None else hidden_NH for out in (gate_out, up_out, hidden_NH)]
    by_store = block.store and by_descriptor and describable(*outs)
    tiles = [descriptor(out, block.m, block.n // block.pieces) if by_store else out for out in outs]
    a = descriptor(x_TD, block.m, block.k) if copy else x_TD
    bias = b_up if b_up is not None else b_gate
    _entry_kernel[(programs,)](
        a, call.order_N, *weights,
        b_gate if b_gate is not None else nothing, b_up if b_up is not None else nothing,
        gate_out if gate_out is not None else nothing, up_out if up_out is not None else nothing, hidden_NH, *tiles,
        schedule.expert_of_tile, schedule.experts, schedule.num_experts, depth, width,
        x_TD.stride(0), w_up.stride(0), w_up.stride(1),
        gate_out.stride(0) if gate_out is not None else 0, up_out.stride(0) if up_out is not None else 0,
        hidden_NH.stride(0), bias.stride(0) if bias is not None else 0,
        K=call.top_k, ACT=call.activation, GLU=glu, GATE_BIAS=b_gate is not None, UP_BIAS=b_up is not None,
        SAVE=up_out is not None, TMA=by_descriptor, EVEN=depth % block.k == 0, PRECISION=precision(x_TD.dtype),
        M=block.m, N=block.n, STEP=block.k, GROUP=block.group, FLATTEN=block.flatten,
        PIECES=block.pieces, STORE=by_store, GATHER=not copy,
        PAIR=0 if pair is None else 1 if gate.data_ptr() < w_up.data_ptr() else 2,
        **block.options,
    )  # fmt: skip


FORMS = (
    Form("hopper", _takes_hopper, _run_hopper),
    Form("descriptor", _takes_descriptors, functools.partial(_run, by_descriptor=True)),
    Form("pointer", anything, functools.partial(_run, by_descriptor=False)),
)


def _pair(gate: Tensor, up: Tensor, block: Blocks) -> Any | None:
    """One descriptor of both weights, [E, 2, H, D], the earlier one in memory first; None when they lie too far apart.

    So both tiles arrive as one operand of 2N columns: products of 128 columns are bound by shared memory, those of 256
    are not. It does not matter whether the two are halves of one tensor: the distance is just a stride.
    """
    first, last = (gate, up) if gate.data_ptr() < up.data_ptr() else (up, gate)
    distance = last.data_ptr() - first.data_ptr()
    if distance % 16 or distance >= 2**40 or gate.stride() != up.stride():
        return None
    experts, width, depth = gate.shape
    strides = (gate.stride(0), distance // gate.element_size(), gate.stride(1), 1)
    return describe(first, (experts, 2, width, depth), strides, (1, 2, block.n, block.k))


@kernel
def _entry_kernel(
    x, order, w_gate, w_up, b_gate, b_up, gate_out, up_out, hidden_out, gate_tiles, up_tiles, hidden_tiles,
    expert_of_tile, experts, num_experts, depth, width,
    stride_x, stride_we, stride_wn, stride_gate, stride_up, stride_hidden, stride_bias,
    K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
    SAVE: tl.constexpr, TMA: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    FLATTEN: tl.constexpr, PIECES: tl.constexpr, STORE: tl.constexpr, GATHER: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, N)
    total = count_tiles(experts, num_experts) * column_tiles
    ks = tl.arange(0, STEP)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, column = locate(tile, column_tiles, expert_of_tile, experts, M, GROUP)
        rows = row + tl.arange(0, M)
        inside = rows < end
        token = tl.load(order + rows, inside, other=0) // K
        columns = column * N + tl.arange(0, N)
        known = columns < width
        if GATHER:
            x_rows = x + token.to(tl.int64)[:, None] * stride_x + ks[None, :]
        if not TMA:
            w_rows = expert.to(tl.int64) * stride_we + columns.to(tl.int64)[:, None] * stride_wn + ks[None, :]
        steps = tl.where(expert < num_experts, depth, 0)
        if PAIR != 0:
            both = tl.zeros((M, 2 * N), tl.float32)
        else:
            up = tl.zeros((M, N), tl.float32)
            gate = tl.zeros((M, N), tl.float32)
        for k in tl.range(0, steps, STEP):
            if not GATHER:
                a = x.load([row, k])
            elif EVEN:
                a = tl.load(x_rows + k)
            else:
                a = tl.load(x_rows + k, (k + ks < depth)[None, :], other=0.0)
            if PAIR != 0:
                b = w_up.load([expert, 0, column * N, k]).reshape(2 * N, STEP)
                both = tl.dot(a, b.T, both, input_precision=PRECISION)
            else:
                if TMA:
                    b = w_up.load([expert, column * N, k]).reshape(N, STEP)
                else:
                    b = tl.load(w_up + w_rows + k, known[:, None] & (k + ks < depth)[None, :], other=0.0)
                up = tl.dot(a, b.T, up, input_precision=PRECISION)
            if GLU and PAIR == 0:
                if TMA:
                    c = w_gate.load([expert, column * N, k]).reshape(N, STEP)
                else:
                    c = tl.load(w_gate + w_rows + k, known[:, None] & (k + ks < depth)[None, :], other=0.0)
                gate = tl.dot(a, c.T, gate, input_precision=PRECISION)
        if PAIR == 1:
            gate, up = both.reshape(M, 2, N).permute(0, 2, 1).split()
        elif PAIR == 2:
            up, gate = both.reshape(M, 2, N).permute(0, 2, 1).split()
        real = tl.where(expert < num_experts, width, 0)
        if not GLU:
            gate = up
        _finish(
            gate, up, expert, row, end, column * N, width, real, b_gate, b_up, stride_bias,
            gate_out, up_out, hidden_out, gate_tiles, up_tiles, hidden_tiles, stride_gate, stride_up, stride_hidden,
            ACT, GLU, GATE_BIAS, UP_BIAS, SAVE, STORE, M, N, PIECES,
        )  # fmt: skip


@jit
def _finish(
    gate, up, expert, row, end, column, width, real, b_gate, b_up, stride_bias,
    gate_out, up_out, hidden_out, gate_tiles, up_tiles, hidden_tiles, stride_gate, stride_up, stride_hidden,
    ACT: tl.constexpr, GLU: tl.constexpr, GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, SAVE: tl.constexpr,
    STORE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Bias, activation, stores of columns ``column .. column + N``, by halves; ``real`` is 0 for no expert."""
    if PIECES > 1:
        up_left, up_right = up.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        if GLU:
            gate_left, gate_right = gate.reshape(M, 2, N // 2).permute(0, 2, 1).split()
        else:
            gate_left, gate_right = up_left, up_right
        _finish(
            gate_left, up_left, expert, row, end, column, width, real, b_gate, b_up, stride_bias,
            gate_out, up_out, hidden_out, gate_tiles, up_tiles, hidden_tiles, stride_gate, stride_up, stride_hidden,
            ACT, GLU, GATE_BIAS, UP_BIAS, SAVE, STORE, M, N // 2, PIECES // 2,
        )  # fmt: skip
        _finish(
            gate_right, up_right, expert, row, end, column + N // 2, width, real, b_gate, b_up, stride_bias,
            gate_out, up_out, hidden_out, gate_tiles, up_tiles, hidden_tiles, stride_gate, stride_up, stride_hidden,
            ACT, GLU, GATE_BIAS, UP_BIAS, SAVE, STORE, M, N // 2, PIECES // 2,
        )  # fmt: skip
    else:
        columns = column + tl.arange(0, N)
        at = expert.to(tl.int64) * stride_bias + columns
        if UP_BIAS:
            up += tl.load(b_up + at, columns < real, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            store(up_out, up_tiles, up, row, end, column, width, stride_up, STORE, M, N)
        if GLU:
            if GATE_BIAS:
                gate += tl.load(b_gate + at, columns < real, other=0.0).to(tl.float32)[None, :]
            if SAVE:
                store(gate_out, gate_tiles, gate, row, end, column, width, stride_gate, STORE, M, N)
            hidden = activate(gate, ACT) * up
        else:
            hidden = activate(up, ACT)
        # act(0) need not be 0 (sigmoid): dropped rows have no hidden value
        hidden = tl.where(real > 0, hidden, 0.0)
        store(hidden_out, hidden_tiles, hidden, row, end, column, width, stride_hidden, STORE, M, N)
