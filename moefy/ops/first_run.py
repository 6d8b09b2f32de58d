"""``first_run``: 1 in a forward, 0 where an activation checkpoint runs that forward again inside a backward.

Contract: what a forward adds to a counter it multiplies by this, so that recomputation counts nothing. The question is
asked when the op runs, not when a graph is traced, so that it also holds for a compiled block inside a checkpoint.

    >>> first_run(torch.zeros(3))
    tensor(1)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.ops.library import register


def _kernel(like: Tensor) -> Tensor:
    # The engine's id of the backward that this thread is in; both kinds of checkpoint recompute there.
    recomputed = torch._C._current_graph_task_id() != -1
    return torch.full((), 0 if recomputed else 1, dtype=torch.int64, device=like.device)


def _fake(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)


_op = register("first_run(Tensor like) -> Tensor", kernel=_kernel, fake=_fake)


def first_run(like: Tensor) -> Tensor:
    """A 0-dim int64 tensor on the device of ``like``: 1, or 0 inside a backward."""
    return _op(like.detach())
