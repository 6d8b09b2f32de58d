"""Which module ran which part of a trace: the calls of registered modules, as a tree.

call 0 (root)  ->  call 1 "layers.0"  ->  call 2 "layers.0.mlp"
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import fx, nn

ROOT_CALL = 0


@dataclasses.dataclass
class ModuleCall:
    """One call of a registered module: nodes with ``start <= seq < end`` ran inside it."""

    fqn: str
    parent: int | None
    start: int
    inputs: list[fx.Node | None]
    has_other_inputs: bool
    kind: str
    end: int = -1
    output: Any = None


class Listener(Protocol):
    """Who is told of module calls. ``enter`` returns what ``leave`` gets back."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> int | None:
        """A call of ``module`` begins."""
        ...

    def leave(self, call: int | None, out: Any) -> None:
        """The call ended with ``out``; with ``None`` when it raised."""
        ...


@contextmanager
def recording_calls(recorder: Listener) -> Iterator[None]:
    """Within the block ``recorder`` is told of every module call (``nn.Module.__call__`` is wrapped, as FX does)."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        index = recorder.enter(module, args, kwargs)
        try:
            out = original(module, *args, **kwargs)
        except BaseException:
            recorder.leave(index, None)
            raise
        recorder.leave(index, out)
        return out

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@functools.cache
def opaque_call(kind: str) -> Callable[..., Any]:
    """What stands for a call of a module of class ``kind`` whose result no torch call made."""

    def opaque(*args: Any) -> Any:
        raise RuntimeError(f"a call of {kind} cannot be replayed")

    opaque.__name__ = opaque.__qualname__ = f"opaque_{kind}"
    return opaque


def qualified_class(module: nn.Module) -> str:
    """The class of ``module`` with its module path, as an identifier."""
    return f"{type(module).__module__}.{type(module).__qualname__}".replace(".", "_")
