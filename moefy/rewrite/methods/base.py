"""What an upcycling method is: how the weights of one dense FFN become stacked experts, and what can be undone.

A method is a class with a name, in a file of its own, and one line in ``methods/__init__.py``:

    class Copy(Method):
        name, exactness = "copy", "exact"
        def stack(self, dense, num_experts): ...

The stages ask it. ``plan`` asks for the counts of parameters and for a warning, ``build`` for the stacked weights,
``undo`` for a dense weight. ``finish`` runs after the exactness check and while a failure can still be rolled back.

Shape letters: E experts.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from moefy.config import MoEConfig
from moefy.records import FFNMatch

Stored = Literal["out_in", "in_out", "conv", "bias"]
"""How a dense weight lies in memory: ``nn.Linear`` [out, in], ``Conv1D`` [in, out], 1x1 convolution [out, in, 1, 1]."""

Exactness = Literal["exact", "exact-at-init", "exact-if-all-active", "approximate"]
"""How near the MoE is to the dense FFN before ``finish``: for any router whose weights sum to 1; for the router as it
starts; when every expert is active; or only by what the check measures."""


@dataclasses.dataclass(frozen=True, eq=False)
class DenseWeight:
    """One parameter of a dense FFN.

    Attributes:
        fqn: its name in the model.
        parameter: the tensor.
        stored: how it lies in memory.
    """

    fqn: str
    parameter: nn.Parameter
    stored: Stored


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a stacked parameter comes from; what ``undo`` needs of the dense one.

    Attributes:
        method: the name of the method that stacked it.
        stored: how the dense parameter lay in memory.
        shape: the dense parameter's shape.
        requires_grad: whether the dense parameter was trained.
        fingerprint: of what the method compares to tell whether experts were trained; ``None`` without data.
    """

    method: str
    stored: Stored
    shape: tuple[int, ...]
    requires_grad: bool
    fingerprint: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """The experts' parameter ``[E, out, in]``, or ``[E, out]`` for a bias, and where it comes from."""

    parameter: nn.Parameter
    origin: Origin


class Method(abc.ABC):
    """Base of the upcycling methods; made for one ``MoEConfig``."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]

    def __init__(self, config: MoEConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def stack(self, dense: Iterable[DenseWeight]) -> dict[str, Stacked]:
        """The stacked weights of one FFN by the FQNs of its dense ones, on their devices and in their dtypes."""

    def finish(self, stacked: Mapping[str, Tensor]) -> None:
        """Change the stacked weights of one FFN, by FQN and in place, after the check. By default nothing."""
        return

    def params_total(self, match: FFNMatch) -> int:
        """Elements of all experts of one FFN."""
        return match.params * self.config.num_experts

    def params_active(self, match: FFNMatch) -> int:
        """Elements of the experts that one token passes."""
        return match.params * self.config.experts_per_token

    def multiply_adds_active(self, match: FFNMatch) -> int:
        """Multiply-adds of the experts that one token passes, in one call."""
        return match.multiply_adds * self.config.experts_per_token

    def warning(self) -> str | None:
        """What the user should know of a model made this way: one sentence, or ``None``."""
        return None

    @classmethod
    @abc.abstractmethod
    def is_untouched(cls, stacked: Tensor, origin: Origin) -> bool:
        """Whether the dense weight can still be had back from ``stacked``, bit by bit."""

    @classmethod
    @abc.abstractmethod
    def restore(cls, stacked: Tensor, origin: Origin, expert: int) -> Tensor:
        """Expert ``expert``'s weight in the layout and shape of the dense one."""
