"""Which tile of rows belongs to which expert: the schedule that all grouped kernels of a layer read.

N rows sorted by expert, E experts, tiles of M rows; a tile never spans two experts.

Contract: ``expert_of_tile[i]`` is the expert of the i-th row tile. ``experts[e]`` holds four int32: its first tile, how
many tiles it has, its first row and the row behind its last. Behind them come the experts in the order in which the
weight gradients take them, those of more than twice the mean load first, and zeroed counters, one for each launch that
hands out its tiles as programs become free. Rows behind the last expert (dropped slots) belong to a
pseudo expert E, for which kernels write zeros. Both tables are made on the device, in one launch, for a number of
tiles that the host can bound: ``cdiv(N, M) + E + 1``; there is no host sync. Offsets that decrease or exceed N are
clamped, so that no address comes from them.

Worked example, M=128: offsets [100, 100, 400], N=400 give tiles of experts [0, 2, 2, 2].
"""

from __future__ import annotations

import dataclasses

import torch
import triton.language as tl
from torch import Tensor

from moefy.triton_ops.shared.blocks import cdiv, next_power_of_2
from moefy.triton_ops.shared.launch import jit, kernel

# Launches that may count through one schedule; more than a backward has.
COUNTERS = 64


@dataclasses.dataclass
class Schedule:
    """The two tables, the row of each slot ([N] int32) when it was asked for, and the sizes."""

    expert_of_tile: Tensor
    experts: Tensor
    row_of_slot_N: Tensor | None
    rows: int
    num_experts: int
    block_rows: int
    counters_used: int = 0

    def next_counter(self) -> int:
        """The place of a counter that no launch has used, in the table of experts."""
        assert self.counters_used < COUNTERS, "more launches than counters"
        self.counters_used += 1
        return 5 * (self.num_experts + 1) + self.counters_used - 1

    @property
    def max_tiles(self) -> int:
        """How many row tiles there can be."""
        return self.expert_of_tile.shape[0]


def schedule(offsets_E: Tensor, rows: int, block_rows: int, order_N: Tensor | None = None) -> Schedule:
    """The schedule of ``rows`` rows in tiles of ``block_rows``; with the row of each slot when ``order_N`` is given.

    Args:
        offsets_E: [E] int32, exclusive ends.
        rows: N.
        block_rows: M.
        order_N: [N] int64, the slot of each row.
    """
    num_experts = offsets_E.shape[0]
    max_tiles = cdiv(rows, block_rows) + num_experts + 1
    padded = next_power_of_2(num_experts + 1)
    per_program = max(1, min(256, 16384 // padded))
    size = 5 * (num_experts + 1) + COUNTERS
    tables = torch.empty(max_tiles + size, dtype=torch.int32, device=offsets_E.device)
    experts, expert_of_tile = tables[:size], tables[size:]
    row_of_slot_N = None
    if order_N is not None:
        row_of_slot_N = torch.empty(rows, dtype=torch.int32, device=offsets_E.device)
    listing = cdiv(max_tiles, per_program)
    inverting = cdiv(rows, 1024) if order_N is not None else 0
    _schedule_kernel[(listing + inverting,)](
        offsets_E, experts, expert_of_tile, order_N if order_N is not None else tables,
        row_of_slot_N if row_of_slot_N is not None else tables, rows, num_experts, max_tiles, listing,
        M=block_rows, PADDED=padded, TILES=per_program, BLOCK=1024, COUNTERS=COUNTERS,
    )  # fmt: skip
    return Schedule(expert_of_tile, experts, row_of_slot_N, rows, num_experts, block_rows)


def row_of_slot(order_N: Tensor) -> Tensor:
    """[N] int32: the row of each slot, by itself."""
    no_experts = torch.zeros(1, dtype=torch.int32, device=order_N.device)
    row_of_slot_N = schedule(no_experts, order_N.shape[0], 1 << 20, order_N).row_of_slot_N
    assert row_of_slot_N is not None
    return row_of_slot_N


@kernel
def _schedule_kernel(
    offsets, experts, expert_of_tile, order, row_of_slot, rows, num_experts, max_tiles, listing,
    M: tl.constexpr, PADDED: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """The first ``listing`` programs list the tiles, the others invert the order."""
    if tl.program_id(0) < listing:
        e = tl.arange(0, PADDED)
        end = tl.load(offsets + e, e < num_experts, other=2147483647)
        start = tl.load(offsets + e - 1, (e > 0) & (e <= num_experts), other=0)
        start = tl.minimum(tl.maximum(start, 0), rows)
        end = tl.maximum(tl.minimum(end, rows), start)
        tiles = tl.where(e <= num_experts, (end - start + M - 1) // M, 0)
        behind = tl.cumsum(tiles, 0)
        if tl.program_id(0) == 0:
            real = e <= num_experts
            tl.store(experts + 4 * e, behind - tiles, real)
            tl.store(experts + 4 * e + 1, tiles, real)
            tl.store(experts + 4 * e + 2, start, real)
            tl.store(experts + 4 * e + 3, end, real)
            load = (end - start).to(tl.int64) * num_experts
            hot = ((load - rows > rows) & (e < num_experts)).to(tl.int32)
            cool = (e < num_experts).to(tl.int32) - hot
            place = tl.where(hot > 0, tl.cumsum(hot, 0), tl.sum(hot, 0) + tl.cumsum(cool, 0))
            tl.store(experts + 4 * (num_experts + 1) + place - 1, e, e < num_experts)
            tl.store(
                experts + 5 * (num_experts + 1) + tl.arange(0, COUNTERS), tl.zeros((COUNTERS,), tl.int32)
            )
        tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
        expert = tl.sum((behind[None, :] <= tile[:, None]).to(tl.int32), 1)
        tl.store(expert_of_tile + tile, tl.minimum(expert, num_experts), tile < max_tiles)
    else:
        row = (tl.program_id(0) - listing) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(order + row, row < rows, other=0)
        tl.store(row_of_slot + slot, row, (row < rows) & (slot >= 0) & (slot < rows))


@jit
def count_tiles(experts, num_experts):
    """How many row tiles there are."""
    return tl.load(experts + 4 * num_experts) + tl.load(experts + 4 * num_experts + 1)


@jit
def locate(tile, column_tiles, expert_of_tile, experts, M: tl.constexpr, GROUP: tl.constexpr):
    """``(expert, first row, end row, column tile)`` of the ``tile``-th of all tiles.

    Tiles of one expert lie together, GROUP row tiles by all column tiles, so that the tiles that run at the same time
    share rows and weights in L2.
    """
    expert = tl.load(expert_of_tile + tile // column_tiles)
    first_tile = tl.load(experts + 4 * expert)
    row_tiles = tl.load(experts + 4 * expert + 1)
    local = tile - first_tile * column_tiles
    group_first = local // (GROUP * column_tiles) * GROUP
    group_size = tl.minimum(row_tiles - group_first, GROUP)
    within = local % (GROUP * column_tiles)
    row = tl.load(experts + 4 * expert + 2) + (group_first + within % group_size) * M
    return expert, row, tl.load(experts + 4 * expert + 3), within // group_size


@jit
def locate_matrix(
    tile, experts, num_experts, row_tiles, column_tiles, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr
):
    """``(expert, first row, first column, first token row, end token row)`` of the ``tile``-th tile of all matrices.

    A matrix has ``row_tiles`` by ``column_tiles`` tiles of M by N. Experts come in the order of the schedule.
    """
    per_expert = row_tiles * column_tiles
    expert = tl.load(experts + 4 * (num_experts + 1) + tile // per_expert)
    local = tile % per_expert
    group_first = local // (GROUP * column_tiles) * GROUP
    group_size = tl.minimum(row_tiles - group_first, GROUP)
    within = local % (GROUP * column_tiles)
    row = (group_first + within % group_size) * M
    column = within // group_size * N
    return expert, row, column, tl.load(experts + 4 * expert + 2), tl.load(experts + 4 * expert + 3)


@jit
def store(
    out, tiles, value, row, end, column, width, stride,
    STORE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write a tile at ``(row, column)``, but nothing from row ``end`` on: there the next expert's rows begin.

    With STORE ``tiles`` is a descriptor of ``out``, which writes whole tiles.
    """
    value = value.to(out.dtype.element_ty)
    whole = False
    if STORE:
        whole = row + M <= end
        if whole:
            tiles.store([row, column], value)
    if not whole:
        # int64 to the tile, int32 within it: whole tiles of 64-bit addresses would not fit the registers
        ms = tl.arange(0, M)[:, None]
        ns = tl.arange(0, N)[None, :]
        at = out + row.to(tl.int64) * stride + column
        tl.store(at + (ms * stride + ns), value, (row + ms < end) & (column + ns < width))
