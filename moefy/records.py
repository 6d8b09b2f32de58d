"""What moefy found and what it did, as plain data: no tensors, no graphs, no modules.

``FFNMatch`` is one candidate that the matcher saw (also a refused one), ``LayerRecord`` what became of it,
``PassRecord`` what one graph pass did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

Kind = Literal["mlp", "glu"]
Action = Literal["moe", "skipped"]
Form = Literal["module", "linears", "graph"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNMatch:
    """One feed-forward candidate of a model.

    ``fqn`` is the owner whose whole forward is the FFN when there is one (``form == "module"``), else the deepest
    module that holds all its linears. ``reason`` is ``None`` when the FFN can be rewritten, else it says why not, and
    ``code`` is the reason's stable short name ("no-residual", "norm-between", ...). ``multiply_adds`` are per token and
    call.
    """

    fqn: str
    entries: tuple[str, ...]
    exit: str
    kind: Kind
    activation: str
    d_model: int
    d_hidden: int
    bias: bool
    form: Form
    calls: int = 1
    params: int = 0
    multiply_adds: int = 0
    reason: str | None = None
    code: str | None = None

    @property
    def accepted(self) -> bool:
        """Whether the FFN can be rewritten."""
        return self.reason is None


Selection = str | Sequence[str] | Callable[[FFNMatch], bool] | None
"""Which candidates are meant: FQN globs, or a predicate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What became of one candidate.

    ``params_dense``, ``params_total`` and ``params_active`` count the layer's weights before, after, and those that one
    token uses. ``flops_dense`` and ``flops_active`` are forward FLOPs per token (2 per multiply-add).
    ``error`` is the relative norm of (MoE - dense) measured by the check, over the whole model's output.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did to one graph. ``preserving`` passes change rounding at most."""

    name: str
    matched: int
    nodes_before: int
    nodes_after: int
    ms: float
    preserving: bool = True
    note: str = ""


def as_json(record: Any) -> dict[str, Any]:
    """A record as a dict of JSON types."""
    return dataclasses.asdict(record)
