"""``seeded``: parameters drawn from a seed of their own, the global random state left as it was.

    >>> with seeded(3, "experts"):
    ...     layer = nn.Linear(4, 4)          # the same on every rank and in every run

Ranks agree as far as their devices draw alike. Tutel's ``seeds=(shared, local, after)`` set the global generator; here
nothing has to be restored.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def seeded(seed: int | None, name: str, device: Any = None) -> Iterator[None]:
    """Draw from generators seeded by ``seed`` and ``name``; from the global ones when ``seed`` is ``None``.

    Args:
        seed: the seed.
        name: what is drawn, so that parts of a layer differ.
        device: where; the default device otherwise.
    """
    if seed is None:
        yield
        return
    kind = torch.device(device) if device is not None else torch.get_default_device()
    if kind.type == "cuda":
        torch.cuda.init()
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    value = int.from_bytes(digest[:8], "big") >> 1
    with torch.random.fork_rng(cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(value)
        yield
