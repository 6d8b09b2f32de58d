"""A whole expert FFN, forward and backward, out of the kernels of this package.

T tokens, D model width, H hidden width, E experts, K top-k, N = T*K rows sorted by expert.

Contract: four launches forward (schedule, entry, exit, weighted sum), about eight backward, none of which the host
waits for. Saved between them are the arguments and the pre-activations alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.triton_ops.entry import entry
from moefy.triton_ops.gather_sum import gather_sum, spread
from moefy.triton_ops.hidden_grad import hidden_grad_form, weights_grad
from moefy.triton_ops.linear import linear
from moefy.triton_ops.shared.blocks import blocks
from moefy.triton_ops.shared.calls import EntryCall, HiddenGradCall
from moefy.triton_ops.shared.tiles import Schedule, schedule
from moefy.triton_ops.weight_grad import Product, bias_grad, weight_grad

# From this hidden width on the gradient's rows are copied before w_down's gradient reads them: a product over rows that
# lie apart is slower by a part of itself, a copy costs the same whatever the width (H100, bf16: H=1024 2.03 ms against
# 1.70 + 0.44, H=3072 0.294 against 0.241 + 0.03). The rows of x are always copied: H=1024 4.80 ms against 2.96 + 0.44.
COPY_GRADIENT_FROM = 2048
# The rows of x are copied in blocks of columns of at most this many bytes, so that the peak of memory is elsewhere.
MAX_COPY = 512 << 20
# But in so few blocks, since each is a launch of its own.
MAX_COPIES = 16
# Where what both read takes at most this many bytes, the gradient of w_down waits for that of an entry and they come
# from one launch: the last tiles of a small product leave many processors idle.
MAX_WAITING = 384 << 20


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
    y_ND = _empty(x_TD, rows, experts.w_down.shape[1])
    linear(hidden_NH, experts.w_down, experts.b_down, tiles.of("linear"), y_ND)
    out_TD = _empty(x_TD, x_TD.shape[0], y_ND.shape[1])
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
    hidden_NH = _empty(x_TD, rows, experts.w_up.shape[1])
    entry(
        EntryCall(
            x_TD=x_TD,
            order_N=experts.order_N,
            top_k=experts.top_k,
            schedule=at,
            row_of_slot_N=tiles.row_of_slot_N,
            w_gate=experts.w_gate,
            b_gate=experts.b_gate,
            w_up=experts.w_up,
            b_up=experts.b_up,
            gate_out=gate_NH,
            up_out=up_NH,
            hidden_NH=hidden_NH,
            activation=experts.activation,
        )
    )
    return hidden_NH


Wanted = Mapping[str, bool]
"""Which gradients are asked for: x, weights (the routing's), w_gate, b_gate, w_up, b_up, w_down, b_down."""


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    experts: Experts,
    gate_NH: Tensor | None,
    up_NH: Tensor,
    dentry: tuple[Tensor | None, Tensor, Tensor],
    wanted: Wanted,
) -> dict[str, Tensor]:
    """The gradients that are ``wanted``, each allocated when its turn comes: only so few are alive at the peak.

    Args:
        grad_TD: the output's gradient.
        x_TD: tokens.
        experts: the layer.
        gate_NH: the gate's pre-activation or None.
        up_NH: the other pre-activation.
        dentry: where the pre-activations' gradients go: ``(dgate, dup, all)``; ``all`` is what the gradient of ``w_up``
            multiplies: ``dup``, or both side by side in the order of a merged weight. They may be the pre-activations.
        wanted: which.
    """
    tiles = Schedules(experts.offsets_E, experts.order_N.shape[0], x_TD.dtype, experts.order_N)
    dgate_NH, dup_NH, dall = dentry
    grads, waiting = _exit_backward(grad_TD, experts, gate_NH, up_NH, dgate_NH, dup_NH, tiles, wanted)
    entries = {"gate": dgate_NH if experts.w_merged is None else None, "up": dall}
    together = waiting is not None and _bytes(*waiting[:2]) + _bytes(x_TD) * experts.top_k <= MAX_WAITING
    grads |= _entry_weight_grads(x_TD, experts, entries if together else {}, tiles, wanted, waiting)
    del waiting  # the copied gradient and the weighted hidden values
    if wanted["x"]:
        grads["x"] = _tokens_grad(x_TD, experts, dgate_NH, dup_NH, dall, tiles)
    if not together:
        grads |= _entry_weight_grads(x_TD, experts, entries, tiles, wanted)
    return grads


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _exit_backward(
    grad_TD: Tensor,
    experts: Experts,
    gate_NH: Tensor | None,
    up_NH: Tensor,
    dgate_NH: Tensor | None,
    dup_NH: Tensor,
    tiles: Schedules,
    wanted: Wanted,
) -> tuple[dict[str, Tensor], Product | None]:
    """Fill the pre-activations' gradients; the gradients of the exit and of the routing weights.

    The second result is a product that is still to be taken: of the exit's matrix, from copied rows.
    """
    order_N, top_k, at = experts.order_N, experts.top_k, tiles.of("hidden_grad")
    grads: dict[str, Tensor] = {}
    waiting = None
    weighted_NH = _empty(up_NH, *up_NH.shape)
    call = HiddenGradCall(
        grad=grad_TD,
        weights_TK=experts.weights_TK,
        order_N=order_N,
        schedule=at,
        w_down=experts.w_down,
        gate_NH=gate_NH,
        up_NH=up_NH,
        dgate_NH=dgate_NH,
        dup_NH=dup_NH,
        weighted_NH=weighted_NH,
        activation=experts.activation,
    )
    form, rows = hidden_grad_form(call), None
    if form.name == "hopper":  # it reads rows, which the exit's gradient then reads too
        rows = spread(grad_TD, tiles.row_of_slot_N, top_k)
        call = call._replace(grad=rows, gather=False)
    parts = form.run(call)
    if wanted["weights"]:
        grads["weights"] = _empty(experts.weights_TK, *experts.weights_TK.shape)
        weights_grad(parts, order_N, grad_TD, experts.b_down, at, grads["weights"])
    if wanted["w_down"]:
        if rows is None and weighted_NH.shape[1] >= COPY_GRADIENT_FROM:
            rows = spread(grad_TD, tiles.row_of_slot_N, top_k)
        grads["w_down"] = _empty(experts.w_down, *experts.w_down.shape)
        if rows is None:
            weight_grad(grad_TD, weighted_NH, order_N, top_k, at, grads["w_down"], gather_g=True)
        else:
            waiting = rows, weighted_NH, grads["w_down"]
    if wanted["b_down"] and experts.b_down is not None:
        grads["b_down"] = _empty(experts.b_down, *experts.b_down.shape)
        bias_grad(grad_TD, experts.weights_TK, order_N, top_k, at, grads["b_down"], gather=True)
    return grads, waiting


def _entry_weight_grads(
    x_TD: Tensor,
    experts: Experts,
    entries: Mapping[str, Tensor | None],
    tiles: Schedules,
    wanted: Wanted,
    waiting: Product | None = None,
) -> dict[str, Tensor]:
    """The gradients of the entries' matrices and biases from those of the pre-activations, by entry.

    With the first of them, or else by itself, comes the product that is ``waiting``.
    """
    order_N, top_k, at = experts.order_N, experts.top_k, tiles.of("hidden_grad")
    shape = (experts.offsets_E.shape[0], x_TD.shape[1])
    present = {name: d for name, d in entries.items() if d is not None}
    grads = {
        f"w_{name}": _empty(d, shape[0], d.shape[1], shape[1])
        for name, d in present.items()
        if wanted[f"w_{name}"]
    }
    for first, end in _column_blocks(order_N.shape[0], x_TD) if grads else ():
        x_NC = spread(x_TD[:, first:end], tiles.row_of_slot_N, top_k)
        for name, d in present.items():
            if f"w_{name}" in grads:
                weight_grad(d, x_NC, order_N, top_k, at, grads[f"w_{name}"][:, :, first:end], also=waiting)
                waiting = None
        del x_NC
    if waiting is not None:
        weight_grad(*waiting[:2], order_N, top_k, at, waiting[2])
    for name, d in present.items():
        if wanted[f"b_{name}"]:
            grads[f"b_{name}"] = _empty(d, shape[0], d.shape[1])
            bias_grad(d, None, order_N, top_k, at, grads[f"b_{name}"])
    return grads


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Room for a contiguous tensor of that shape, of the dtype and device of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _tokens_grad(
    x_TD: Tensor,
    experts: Experts,
    dgate_NH: Tensor | None,
    dup_NH: Tensor,
    dall: Tensor,
    tiles: Schedules,
) -> Tensor:
    """The tokens' gradient: every row's through the entries, summed over each token's rows."""
    dx_ND = _empty(x_TD, dup_NH.shape[0], x_TD.shape[1])
    at = tiles.of("linear")
    if experts.w_merged is not None:
        linear(dall, experts.w_merged, None, at, dx_ND, transposed=True)
    else:
        second = None if dgate_NH is None or experts.w_gate is None else (dgate_NH, experts.w_gate)
        linear(dup_NH, experts.w_up, None, at, dx_ND, transposed=True, second=second)
    dx_TD = _empty(x_TD, *x_TD.shape)
    gather_sum(dx_ND, None, tiles.row_of_slot_N, experts.top_k, dx_TD)
    return dx_TD


def _column_blocks(rows: int, x_TD: Tensor) -> list[tuple[int, int]]:
    """The columns of x in blocks whose copies take at most ``MAX_COPY`` bytes each, in multiples of a tile."""
    width = x_TD.shape[1]
    block = max(512, MAX_COPY // (max(rows, 1) * x_TD.element_size()) // 256 * 256)
    block = max(block, -(-width // (256 * MAX_COPIES)) * 256)
    return [(first, min(first + block, width)) for first in range(0, width, block)]
