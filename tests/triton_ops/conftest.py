"""What the kernels' tests share: where kernels run, and memory that shows what they wrote.

``tests/conftest.py`` has set ``TRITON_INTERPRET=1`` before triton was imported, where there is no GPU: kernels then run
on CPU tensors. With a GPU they are compiled and run on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moefy.triton_ops.shared import launch

POISON, GUARD_BYTES = 0xA5, 256


@pytest.fixture
def device() -> str:
    """Where kernels run."""
    if torch.cuda.is_available():
        return "cuda"
    assert os.environ.get("TRITON_INTERPRET") == "1", "triton would look for a GPU"
    return "cpu"


@pytest.fixture
def kernel_of(monkeypatch) -> Callable[..., launch.Kernel]:
    """A kernel that launches a stand-in for what Triton has jitted, on device 0 and stream 7."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "raw_stream", lambda device: 7)

    def named():
        """Only its name is used."""

    def make(jitted: object, *, interpreted: bool = False) -> launch.Kernel:
        kernel = launch.Kernel(named)
        kernel.jitted, kernel._interpreted = jitted, interpreted
        return kernel

    return make


class GuardBands(TorchFunctionMode):
    """Every ``torch.empty`` inside is poisoned, with poison on both sides that has to be there still at the end.

    >>> with GuardBands():
    ...     out = launcher(x)
    """

    def __init__(self) -> None:
        super().__init__()
        self.bands: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is not torch.empty:
            return made
        size = made.numel() * made.element_size()
        memory = torch.full((size + 2 * GUARD_BYTES,), POISON, dtype=torch.uint8, device=made.device)
        self.bands += [memory[:GUARD_BYTES], memory[GUARD_BYTES + size :]]
        return memory[GUARD_BYTES : GUARD_BYTES + size].view(made.dtype).view(made.shape)

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None:
            assert self.bands, "nothing was allocated with torch.empty"
            assert all((band == POISON).all() for band in self.bands), "a kernel wrote outside its output"


@pytest.fixture
def guard_bands() -> Callable[[], GuardBands]:
    """``with guard_bands(): ...``."""
    return GuardBands
