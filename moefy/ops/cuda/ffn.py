"""The CUDA side of ``expert_ffn``: from the op's arguments to the launchers of ``moefy.triton_ops``.

Contract: the same results as ``moefy/ops/cpu/ffn.py``, to rounding, without waiting for the device. A merged
entry is read as two views of its weight, whichever half the gate is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moefy.ops.cuda.choose import recorded, rows_contiguous
from moefy.ops.ffn_args import FFNArgs, Wanted, halves
from moefy.ops.saved_rows import claim, promise_private


def ffn_cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``expert_ffn`` by Triton kernels."""
    *tensors, activation, glu, save, private = args
    tensors[0] = rows_contiguous(tensors[0])
    # The distance is no option of the kernels. It is part of the key under which launches are recorded, since a
    # descriptor of both weights has it for a stride.
    options = (activation, glu, save, _apart(tensors[4], tensors[6]))
    out_TD, gate, up = recorded(_forward)(tensors, options)
    if save and private:
        promise_private(gate, up)
    return out_TD, gate, up


def _forward(tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The output and the saved rows; what is not saved is empty."""
    from moefy.triton_ops import expert_ffn as kernels

    activation, glu, save, _ = options
    layer = FFNArgs._make((*tensors, activation, glu))
    gate_rows, up_rows = _entry_buffers(layer) if save else (None, None)
    gate_NH, up_NH = (None, None) if up_rows is None else layer.gate_and_up(gate_rows, up_rows)
    out_TD = kernels.forward(layer.x_TD, _experts(layer), gate_NH, up_NH)
    return out_TD, *(out_TD.new_empty(0) if rows is None else rows for rows in (gate_rows, up_rows))


def ffn_backward_cuda(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """``expert_ffn_backward`` by Triton kernels; over the saved rows where these are its own."""
    *tensors, gate_rows, up_rows, activation, glu, mask = args
    gate_rows, up_rows, overwrite = claim(gate_rows, up_rows)
    tensors[0] = rows_contiguous(tensors[0])
    options = (activation, glu, tuple(mask), overwrite, _apart(tensors[4], tensors[6]))
    return recorded(_backward)((rows_contiguous(grad_TD), *tensors, gate_rows, up_rows), options)


def _backward(tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The gradients; those that are not wanted are empty."""
    from moefy.triton_ops import expert_ffn as kernels

    grad_TD, *layer_tensors, gate_rows, up_rows = tensors
    activation, glu, mask, overwrite, _ = options
    layer, want = FFNArgs._make((*layer_tensors, activation, glu)), Wanted._make(mask)
    x_TD, experts = layer.x_TD, _experts(layer)
    if up_rows is None:
        gate_rows, up_rows = _entry_buffers(layer)
        kernels.hidden(x_TD, experts, *layer.gate_and_up(gate_rows, up_rows))
    gate_NH, up_NH = layer.gate_and_up(gate_rows, up_rows)
    dgate_rows, dup_rows = (gate_rows, up_rows) if overwrite else _entry_buffers(layer)
    dgate_NH, dup_NH = layer.gate_and_up(dgate_rows, dup_rows)
    grads = kernels.backward(
        grad_TD, x_TD, experts, gate_NH, up_NH, (dgate_NH, dup_NH, dup_rows), want._asdict()
    )
    results = (grads.get(name) for name in Wanted._fields)
    return tuple(grad_TD.new_empty(0) if grad is None else grad for grad in results)


def _apart(w_gate: Tensor | None, w_up: Tensor) -> int:
    """How far up lies behind its gate: a launch may read both by one stride."""
    return 0 if w_gate is None else w_up.data_ptr() - w_gate.data_ptr()


def _entry_buffers(layer: FFNArgs) -> tuple[Tensor | None, Tensor]:
    """Room for the pre-activations of a separate gate and of the other entry."""
    rows = layer.order_N.shape[0]
    gate = None if layer.w_gate is None else layer.x_TD.new_empty((rows, layer.w_gate.shape[1]))
    return gate, layer.x_TD.new_empty((rows, layer.w_up.shape[1]))


def _experts(layer: FFNArgs) -> Any:
    """The layer with gate and up apart: views of a merged weight, or weights of equal strides."""
    from moefy.triton_ops.expert_ffn import Experts

    w_gate, b_gate, w_up, b_up = layer.w_gate, layer.b_gate, layer.w_up, layer.b_up
    w_merged = None
    if layer.glu.startswith("merged"):
        w_merged = rows_contiguous(w_up)
        w_gate, w_up = halves(w_merged, layer.glu)
        b_gate, b_up = (None, None) if b_up is None else halves(rows_contiguous(b_up), layer.glu)
    elif w_gate is not None:
        w_gate, w_up = w_gate.contiguous(), w_up.contiguous()
        b_gate = None if b_gate is None else b_gate.contiguous()
        b_up = None if b_up is None else b_up.contiguous()
    return Experts(
        weights_TK=layer.weights_TK.contiguous(),
        order_N=layer.order_N,
        offsets_E=layer.offsets_E,
        w_gate=w_gate,
        b_gate=b_gate,
        w_up=rows_contiguous(w_up),
        b_up=None if b_up is None else rows_contiguous(b_up),
        w_down=rows_contiguous(layer.w_down),
        b_down=None if layer.b_down is None else layer.b_down.contiguous(),
        activation=layer.activation,
        w_merged=w_merged,
    )
