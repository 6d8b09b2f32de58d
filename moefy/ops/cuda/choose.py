"""When an op runs by Triton, on which device, and with which of its launches repeated.

Contract: Triton is imported when the first op runs. ``by_triton`` leaves fp64 to plain torch, which waits for the
device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_GEMM_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def by_triton(kernel: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` where every floating tensor is of a dtype that it takes, else ``otherwise``."""

    def chosen(*args: Any) -> Any:
        floating = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        run = kernel if all(a.dtype in _GEMM_DTYPES for a in floating) else otherwise
        device = floating[0].device
        if device.index == torch.cuda.current_device():  # entering it again takes microseconds
            return run(*args)
        with torch.cuda.device(device):  # Triton launches on the current one
            return run(*args)

    return chosen


@functools.cache
def recorded(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """``function(tensors, options)``, whose launches are repeated from the third call of a kind on."""
    from moefy.triton_ops.shared.recorded import Recorded

    return Recorded(function)


def rows_contiguous(x: Tensor) -> Tensor:
    """``x`` with its features side by side."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()
