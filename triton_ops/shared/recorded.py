"""Launches recorded once and replayed with other addresses, for layers so small that the host is what takes the time.

What a launcher of this package does follows from its arguments' shapes, strides, types and alignment, and from whether
tf32 is allowed: which kernels, with which sizes, from where to where. To work that out takes Python longer than a small
layer's kernels take the GPU.

Contract: ``Recorded(function)(tensors, options)`` gives what ``function(tensors, options)`` gives. The second call of a
kind is recorded, from the third on its launches are repeated. ``function`` may allocate with ``torch.empty``, take
views and launch ``launch.Kernel``; a call that does anything else is never replayed. A replay allocates a buffer before
the first launch that uses it and frees it behind the last: it needs no more memory than the call itself. CUDA graphs
can capture one.

    >>> ffn = Recorded(ffn_forward)
    >>> for _ in range(3):
    ...     (out_TD,) = ffn((x_TD, w_up, w_down), ("silu",))
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefy.triton_ops.shared import launch
from moefy.triton_ops.shared.blocks import tf32_allowed

Tensors = Sequence[Any]  # tensors or None, the first a tensor; all on one device
Function = Callable[[Tensors, tuple[Hashable, ...]], tuple[Tensor, ...]]

# Kinds of calls that are remembered, the latest: lengths that never repeat would fill the memory.
MAX_KINDS = 256


class Recorded:
    """``function``, whose launches are replayed from the third call of a kind on."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._tapes: dict[Any, Tape | None] = {}

    def __call__(self, tensors: Tensors, options: tuple[Hashable, ...]) -> tuple[Tensor, ...]:
        """The results of ``function``; ``options`` are all else that its launches depend on."""
        if launch.watched():  # a replay would launch behind the back of a recording
            return self._function(tensors, options)
        kind = _kind(tensors, options)
        tape = self._tapes.get(kind, _UNSEEN)
        if isinstance(tape, Tape):
            return tape.replay(tensors)
        if tape is _ONCE and _RECORDING.acquire(blocking=False):
            try:
                return self._record(kind, tensors, options)
            finally:
                _RECORDING.release()
        if tape is _UNSEEN:
            if len(self._tapes) >= MAX_KINDS:
                self._tapes.pop(next(iter(self._tapes)), None)
            self._tapes[kind] = _ONCE
        return self._function(tensors, options)

    def _record(self, kind: Hashable, tensors: Tensors, options: tuple[Hashable, ...]) -> tuple[Tensor, ...]:
        recorder = _Recorder(tensors)
        with recorder:
            results = self._function(tensors, options)
        self._tapes[kind] = recorder.tape(results)
        return results


_UNSEEN: Any = object()
_ONCE: Any = object()
# One thread at a time: torch's modes restore flags of the process, so that two which overlap would leave one set.
_RECORDING = threading.Lock()


def _kind(tensors: Tensors, options: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """All that the launches may depend on."""
    kind: list[Hashable] = [options, tensors[0].device, tf32_allowed()]
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
        else:
            kind += (tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() & 15)
    return tuple(kind)


@dataclasses.dataclass
class _Launch:
    """One launch. ``places`` and ``tiles`` name, of ``values``, the addresses and the descriptors that hold one.

    Each is ``(index, source, offset)``: so many bytes behind the source-th of all arguments and then all buffers.
    ``begins`` and ``ends`` are known when the recording is over.
    """

    compiled: Any
    grid: launch.Grid
    values: list[Any]
    places: tuple[tuple[int, int, int], ...]
    tiles: tuple[tuple[int, int, int], ...]
    begins: list[int] = dataclasses.field(default_factory=list)  # the buffers that it is the first to use
    ends: list[int] = dataclasses.field(default_factory=list)  # those that nobody needs behind it


@dataclasses.dataclass(frozen=True)
class Tape:
    """The launches of a call, the shape and type of each buffer, and which of these are its results."""

    launches: list[_Launch]
    buffers: list[tuple[tuple[int, ...], torch.dtype]]
    results: list[int]
    device: torch.device

    def replay(self, tensors: Tensors) -> tuple[Tensor, ...]:
        """Repeat all launches on the current stream."""
        at = [0 if t is None else t.data_ptr() for t in tensors]
        first = len(at)
        at += [0] * len(self.buffers)
        alive: list[Any] = [None] * len(self.buffers)
        stream = launch.raw_stream(self.device.index)
        with launch.on_device(tensors[0]):
            for one in self.launches:
                for i in one.begins:
                    alive[i] = self._empty(i)
                    at[first + i] = alive[i].data_ptr()
                values = one.values.copy()
                for i, source, offset in one.places:
                    values[i] = at[source] + offset
                for i, source, offset in one.tiles:
                    values[i] = _moved(values[i], at[source] + offset)
                one.compiled[one.grid](*values, stream=stream)
                for i in one.ends:
                    alive[i] = None
        return tuple(self._empty(i) if alive[i] is None else alive[i] for i in self.results)

    def _empty(self, i: int) -> Tensor:
        shape, dtype = self.buffers[i]
        return torch.empty(shape, dtype=dtype, device=self.device)


class _Address:
    """What a launch reads of a descriptor's tensor."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self._address


def _moved(tiles: Any, address: int) -> Any:
    """A copy of a tensor descriptor that begins elsewhere."""
    found = object.__new__(type(tiles))
    found.__dict__.update(tiles.__dict__)
    found.base = _Address(address, tiles.base.dtype)
    return found


class _Recorder(TorchDispatchMode):
    """Watches one call: what it allocates, what it launches, and whether it does anything else."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self._arguments = [(i, *_span(t)) for i, t in enumerate(tensors) if t is not None and t.numel()]
        self._first = len(tensors)
        self._youngest: dict[int, int] = {}  # the buffer that was last allocated at an address
        self._buffers: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._lives: list[list[int]] = []  # the launches that use a buffer
        self._launches: list[_Launch] = []
        self._device = tensors[0].device
        ends = sorted((start, end) for _, start, end in self._arguments)
        # of two arguments that overlap a launch's address would not say which it means
        self._faithful = all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))

    def __enter__(self) -> Any:
        launch.watch(self.launched)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        launch.watch(None)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self._youngest[result.data_ptr()] = len(self._buffers)
            self._buffers.append((tuple(result.shape), result.dtype))
            self._lives.append([])
            self._faithful &= result.is_contiguous() and result.device == self._device
        elif not (func.is_view and _same_storage(args[0], result)):
            self._faithful = False
        return result

    def launched(self, compiled: Any, grid: launch.Grid, args: Sequence[Any], rest: list[Any]) -> None:
        """To be called for every launch; ``compiled`` is None where it cannot be repeated."""
        if compiled is None:
            self._faithful = False
            return
        values: list[Any] = [*args, *rest]
        places, tiles = [], []
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                values[i] = 0
                if value.numel():
                    places.append((i, *self._place(value)))
            elif hasattr(value, "block_shape"):
                tiles.append((i, *self._place(value.base)))
                values[i] = _moved(value, 0)
        self._launches.append(_Launch(compiled, grid, values, tuple(places), tuple(tiles)))

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """``(source, offset)`` of a tensor."""
        address, start = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        buffer = self._youngest.get(start)
        if buffer is not None:
            self._lives[buffer].append(len(self._launches))
            return self._first + buffer, address - start
        for i, start, end in self._arguments:
            if start <= address < end:
                return i, address - start
        self._faithful = False
        return 0, 0

    def tape(self, results: tuple[Tensor, ...]) -> Tape | None:
        """What to repeat, or None if that would not be the same call."""
        own = [self._result(result) for result in results]
        if not self._faithful or len(set(own)) < len(own):
            return None
        for i, uses in enumerate(self._lives):
            if uses:
                self._launches[uses[0]].begins.append(i)
            if uses and i not in own:
                self._launches[uses[-1]].ends.append(i)
        return Tape(self._launches, self._buffers, own, self._device)

    def _result(self, result: Tensor) -> int:
        """The buffer that is ``result``, all of it."""
        if not result.numel():  # no address, and no launch
            self._buffers.append((tuple(result.shape), result.dtype))
            self._lives.append([])
            return len(self._buffers) - 1
        buffer = self._youngest.get(result.data_ptr(), -1)
        whole = buffer >= 0 and self._buffers[buffer] == (tuple(result.shape), result.dtype)
        self._faithful &= whole and result.is_contiguous() and bool(self._lives[buffer])
        return buffer


def _span(tensor: Tensor) -> tuple[int, int]:
    """The address of the first element and the one behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _same_storage(tensor: Tensor, views: Tensor | Sequence[Tensor]) -> bool:
    """Whether no view is a copy."""
    found = [views] if isinstance(views, Tensor) else views
    return all(v.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for v in found)


_ATEN = torch.ops.aten
_ALLOCATIONS = frozenset((_ATEN.empty.memory_format, _ATEN.new_empty.default, _ATEN.empty_like.default))
