"""``noise``: copies that differ from the start, so that the router has a gradient in the first step.

Experts 1 to E-1 get ``noise * std(weight)`` of Gaussian noise added to each weight tensor (``MoEConfig.expert_noise``;
mergekit's ``noise_scale``). The exactness check compares the copies, before the noise.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.nn.seeding import seeded_generator
from moefy.rewrite.methods.copy import Copy


class Noise(Copy):
    """Copies, all but expert 0 with noise. Expert 0 stays the dense FFN bit by bit."""

    name = "noise"

    def finish(self, stacked: Mapping[str, Tensor]) -> None:
        """Add the noise."""
        for fqn, weight in stacked.items():
            add_noise(weight, self.config.expert_noise, self.config.seed, fqn)

    def warning(self) -> str | None:
        """None: the experts differ."""
        return None


def add_noise(stacked: Tensor, noise: float, seed: int, fqn: str) -> None:
    """Add ``noise * std(expert 0)`` of Gaussian noise to experts 1 to E-1 of ``[E, ...]``.

    The noise is drawn on the CPU by a generator that ``seed`` and ``fqn`` seed, so that every rank draws the same.
    """
    if noise == 0 or stacked.shape[0] == 1 or stacked.is_meta:
        return
    generator = seeded_generator(seed, f"{fqn}:noise")
    with torch.no_grad():
        scale = noise * stacked[0].float().std(correction=0)
        for expert in stacked[1:].unbind(0):
            draw = torch.randn(expert.shape, generator=generator)
            expert.add_((draw.to(expert.device) * scale).to(expert.dtype))
