"""The arguments of the products that have forms in two files: one record per call, which every form reads.

T tokens, D model width, H hidden width, E experts, K top-k, N = T*K rows sorted by expert.

    form_for(FORMS, EntryCall(x_TD, order_N, top_k, ...)).run(call)
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moefy.triton_ops.shared.tiles import Schedule


class EntryCall(NamedTuple):
    """What ``entry`` computes; ``w_gate`` and ``w_up`` are of equal strides, as are their biases.

    Attributes:
        x_TD: tokens; features side by side.
        order_N: [N] int64, the slot of each row.
        top_k: K.
        schedule: the tiles of the rows; its ``block_rows`` is this kernel's.
        row_of_slot_N: [N] int32, the row of each slot.
        w_gate: [E, H, D] or None.
        b_gate: [E, H] or None.
        w_up: [E, H, D].
        b_up: [E, H] or None.
        gate_out: [N, H], where the gate's pre-activation goes, or None.
        up_out: [N, H], where the other pre-activation goes, or None.
        hidden_NH: where the result goes.
        activation: a name of ``ACTIVATIONS``.
    """

    x_TD: Tensor
    order_N: Tensor
    top_k: int
    schedule: Schedule
    row_of_slot_N: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    gate_out: Tensor | None
    up_out: Tensor | None
    hidden_NH: Tensor
    activation: str

    @property
    def gate(self) -> Tensor:
        """The gate's matrix, or where there is none the other."""
        return self.w_up if self.w_gate is None else self.w_gate


class HiddenGradCall(NamedTuple):
    """What ``hidden_grad`` computes.

    Attributes:
        grad: [T, D], the output's gradient; features side by side. Without ``gather`` [N, D], that of each row.
        weights_TK: [T, K] routing weights, contiguous.
        order_N: [N] int64, the slot of each row.
        schedule: the tiles of the rows; its ``block_rows`` is this kernel's.
        w_down: [E, D, H].
        gate_NH: the gate's pre-activation or None.
        up_NH: the other pre-activation, of gate_NH's stride.
        dgate_NH: where the gate's gradient goes, or None.
        dup_NH: where the other gradient goes, of dgate_NH's stride.
        weighted_NH: where hidden values times routing weight go.
        activation: a name of ``ACTIVATIONS``.
        gather: whether row r of the gradient is that of token ``order[r] // K``.
    """

    grad: Tensor
    weights_TK: Tensor
    order_N: Tensor
    schedule: Schedule
    w_down: Tensor
    gate_NH: Tensor | None
    up_NH: Tensor
    dgate_NH: Tensor | None
    dup_NH: Tensor
    weighted_NH: Tensor
    activation: str
    gather: bool = True
