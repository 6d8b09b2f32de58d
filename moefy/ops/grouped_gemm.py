"""Matrix products per expert, in plain torch, over rows that are sorted by expert: what the kernels are made of.

N rows, I and O features, E experts; ``bounds[e] = (first, end)`` row of expert e; C rows of the busiest expert.

Contract: rows that belong to no expert come out as exact zeros, an expert without rows gets an exact zero gradient.
Nothing here is differentiable; the ops above give the formulas. Large experts are multiplied one by one, many small
ones in one batch, where each has C rows: a product alone costs a CPU about 3 microseconds, in bf16 about 20.

    >>> x_NI, weight_EOI = torch.ones(3, 2), torch.ones(1, 4, 2)
    >>> rows_times(x_NI, weight_EOI, None, [(0, 2)])[:, 0]
    tensor([2., 2., 0.])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Bounds = Sequence[tuple[int, int]]

# In multiply-adds: a call of ``mm``, in fp32 and in bf16, and to copy an element. By measurements on 2 cores of an AMD
# EPYC (Zen 4), 8 to 256 experts of 2 to 256 rows, 48 to 1024 features: where the batch is slower than products one by
# one it is so by less than a tenth.
CALL, CALL_HALF, COPY = 150_000, 1_600_000, 16
FEW_ROWS = 16


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AMX or AVX512-BF16)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _through_fp32(operand: Tensor) -> bool:
    """Whether a product of two such operands is faster with both widened to fp32 first.

    Measured on 4096 x 768 x 3072, 8 experts, 2 cores. AMD EPYC without AVX-512: bf16 1287 ms native, 736 ms widened;
    fp16 2327 against 600 ms. Xeon with AMX: bf16 74 ms native, 268 ms in fp32; fp16 about 300 ms either way.
    """
    if operand.device.type != "cpu":
        return False
    if operand.dtype is torch.bfloat16:
        return not _cpu_multiplies_bf16()
    return operand.dtype is torch.float16


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = a @ b (+ bias)``, where bias may be ``out`` itself; half types accumulate in fp32 and round once."""
    if _through_fp32(a):
        a, b = a.float(), b.float()
        out.copy_(a @ b if bias is None else torch.addmm(bias.float(), a, b))
    elif bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows sorted by expert as ``[E, C, features]`` and back.

    Args:
        rows: N.
        padded_EC: the row that each place holds; behind an expert's last row any row.
        place_R: the place, ``e * C + c``, of each row that belongs to an expert.
    """

    rows: int
    padded_EC: Tensor
    place_R: Tensor

    @classmethod
    def of(cls, x_NI: Tensor, matrix: Sequence[int], bounds: Bounds) -> Batch | None:
        """The batch for products of ``matrix`` ``(E, I, O)``, or None where products one by one are faster."""
        sizes = [end - first for first, end in bounds]
        if x_NI.device.type != "cpu" or _through_fp32(x_NI) or not _batch_pays(x_NI, matrix, sizes):
            return None
        return _batch(x_NI.shape[0], tuple(bounds))

    def pad(self, x_NI: Tensor, *, zero: bool = False) -> Tensor:
        """``[N, I]`` to ``[E, C, I]``; places without a row are 0 if ``zero`` says so, else anything."""
        experts, most = self.padded_EC.shape
        if not zero:
            return x_NI.index_select(0, self.padded_EC.view(-1)).view(experts, most, -1)
        padded = x_NI.new_zeros(experts * most, x_NI.shape[1])
        return padded.index_copy_(0, self.place_R, x_NI[: len(self.place_R)]).view(experts, most, -1)

    def unpad(self, y_ECO: Tensor) -> Tensor:
        """``[E, C, O]`` to ``[N, O]``, zero where a row belongs to no expert."""
        routed = len(self.place_R)
        out_NO = y_ECO.new_empty((self.rows, y_ECO.shape[2]))
        torch.index_select(y_ECO.view(-1, y_ECO.shape[2]), 0, self.place_R, out=out_NO[:routed])
        return _tail_cleared(out_NO, routed)


@lru_cache(maxsize=4)
def _batch(rows: int, bounds: tuple[tuple[int, int], ...]) -> Batch:
    """Kept for the other products of the same layer: to lay out 64 experts took as long as to multiply 2 rows each."""
    ends_E2 = torch.tensor(bounds)
    most = max(end - first for first, end in bounds)
    padded_EC = ends_E2[:, :1] + torch.arange(most)
    place_R = (padded_EC < ends_E2[:, 1:]).view(-1).nonzero().view(-1)
    return Batch(rows=rows, padded_EC=padded_EC.clamp_(max=rows - 1), place_R=place_R)


def _batch_pays(x_NI: Tensor, matrix: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether the calls saved cost more than the copies and the padding, all counted in multiply-adds."""
    experts, size_i, size_o = matrix
    hit, most, routed = sum(map(bool, sizes)), max(sizes, default=0), sum(sizes)
    copied = experts * most * size_i + routed * size_o
    if most <= FEW_ROWS:  # bound by reading weights, whatever the number of rows
        copied, wasted = copied + (experts - hit) * size_i * size_o, 0
    else:
        wasted = (experts * most - routed) * size_i * size_o
    call = CALL_HALF if x_NI.dtype.itemsize < 4 else CALL
    return hit > 1 and wasted + COPY * copied <= hit * call


def _grouped_mm_takes(x_NI: Tensor, other: Tensor) -> bool:
    """Whether torch's loop over experts takes the operands: it is 4 microseconds an expert faster than ours.

    It wants rows of whole 16 bytes, without gaps, in fp32 or a half type.
    """
    return (
        x_NI.device.type == "cpu"
        and x_NI.dtype is not torch.float64
        and not _through_fp32(x_NI)
        and _whole_rows(x_NI)
        and (_whole_rows(other) or (other.dim() == 3 and _whole_rows(other.mT)))
    )


def _whole_rows(matrix: Tensor) -> bool:
    width = matrix.shape[-1]
    return matrix.stride()[-2:] == (width, 1) and width * matrix.itemsize % 16 == 0


def _ends(bounds: Bounds) -> Tensor:
    return torch.tensor([end for _, end in bounds], dtype=torch.int32)


def pieces(rows: Tensor, bounds: Bounds, dim: int = 0) -> Sequence[Tensor]:
    """Each expert's part of ``rows`` along ``dim``, as views.

    One split, not a slice for every expert: that took 1.5 microseconds each, as long as a product of 16 rows.
    """
    sizes = [end - first for first, end in bounds]
    return rows.split([*sizes, rows.shape[dim] - _routed(bounds)], dim)[:-1]


def rows_times(
    x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, bounds: Bounds, onto_NO: Tensor | None = None
) -> Tensor:
    """``x[r] @ weight[e].T + bias[e]`` for every row r of every expert e: [N, O].

    ``onto_NO`` stands for the bias: the products are added to it, in place.
    """
    weight_EIO = weight_EOI.transpose(1, 2)
    batch = Batch.of(x_NI, weight_EIO.shape, bounds)
    if batch is None:
        if bias_EO is None and onto_NO is None and _grouped_mm_takes(x_NI, weight_EOI):
            out_NO = F.grouped_mm(x_NI, weight_EIO, offs=_ends(bounds))
            return _tail_cleared(out_NO, _routed(bounds))
        return _each_rows_times(x_NI, weight_EIO, bias_EO, bounds, onto_NO)
    x_ECI = batch.pad(x_NI)
    out_NO = batch.unpad(
        torch.bmm(x_ECI, weight_EIO)
        if bias_EO is None
        else torch.baddbmm(bias_EO.unsqueeze(1), x_ECI, weight_EIO)
    )
    return out_NO if onto_NO is None else onto_NO.add_(out_NO)


def _each_rows_times(
    x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, bounds: Bounds, onto_NO: Tensor | None
) -> Tensor:
    """``rows_times`` with a product for each expert, written to its place."""
    out_NO = x_NI.new_empty((x_NI.shape[0], weight_EIO.shape[2])) if onto_NO is None else onto_NO
    outs = pieces(out_NO, bounds)
    if onto_NO is None:
        _tail_cleared(out_NO, _routed(bounds))
        biases = [None] * len(bounds) if bias_EO is None else bias_EO.unbind(0)
    else:
        biases = outs
    parts = zip(pieces(x_NI, bounds), weight_EIO.unbind(0), biases, outs, strict=True)
    for x_MI, weight_IO, bias, out_MO in parts:
        if x_MI.shape[0]:
            _multiply(x_MI, weight_IO, bias, out_MO)
    return out_NO


def outer_products(grad_NO: Tensor, x_NI: Tensor, bounds: Bounds) -> Tensor:
    """``grad[rows of e].T @ x[rows of e]``, the gradient of the weights: [E, O, I]."""
    shape = (len(bounds), grad_NO.shape[1], x_NI.shape[1])
    batch = Batch.of(x_NI, shape, bounds)
    if batch is not None:
        return torch.bmm(batch.pad(grad_NO, zero=True).transpose(1, 2), batch.pad(x_NI, zero=True))
    if _grouped_mm_takes(x_NI, grad_NO):
        return F.grouped_mm(grad_NO.t(), x_NI, offs=_ends(bounds))
    out_EOI = grad_NO.new_empty(shape)
    grads, xs = pieces(grad_NO.t(), bounds, 1), pieces(x_NI, bounds)
    for grad_OM, x_MI, out_OI in zip(grads, xs, out_EOI.unbind(0), strict=True):
        if x_MI.shape[0]:
            _multiply(grad_OM, x_MI, None, out_OI)
        else:
            out_OI.zero_()
    return out_EOI


def row_sums(grad_NO: Tensor, bounds: Bounds) -> Tensor:
    """``grad[rows of e].sum(0)``, the gradient of the biases: [E, O]."""
    out_EO = grad_NO.new_empty((len(bounds), grad_NO.shape[1]))
    for grad_MO, out_O in zip(pieces(grad_NO, bounds), out_EO.unbind(0), strict=True):
        torch.sum(grad_MO, 0, out=out_O)
    return out_EO


def _routed(bounds: Bounds) -> int:
    """Number of rows that belong to some expert."""
    return bounds[-1][1] if bounds else 0


def _tail_cleared(out_NO: Tensor, routed: int) -> Tensor:
    """``out_NO`` with zeros in the rows that belong to no expert."""
    if routed < out_NO.shape[0]:
        out_NO[routed:].zero_()
    return out_NO
