"""``copy``: every expert is the dense FFN.

Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): with routing weights that sum to 1 the output is the dense
one. A dense weight becomes E copies in ``nn.Linear`` layout:

    nn.Linear weight [out, in]   Conv1D weight [in, out]   1x1 conv weight [out, in, 1, 1]   ->   [E, out, in]

Shape letters: E experts, O output width, I input width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moefy.rewrite.methods.base import DenseWeight, Method, Origin, Stacked, Stored

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Copy(Method):
    """E copies. Expert 0 stays the dense FFN bit by bit until it is trained, so ``undo`` gives it back."""

    name = "copy"
    exactness = "exact"

    def stack(self, dense: Iterable[DenseWeight]) -> dict[str, Stacked]:
        """Copies of each weight."""
        return {weight.fqn: self._copies(weight) for weight in dense}

    def _copies(self, weight: DenseWeight) -> Stacked:
        dense = weight.parameter
        stacked = copies(dense, self.config.num_experts, weight.stored)
        mark = fingerprint(stacked[0])
        origin = Origin(self.name, weight.stored, tuple(dense.shape), dense.requires_grad, mark)
        return Stacked(stacked, origin)

    def warning(self) -> str | None:
        """Identical experts have no gradient for the router (README, "Symmetry")."""
        if self.config.num_experts == 1:
            return None
        return (
            "identical experts give the router no gradient until they diverge; "
            "expert_noise=0.01 breaks the symmetry"
        )

    @classmethod
    def is_untouched(cls, stacked: Tensor, origin: Origin) -> bool:
        """Whether expert 0 is still the dense weight, bit by bit, or all experts agree."""
        if fingerprint(stacked[0]) == origin.fingerprint:
            return True
        return all(torch.equal(expert, stacked[0]) for expert in stacked[1:].unbind(0))

    @classmethod
    def restore(cls, stacked: Tensor, origin: Origin, expert: int) -> Tensor:
        """That expert's weight, contiguous."""
        weight_OI = stacked.detach()[expert]
        weight = weight_OI.t() if origin.stored == "in_out" else weight_OI
        return weight.reshape(origin.shape).clone(memory_format=torch.contiguous_format)


def copies(dense: Tensor, num_experts: int, stored: Stored) -> nn.Parameter:
    """``[E, out, in]`` (``[E, out]`` for a bias): E copies of ``dense``, on its device and in its dtype."""
    with torch.no_grad():
        weight = _to_linear(dense.detach(), stored)
        stacked = torch.empty((num_experts, *weight.shape), dtype=dense.dtype, device=dense.device)
        stacked.copy_(weight)
    return nn.Parameter(stacked, requires_grad=dense.requires_grad)


def fingerprint(weight: Tensor) -> int | None:
    """A number that changes when any weight does: the sum of the bit patterns. ``None`` without data."""
    if weight.is_meta or weight.numel() == 0 or type(weight) not in (Tensor, nn.Parameter):
        return None
    bits = weight.detach().contiguous().view(_BITS[weight.element_size()]).flatten()
    # In pieces: one sum over all makes an int64 copy of the weight, whose freed pages stayed resident (+13 MB a layer).
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(1 << 16))


def _to_linear(dense: Tensor, stored: Stored) -> Tensor:
    if stored == "in_out":
        return dense.t()
    return dense.flatten(1) if stored == "conv" else dense
