"""How a kernel is declared and launched: ``jit`` for device functions, ``kernel`` for what a launcher starts.

Contract: a launcher takes and returns tensors, allocates with ``torch.empty`` and never reads data on the host. It
gives a kernel's run-time arguments by position, its constants and options by keyword:

    >>> with on_device(x):
    ...     _copy_kernel[(programs,)](x, out, width, BLOCK=128, num_warps=4)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# ``triton.jit`` without its types, by which a kernel's constants would have to be ``tl.constexpr`` objects at the call.
jit: Any = triton.jit

# What all kernels are compiled with: products fused with sums. Triton 3.9 warns that later ones will not by themselves.
OPTIONS = {"enable_fp_fusion": True}

Grid = tuple[int, ...]
Watcher = Callable[[Any, Grid, Sequence[Any], list[Any]], None]


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
        watcher = _watching.watcher
        if self._interpreted:
            if watcher is not None:
                watcher(None, grid, args, [])
            self.jitted[grid](*args, **constants)
            return
        device = torch.cuda.current_device()
        traits, values = _specialisation(args)
        key = (device, *traits, *constants, *constants.values())
        found = self._compiled.get(key)
        whole = (*grid, 1, 1)[:3]
        if found is None:
            compiled = self.jitted[grid](*args, **OPTIONS, **constants)
            rest = [constants[name] for name in self.arg_names[len(args) :]]
            self._compiled[key] = compiled, rest
        else:
            compiled, rest = found
            compiled[whole](*values, *rest, stream=raw_stream(device))
        if watcher is not None:
            watcher(compiled, whole, args, rest)


class _Watching(threading.local):
    watcher: Watcher | None = None


_watching = _Watching()


def watch(watcher: Watcher | None) -> None:
    """Have ``watcher`` told of all launches of this thread: what was compiled, the grid, arguments, constants.

    It is told None in place of what was compiled where kernels are interpreted.
    """
    _watching.watcher = watcher


def watched() -> bool:
    """Whether this thread's launches are told to a watcher."""
    return _watching.watcher is not None


def _specialisation(args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """``(traits, values)``: what Triton specialises run-time arguments on, and these with tensors as addresses.

    Given a tensor Triton's launcher asks for its address, then asks the driver whether the address is a device's.
    """
    traits: list[Any] = []
    values: list[Any] = []
    for value in args:
        if type(value) is int:
            traits.append(1 if value == 1 else (value & 15 == 0, value.bit_length() > 31))
        elif isinstance(value, Tensor):
            dtype, value = value.dtype, value.data_ptr()
            traits.append((dtype, value & 15 == 0))
        elif value is None:
            traits.append(None)
        else:
            traits.append((value.base.dtype, *value.block_shape))
        values.append(value)
    return traits, values


def raw_stream(device: int) -> int:
    """The handle of the current stream."""
    active: Any = triton.runtime.driver.active
    return active.get_current_stream(device)


def kernel(
    function: Callable[..., Any] | None = None, *, by: Callable[..., Any] = jit, **options: Any
) -> Any:
    """Declare a kernel; ``by`` is ``triton.jit`` or Gluon's, ``options`` are theirs."""
    if function is None:
        return functools.partial(Kernel, by=by, **options)
    return Kernel(function, by)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The device of ``x`` as the current one, where Triton launches; nothing for the interpreter's CPU tensors."""
    already = not x.is_cuda or x.device.index == torch.cuda.current_device()
    return _NOTHING if already else torch.cuda.device(x.device)


_NOTHING = nullcontext()
