"""Slots sorted by expert: a stable counting sort of expert ids, without a word to the host.

E experts, N slots, ids [N]; C tiles of BLOCK slots each.

Contract: ``order[r]`` is the slot of sorted row r, rows of one expert keep slot order, ``offsets[e]`` is the row behind
expert e's last one. Ids outside ``[0, E)`` are dropped: they come last and are never addresses. ``row[slot]`` is the
inverse of ``order``. No atomics, shapes depend on N and E alone: bits repeat, and CUDA graphs can capture it.

    >>> sort_by_expert(torch.tensor([1, 0, 1, 2], device="cuda"), num_experts=3)
    (tensor([1, 0, 2, 3]), tensor([1, 3, 4], dtype=torch.int32), None)

Few slots: one launch, in which every slot counts the keys below its own (N * N comparisons). Many slots: three.
1. ``count_kernel``, a program a tile: ``upto[e, c]``, how many ids of tile c are at most e.
2. ``base_kernel``, a program an expert: ``base[e, c]``, the row of the first slot of expert e in tile c. The sum of
   ``upto[e - 1]`` over all tiles is where e starts; what is left is a running sum of ``upto[e] - upto[e - 1]``.
3. ``place_kernel``, a program a tile: a slot's row is its base plus how many slots before it in the tile share its id.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from moefy.triton_ops.shared.blocks import cdiv, next_power_of_2
from moefy.triton_ops.shared.launch import jit, kernel, on_device

MAX_EXPERTS = 4096
# Up to here one launch that compares all pairs is used.
MAX_PAIRS_SLOTS = 4096
# Tiles that one step of the running sum takes.
SCAN_BLOCK = 2048


def sort_by_expert(
    ids_N: Tensor, num_experts: int, *, with_rows: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(order [N] int64, offsets [E] int32, row [N] int32 or None)`` of contiguous int64 or int32 ids."""
    slots, device = ids_N.shape[0], ids_N.device
    order_N = torch.empty(slots, dtype=torch.int64, device=device)
    offsets_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    row_N = torch.empty(slots, dtype=torch.int32, device=device) if with_rows else None
    sort = sort_pairs if slots <= MAX_PAIRS_SLOTS else sort_tiles
    with on_device(ids_N):
        sort(ids_N, order_N, offsets_E, row_N)
    return order_N, offsets_E, row_N


def sort_pairs(ids_N: Tensor, order_N: Tensor, offsets_E: Tensor, row_N: Tensor | None) -> None:
    """Fill the results with one launch; time grows with N * N."""
    slots, experts = ids_N.shape[0], offsets_E.shape[0]
    config = pairs_blocks(slots)
    pairs_kernel[(cdiv(slots + experts, config["BLOCK"]),)](
        ids_N, order_N, offsets_E, row_N, slots, E=experts, **config
    )


def sort_tiles(ids_N: Tensor, order_N: Tensor, offsets_E: Tensor, row_N: Tensor | None) -> None:
    """Fill the results with three launches; time grows with N."""
    slots, experts = ids_N.shape[0], offsets_E.shape[0]
    config = tile_blocks(experts)
    block = config["BLOCK"]
    tiles = max(1, cdiv(slots, block))
    upto_EC = torch.empty((experts, tiles), dtype=torch.int32, device=ids_N.device)
    base_FC = torch.empty((experts + 1, tiles), dtype=torch.int32, device=ids_N.device)
    count_kernel[(tiles,)](
        ids_N, upto_EC, slots, tiles, E=experts, BLOCK_E=next_power_of_2(experts), **config
    )
    base_kernel[(experts + 1,)](
        upto_EC, base_FC, offsets_E, tiles, E=experts, BLOCK=block, **scan_blocks(tiles)
    )
    place_kernel[(tiles,)](ids_N, base_FC, order_N, row_N, slots, tiles, E=experts, **place_blocks(experts))


def pairs_blocks(slots: int) -> dict[str, int]:
    """Blocks of ``pairs_kernel``; ``MAX_SLOTS`` in powers of two, so that few kernels are compiled.

    A program's steps wait for their loads one after the other: many programs of few steps.
    """
    most = max(128, next_power_of_2(slots))
    return {"MAX_SLOTS": most, "BLOCK": 16, "OTHERS": min(most, 512), "num_warps": 4}


def tile_blocks(num_experts: int) -> dict[str, int]:
    """Blocks of ``count_kernel``: larger tiles for many experts keep the tables small."""
    block = min(1024, max(256, next_power_of_2(num_experts)))
    return {"BLOCK": block, "num_warps": 4 if block <= 512 else 8}


def place_blocks(num_experts: int) -> dict[str, int]:
    """Blocks of ``place_kernel``: the same tiles, in steps of 32 comparisons a thread (more would spill)."""
    config = tile_blocks(num_experts)
    return {**config, "OTHERS": 32 * 32 * config["num_warps"] // config["BLOCK"]}


def scan_blocks(tiles: int) -> dict[str, int]:
    """Blocks of ``base_kernel``; the number of steps in powers of two."""
    block_c = min(SCAN_BLOCK, max(32, next_power_of_2(tiles)))
    steps = next_power_of_2(cdiv(tiles, block_c))
    return {"BLOCK_C": block_c, "STEPS": steps, "num_warps": 4}


@jit
def _bins(ids_ptr, slot, N, E: tl.constexpr):
    """The ids of ``slot`` as int32: E for a dropped one, and E + 1 behind the last slot."""
    ids = tl.load(ids_ptr + slot, mask=slot < N, other=0)
    # Compared as they come: an int64 id must not be cut to a valid int32 one.
    bins = tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)
    return tl.where(slot < N, bins, E + 1)


@kernel(do_not_specialize=["N"])
def pairs_kernel(
    ids_ptr,
    order_ptr,
    offsets_ptr,
    row_ptr,
    N,
    E: tl.constexpr,
    MAX_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: BLOCK questions "how many keys are below this one?", the slots' first, then one for each expert.

    A slot's key is ``id * MAX_SLOTS + slot``, all different: the answer is its row. Expert e asks with
    ``(e + 1) * MAX_SLOTS``: the answer is its offset. E and N are at most 4096, so a key fits in 26 bits.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot_key = _bins(ids_ptr, mine, N, E) * MAX_SLOTS + mine
    key = tl.where(mine < N, slot_key, (mine - N + 1) * MAX_SLOTS)
    found = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)
    for first in range(0, MAX_SLOTS, OTHERS):
        slot = first + tl.arange(0, OTHERS)
        other = _bins(ids_ptr, slot, N, E) * MAX_SLOTS + slot
        other = tl.where(slot < N, other, 2**31 - 1)
        found += (other[None, :] < key[:, None]).to(tl.int32)
    below = tl.sum(found, axis=1)
    tl.store(order_ptr + below, mine.to(tl.int64), mask=mine < N)
    if row_ptr is not None:
        tl.store(row_ptr + mine, below, mask=mine < N)
    tl.store(offsets_ptr + mine - N, below, mask=(mine >= N) & (mine < N + E))


@kernel(do_not_specialize=["N", "C"])
def count_kernel(ids_ptr, upto_ptr, N, C, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """One program: column c of ``upto`` [E, C]."""
    c = tl.program_id(0).to(tl.int64)
    bins = _bins(ids_ptr, c * BLOCK + tl.arange(0, BLOCK), N, E)
    kept = bins < E
    counts = tl.histogram(tl.where(kept, bins, 0), BLOCK_E, mask=kept)
    expert = tl.arange(0, BLOCK_E)
    tl.store(upto_ptr + expert.to(tl.int64) * C + c, tl.cumsum(counts, axis=0), mask=expert < E)


@kernel(do_not_specialize=["C"])
def base_kernel(
    upto_ptr,
    base_ptr,
    offsets_ptr,
    C,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: row e of ``base`` [E + 1, C] and ``offsets[e]``; the last row is the dropped slots'."""
    e = tl.program_id(0).to(tl.int64)
    # Row -1 of the table is all zeros. Row E, up to the dropped ones, is BLOCK: only the last tile may have fewer
    # slots, and no tile follows it.
    lower_end = tl.where(e > 0, C, 0)
    upper_end = tl.where(e < E, C, 0)
    below = tl.zeros([BLOCK_C], dtype=tl.int32)
    for step in range(STEPS):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        below += tl.load(upto_ptr + (e - 1) * C + c, mask=c < lower_end, other=0)
    row = tl.sum(below, axis=0)
    for step in range(STEPS):
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        lower = tl.load(upto_ptr + (e - 1) * C + c, mask=c < lower_end, other=0)
        upper = tl.load(upto_ptr + e * C + c, mask=c < upper_end, other=BLOCK)
        count = tl.where(c < C, upper - lower, 0)
        tl.store(base_ptr + e * C + c, row + tl.cumsum(count, axis=0) - count, mask=c < C)
        row += tl.sum(count, axis=0)
    tl.store(offsets_ptr + e, row, mask=e < E)


@kernel(do_not_specialize=["N", "C"])
def place_kernel(
    ids_ptr,
    base_ptr,
    order_ptr,
    row_ptr,
    N,
    C,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """One program: the rows of the slots of tile c."""
    c = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    slot = c * BLOCK + place
    bins = _bins(ids_ptr, slot, N, E)
    base = tl.load(base_ptr + bins.to(tl.int64) * C + c, mask=slot < N, other=0)
    found = tl.zeros([BLOCK, OTHERS], dtype=tl.int32)
    for first in range(0, BLOCK, OTHERS):
        other = first + tl.arange(0, OTHERS)
        same = bins[:, None] == _bins(ids_ptr, c * BLOCK + other, N, E)[None, :]
        found += (same & (other[None, :] < place[:, None])).to(tl.int32)
    row = base + tl.sum(found, axis=1)
    tl.store(order_ptr + row, slot, mask=slot < N)
    if row_ptr is not None:
        tl.store(row_ptr + slot, row, mask=slot < N)
