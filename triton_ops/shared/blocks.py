"""Tile sizes per kernel, dtype and architecture, and what a launch needs to know of its device.

Contract: ``blocks(kernel, dtype, rows, experts, device)`` gives the tile of M rows, N columns and a depth of K, and the
warps and stages. What was measured is in ``triton_ops/README.md``; what was not measured follows the registers and the
shared memory that a compile reports.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["entry", "glu_entry", "linear", "hidden_grad", "weight_grad", "gathered_weight_grad"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """One tile size. ``m`` rows by ``n`` columns in steps of ``k``; ``group`` row tiles share a sweep of columns.

    ``pieces``: in how many parts an epilogue that needs many registers takes the columns, a power of two;
    ``pieces_plain`` without a gate.
    ``per_processor``: programs that share a multiprocessor, so that one's epilogue runs beside another's products.
    ``store``: write whole tiles by descriptor.
    ``pair``: load the tiles of gate and up as one operand.
    ``flatten``: let the loads of the next tile start during the epilogue.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 16
    pieces: int = 1
    pieces_plain: int | None = None
    per_processor: int = 1
    flatten: bool = False
    store: bool = False
    pair: bool = True

    def pieces_for(self, glu: bool) -> int:
        """``pieces`` with a gate or without one."""
        return self.pieces if glu or self.pieces_plain is None else self.pieces_plain

    @property
    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


_WIDE = {
    "entry": Blocks(m=128, n=256, k=64, warps=8, stages=3, pieces=4),
    "glu_entry": Blocks(m=128, n=128, k=64, warps=8, stages=3, pieces=4),
    "linear": Blocks(m=128, n=256, k=64, warps=8, stages=3, flatten=True, store=True),
    # H200, bf16, Triton 3.6, by descriptor. With a gate 1.25 ms in 4 pieces, 1.40 in 8 (H=1024). Without one 0.96 in 4,
    # which spill 72 bytes, 0.89 and 0.96 in 8, which spill none (H=4096); 1.40 against 1.34 and 1.44 (H=1024).
    "hidden_grad": Blocks(m=128, n=256, k=64, warps=8, stages=3, pieces=4, pieces_plain=8),
    "weight_grad": Blocks(m=128, n=256, k=32, warps=8, stages=5),
    "gathered_weight_grad": Blocks(m=128, n=256, k=32, warps=8, stages=8),
}
_AMPERE = {
    "entry": Blocks(m=64, n=128, k=32, warps=8, stages=3, pieces=2),
    "glu_entry": Blocks(m=64, n=64, k=32, warps=8, stages=3, pieces=2),
    "linear": Blocks(m=64, n=128, k=32, warps=8, stages=3),
    "hidden_grad": Blocks(m=64, n=64, k=32, warps=8, stages=3, pieces=2),
    "weight_grad": Blocks(m=128, n=128, k=32, warps=8, stages=3),
    "gathered_weight_grad": Blocks(m=128, n=128, k=32, warps=8, stages=3),
}
# fp32 products run on ordinary cores, whose operands lie in registers.
_FULL_PRECISION = Blocks(m=32, n=32, k=32, warps=4, stages=2)


def blocks(kernel: Kernel, dtype: torch.dtype, rows: int, experts: int, device: torch.device) -> Blocks:
    """The tile for ``rows`` rows over ``experts`` experts."""
    if dtype is torch.float32:
        return _FULL_PRECISION
    if not kernel.endswith("weight_grad") and not fills_wide_tiles(kernel, rows, experts):
        n = 64 if kernel == "glu_entry" else 128
        # better at 32 and 40 rows an expert, where many would need a second tile of 32, worse at 16 and 24
        if rows >= 28 * experts and kernel != "hidden_grad" and has_tma(device) and _holds_wide_tiles(device):
            return Blocks(m=64, n=n, k=128, warps=4, stages=3, flatten=True)
        m = 16 if rows < 16 * experts else 32
        return Blocks(m=m, n=n, k=128, warps=4, stages=3, per_processor=3)
    return (_WIDE if has_tma(device) and _holds_wide_tiles(device) else _AMPERE)[kernel]


def fills_wide_tiles(kernel: Kernel, rows: int, experts: int) -> bool:
    """Whether an expert has enough rows, on average, for tiles of 128; entry and linear want more, by measurement."""
    return rows >= (64 if kernel in ("entry", "glu_entry", "linear") else 48) * experts


@functools.cache
def _holds_wide_tiles(device: torch.device) -> bool:
    """Whether a program may have the 227 KiB of shared memory of a data-centre card; others have about 100."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 * 1024


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether the device copies tiles by descriptor: Hopper and newer. The interpreter does too."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at a time when each fills a multiprocessor."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def describable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can address them: not empty, 16-byte aligned rows, features side by side."""
    for tensor in tensors:
        *outer, last = tensor.stride()
        if last != 1 or tensor.data_ptr() & 15 or not tensor.numel():
            return False
        size = tensor.element_size()
        for stride in outer:
            if stride <= 0 or stride * size & 15:
                return False
    return True


def descriptor(tensor: Tensor, *block: int) -> Any:
    """A tensor descriptor of ``tensor``, which is ``describable``, for tiles of ``block``."""
    return describe(tensor, tensor.shape, tensor.stride(), block)


def describe(base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]) -> Any:
    """A tensor descriptor without its own checks, which take microseconds of the host: ``describable`` made them."""
    found: Any = object.__new__(_descriptor_class())
    found.base, found.shape, found.strides = base, list(shape), list(strides)
    found.block_shape, found.padding = list(block), "zero"
    return found


@functools.cache
def _descriptor_class() -> type[Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: in full, or in tf32 where torch was told that it may be."""
    return "tf32" if dtype is torch.float32 and tf32_allowed() else "ieee"


def tf32_allowed() -> bool:
    """Whether torch was told so, by whichever of its switches; ``allow_tf32`` cannot be read behind the newer ones."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below ``n >= 1``."""
    return 1 << (n - 1).bit_length()
