"""``FFNMatch``: one feed-forward candidate that the matcher saw, accepted or refused.

>>> moefy.find(model)[0].fqn, moefy.find(model)[0].activation          # doctest: +SKIP
('layers.0.mlp', 'silu')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

Kind = Literal["mlp", "glu"]
Form = Literal["module", "linears", "graph"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFNMatch:
    """One feed-forward candidate of a model.

    Attributes:
        fqn: name of the module whose whole forward is the FFN (``form == "module"``), else of the deepest module that
            holds all its linears.
        entries: names of the linears that read the FFN's input.
        exit: name of the linear that writes its output.
        kind: ``"mlp"``, or ``"glu"`` with a gate.
        activation: name of the activation.
        d_model: D, the width of a token.
        d_hidden: H, the width between entries and exit.
        bias: whether a linear has a bias.
        form: what a rewrite would replace: the module, its linears in place, or nodes of the caller's graph.
        calls: how often one forward runs the FFN.
        params: elements of its weights and biases.
        multiply_adds: per token and call.
        reason: why the FFN cannot be rewritten, in words; None if it can.
        code: the short stable name of ``reason``: ``"no-residual"``, ``"norm-between"``, ...
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
"""Which candidates to take: FQN globs, or a predicate."""
