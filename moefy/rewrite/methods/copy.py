"""Dense weights to stacked experts and back. Tensors in, tensors out.

``stack`` copies a dense weight E times in ``nn.Linear`` layout, ``unstack`` returns one expert in the dense layout:

    nn.Linear weight [out, in]   Conv1D weight [in, out]   1x1 conv weight [out, in, 1, 1]   ->   [E, out, in]

Copies make the start exact (Sparse Upcycling, Komatsuzaki et al. 2022: with weights that sum to 1 the output is the
dense one). ``add_noise`` breaks the symmetry between them afterwards.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from moefy.nn.seeding import seeded_generator

Stored = Literal["out_in", "in_out", "conv", "bias"]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a stacked parameter comes from: the dense parameter's shape, layout, dtype, and a fingerprint of it."""

    layout: Stored
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    fingerprint: int | None

    @classmethod
    def of(cls, dense: Tensor, layout: Stored, stacked: Tensor) -> Origin:
        """Describe ``dense``, whose copies are ``stacked``."""
        mark = fingerprint(stacked[0])
        return cls(layout, tuple(dense.shape), dense.dtype, dense.requires_grad, mark)

    def untouched(self, stacked_EOI: Tensor) -> bool:
        """Whether expert 0 is still the dense weight, bit by bit, or all experts agree."""
        if fingerprint(stacked_EOI[0]) == self.fingerprint:
            return True
        return all(torch.equal(expert, stacked_EOI[0]) for expert in stacked_EOI[1:].unbind(0))


def stack(dense: Tensor, num_experts: int, layout: Stored) -> nn.Parameter:
    """``[E, out, in]`` (``[E, out]`` for a bias): E copies of ``dense``, on its device, in its dtype."""
    with torch.no_grad():
        weight = _to_linear(dense.detach(), layout)
        shape = (num_experts, *weight.shape)
        copies = torch.empty(shape, dtype=dense.dtype, device=dense.device)
        copies.copy_(weight)
    return nn.Parameter(copies, requires_grad=dense.requires_grad)


def unstack(stacked_EOI: Tensor, expert: int, origin: Origin) -> Tensor:
    """One expert's weight in the dense layout and shape."""
    weight = stacked_EOI.detach()[expert]
    if origin.layout == "in_out":
        weight = weight.t()
    return weight.reshape(origin.shape).clone(memory_format=torch.contiguous_format)


def add_noise(stacked_EOI: Tensor, noise: float, seed: int, fqn: str) -> None:
    """Add ``noise * std(weight)`` of Gaussian noise to experts 1 to E-1; expert 0 stays bitwise.

    Drawn on the CPU from a generator of its own, seeded by seed and FQN: every rank draws the same.
    """
    if noise == 0 or stacked_EOI.shape[0] == 1 or stacked_EOI.is_meta:
        return
    generator = seeded_generator(seed, f"{fqn}:noise")
    with torch.no_grad():
        scale = noise * stacked_EOI[0].float().std(correction=0)
        for expert in stacked_EOI[1:].unbind(0):
            draw = torch.randn(expert.shape, generator=generator)
            expert.add_((draw.to(expert.device) * scale).to(expert.dtype))


def fingerprint(weight: Tensor) -> int | None:
    """A number that changes when any weight does: the sum of the bit patterns. None without data."""
    if weight.is_meta or weight.numel() == 0 or type(weight) not in (Tensor, nn.Parameter):
        return None
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten()
    # In pieces: one sum over all makes an int64 copy of the weight, whose freed pages stayed resident (+13 MB a layer).
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(1 << 16))


def _to_linear(dense: Tensor, layout: Stored) -> Tensor:
    if layout == "in_out":
        return dense.t()
    return dense.flatten(1) if layout == "conv" else dense
