"""The registry of balance losses, and the one place where their signature is written.

A balance loss is a formula of the scores and the ``Assignment``. ``@balance_loss`` names the formula and makes the
function that callers see. The facts go to ``moefy.config``, where ``AuxLoss`` refuses a name that does not exist.

    >>> @balance_loss("twice_switch")
    ... def twice_switch(scores_TE, slots):
    ...     "``2 * switch``."
    ...     return 2 * switch.formula(scores_TE, slots)
    >>> moefy.MoE(16, 64, num_experts=4, aux_loss=moefy.AuxLoss(balance="twice_switch"))    # doctest: +SKIP

Shape letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from moefy.config.declared import BALANCE, BalanceFacts
from moefy.errors import ConfigError
from moefy.nn.losses.counting import Assignment, Reduce


class BalanceLoss(Protocol):
    """A balance loss as callers see it. ``formula`` takes the scores and an ``Assignment`` in the place of the rest."""

    __qualname__: str
    formula: Callable[..., Tensor]

    def __call__(
        self,
        scores_TE: Tensor,
        index_TK: Tensor,
        num_experts: int,
        *,
        mask_T: Tensor | None = None,
        reduce: Reduce | None = None,
        offsets_E: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The loss without a weight.

        Args:
            scores_TE: ``[..., T, E]`` what the router gives every expert, a row summing to 1. The gradient flows here.
            index_TK: ``[..., T, K]`` the chosen experts, before capacity drops any. Ids outside ``[0, E)`` are dropped.
            num_experts: E.
            mask_T: ``[..., T]`` bool, True = a token that counts.
            reduce: makes the counts those of a wider scope, such as ``GlobalCounts``.
            offsets_E: ``[..., E]``, the slots of tokens that count sorted by expert (``ops.sort_by_expert``), where the
                caller has them.
            options: further arguments of the formula.

        Returns:
            ``[...]``, one number per batch, in fp32; fp64 for fp64 scores.

        Raises:
            ConfigError: for a ``reduce`` where the loss counts no slots.
        """
        ...


BALANCE_LOSSES: dict[str, BalanceLoss] = {}
"""Every balance loss by name; several names may mean one."""


def balance_loss(
    *names: str, counted: bool = True, after_drops: bool = False
) -> Callable[[Callable[..., Tensor]], BalanceLoss]:
    """Decorator: register a formula ``(scores_TE, slots, **options) -> [...]`` under ``names``.

    Args:
        names: the loss's names in ``AuxLoss(balance=...)``.
        counted: whether the loss counts slots, and so takes ``reduce`` and has a global-batch scope.
        after_drops: whether the loss reads the experts after capacity dropped slots, not the router's choice.

    Raises:
        ConfigError: when another loss has one of the names. Defining the same formula again replaces it.
    """

    def register(formula: Callable[..., Tensor]) -> BalanceLoss:
        for name in names:
            known = BALANCE_LOSSES.get(name, formula)
            if (known.__module__, known.__qualname__) != (formula.__module__, formula.__qualname__):
                expected = f"a name that {known.__qualname__} does not have"
                raise ConfigError("aux_loss.balance", got=name, expected=expected)

        @functools.wraps(formula)
        def loss(
            scores_TE: Tensor,
            index_TK: Tensor,
            num_experts: int,
            *,
            mask_T: Tensor | None = None,
            reduce: Reduce | None = None,
            offsets_E: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            if reduce is not None and not counted:
                others = sorted(name for name, facts in BALANCE.items() if facts.counted)
                expected = f"None: {formula.__name__} counts no slots; {others} do"
                raise ConfigError("reduce", got=reduce, expected=expected)
            slots = Assignment(index_TK, num_experts, mask_T, reduce, offsets_E)
            return formula(scores_TE, slots, **options)

        del loss.__wrapped__  # inspect and help() would show the formula's arguments
        loss.formula = formula  # type: ignore[attr-defined]
        for name in names:
            BALANCE_LOSSES[name] = loss  # type: ignore[assignment]
            BALANCE[name] = BalanceFacts(counted=counted, after_drops=after_drops)
        return loss  # type: ignore[return-value]

    return register
