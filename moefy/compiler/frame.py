"""What moefy asks of Dynamo's insides while a frame is being compiled: private names live here alone.

Run on torch 2.11, 2.13 and 2.14.

    >>> frame = current_frame()                  # inside a backend
    >>> frame.root, frame.call                   # the module whose forward it is, and its arguments
    (Block(...), ((tensor(...),), {}))
    >>> raise RestartAnalysis                    # trace the frame again, from the start
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo.cache_size import exceeds_recompile_limit
from torch._dynamo.exc import (
    ShortenTraceback,
    TensorifyScalarRestartAnalysis,
    UnspecializeRestartAnalysis,
)
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._pytree import tree_leaves

ErrorType = TypeVar("ErrorType", bound=Exception)
PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class RestartAnalysis(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):
    """Raised from a backend, makes Dynamo trace the frame again.

    The second base passes through every layer that wraps a backend's exceptions; the first makes
    Dynamo clear its log of the last attempt, which modules swapped meanwhile would contradict.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """The Python frame that Dynamo is compiling.

    Attributes:
        code: its code object.
        scope: its local variables at the start.
        root: the module whose forward it is, ``None`` for functions and for the rest of a frame after
            a graph break.
        local: the name under which the frame knows ``root``.
        call: ``(args, kwargs)`` of that forward if they are tensors and plain values, else ``None``.
    """

    code: types.CodeType
    scope: Mapping[str, Any]
    root: nn.Module | None = None
    local: str = ""
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = None


def current_frame() -> Frame | None:
    """The frame, or ``None`` when the backend was not called by Dynamo."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # nothing is being traced
        return None
    assert output.root_tx is not None
    return read_frame(output.root_tx.f_code, output.local_scope)


def read_frame(code: types.CodeType, scope: Mapping[str, Any]) -> Frame:
    """Tell whether ``code`` is the forward of its first local."""
    if not code.co_varnames:
        return Frame(code=code, scope=scope)
    local = code.co_varnames[0]
    root = scope.get(local)
    if not isinstance(root, nn.Module) or code not in _forward_codes(root):
        return Frame(code=code, scope=scope)
    args, kwargs = _arguments(code, scope)
    plain = all(isinstance(v, PLAIN) or type(v) is Tensor for v in tree_leaves((args, kwargs)))
    return Frame(code=code, scope=scope, root=root, local=local, call=(args, kwargs) if plain else None)


def guard_identity(frame: Frame) -> None:
    """Make the entry that is being compiled valid for this very root only.

    Dynamo counts such entries per object: they do not use up the ``recompile_limit`` of other objects
    that run the same code.
    """
    source = LocalSource(frame.local, is_input=True)
    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def unwrapped(error: ErrorType) -> ErrorType:
    """``error`` in a class that Dynamo hands through to the user instead of ``BackendCompilerFailed``."""
    bases: tuple[Any, ...] = (type(error), ShortenTraceback)
    named: Any = type(type(error).__name__, bases, {})
    named.__module__ = type(error).__module__
    copy = named.__new__(named)
    copy.__dict__.update(error.__dict__)
    copy.args, copy.first_useful_frame = error.args, None
    return copy


def on_limit(refuse: Callable[[Frame, str], None]) -> None:
    """Call ``refuse(frame, limit)`` when Dynamo is about to run a frame uncompiled from now on, since
    its code was compiled too often. ``limit`` is the setting that was hit."""

    def hook() -> str:
        compiling = sys._getframe(1)
        while compiling.f_code.co_name != "_compile":  # the set comprehension around the hook
            if compiling.f_back is None:
                return ""
            compiling = compiling.f_back
        values = compiling.f_locals
        exceeded, limit = exceeds_recompile_limit(values["cache_size"], values["compile_id"])
        if exceeded:
            refuse(read_frame(values["code"], values["locals"]), limit)
        return ""

    dynamo: Any = torch._dynamo
    dynamo.register_hook_for_recompile_user_context(hook)


def _forward_codes(module: nn.Module) -> Iterator[types.CodeType]:
    """The code of ``module.forward`` and of what its decorators wrap."""
    for function in _wrapping_chain(module.forward):
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None:
            yield code


def _wrapping_chain(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _arguments(code: types.CodeType, scope: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the frame was called with, its first argument left out."""
    names = list(code.co_varnames)
    positional = names[1 : code.co_argcount]
    end = code.co_argcount + code.co_kwonlyargcount
    kwargs = {name: scope[name] for name in names[code.co_argcount : end]}
    args = tuple(scope[name] for name in positional)
    if code.co_flags & inspect.CO_VARARGS:
        args += tuple(scope[names[end]])
        end += 1
    if code.co_flags & inspect.CO_VARKEYWORDS:
        kwargs.update(scope[names[end]])
    return args, kwargs
