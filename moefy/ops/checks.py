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
from moefy.ops.library import AUTOCAST_DEVICES

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_on(device_type: str) -> bool:
    """Whether autocast is active on a kind of device; False where it does not exist ("meta")."""
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


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
    """All GEMM operands share a dtype, or autocast will give them one (it leaves fp64 alone)."""
    for other, value in others.items():
        if value is None or value.dtype == first.dtype:
            continue
        if torch.float64 not in (value.dtype, first.dtype) and autocast_on(first.device.type):
            continue
        raise DtypeError(
            f"moefy.{op}: {other} dtype {value.dtype} != {name} dtype {first.dtype}; "
            f"got {value.dtype}; expected {first.dtype}; cast one of them or use torch.autocast"
        )


def order(op: str, value: Tensor) -> None:
    """``value`` is [T*K] int64."""
    shape(op, "order", value, "[T*K]", 1)
    index(op, "order", value, torch.int64)


def offsets(op: str, name: str, x: Tensor, value: Tensor, num_experts: int) -> None:
    """``value`` is [E] int32 where ``x`` (called ``name``) is."""
    shape(op, "offsets", value, "[E]", 1)
    index(op, "offsets", value, torch.int32)
    size(op, "offsets length", value.shape[0], num_experts, "number of experts")
    same_device(op, name, x, {"offsets": value})


def weight(
    op: str, x_name: str, x: Tensor, w_name: str, weight: Tensor, b_name: str, bias: Tensor | None
) -> None:
    """``weight`` is [E, out, in] and ``bias`` [E, out] or None, of x's dtype and device."""
    shape(op, w_name, weight, "[E, out, in]", 3)
    floating(op, w_name, weight)
    if bias is not None:
        shape(op, b_name, bias, "[E, out]", 2)
        size(op, f"{b_name}.shape[0]", bias.shape[0], weight.shape[0], f"{w_name}.shape[0]")
        size(op, f"{b_name}.shape[1]", bias.shape[1], weight.shape[1], f"{w_name}.shape[1]")
    same_device(op, x_name, x, {w_name: weight, b_name: bias})
    same_dtype(op, x_name, x, {w_name: weight, b_name: bias})


def linear(op: str, x_name: str, x: Tensor, w_name: str, w: Tensor, b_name: str, bias: Tensor | None) -> None:
    """As ``weight``, and its input width is that of ``x``."""
    weight(op, x_name, x, w_name, w, b_name, bias)
    size(op, f"{x_name}.shape[-1]", x.shape[-1], w.shape[2], f"{w_name}.shape[2]")


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


def bounds(op: str, offsets_E: Tensor, rows: int) -> list[tuple[int, int]]:
    """``(first, end)`` row of every expert, read from offsets and checked against ``rows``.

    Called by kernels, not by wrappers: it reads data. On CUDA that waits for the device.
    """
    ends = offsets_E.tolist()
    starts = [0, *ends[:-1]]
    for e, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if not start <= end <= rows:
            raise RoutingError(
                f"moefy.{op}: offsets[{e}] is out of order; got {end}; expected {start} <= end <= rows = {rows}"
            )
    return list(zip(starts, ends, strict=True))


def slots(op: str, order_N: Tensor) -> Tensor:
    """``order`` itself when on CPU every entry is a slot in ``[0, N)``. CUDA is not read: no wait there."""
    if order_N.device.type == "cpu" and order_N.numel():
        low, high = (int(v) for v in order_N.aminmax())
        if low < 0 or high >= order_N.numel():
            raise RoutingError(
                f"moefy.{op}: order has an entry that is no slot; got range [{low}, {high}]; "
                f"expected a permutation of 0..{order_N.numel() - 1}"
            )
    return order_N
