"""Parameters drawn from a seed of their own; the global random state stays as it was.

    >>> with seeded(3, "experts"):
    ...     layer = nn.Linear(4, 4)          # the same on every rank and in every run

Ranks of one kind of device draw the same values. Tutel's ``seeds=(shared, local, after)`` set the global generator;
here it is untouched.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch


def seed_of(seed: int, name: str) -> int:
    """A seed that depends on ``seed`` and ``name`` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU with that seed."""
    return torch.Generator(device="cpu").manual_seed(seed_of(seed, name))


@contextlib.contextmanager
def seeded(seed: int | None, name: str, device: Any = None) -> Iterator[None]:
    """Draw from generators seeded by ``seed`` and ``name``; from the global ones when ``seed`` is ``None``.

    Args:
        seed: the seed.
        name: of the parameters, so that parts of a layer differ.
        device: the device to draw on; by default torch's default device.
    """
    if seed is None:
        yield
        return
    kind = torch.device(device) if device is not None else torch.get_default_device()
    if kind.type == "cuda":
        torch.cuda.init()
    cuda = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    value = seed_of(seed, name)
    with torch.random.fork_rng(cuda):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in cuda)):
            generator.manual_seed(value)
        yield
