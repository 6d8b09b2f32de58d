"""The arguments of ``expert_ffn`` as one record, which its CPU and its CUDA side read.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows; P = H, or 2H for a merged entry.

    >>> gate_NH, up_NH = halves(torch.tensor([[1.0, 2.0]]), "merged_gate_last")
    >>> gate_NH, up_NH
    (tensor([[2.]]), tensor([[1.]]))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moefy.ops import checks

Bounds = Sequence[tuple[int, int]]
"""First and end row of each expert."""


class FFNArgs(NamedTuple):
    """The arguments of ``expert_ffn`` in schema order."""

    x_TD: Tensor
    weights_TK: Tensor
    order_N: Tensor
    offsets_E: Tensor
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None
    activation: str
    glu: str

    @property
    def saves_acted(self) -> bool:
        """Whether the backward gets the activations beside ``up``, and not a gate's pre-activations.

        To compute them again costs a CPU: on 2 cores tanh-gelu took as long as one of the six products, where these
        are narrow (D=48, H=192). Autograd would save them as well, and the exit's input besides.
        """
        return self.w_gate is None and self.x_TD.device.type == "cpu"

    @property
    def saves_second(self) -> bool:
        """Whether the backward gets a second saved tensor beside ``up``."""
        return self.saves_acted or self.w_gate is not None

    @property
    def saved_features(self) -> int:
        """How many features of a row are saved."""
        return self.w_up.shape[1] + self.saves_second * self.w_down.shape[2]

    def bounds(self, op: str) -> Bounds:
        """First and end row of each expert."""
        return checks.bounds(op, self.offsets_E, self.order_N.shape[0])

    def gate_and_up(self, gate: Tensor | None, up: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(gate or None, up)`` for every GLU form, of the entries' outputs or of buffers for these.

        Args:
            gate: [N, H], the output of a separate gate, else None.
            up: [N, P], the output of the other entry; views of its halves are returned if it is merged.
        """
        return halves(up, self.glu) if self.glu.startswith("merged") else (gate, up)


class Wanted(NamedTuple):
    """Which gradients to compute, in the order of the backward's results."""

    x: bool
    weights: bool
    w_gate: bool
    b_gate: bool
    w_up: bool
    b_up: bool
    w_down: bool
    b_down: bool


def halves(merged_PW: Tensor, glu: str) -> tuple[Tensor, Tensor]:
    """``(gate, up)``, views of a merged entry's output."""
    first_PH, last_PH = merged_PW.chunk(2, dim=1)
    return (first_PH, last_PH) if glu == "merged_gate_first" else (last_PH, first_PH)
