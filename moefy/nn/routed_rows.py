"""``RoutedRows``: rows sorted by expert, as a tensor that carries its exchange through a user's code.

Contract: between the entry and the exit of an FFN lies code that moefy did not write. The entry
returns ``RoutedRows``, each torch function on them returns ``RoutedRows`` with the same mark, and the
exit reads it. The mark is found in args, kwargs and nested containers; rows of two routings never mix.
Only ``__torch_function__`` is overridden: below it the rows are a plain tensor, which is why autograd,
checkpointing, vmap and Dynamo need no special case.

A mark is the ``Exchange`` itself, or inside a compiled frame a ``Ticket`` for it (see ``FFNLink``).

    >>> h = with_mark(rows, exchange)
    >>> mark_of(F.gelu(h)) is exchange
    True
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import get_default_nowrap_functions

from moefy.errors import RoutingError
from moefy.nn.dispatch import Exchange


class Ticket:
    """Stands for one exchange inside a compiled frame; only its identity counts."""


Mark = Exchange | Ticket


class RoutedRows(torch.Tensor):
    """Rows sorted by expert. Make them with ``with_mark``, read the mark with ``mark_of``."""

    moefy_mark: Mark

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on the plain tensors and hand the mark to the tensors it returns."""
        kwargs = kwargs or {}
        if not isinstance(func, BuiltinFunctionType):  # Dynamo 2.11 knows no name of these
            func = OPERATORS.get(getattr(func, "__name__", ""), func)
        mark = find_mark((args, tuple(kwargs.values())))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        # A compiled graph runs as OpOverloads, forward and backward. It was traced on plain tensors:
        # what it returns, gradients above all, must be plain.
        if isinstance(func, OpOverload) or mark is None or func in get_default_nowrap_functions():
            return out
        return rewrap(out, mark)

    def split(self, split_size: Any, dim: int = 0) -> Any:  # type: ignore[override]
        """``torch.split``, since Dynamo cannot call on a subclass what ``torch.Tensor`` defines in Python."""
        if torch.compiler.is_dynamo_compiling():
            return torch.split(self, split_size, dim)
        return super().split(split_size, dim)

    def unflatten(self, dim: Any, sizes: Any) -> Any:  # type: ignore[override]
        """``torch.unflatten``, for the same reason as ``split``."""
        if torch.compiler.is_dynamo_compiling():
            return torch.unflatten(self, dim, sizes)
        return super().unflatten(dim, sizes)


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


def with_mark(rows: torch.Tensor, mark: Mark) -> RoutedRows:
    """``rows`` as ``RoutedRows`` that carry ``mark``; a view of the same tensor."""
    admit_to_compiled_frames()
    routed = rows.as_subclass(RoutedRows)
    routed.moefy_mark = mark
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


def mark_of(rows: Any) -> Mark | None:
    """The mark that ``rows`` carry; ``None`` for a tensor that carries none."""
    return getattr(rows, "moefy_mark", None) if isinstance(rows, RoutedRows) else None


def find_mark(value: Any, found: Mark | None = None) -> Mark | None:
    """The one mark inside nested tuples, lists and dicts.

    Raises:
        RoutingError: when two rows carry different ones.
    """
    if isinstance(value, RoutedRows):
        mark = mark_of(value)
        if found is not None and mark is not None and mark is not found:
            raise RoutingError(
                "rows of two different routings met in one operation. Two FFNs were mixed, or the "
                "entries of one FFN were called on different tensors"
            )
        return found if mark is None else mark
    if isinstance(value, (tuple, list)):
        for item in value:
            found = find_mark(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            found = find_mark(item, found)
    return found


def rewrap(out: Any, mark: Mark) -> Any:
    """``out`` with each tensor inside as ``RoutedRows``; in-place results stay the object they are."""
    if isinstance(out, torch.Tensor):
        return out if mark_of(out) is not None else with_mark(out, mark)
    if isinstance(out, tuple):
        items = [rewrap(item, mark) for item in out]
        return type(out)(*items) if hasattr(out, "_fields") else tuple_like(out, items)
    if isinstance(out, list):
        return [rewrap(item, mark) for item in out]
    return out


def tuple_like(out: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    """``items`` as the kind of tuple ``out`` is: ``torch.return_types`` take one sequence."""
    return tuple(items) if type(out) in (tuple, torch.Size) else type(out)(items)  # type: ignore[call-arg]
