"""``Capacity``: how many tokens an expert takes. ``moefy.nn.routing.capacity`` computes with it.

>>> Capacity.of(1.25)
Capacity(factor=1.25, eval_factor=None, rule='megatron', ...)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.config.capacity_rules import CAPACITY_RULES
from moefy.config.fields import from_fields, is_finite, is_int
from moefy.errors import ConfigError, suggest

DROP_POLICIES = ("position", "probability", "batch_prioritized", "random")
SLOT_ORDERS = ("token", "choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many tokens an expert takes, and which tokens lose their seat when more come.

    Without a capacity nothing is dropped.

    Args:
        factor: > 0: the capacity is ``rule(factor)``. 0: exactly the need, so that nothing is dropped. < 0: the need,
            at most ``rule(|factor|)`` (Tutel).
        eval_factor: the factor in evaluation mode; ``None`` is ``factor``.
        rule: the formula, a name of ``moefy.config.CAPACITY_RULES``.
        min_capacity: the least that the rule may give; ``None`` is the rule's own, 4 for "deepspeed" and else 0.
        align: the capacity is rounded up to a multiple of this.
        drop: who is seated first. "position": the slots in their order. "probability": the largest routing weight
            (Megatron-Core's "probs"). "batch_prioritized": tokens by their largest score (V-MoE, Tutel). "random":
            tokens by lot (DeepSpeed's random token selection), in evaluation by position.
        order: the order of slots among tokens of one rank, also where "probability" ties. "token": token by token.
            "choice": all first choices before any second. ``None`` is the rule's own.
        renormalize: the kept weights of a token are scaled up to the sum that all of them had.
        residual: a token that lost all its slots passes through, ``y = x``; else it gets 0. One that kept some gets
            the weighted sum of these, either way.
        experts_per_worker: what "fastmoe_switch" divides by; ``None`` is all experts.
    """

    factor: float = 1.0
    eval_factor: float | None = None
    rule: str = "megatron"
    min_capacity: int | None = None
    align: int = 1
    drop: str = "position"
    order: str | None = None
    renormalize: bool = False
    residual: bool = False
    experts_per_worker: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if not (name == "eval_factor" and value is None) and not is_finite(value):
                raise ConfigError(f"capacity.{name}", got=value, expected="a finite number")
        for name, known in (("rule", tuple(CAPACITY_RULES)), ("drop", DROP_POLICIES), ("order", SLOT_ORDERS)):
            value = getattr(self, name)
            if value not in known and not (name == "order" and value is None):
                expected = f"one of {list(known)}{suggest(str(value), known)}"
                raise ConfigError(f"capacity.{name}", got=value, expected=expected)
        for name, least in (("min_capacity", 0), ("align", 1), ("experts_per_worker", 1)):
            value = getattr(self, name)
            if not (name != "align" and value is None) and not is_int(value, least):
                raise ConfigError(f"capacity.{name}", got=value, expected=f"an int >= {least}")
        for name in ("renormalize", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"capacity.{name}", got=getattr(self, name), expected="True or False")

    @classmethod
    def of(cls, capacity: float | Capacity | None) -> Capacity | None:
        """``capacity`` itself, or the capacity of that factor.

        Raises:
            ConfigError: for anything else.
        """
        if capacity is None or isinstance(capacity, Capacity):
            return capacity
        if not is_finite(capacity):
            raise ConfigError("capacity", got=capacity, expected="a number, a moefy.Capacity or None")
        return cls(factor=capacity)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Capacity:
        """The inverse of ``to_dict``; unknown keys are errors."""
        return from_fields(cls, data)

    @property
    def dropless(self) -> bool:
        """Whether nothing can be dropped, in training and evaluation."""
        return self.factor == 0 and self.eval_factor in (None, 0)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)
