"""``KnownBody``: what lies between the entries and the exit of an FFN, when the fused op knows it.

>>> KnownBody("silu", "separate", gate=1)           # up(x), then gate(x): up * silu(gate)
KnownBody(activation='silu', glu='separate', gate=1)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

GLU = Literal["none", "separate", "merged_gate_first", "merged_gate_last"]
GLU_FORMS: tuple[GLU, ...] = ("none", "separate", "merged_gate_first", "merged_gate_last")


@dataclasses.dataclass(frozen=True)
class KnownBody:
    """A body that ``moefy.ops.expert_ffn`` computes.

    Attributes:
        activation: key of ``moefy.ops.ACTIVATIONS``.
        glu: ``"none"``: ``act(h)``. ``"separate"``: ``act(entry[gate]) * entry[1 - gate]``. Merged, one entry of width
            2H with ``a, b = h.chunk(2)``: ``"merged_gate_first"`` is ``act(a) * b``, ``"merged_gate_last"`` is
            ``a * act(b)``.
        gate: which entry is the gate when ``glu == "separate"``, else 0.
    """

    activation: str
    glu: GLU = "none"
    gate: int = 0
