"""``grouped_linear``: every row through the linear layer of its own expert.

N rows sorted by expert, I input and O output features, E experts.

Contract: rows ``offsets[e-1] .. offsets[e]`` give ``x @ weight[e].T + bias[e]``; rows from ``offsets[-1]`` on are zero
and send back a zero gradient. Weights are stacked in the layout of ``nn.Linear``. An expert without rows gets exactly
zero gradients.

    >>> weight_EOI = torch.tensor([[[1.0]], [[10.0]]])
    >>> grouped_linear(torch.ones(3, 1), weight_EOI, None, torch.tensor([1, 3], dtype=torch.int32)).T
    tensor([[ 1., 10., 10.]])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.ops import checks
from moefy.ops.cpu.layout import Bounds, Layout, layout_for
from moefy.ops.cpu.products import outer_products, row_sums, rows_times
from moefy.ops.cuda.choose import by_triton
from moefy.ops.cuda.rows import grouped_linear_backward_cuda, grouped_linear_cuda
from moefy.ops.library import differentiable, register


def _layout(x_NI: Tensor, weight_EOI: Tensor, bounds: Bounds) -> Layout:
    """For a product of ``x`` and ``weight``; in a batch its operand and its result are copied."""
    _, size_o, size_i = weight_EOI.shape
    return layout_for(x_NI, bounds, x_NI.shape[0], matrices=[size_o * size_i], copied=(size_i, size_o))


def _kernel(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    bounds = checks.bounds("grouped_linear", offsets_E, x_NI.shape[0])
    layout = _layout(x_NI, weight_EOI, bounds)
    return layout.collect(rows_times(layout.spread(x_NI), weight_EOI, bias_EO, layout))


def _fake(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    return x_NI.new_empty((x_NI.shape[0], weight_EOI.shape[1]))


def _backward_kernel(
    grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; one that ``mask`` does not ask for is an empty tensor."""
    bounds = checks.bounds("grouped_linear_backward", offsets_E, x_NI.shape[0])
    layout = _layout(x_NI, weight_EOI, bounds)
    grad_PO = layout.spread(grad_NO, zero=True)
    nothing = [grad_NO.new_empty(0) for _ in range(3)]
    return (
        layout.collect(rows_times(grad_PO, weight_EOI.transpose(1, 2), None, layout))
        if mask[0]
        else nothing[0],
        outer_products(grad_PO, layout.spread(x_NI, zero=True), layout) if mask[1] else nothing[1],
        row_sums(grad_PO, layout) if mask[2] else nothing[2],
    )


def _backward_fake(
    grad_NO: Tensor, x_NI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x_NI.shape, weight_EOI.shape, weight_EOI.shape[:2])
    dx, dweight, dbias = (
        grad_NO.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, mask, strict=True)
    )
    return dx, dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_NI, weight_EOI, _, offsets_E = inputs
    ctx.save_for_backward(x_NI, weight_EOI, offsets_E)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    mask = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad_NO, *ctx.saved_tensors, mask)
    return *(g if wanted else None for g, wanted in zip(grads, mask, strict=True)), None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.mask = inputs
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, ggx_NI: Tensor, ggw_EOI: Tensor, ggb_EO: Tensor) -> tuple[Tensor | None, ...]:
    """The backward is bilinear in (grad, weight), (grad, x) and linear in grad: the same two ops again.

    ``ggx`` plays x's part and ``ggw`` weight's:
    dgrad = ggx @ W.T + x @ ggw.T + ggb, dx = grad @ ggw, dW = grad.T @ ggx.
    """
    grad_NO, x_NI, weight_EOI, offsets_E = ctx.saved_tensors
    with_x, with_w, with_b = ctx.mask
    ggw_EOI = ggw_EOI if with_w else torch.zeros_like(weight_EOI)
    dgrad_NO = _op(x_NI, ggw_EOI, ggb_EO if with_b else None, offsets_E)
    if with_x:
        dgrad_NO = dgrad_NO + _op(ggx_NI, weight_EOI, None, offsets_E)
    mask = [with_w and ctx.needs_input_grad[1], with_x and ctx.needs_input_grad[2], False]
    # Without ggx its product is not asked for; x only lends its shape.
    x_part = ggx_NI if with_x else x_NI
    dx_NI, dw_EOI, _ = _backward_op(grad_NO, x_part, ggw_EOI, offsets_E, mask)
    return dgrad_NO, dx_NI if mask[0] else None, dw_EOI if mask[1] else None, None, None


_op = register(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    kernel=_kernel,
    fake=_fake,
    cuda=by_triton(grouped_linear_cuda, _kernel),
    gemm_args=("x", "weight", "bias"),
)
_backward_op = register(
    "grouped_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor offsets, bool[3] mask)"
    " -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    fake=_backward_fake,
    cuda=by_triton(grouped_linear_backward_cuda, _backward_kernel),
)
differentiable(_op, setup=_setup, backward=_backward)
differentiable(_backward_op, setup=_setup_backward, backward=_double_backward)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    """Apply each expert's linear layer to its rows.

    Args:
        x_NI: [N, I] rows sorted by expert, floating point, any strides.
        weight_EOI: [E, O, I] in x's dtype (under autocast any).
        bias_EO: [E, O] or None.
        offsets_E: [E] int32 from ``sort_by_expert``.

    Returns:
        [N, O] in x's dtype, or in autocast's. Differentiable in x, weight and bias, to any order.

    Raises:
        ShapeError, DtypeError, DeviceError: for arguments that are not as above.
        RoutingError: for offsets that decrease or exceed N.
    """
    checks.shape("grouped_linear", "x", x_NI, "[N, I]", 2)
    checks.floating("grouped_linear", "x", x_NI)
    checks.linear("grouped_linear", "x", x_NI, "weight", weight_EOI, "bias", bias_EO)
    checks.offsets("grouped_linear", "x", x_NI, offsets_E, weight_EOI.shape[0])
    return _op(x_NI, weight_EOI, bias_EO, offsets_E)
