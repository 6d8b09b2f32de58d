"""What every launcher needs around a kernel.

Contract: a launcher takes and returns tensors, allocates with ``torch.empty`` and never reads data on the host.

    >>> with on_device(x):
    ...     kernel[grid](x, out, BLOCK=128)
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

# ``triton.jit`` without its types, by which a kernel's constants would have to be ``tl.constexpr`` objects at the call.
jit: Any = triton.jit


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """The device of ``x`` as the current one, where Triton launches; nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
