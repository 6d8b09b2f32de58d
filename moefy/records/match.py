"""``FFNMatch``: one feed-forward candidate that the matcher saw, accepted or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

Kind = Literal["mlp", "glu"]
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
