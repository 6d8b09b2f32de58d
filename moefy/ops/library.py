"""Registration of moefy's ops with ``torch.library``: one call per op, so that every op has every part.

Contract: an op has a schema, a fake (shapes only), a kernel for CPU and for CUDA, an autocast and a vmap rule; a
differentiable one also has an autograd formula, whose backward is itself a registered op. Kernels never return
views of their inputs, always return contiguous tensors, and give the same bits for the same inputs.

    >>> double = register("double(Tensor x) -> Tensor", kernel=lambda x: 2 * x, fake=torch.empty_like)
    >>> double(torch.ones(2))
    tensor([2., 2.])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

NAMESPACE = "moefy"
DEVICES = ("CPU", "CUDA")
# Asked once, at import: Dynamo of torch 2.11 cannot trace the question. "meta" has no autocast.
AUTOCAST_DEVICES = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla") if is_autocast_available(kind)
)

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    gemm_args: tuple[str, ...] = (),
) -> torch._ops.OpOverload:
    """Define ``moefy::<schema>`` and return its overload.

    Args:
        schema: name, arguments and returns in torch schema language; positional arguments only.
        kernel: the computation in plain torch, used on the CPU, and on CUDA where there is no other.
        fake: the same signature, returns empty tensors of the right shape, dtype and device.
        cuda: the same by Triton kernels; it imports them when it is called.
        gemm_args: names of the tensor arguments that autocast casts to its dtype. Everything else, routing
            weights above all, keeps its dtype.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel if cuda is None else cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    cast = tuple(a.name in gemm_args for a in overload._schema.arguments)
    for device in DEVICES:
        _LIBRARY.impl(name, _autocast_rule(overload, device, cast), f"Autocast{device}")
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap_rule(overload), lib=_LIBRARY)
    return overload


def differentiable(
    op: torch._ops.OpOverload,
    *,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Give ``op`` its autograd formula. ``setup(ctx, inputs, output)`` saves, ``backward(ctx, *grads)`` answers.

    ``torch.library.register_autograd`` compares every argument with its default in every call, though there are none
    here: a call with 14 arguments took 66 us apart from the kernel, and takes 21 (one core). It also takes tangents for
    constants; here forward mode is refused, as of any autograd function without a ``jvp``.
    """
    function = _function(op, setup, backward)

    def rule(keyset: Any, *args: Any) -> Any:
        backward_mode = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)  # type: ignore[attr-defined]
        if backward_mode or forward_ad._current_level >= 0:
            return function.apply(*args, keyset)
        return _below_autograd(op, keyset, args)

    _LIBRARY.impl(op._schema.name.partition("::")[2], rule, "Autograd", with_keyset=True)


def _function(
    op: torch._ops.OpOverload,
    setup: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """``op`` as an autograd function, whose last argument is the dispatcher's key set."""
    count = len(op._schema.arguments)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        result = _below_autograd(op, keyset, inputs)
        setup(ctx, inputs, result)
        return result

    def backward_of_all(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.needs_input_grad = ctx.needs_input_grad[:count]
        return *backward(ctx, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_all)}
    return type(op._schema.name.replace("::", "_"), (torch.autograd.Function,), members)


def _below_autograd(op: torch._ops.OpOverload, keyset: Any, args: Iterable[Any]) -> Any:
    """What ``op`` has below its autograd formula, with the dispatcher's ``keyset`` of the call."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, on any kind of device."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _autocast_rule(op: torch._ops.OpOverload, device: str, cast: tuple[bool, ...]) -> Callable[..., Any]:
    """Run ``op`` with its GEMM operands in the autocast dtype and autocast off inside.

    ``torch.library.register_autocast`` would cast every floating argument, the fp32 routing weights too. Ops
    without GEMM operands need the rule as well: their kernels call torch ops, which autocast would otherwise cast.
    """
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))
    device_type = device.lower()

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*(_cast(a, dtype) if c else a for a, c in zip(args, cast, strict=True)))

    return rule


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` in ``dtype`` when autocast would cast it: a floating tensor, but never fp64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype is torch.float64 else value.to(dtype)


def _vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """``torch.vmap`` by a loop: routing differs from sample to sample, so there is no batched kernel."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    return rule
