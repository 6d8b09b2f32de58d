"""Argument checks of the public ops: a named error with a clear message before any work starts.

Messages read ``moefy.<op>: <argument> <problem>; got <value>; expected <rule>``. Everything here looks at shapes,
dtypes, layouts and devices only, so it costs microseconds and traces without a graph break.

    >>> shape("permute", "x", torch.zeros(3), "[T, D]", 2)
    moefy.errors.ShapeError: moefy.permute: x has the wrong number of dimensions; got shape [3]; expected [T, D]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moefy.errors import ConfigError, DeviceError, DtypeError, RoutingError, ShapeError

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_ROWS = 2**31 - 1


def tensor(op: str, name: str, value: Any) -> None:
    """``value`` is a dense (strided) tensor."""
    if not isinstance(value, Tensor):
        raise DtypeError(
            f"moefy.{op}: {name} must be a tensor; got {type(value).__name__}; expected torch.Tensor"
        )
    if value.layout is not torch.strided:
        raise DtypeError(
            f"moefy.{op}: {name} layout is not supported; got {value.layout}; expected torch.strided"
        )


def shape(op: str, name: str, value: Tensor, letters: str, ndim: int) -> None:
    """``value`` is a dense tensor with ``ndim`` dimensions."""
    tensor(op, name, value)
    if value.dim() != ndim:
        raise ShapeError(
            f"moefy.{op}: {name} has the wrong number of dimensions; got shape {list(value.shape)}; "
            f"expected {letters}"
        )


def size(op: str, what: str, got: int, expected: int, rule: str) -> None:
    """One length agrees with another."""
    if got != expected:
        raise ShapeError(f"moefy.{op}: {what} does not fit; got {got}; expected {rule} = {expected}")


def floating(op: str, name: str, value: Tensor) -> None:
    """``value`` is fp64, fp32, bf16 or fp16."""
    if value.dtype not in FLOATING:
        raise DtypeError(
            f"moefy.{op}: {name} must be floating point; got {value.dtype}; "
            "expected float32, bfloat16, float16 or float64"
        )


def index(op: str, name: str, value: Tensor, *dtypes: torch.dtype) -> None:
    """``value`` has one of the integer ``dtypes``."""
    if value.dtype not in dtypes:
        raise DtypeError(
            f"moefy.{op}: {name} has the wrong dtype; got {value.dtype}; "
            f"expected {' or '.join(str(d) for d in dtypes)}"
        )


def same_device(op: str, name: str, first: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """All tensors live where ``first`` does."""
    for other, value in others.items():
        if value is not None and value.device != first.device:
            raise DeviceError(
                f"moefy.{op}: {other} is on {value.device} but {name} on {first.device}; "
                f"got {value.device}; expected {first.device}"
            )


def same_dtype(op: str, name: str, first: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """All GEMM operands share a dtype, unless autocast is about to give them one."""
    if torch.is_autocast_enabled(first.device.type):
        return
    for other, value in others.items():
        if value is not None and value.dtype != first.dtype:
            raise DtypeError(
                f"moefy.{op}: {other} dtype {value.dtype} != {name} dtype {first.dtype}; "
                f"got {value.dtype}; expected {first.dtype}, or torch.autocast"
            )


def top_k(op: str, value: int) -> None:
    """``value`` is a usable number of experts per token."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ConfigError("top_k", got=value, expected=f"an int (moefy.{op})")
    if value < 1:
        raise ConfigError("top_k", got=value, expected=f"top_k >= 1 (moefy.{op})")


def num_experts(op: str, value: int) -> None:
    """``value`` is a usable number of experts."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise ConfigError("num_experts", got=value, expected=f"an int (moefy.{op})")
    if value < 1:
        raise ConfigError("num_experts", got=value, expected=f"num_experts >= 1 (moefy.{op})")


def bounds(op: str, offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """``(first, end)`` row of every expert, read from ``offsets`` and checked against ``rows``.

    Called by kernels, not by wrappers: it reads data. On CUDA that waits for the device.
    """
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not start <= end <= rows:
            raise RoutingError(
                f"moefy.{op}: offsets[{e}] is out of order; got {end}; expected {start} <= end <= rows = {rows}"
            )
    return list(zip(starts, ends, strict=True))


def slots(op: str, order: Tensor) -> Tensor:
    """``order`` itself when on CPU every entry is a slot in ``[0, N)``. CUDA is not read: no wait there."""
    if order.device.type == "cpu" and order.numel():
        low, high = (int(v) for v in order.aminmax())
        if low < 0 or high >= order.numel():
            raise RoutingError(
                f"moefy.{op}: order has an entry that is no slot; got range [{low}, {high}]; "
                f"expected a permutation of 0..{order.numel() - 1}"
            )
    return order
