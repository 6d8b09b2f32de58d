"""The capacity formulas of the libraries, by name: how many seats an expert has. Plain arithmetic.

A rule is one entry of ``CAPACITY_RULES``; ``Capacity(rule=...)`` takes its name.

    >>> CAPACITY_RULES["megatron"].formula(1.25, 1024, 2, 8, 8)        # ceil(1024 * 2 / 8 * 1.25)
    320

The letters in the formulas: f factor, t tokens, k experts per token, e experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class CapacityRule:
    """A named capacity formula and what goes with it in its library.

    Attributes:
        formula: ``(factor, tokens, top_k, num_experts, experts_per_worker) -> int`` for a factor > 0.
        order: in which order slots are seated.
        min_capacity: the least capacity.
    """

    formula: Callable[[float, int, int, int, int], int]
    order: str
    min_capacity: int = 0


CAPACITY_RULES: dict[str, CapacityRule] = {
    # ceil(T*K / E * factor); a slot's choice does not matter.
    "megatron": CapacityRule(lambda f, t, k, e, _: math.ceil(t * k / e * f), "token"),
    # max(4, ceil(T / E * K * factor)); second choices queue behind all first ones.
    "deepspeed": CapacityRule(lambda f, t, k, e, _: math.ceil(t / e * (f * k)), "choice", 4),
    # GShard (Lepikhin et al. 2020, section 2.2): K*T / E for factor 1; first choices before second ones (algorithm 1).
    "gshard": CapacityRule(lambda f, t, k, e, _: math.floor(t * k * f / e), "choice"),
    # Switch Transformer (Fedus et al. 2022, equation 3): T / E * factor, whatever K.
    "switch": CapacityRule(lambda f, t, k, e, _: math.floor(t * f / e), "choice"),
    # Tutel: K * int(factor * ceil(T / E)); all first choices before any second.
    "tutel": CapacityRule(lambda f, t, k, e, _: k * math.floor(f * ((t + e - 1) // e)), "choice"),
    # FastMoE has three. Its GShard gate: floor(ceil(factor * T) * K / E), per expert and source rank.
    "fastmoe_gshard": CapacityRule(lambda f, t, k, e, _: math.ceil(f * t) * k // e, "token"),
    # Its Switch gate: ceil(factor * T / experts on this rank).
    "fastmoe_switch": CapacityRule(lambda f, t, k, e, per_worker: math.ceil(f * t / per_worker), "token"),
    # Its DC gate: ceil(factor * T), not divided at all.
    "fastmoe_dc": CapacityRule(lambda f, t, k, e, _: math.ceil(f * t), "token"),
}
