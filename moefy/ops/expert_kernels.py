"""The kernels behind ``expert_ffn`` and its backward, in plain torch: gather once, multiply expert by expert.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = H, or 2H for a merged entry.

Contract: as ``moefy/ops/expert_ffn.py``. The gradient of the routing weights needs no expert output again (as in
SonicMoE, Guo et al. 2025): ``<grad, h @ W.T + b> = <grad @ W, h> + <grad, b>``, and ``grad @ W`` is needed anyway.

    >>> gate_NH, up_NH = halves(torch.tensor([[1.0, 2.0]]), "merged_gate_last")
    >>> gate_NH, up_NH
    (tensor([[2.]]), tensor([[1.]]))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefy.ops import checks
from moefy.ops.activations import ACTIVATIONS
from moefy.ops.grouped_gemm import Bounds, outer_products, pieces, row_sums, rows_times
from moefy.ops.permute import accumulation_dtype, weighted_sum

CHUNK_BYTES = 8 << 20


class Layer(NamedTuple):
    """The arguments of ``expert_ffn`` in schema order."""

    x_TD: Tensor
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
    glu: str

    @property
    def saves_acted(self) -> bool:
        """Whether the first of the two tensors saved for the backward is the activations, not a gate's pre-activations.

        To compute them again costs a CPU: on 2 cores tanh-gelu took as long as one of the six products, where these
        are narrow (D=48, H=192). Autograd would save them as well, and the exit's input besides.
        """
        return self.w_gate is None and self.x_TD.device.type == "cpu"

    def token_N(self, op: str) -> Tensor:
        """The token of each row."""
        return checks.slots(op, self.order_N) // self.weights_TK.shape[1]

    def bounds(self, op: str) -> Bounds:
        """First and end row of each expert."""
        return checks.bounds(op, self.offsets_E, self.order_N.shape[0])


class Wanted(NamedTuple):
    """Which gradients to compute, in the order of the backward's results."""

    x: bool
    weights: bool
    w_gate: bool
    b_gate: bool
    w_up: bool
    b_up: bool
    w_down: bool
    b_down: bool


def halves(merged_NP: Tensor, glu: str) -> tuple[Tensor, Tensor]:
    """``(gate, up)``, views of a merged entry's output."""
    first_NH, last_NH = merged_NP.chunk(2, dim=1)
    return (first_NH, last_NH) if glu == "merged_gate_first" else (last_NH, first_NH)


class Chunk(NamedTuple):
    """Consecutive experts, their rows, and ``bounds`` within these; the last one also has the rows of no expert."""

    experts: slice
    rows: slice
    bounds: Bounds

    def of(self, layer: Layer) -> Layer:
        """The layer with these experts alone."""
        parts = (None if w is None else w[self.experts] for w in layer[4:10])
        return Layer._make((*layer[:4], *parts, *layer[10:]))


def chunks(layer: Layer, bounds: Bounds) -> list[Chunk]:
    """The experts as one chunk, or on a CPU as several when the intermediates would take fresh memory in every step.

    Blocks of 32 MiB and more come from the kernel page by page: with 32768 rows of 512 features a third of the time of
    a step went there. Smaller ones are used again, and stay in the cache.
    """
    rows = layer.order_N.shape[0]
    row_bytes = max(layer.w_up.shape[1], layer.x_TD.shape[1]) * max(layer.x_TD.itemsize, 4)
    if layer.x_TD.device.type != "cpu" or rows * row_bytes <= 2 * CHUNK_BYTES:
        return [Chunk(slice(None), slice(None), bounds)]
    starts = [0]
    for e, (_, end) in enumerate(bounds):
        if e > starts[-1] and (end - bounds[starts[-1]][0]) * row_bytes > CHUNK_BYTES:
            starts.append(e)
    found = []
    for e, stop in zip(starts, [*starts[1:], len(bounds)], strict=True):
        first, last = bounds[e][0], rows if stop == len(bounds) else bounds[stop][0]
        within = [(a - first, b - first) for a, b in bounds[e:stop]]
        found.append(Chunk(slice(e, stop), slice(first, last), within))
    return found


def put(whole: Tensor | None, part: Tensor, at: slice, size: int) -> Tensor:
    """``part`` itself when it is all there is, else ``whole``, made when it is None, with ``part`` in its place."""
    if at == slice(None):
        return part
    if whole is None:
        whole = part.new_empty((size, *part.shape[1:]))
    whole[at] = part
    return whole


def ffn_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``(out, activations or a separate gate's pre-activations, the other entry's)``; what is not saved is empty."""
    *layer_args, save, _ = args
    layer = Layer._make(layer_args)
    bounds, token_N = layer.bounds("expert_ffn"), layer.token_N("expert_ffn")
    y_ND = first_rows = up_rows = None
    for chunk in chunks(layer, bounds):
        y, first, up = _forward(chunk.of(layer), token_N[chunk.rows], chunk.bounds, save)
        y_ND = put(y_ND, y, chunk.rows, len(token_N))
        first_rows = first if first is None else put(first_rows, first, chunk.rows, len(token_N))
        up_rows = up if up is None else put(up_rows, up, chunk.rows, len(token_N))
        del y, first, up
    assert y_ND is not None
    out_TD = weighted_sum(y_ND, layer.weights_TK, layer.order_N, layer.weights_TK.shape[1])
    first_rows, up_rows = (out_TD.new_empty(0) if saved is None else saved for saved in (first_rows, up_rows))
    return out_TD, first_rows, up_rows


def _forward(
    layer: Layer, token_N: Tensor, bounds: Bounds, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The experts' outputs by row, and what ``ffn_kernel`` saves."""
    rows_ND = layer.x_TD.index_select(0, token_N)
    gate_rows, up_rows = _entry(layer, rows_ND, bounds)
    del rows_ND
    first_rows = None
    if save and layer.saves_acted:
        first_rows, hidden_NH = _acted(layer, gate_rows, up_rows)
    else:
        hidden_NH = _body(layer, gate_rows, up_rows)
        if save:
            first_rows = gate_rows
    saved_up = up_rows if save else None
    del gate_rows, up_rows
    return rows_times(hidden_NH, layer.w_down, layer.b_down, bounds), first_rows, saved_up


def ffn_backward_kernel(grad_TD: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of (x, top_k_weights, w_gate, b_gate, w_up, b_up, w_down, b_down); unasked ones are empty."""
    *tensors, first_rows, up_rows, activation, glu, mask = args
    layer, want = Layer._make((*tensors, activation, glu)), Wanted._make(mask)
    bounds, token_N = layer.bounds("expert_ffn_backward"), layer.token_N("expert_ffn_backward")
    weight_N = layer.weights_TK.reshape(-1).index_select(0, layer.order_N)
    result: dict[str, Tensor | None] = dict.fromkeys(Wanted._fields)
    for chunk in chunks(layer, bounds):
        first, up = (saved[chunk.rows] if saved.dim() == 2 else None for saved in (first_rows, up_rows))
        grad_ND = grad_TD.index_select(0, token_N[chunk.rows])
        parts = _backward(
            chunk.of(layer), want, token_N[chunk.rows], weight_N[chunk.rows], grad_ND, first, up, chunk.bounds
        )
        for name, part in parts.items():
            by_row = name in ("x", "weights")
            at, size = (chunk.rows, len(token_N)) if by_row else (chunk.experts, len(bounds))
            result[name] = put(result[name], part, at, size)
        del grad_ND, parts
    if result["x"] is not None:
        result["x"] = weighted_sum(result["x"], None, layer.order_N, layer.weights_TK.shape[1])
    if result["weights"] is not None:
        dw_N = result["weights"]
        result["weights"] = (
            torch.zeros_like(dw_N).scatter_(0, layer.order_N, dw_N).view(layer.weights_TK.shape)
        )
    return tuple(grad_TD.new_empty(0) if g is None else g for g in result.values())


def _backward(
    layer: Layer,
    want: Wanted,
    token_N: Tensor,
    weight_N: Tensor,
    grad_ND: Tensor,
    first_rows: Tensor | None,
    up_rows: Tensor | None,
    bounds: Bounds,
) -> dict[str, Tensor]:
    """The wanted gradients; x's and the routing weights' by row. ``grad`` is overwritten."""
    rows_ND, weight_N1 = layer.x_TD.index_select(0, token_N), weight_N.unsqueeze(1)
    gate_rows, acted_NH = (None, first_rows) if layer.saves_acted else (first_rows, None)
    if up_rows is None:  # not saved
        gate_rows, up_rows = _entry(layer, rows_ND, bounds)
    dhidden_NH = rows_times(grad_ND, layer.w_down.transpose(1, 2), None, bounds)
    acted_NH, hidden_NH = _acted(layer, gate_rows, up_rows, acted_NH)
    result: dict[str, Tensor] = {}
    if want.weights:
        result["weights"] = _weights_grad(layer, grad_ND, dhidden_NH, hidden_NH, bounds)
    grad_ND.mul_(weight_N1)  # in the wider of the two dtypes, rounded once
    if want.w_down:
        result["w_down"] = outer_products(grad_ND, hidden_NH, bounds)
    if want.b_down:
        result["b_down"] = row_sums(grad_ND, bounds)
    del hidden_NH
    if any((want.x, want.w_gate, want.b_gate, want.w_up, want.b_up)):
        dgate, dup = _body_backward(layer, gate_rows, up_rows, acted_NH, dhidden_NH.mul_(weight_N1))
        result |= _entry_backward(layer, want, rows_ND, dgate, dup, bounds)
    return result


def _entry(layer: Layer, rows_ND: Tensor, bounds: Bounds) -> tuple[Tensor | None, Tensor]:
    """Pre-activations: of the gate if it is separate, and of the other (or merged) entry."""
    gate = None
    if layer.w_gate is not None:
        gate = rows_times(rows_ND, layer.w_gate, layer.b_gate, bounds)
    return gate, rows_times(rows_ND, layer.w_up, layer.b_up, bounds)


def _gate_and_up(layer: Layer, gate_rows: Tensor | None, up_rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """``(gate or None, up)``, whatever the GLU form."""
    return halves(up_rows, layer.glu) if layer.glu.startswith("merged") else (gate_rows, up_rows)


def _body(layer: Layer, gate_rows: Tensor | None, up_rows: Tensor) -> Tensor:
    """From pre-activations to the exit's input."""
    act = ACTIVATIONS[layer.activation].forward
    gate_NH, up_NH = _gate_and_up(layer, gate_rows, up_rows)
    if gate_NH is None:
        return act(up_NH)
    acted_NH = act(gate_NH)
    return acted_NH * up_NH if acted_NH is gate_NH else acted_NH.mul_(up_NH)


def _acted(
    layer: Layer, gate_rows: Tensor | None, up_rows: Tensor, acted_NH: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(activations, the exit's input)``, one tensor where there is no gate, and no alias of the pre-activations."""
    gate_NH, up_NH = _gate_and_up(layer, gate_rows, up_rows)
    before_NH = up_NH if gate_NH is None else gate_NH
    if acted_NH is None:
        acted_NH = ACTIVATIONS[layer.activation].forward(before_NH)
    if acted_NH is before_NH:
        acted_NH = before_NH.clone()
    return acted_NH, acted_NH if gate_NH is None else acted_NH * up_NH


def _body_backward(
    layer: Layer, gate_rows: Tensor | None, up_rows: Tensor, acted_NH: Tensor, dhidden_NH: Tensor
) -> tuple[Tensor | None, Tensor]:
    """Gradients of the pre-activations, in the form in which ``_entry`` gives them; ``dhidden`` is overwritten."""
    backward = ACTIVATIONS[layer.activation].backward
    gate_NH, up_NH = _gate_and_up(layer, gate_rows, up_rows)
    if gate_NH is None:
        backward(dhidden_NH, up_NH, dhidden_NH)
        return None, dhidden_NH
    if layer.glu == "separate":
        dup_NH = dhidden_NH * acted_NH
        backward(dhidden_NH.mul_(up_NH), gate_NH, dhidden_NH)
        return dhidden_NH, dup_NH
    merged_NP = up_rows.new_empty(up_rows.shape)
    dgate_NH, dup_NH = halves(merged_NP, layer.glu)
    torch.mul(dhidden_NH, acted_NH, out=dup_NH)
    backward(dhidden_NH.mul_(up_NH), gate_NH, dgate_NH)
    return None, merged_NP


def _entry_backward(
    layer: Layer,
    want: Wanted,
    rows_ND: Tensor,
    dgate_NH: Tensor | None,
    dup_NP: Tensor,
    bounds: Bounds,
) -> dict[str, Tensor]:
    """Gradients of x by row and of the entries' weights and biases, as far as they are wanted."""
    result: dict[str, Tensor] = {}
    for name, drows in (("gate", dgate_NH), ("up", dup_NP)):
        if drows is not None and getattr(want, f"w_{name}"):
            result[f"w_{name}"] = outer_products(drows, rows_ND, bounds)
        if drows is not None and getattr(want, f"b_{name}"):
            result[f"b_{name}"] = row_sums(drows, bounds)
    if want.x:
        dx_ND = rows_times(dup_NP, layer.w_up.transpose(1, 2), None, bounds)
        if dgate_NH is not None and layer.w_gate is not None:
            rows_times(dgate_NH, layer.w_gate.transpose(1, 2), None, bounds, onto_NO=dx_ND)
        result["x"] = dx_ND
    return result


def _weights_grad(
    layer: Layer, grad_ND: Tensor, dhidden_NH: Tensor, hidden_NH: Tensor, bounds: Bounds
) -> Tensor:
    """``<grad @ W_down, hidden> + <grad, b_down>`` per row; ``dhidden`` is still without routing weights."""
    dtype = accumulation_dtype(grad_ND, layer.weights_TK)
    if dhidden_NH.dtype is torch.bfloat16 and dtype is torch.float32:
        # products rounded like dhidden itself, added in fp32; two casts to fp32 took twice the time
        dw_N = (dhidden_NH * hidden_NH).sum(1, dtype=dtype)
    else:
        dw_N = torch.linalg.vecdot(dhidden_NH.to(dtype), hidden_NH.to(dtype))
    if layer.b_down is not None:
        parts = zip(pieces(dw_N, bounds), pieces(grad_ND, bounds), layer.b_down.unbind(0), strict=True)
        for dw_M, grad_MD, bias_D in parts:
            torch.addmv(dw_M, grad_MD.to(dtype), bias_D.to(dtype), out=dw_M)
    return dw_N.to(layer.weights_TK.dtype)
