"""A whole expert FFN, forward and backward, out of the kernels of this package.

T tokens, D model width, H hidden width, E experts, K top-k, N = T*K rows sorted by expert.

Contract: four launches forward (schedule, entry, exit, weighted sum), about eight backward, none of which the host
waits for. Saved between them are the arguments and the pre-activations alone.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moefy.triton_ops.blocks import blocks
from moefy.triton_ops.entry import entry
from moefy.triton_ops.gather_sum import gather_sum, spread
from moefy.triton_ops.hidden_grad import hidden_grad, weights_grad
from moefy.triton_ops.linear import linear
from moefy.triton_ops.tiles import Schedule, schedule
from moefy.triton_ops.weight_grad import bias_grad, weight_grad

# From this hidden width on the gradient's rows are copied before w_down's gradient reads them: a product over rows that
# lie apart is slower by a part of itself, a copy costs the same whatever the width (H100, bf16: H=1024 2.11 ms against
# 1.74 + 0.74, H=3072 0.295 against 0.237 + 0.04). The rows of x are always copied: H=1024 4.80 ms against 2.96 + 0.74.
COPY_GRADIENT_FROM = 2048
# The rows of x are copied in blocks of columns of at most this many bytes, so that the peak of memory is elsewhere.
MAX_COPY = 512 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """Weights and routing of one layer.

    ``w_gate`` and ``w_up`` are [E, H, D] of equal strides: views of ``w_merged`` [E, 2H, D] when there is one.
    """

    weights_TK: Tensor
    order_N: Tensor
    offsets_E: Tensor
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None
    activation: str
    w_merged: Tensor | None = None

    @property
    def top_k(self) -> int:
        """K."""
        return self.weights_TK.shape[1]


class Schedules:
    """One schedule per tile height, made when first asked for."""

    def __init__(
        self, offsets_E: Tensor, rows: int, dtype: torch.dtype, order_N: Tensor | None = None
    ) -> None:
        self.offsets_E, self.rows, self.dtype, self.order_N = offsets_E, rows, dtype, order_N
        self._made: dict[int, Schedule] = {}

    def of(self, kernel: str) -> Schedule:
        """The schedule whose tiles have the height of ``kernel``'s."""
        height = blocks(kernel, self.dtype, self.rows, self.offsets_E.shape[0], self.offsets_E.device).m  # type: ignore[arg-type]
        if height not in self._made:
            order_N = self.order_N if not self._made else None
            self._made[height] = schedule(self.offsets_E, self.rows, height, order_N)
        return self._made[height]

    @property
    def row_of_slot_N(self) -> Tensor | None:
        """The row of each slot, which the first schedule made."""
        return next(iter(self._made.values())).row_of_slot_N if self._made else None


def forward(x_TD: Tensor, experts: Experts, gate_NH: Tensor | None, up_NH: Tensor | None) -> Tensor:
    """The layer's output [T, D_out]; fills the pre-activations where given."""
    rows = experts.order_N.shape[0]
    tiles = Schedules(experts.offsets_E, rows, x_TD.dtype, experts.order_N)
    hidden_NH = hidden(x_TD, experts, gate_NH, up_NH, tiles)
    y_ND = torch.empty((rows, experts.w_down.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    linear(hidden_NH, experts.w_down, experts.b_down, tiles.of("linear"), y_ND)
    out_TD = torch.empty((x_TD.shape[0], y_ND.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    gather_sum(y_ND, experts.weights_TK, tiles.row_of_slot_N, experts.top_k, out_TD)
    return out_TD


def hidden(
    x_TD: Tensor,
    experts: Experts,
    gate_NH: Tensor | None,
    up_NH: Tensor | None,
    tiles: Schedules | None = None,
) -> Tensor:
    """The exit's input [N, H]; fills the pre-activations where given."""
    rows = experts.order_N.shape[0]
    tiles = tiles or Schedules(experts.offsets_E, rows, x_TD.dtype, experts.order_N)
    at = tiles.of("glu_entry" if experts.w_gate is not None else "entry")
    hidden_NH = torch.empty((rows, experts.w_up.shape[1]), dtype=x_TD.dtype, device=x_TD.device)
    entry(
        x_TD, experts.order_N, experts.top_k, at, tiles.row_of_slot_N,
        experts.w_gate, experts.b_gate, experts.w_up, experts.b_up, gate_NH, up_NH, hidden_NH, experts.activation,
    )  # fmt: skip
    return hidden_NH


@dataclasses.dataclass(kw_only=True)
class Gradients:
    """Where the gradients go; None for those that nobody asked for. ``w_up`` is [E, 2H, D] when merged."""

    x_TD: Tensor | None
    weights_TK: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor | None
    b_up: Tensor | None
    w_down: Tensor | None
    b_down: Tensor | None


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    experts: Experts,
    gate_NH: Tensor | None,
    up_NH: Tensor,
    dentry: tuple[Tensor | None, Tensor, Tensor],
    grads: Gradients,
) -> None:
    """Fill ``grads``.

    Args:
        grad_TD: the output's gradient.
        x_TD: tokens.
        experts: the layer.
        gate_NH: the gate's pre-activation or None.
        up_NH: the other pre-activation.
        dentry: where the pre-activations' gradients go: ``(dgate, dup, all)``; ``all`` is what the gradient of ``w_up``
            multiplies: ``dup``, or both side by side in the order of a merged weight.
        grads: where the results go.
    """
    rows = experts.order_N.shape[0]
    order_N, top_k = experts.order_N, experts.top_k
    tiles = Schedules(experts.offsets_E, rows, x_TD.dtype, order_N)
    dgate_NH, dup_NH, dall = dentry
    weighted_NH = torch.empty(up_NH.shape, dtype=up_NH.dtype, device=up_NH.device)
    at = tiles.of("hidden_grad")
    parts = hidden_grad(
        grad_TD, experts.weights_TK, order_N, at, experts.w_down, gate_NH, up_NH, dgate_NH, dup_NH, weighted_NH,
        experts.activation,
    )  # fmt: skip
    if grads.weights_TK is not None:
        weights_grad(parts, order_N, grad_TD, experts.b_down, at, grads.weights_TK)
    if grads.w_down is not None and weighted_NH.shape[1] < COPY_GRADIENT_FROM:
        weight_grad(grad_TD, weighted_NH, order_N, top_k, at, grads.w_down, gather_g=True)
    elif grads.w_down is not None:
        weight_grad(spread(grad_TD, tiles.row_of_slot_N, top_k), weighted_NH, order_N, top_k, at, grads.w_down)
    del weighted_NH, parts
    if grads.b_down is not None:
        bias_grad(grad_TD, experts.weights_TK, order_N, top_k, at, grads.b_down, gather=True)
    if grads.x_TD is not None:
        _tokens_grad(experts, dgate_NH, dup_NH, dall, tiles, grads.x_TD)
    entries = ((grads.w_gate, grads.b_gate, dgate_NH), (grads.w_up, grads.b_up, dall))
    wanted = [(weight, d) for weight, _, d in entries if weight is not None and d is not None]
    for first, end in _column_blocks(rows, x_TD) if wanted else ():
        x_NC = spread(x_TD[:, first:end], tiles.row_of_slot_N, top_k)
        for weight, d in wanted:
            weight_grad(d, x_NC, order_N, top_k, at, weight[:, :, first:end])
        del x_NC
    for _, bias, d in entries:
        if bias is not None and d is not None:
            bias_grad(d, None, order_N, top_k, at, bias)


def _tokens_grad(
    experts: Experts, dgate_NH: Tensor | None, dup_NH: Tensor, dall: Tensor, tiles: Schedules, dx_TD: Tensor
) -> None:
    """Fill the tokens' gradient: every row's through the entries, summed over each token's rows."""
    dx_ND = torch.empty((dup_NH.shape[0], dx_TD.shape[1]), dtype=dx_TD.dtype, device=dx_TD.device)
    at = tiles.of("linear")
    if experts.w_merged is not None:
        linear(dall, experts.w_merged, None, at, dx_ND, transposed=True)
    else:
        second = None if dgate_NH is None or experts.w_gate is None else (dgate_NH, experts.w_gate)
        linear(dup_NH, experts.w_up, None, at, dx_ND, transposed=True, second=second)
    gather_sum(dx_ND, None, tiles.row_of_slot_N, experts.top_k, dx_TD)


def _column_blocks(rows: int, x_TD: Tensor) -> list[tuple[int, int]]:
    """The columns of x in blocks whose copies take at most ``MAX_COPY`` bytes each, in multiples of a tile."""
    width = x_TD.shape[1]
    block = max(512, MAX_COPY // (max(rows, 1) * x_TD.element_size()) // 256 * 256)
    return [(first, min(first + block, width)) for first in range(0, width, block)]
