"""How a kernel is declared and launched: ``jit`` for device functions, ``kernel`` for what a launcher starts.

Contract: a launcher takes and returns tensors, allocates with ``torch.empty`` and never reads data on the host. It
gives a kernel's run-time arguments by position, its constants and options by keyword:

    >>> with on_device(x):
    ...     _copy_kernel[(programs,)](x, out, width, BLOCK=128, num_warps=4)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# ``triton.jit`` without its types, by which a kernel's constants would have to be ``tl.constexpr`` objects at the call.
jit: Any = triton.jit

Grid = tuple[int, ...]


class Kernel:
    """A jitted kernel that finds what it compiled by a key of its own.

    A small layer is bound by the host: with Triton's own lookup a step of a GPT-2 layer took it 3.7 ms, with this one
    3.1 to 3.4 (19 launches). What specialises a kernel is the type and the alignment of its tensors and descriptors,
    whether an int is 1 or a multiple of 16, and its constants. ``jitted`` is Triton's object, for those who compile
    without launching.
    """

    def __init__(self, function: Callable[..., Any], by: Callable[..., Any] = jit, **options: Any) -> None:
        self.jitted = by(**options)(function) if options else by(function)
        self._interpreted = not isinstance(self.jitted, triton.JITFunction)
        self._compiled: dict[Any, Any] = {}
        self.__name__, self.__module__, self.__doc__ = (
            function.__name__,
            function.__module__,
            function.__doc__,
        )

    @property
    def arg_names(self) -> list[str]:
        """The names of all parameters, in order."""
        return self.jitted.arg_names

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Grid, *args: Any, **constants: Any) -> None:
        if self._interpreted:
            self.jitted[grid](*args, **constants)
            return
        key = (torch.cuda.current_device(), *map(_trait, args), *constants.items())
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.jitted[grid](*args, **constants)
        else:
            names = self.jitted.arg_names[len(args) :]
            compiled[(*grid, 1, 1)[:3]](
                *args, *[constants[name] for name in names], stream=torch.cuda.current_stream().cuda_stream
            )


def _trait(value: Any) -> Any:
    """What Triton specialises a run-time argument on."""
    if type(value) is int:
        return 1 if value == 1 else (value & 15 == 0, value.bit_length() > 31)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if value is None:
        return None
    return value.base.dtype, *value.block_shape


def kernel(
    function: Callable[..., Any] | None = None, *, by: Callable[..., Any] = jit, **options: Any
) -> Any:
    """Declare a kernel; ``by`` is ``triton.jit`` or Gluon's, ``options`` are theirs."""
    if function is None:
        return functools.partial(Kernel, by=by, **options)
    return Kernel(function, by)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The device of ``x`` as the current one, where Triton launches; nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
