"""How the rows of some experts lie in memory while they are multiplied: as they are sorted, or padded to a batch.

N rows sorted by expert, P places, E experts, C rows of the busiest expert, I and O features; ``bounds[e] =
(first, end)`` row of expert e.

Contract: row r lies at place ``place_N[r]``. ``spread`` copies values from rows to places, ``collect`` copies them
back. ``InRows`` has a place for each row; ``Batch`` has C places for each expert, ``e * C + c``, so that one call
multiplies all experts. Large experts are multiplied one by one, many small ones in one batch.

    >>> batch = Batch.of([(0, 2), (2, 3)], 3)
    >>> batch.spread(torch.tensor([[1.0], [2.0], [3.0]]), zero=True).T
    tensor([[1., 2., 3., 0.]])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from moefy.ops.ffn_args import Bounds

# In multiply-adds: what a product costs more as a call of its own, in fp32 and in bf16, and to copy an element. On 2
# cores of an AMD EPYC (Zen 4), 8 to 256 experts of 32 to 256 rows, 48 to 256 features, a call costs 8 to 15 and 20
# microseconds more than in a batch (two threads share each product, where a batch gives each its own); here it counts 6
# and 15, since what follows the products also runs over the padding.
CALL, CALL_HALF, COPY = 500_000, 2_500_000, 16
FEW_ROWS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class InRows:
    """The rows as they are sorted; behind ``bounds`` there may be rows of no expert."""

    bounds: Bounds
    rows: int

    @property
    def places(self) -> int:
        """P, the number of places: N."""
        return self.rows

    @cached_property
    def end_E(self) -> Tensor:
        """The row behind each expert's last, as ``grouped_mm`` wants them."""
        return torch.tensor([end for _, end in self.bounds], dtype=torch.int32)

    def place_N(self, device: torch.device) -> Tensor:
        """The place of each row."""
        return torch.arange(self.rows, device=device)

    def spread(self, by_row: Tensor, *, zero: bool = False) -> Tensor:
        """``by_row`` itself: each row is a place."""
        return by_row

    def cleared(self, by_place: Tensor) -> Tensor:
        """``by_place`` itself: no place is without a row."""
        return by_place

    def collect(self, by_place: Tensor, out: Tensor | None = None) -> Tensor:
        """``by_place`` itself, or its copy in ``out`` if that is another tensor."""
        return by_place if out is None or out is by_place else out.copy_(by_place)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """``[E * C, features]``, to be viewed as ``[E, C, features]``.

    Args:
        experts: E.
        rows: N.
        row_P: the row that each place holds; behind an expert's last row any row.
        place_R: the place of each row that belongs to an expert.
        empty: the places without a row.
    """

    experts: int
    rows: int
    row_P: Tensor
    place_R: Tensor
    empty: Tensor

    @staticmethod
    def of(bounds: Bounds, rows: int) -> Batch:
        """The batch of these experts, of whom at least one has a row."""
        return _batch(rows, tuple(bounds))

    @property
    def places(self) -> int:
        """P, the number of places: E * C."""
        return self.row_P.shape[0]

    def place_N(self, device: torch.device) -> Tensor:
        """The place of each row; every row belongs to an expert."""
        assert self.place_R.shape[0] == self.rows
        return self.place_R

    def spread(self, by_row: Tensor, *, zero: bool = False) -> Tensor:
        """``by_row`` [N, ...] by place [P, ...]; places without a row are 0 with ``zero``, else undefined."""
        by_place = by_row.index_select(0, self.row_P)
        return self.cleared(by_place) if zero else by_place

    def cleared(self, by_place: Tensor) -> Tensor:
        """``by_place`` itself, with zeros at the places without a row."""
        return by_place.index_fill_(0, self.empty, 0)

    def collect(self, by_place: Tensor, out: Tensor | None = None) -> Tensor:
        """``by_place`` [P, ...] by row [N, ...]; rows of no expert are 0."""
        if out is None:
            out = by_place.new_empty((self.rows, *by_place.shape[1:]))
        routed = self.place_R.shape[0]
        torch.index_select(by_place, 0, self.place_R, out=out[:routed])
        if routed < self.rows:
            out[routed:].zero_()
        return out


Layout: TypeAlias = InRows | Batch


@lru_cache(maxsize=4)
def _batch(rows: int, bounds: tuple[tuple[int, int], ...]) -> Batch:
    """The batch of ``bounds``, cached: the backward of a layer asks for that of its forward."""
    ends_E2 = torch.tensor(bounds)
    row_EC = ends_E2[:, :1] + torch.arange(max(end - first for first, end in bounds))
    taken_P = (row_EC < ends_E2[:, 1:]).view(-1)
    return Batch(
        experts=len(bounds),
        rows=rows,
        row_P=row_EC.clamp_(max=rows - 1).view(-1),
        place_R=taken_P.nonzero().view(-1),
        empty=taken_P.logical_not_().nonzero().view(-1),
    )


def layout_for(
    like: Tensor, bounds: Bounds, rows: int, *, matrices: Sequence[int], copied: tuple[int, int]
) -> Layout:
    """The faster layout for products of ``rows`` rows.

    Args:
        like: has their dtype and device.
        bounds: of the experts among the rows.
        rows: N.
        matrices: sizes, in elements, of the matrices by which every row is multiplied.
        copied: features that are copied for the batch alone, of every place and of every row.
    """
    sizes = [end - first for first, end in bounds]
    if like.device.type == "cpu" and not through_fp32(like) and _batch_pays(like, sizes, matrices, copied):
        return Batch.of(bounds, rows)
    return InRows(bounds=bounds, rows=rows)


def _batch_pays(like: Tensor, sizes: Sequence[int], matrices: Sequence[int], copied: tuple[int, int]) -> bool:
    """Whether the calls saved cost more than the copies and the padding, all counted in multiply-adds."""
    hit, most, routed = sum(map(bool, sizes)), max(sizes, default=0), sum(sizes)
    places = len(sizes) * most
    wasted = (places - routed) * sum(matrices)
    if most <= FEW_ROWS:  # bound by reading weights, whatever the number of rows
        wasted = (len(sizes) - hit) * sum(matrices)
    call = CALL_HALF if like.dtype.itemsize < 4 else CALL
    copies = COPY * (copied[0] * places + copied[1] * routed)
    return hit > 1 and wasted + copies <= len(matrices) * hit * call


@cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AMX or AVX512-BF16)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def through_fp32(operand: Tensor) -> bool:
    """Whether a product of two such operands is faster with both widened to fp32 first.

    Measured on 4096 x 768 x 3072, 8 experts, 2 cores. AMD EPYC without AVX-512: bf16 1287 ms native, 736 ms widened;
    fp16 2327 against 600 ms. Xeon with AMX: bf16 74 ms native, 268 ms in fp32; fp16 about 300 ms either way.
    """
    if operand.device.type != "cpu":
        return False
    if operand.dtype is torch.bfloat16:
        return not _cpu_multiplies_bf16()
    return operand.dtype is torch.float16
