"""Matrix products per expert, in plain torch, over rows sorted by expert; the CPU kernels are made of them.

N rows, P places, I and O features, E experts, C places of an expert in a batch.

Contract: operands and results lie by place, as a ``Layout`` of ``moefy/ops/cpu/layout.py`` says. Rows that belong to no
expert come out as exact zeros, an expert without rows gets an exact zero gradient; for sums over rows the operands have
zeros at places without a row. Nothing here is differentiable; the ops above give the formulas.

    >>> x_NI, weight_EOI = torch.ones(3, 2), torch.ones(1, 4, 2)
    >>> rows_times(x_NI, weight_EOI, None, InRows(bounds=[(0, 2)], rows=3))[:, 0]
    tensor([2., 2., 0.])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.ops.cpu.layout import Batch, Bounds, Layout, through_fp32


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = a @ b (+ bias)``, where bias may be ``out`` itself; half types accumulate in fp32 and round once."""
    if through_fp32(a):
        a, b = a.float(), b.float()
        out.copy_(a @ b if bias is None else torch.addmm(bias.float(), a, b))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _grouped_mm_takes(x_NI: Tensor, other: Tensor) -> bool:
    """Whether torch's loop over experts takes the operands: it is 4 microseconds an expert faster than ours.

    It wants rows of whole 16 bytes, without gaps, in fp32 or a half type.
    """
    return (
        x_NI.device.type == "cpu"
        and x_NI.dtype is not torch.float64
        and not through_fp32(x_NI)
        and _whole_rows(x_NI)
        and (_whole_rows(other) or (other.dim() == 3 and _whole_rows(other.mT)))
    )


def _whole_rows(matrix: Tensor) -> bool:
    width = matrix.shape[-1]
    return matrix.stride()[-2:] == (width, 1) and width * matrix.itemsize % 16 == 0


def _pieces(rows: Tensor, bounds: Bounds, dim: int = 0) -> Sequence[Tensor]:
    """Each expert's part of ``rows`` along ``dim``, as views.

    One split, not a slice for every expert: that took 1.5 microseconds each, as long as a product of 16 rows.
    """
    sizes = [end - first for first, end in bounds]
    return rows.split([*sizes, rows.shape[dim] - _routed(bounds)], dim)[:-1]


def rows_times(
    x_PI: Tensor,
    weight_EOI: Tensor,
    bias_EO: Tensor | None,
    layout: Layout,
    *,
    out_PO: Tensor | None = None,
    onto_PO: Tensor | None = None,
) -> Tensor:
    """``x[p] @ weight[e].T + bias[e]`` for every place p of every expert e: [P, O].

    The result is written to ``out_PO`` if there is one. ``onto_PO`` stands for the bias: the products are added to it,
    in place.
    """
    weight_EIO = weight_EOI.transpose(1, 2)
    if isinstance(layout, Batch):
        return _batch_times(x_PI, weight_EIO, bias_EO, layout, out_PO, onto_PO)
    new = bias_EO is None and onto_PO is None and out_PO is None
    if new and layout.bounds and _grouped_mm_takes(x_PI, weight_EOI):
        y_PO = F.grouped_mm(x_PI, weight_EIO, offs=layout.end_E)
        return _tail_cleared(y_PO, _routed(layout.bounds))
    return _each_times(x_PI, weight_EIO, bias_EO, layout.bounds, out_PO, onto_PO)


def _batch_times(
    x_PI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    batch: Batch,
    out_PO: Tensor | None,
    onto_PO: Tensor | None,
) -> Tensor:
    """``rows_times`` as one product of three-dimensional tensors."""
    x_ECI = x_PI.view(batch.experts, -1, x_PI.shape[1])
    if onto_PO is not None:
        onto_PO.view(*x_ECI.shape[:2], -1).baddbmm_(x_ECI, weight_EIO)
        return onto_PO
    out_ECO = None if out_PO is None else out_PO.view(*x_ECI.shape[:2], -1)
    if bias_EO is None:
        y_ECO = torch.bmm(x_ECI, weight_EIO, out=out_ECO)
    else:
        y_ECO = torch.baddbmm(bias_EO.unsqueeze(1), x_ECI, weight_EIO, out=out_ECO)
    return y_ECO.view(-1, y_ECO.shape[2])


def _each_times(
    x_NI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    bounds: Bounds,
    out_NO: Tensor | None,
    onto_NO: Tensor | None,
) -> Tensor:
    """``rows_times`` with a product for each expert, written to its place."""
    if onto_NO is not None:
        out_NO, biases = onto_NO, _pieces(onto_NO, bounds)
    else:
        out_NO = x_NI.new_empty((x_NI.shape[0], weight_EIO.shape[2])) if out_NO is None else out_NO
        _tail_cleared(out_NO, _routed(bounds))
        biases = [None] * len(bounds) if bias_EO is None else bias_EO.unbind(0)
    parts = zip(_pieces(x_NI, bounds), weight_EIO.unbind(0), biases, _pieces(out_NO, bounds), strict=True)
    for x_MI, weight_IO, bias, out_MO in parts:
        if x_MI.shape[0]:
            _multiply(x_MI, weight_IO, bias, out_MO)
    return out_NO


def outer_products(grad_PO: Tensor, x_PI: Tensor, layout: Layout, *, out_EOI: Tensor | None = None) -> Tensor:
    """``grad[places of e].T @ x[places of e]``, the gradient of the weights: [E, O, I], in ``out_EOI`` if given."""
    if isinstance(layout, Batch):
        grad_ECO, x_ECI = (t.view(layout.experts, -1, t.shape[1]) for t in (grad_PO, x_PI))
        return torch.bmm(grad_ECO.transpose(1, 2), x_ECI, out=out_EOI)
    bounds = layout.bounds
    if out_EOI is None and _grouped_mm_takes(x_PI, grad_PO):
        return F.grouped_mm(grad_PO.t(), x_PI, offs=layout.end_E)
    if out_EOI is None:
        out_EOI = grad_PO.new_empty((len(bounds), grad_PO.shape[1], x_PI.shape[1]))
    grads, xs = _pieces(grad_PO.t(), bounds, 1), _pieces(x_PI, bounds)
    for grad_OM, x_MI, out_OI in zip(grads, xs, out_EOI.unbind(0), strict=True):
        if x_MI.shape[0]:
            _multiply(grad_OM, x_MI, None, out_OI)
        else:
            out_OI.zero_()
    return out_EOI


def row_sums(grad_PO: Tensor, layout: Layout, *, out_EO: Tensor | None = None) -> Tensor:
    """``grad[places of e].sum(0)``, the gradient of the biases: [E, O], in ``out_EO`` if given."""
    if isinstance(layout, Batch):
        grad_ECO = grad_PO.view(layout.experts, -1, grad_PO.shape[1])
        return grad_ECO.sum(1) if out_EO is None else torch.sum(grad_ECO, 1, out=out_EO)
    if out_EO is None:
        out_EO = grad_PO.new_empty((len(layout.bounds), grad_PO.shape[1]))
    for grad_MO, out_O in zip(_pieces(grad_PO, layout.bounds), out_EO.unbind(0), strict=True):
        torch.sum(grad_MO, 0, out=out_O)
    return out_EO


def rows_dot(grad_PO: Tensor, bias_EO: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """``<grad[p], bias[e]>`` in ``dtype`` for every place p of every expert e, 0 for rows of none: [P]."""
    if isinstance(layout, Batch):
        grad_ECO = grad_PO.view(layout.experts, -1, grad_PO.shape[1]).to(dtype)
        return torch.bmm(grad_ECO, bias_EO.to(dtype).unsqueeze(2)).view(-1)
    out_P = grad_PO.new_zeros(grad_PO.shape[0], dtype=dtype)
    parts = zip(
        _pieces(out_P, layout.bounds), _pieces(grad_PO, layout.bounds), bias_EO.unbind(0), strict=True
    )
    for out_M, grad_MO, bias_O in parts:
        torch.mv(grad_MO.to(dtype), bias_O.to(dtype), out=out_M)
    return out_P


def _routed(bounds: Bounds) -> int:
    """Number of rows that belong to some expert."""
    return bounds[-1][1] if bounds else 0


def _tail_cleared(out_NO: Tensor, routed: int) -> Tensor:
    """``out_NO`` with zeros in the rows that belong to no expert."""
    if routed < out_NO.shape[0]:
        out_NO[routed:].zero_()
    return out_NO
