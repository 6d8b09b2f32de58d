"""``LayerRecord``: what became of one candidate, in numbers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moefy.records.match import Form, Kind

Action = Literal["moe", "skipped"]
NOT_EXACT = "not exact"
"""``LayerRecord.exactness`` of a layer whose router departs from the dense FFN by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What became of one candidate.

    ``params_dense``, ``params_total`` and ``params_active`` count the layer's weights before, after, and those that one
    token uses. ``flops_dense`` and ``flops_active`` are forward FLOPs per token (2 per multiply-add).
    """

    fqn: str
    action: Action
    reason: str | None
    code: str | None
    kind: Kind
    activation: str
    form: Form
    d_model: int
    d_hidden: int
    num_experts: int
    top_k: int
    calls: int
    params_dense: int
    params_total: int
    params_active: int
    flops_dense: int
    flops_active: int
    exactness: str
