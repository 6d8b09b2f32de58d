"""One process: what the originals spread over ranks is refused by name.

>>> refuse_ranks("FMoE: world_size", 2)
moefy.errors.ParallelismNeeded: FMoE: world_size: 2 processes; ...
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from moefy.errors import ParallelismNeeded


def refuse_ranks(what: str, size: int) -> None:
    """Raise ``ParallelismNeeded`` for more than one process."""
    if size > 1:
        raise ParallelismNeeded(what, size)


def group_size(group: Any = None) -> int:
    """How many processes share ``group``, which is the world for ``None``; 1 without a process group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size() if group is None else group.size()
