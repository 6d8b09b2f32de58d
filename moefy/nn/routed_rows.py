"""``RoutedRows``: rows sorted by expert, as a tensor that carries its routing through a user's code.

Contract: between the entry and the exit of an FFN lies code that moefy did not write. The entry returns ``RoutedRows``,
each torch function on them returns ``RoutedRows`` with the same ``Routing``, and the exit reads it. The routing is
found in args, kwargs and nested containers; rows of two routings never mix. Only ``__torch_function__`` is overridden:
below it the rows are a plain tensor, which is why autograd, checkpointing, vmap and Dynamo need no special case.

    >>> h = with_routing(rows, routing)
    >>> F.gelu(h).moefy_routing is routing
    True
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from moefy.errors import RoutingError
from moefy.nn.routing import Routing

ATTRIBUTE = "moefy_routing"


class RoutedRows(torch.Tensor):
    """Rows sorted by expert. Make them with ``with_routing``, read the routing with ``routing_of``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the plain tensors and hand the routing to the tensors it returns."""
        kwargs = kwargs or {}
        func = OPERATORS.get(getattr(func, "__name__", ""), func)
        routing = find_routing((args, tuple(kwargs.values())))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if routing is None or func in torch.overrides.get_default_nowrap_functions():
            return out
        return rewrap(out, routing)


def _rpow(x: torch.Tensor, base: Any) -> torch.Tensor:
    return torch.pow(base, x)


def _rdiv(x: torch.Tensor, other: Any) -> torch.Tensor:
    return torch.reciprocal(x) * other


def _rfloordiv(x: torch.Tensor, other: Any) -> torch.Tensor:
    return torch.floor_divide(other, x)


# By name: under Dynamo the operators that torch.Tensor defines in Python cannot be called from
# ``__torch_function__`` and do not hash.
OPERATORS = {
    "pow": torch.pow,  # of Tensor.__pow__ too
    "__rpow__": _rpow,
    "__rsub__": torch.rsub,
    "__rdiv__": _rdiv,
    "__floordiv__": torch.floor_divide,
    "__rfloordiv__": _rfloordiv,
}


def with_routing(rows: torch.Tensor, routing: Routing) -> RoutedRows:
    """``rows`` as ``RoutedRows`` that carry ``routing``."""
    admit_to_compiled_frames()
    routed = rows.as_subclass(RoutedRows)
    routed.moefy_routing = routing  # type: ignore[attr-defined]
    return routed


def admit_to_compiled_frames() -> bool:
    """Let a compiled frame take ``RoutedRows`` as inputs, as it gets them after a graph break.

    torch 2.13 and 2.14 watch the first call of a compiled graph with a mode
    (``_AnalyzeCustomOpInputOutputMode``) that refuses tensor types it does not list, plain
    ``__torch_function__`` subclasses among them: ``TypeError: Multiple dispatch failed``. With the type
    listed, forward and gradients are right. Dynamo runs this function while it traces.
    """
    wrappers = sys.modules.get("torch._functorch._aot_autograd.runtime_wrappers")
    handled = getattr(wrappers, "HANDLED_TYPES", None)
    if wrappers is not None and isinstance(handled, tuple) and RoutedRows not in handled:
        wrappers.HANDLED_TYPES = (*handled, RoutedRows)  # type: ignore[attr-defined]
    return True


# What torch.compiler.assume_constant_result sets; calling that would import torch._dynamo here.
admit_to_compiled_frames._dynamo_marked_constant = True  # type: ignore[attr-defined]


def routing_of(rows: Any) -> Routing | None:
    """The routing that ``rows`` carry, or ``None``."""
    if not isinstance(rows, RoutedRows):
        return None
    return getattr(rows, ATTRIBUTE, None)


def plain(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as a plain tensor."""
    if not isinstance(rows, RoutedRows):
        return rows
    with torch._C.DisableTorchFunctionSubclass():
        return rows.as_subclass(torch.Tensor)


def find_routing(value: Any, found: Routing | None = None) -> Routing | None:
    """The one routing inside nested tuples, lists and dicts.

    Raises:
        RoutingError: when two rows carry different routings.
    """
    if isinstance(value, RoutedRows):
        routing = routing_of(value)
        if found is not None and routing is not None and routing is not found:
            raise RoutingError(
                "rows of two different routings met in one operation. Two FFNs were mixed, or the entries of one FFN "
                "were called on different tensors"
            )
        return found if routing is None else routing
    if isinstance(value, (tuple, list)):
        for item in value:
            found = find_routing(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            found = find_routing(item, found)
    return found


def rewrap(out: Any, routing: Routing) -> Any:
    """``out`` with every tensor inside as ``RoutedRows``; in-place results stay the object they are."""
    if isinstance(out, torch.Tensor):
        return out if routing_of(out) is not None else with_routing(out, routing)
    if isinstance(out, tuple):
        items = [rewrap(item, routing) for item in out]
        return type(out)(*items) if hasattr(out, "_fields") else tuple_like(out, items)
    if isinstance(out, list):
        return [rewrap(item, routing) for item in out]
    return out


def tuple_like(out: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """``items`` as the kind of tuple ``out`` is: ``torch.return_types`` take one sequence."""
    return tuple(items) if type(out) in (tuple, torch.Size) else type(out)(items)  # type: ignore[call-arg]
