"""``LayerRecord``: what became of one candidate, in numbers.

>>> record.action, record.params_dense, record.params_total           # 8 experts and a router of width 64
('moe', 33088, 265216)
"""

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

    Attributes:
        fqn: name of the module whose whole forward is the FFN, else of the deepest module that holds its linears.
        action: ``"moe"`` for an FFN that is, or would be, rewritten; ``"skipped"`` for one that stays dense.
        reason: why the candidate is skipped, in words; None for ``"moe"``.
        code: the short stable name of ``reason``, such as ``"no-residual"``.
        kind: ``"mlp"``, or ``"glu"`` with a gate.
        activation: name of the activation.
        form: whether a module, a module's linears, or graph nodes are rewritten.
        d_model: D, the width of a token.
        d_hidden: H, the hidden width of an expert.
        num_experts: E; 0 for a skipped candidate, and where no number of experts was asked for.
        top_k: K; 0 likewise.
        calls: how often one forward runs the FFN.
        params_dense: weights of the dense FFN.
        params_total: weights of the layer: all experts and the router.
        params_active: weights that one token uses: K experts and the router.
        flops_dense: forward FLOPs per token of the dense FFN, 2 per multiply-add.
        flops_active: the same of the layer, router included.
        exactness: how near the rewritten model's output is to the dense one, in words.
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
