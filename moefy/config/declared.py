"""Facts that options need about things above them, by name: balance losses and routers.

A name and its facts are written once, beside the formula or the router; registering there fills a table here. Options
refuse an unknown name when they are made, and yet this room imports nothing above it.

Contract: ``filled_by`` names the module whose import fills the tables, and ``moefy/__init__.py`` calls it. ``known``
imports that module at the first look at a table.

    >>> known(BALANCE)["importance"].counted, known(DEFAULT_TOP_K)["switch"]
    (False, 1)
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import TypeVar

FactsT = TypeVar("FactsT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BalanceFacts:
    """What options have to know of a balance loss.

    Attributes:
        counted: whether the loss counts slots, and so has a global-batch scope.
        after_drops: whether the loss reads the experts after capacity dropped slots (``Routing.top_k_index``), not the
            router's choice.
    """

    counted: bool = True
    after_drops: bool = False


BALANCE: dict[str, BalanceFacts] = {}
"""The balance losses; ``moefy.nn.losses.balance_loss`` adds one."""
DEFAULT_TOP_K: dict[str, int] = {}
"""Each router's K for layers that name none; ``moefy.nn.routers.register_router`` adds one."""
_SOURCES: set[str] = set()


def filled_by(module: str) -> None:
    """Say that importing ``module`` fills the tables."""
    _SOURCES.add(module)


def known(table: dict[str, FactsT]) -> dict[str, FactsT]:
    """``table``, after the import that fills it."""
    for module in _SOURCES:
        importlib.import_module(module)
    return table
