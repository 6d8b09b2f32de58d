"""The linears of an FFN inside a larger forward are swapped in place, for ``EntryLinear``s and an ``ExitLinear``.

The code between them stays the user's: ``fc2(gelu(fc1(x)))`` runs as written, on rows sorted by expert.

Contract: the model is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefy.config import MoEConfig
from moefy.nn import EntryLinear, ExitLinear, ExpertLinear, FFNLink, Router
from moefy.nn.routers import configured_router
from moefy.passes.match import Match
from moefy.passes.match.linears import LinearSite
from moefy.rewrite.index import ModelIndex, refuse_router_clash
from moefy.rewrite.methods import Stacked
from moefy.rewrite.mirror import expert_linear
from moefy.rewrite.swaps import Swap


def inline_swaps(
    index: ModelIndex, match: Match, config: MoEConfig, stacked: Mapping[str, Stacked]
) -> list[Swap]:
    """One swap for each linear; the first entry holds the router.

    Raises:
        NameClash: the first entry has a ``router`` already.
    """
    region = match.region
    common: dict[str, Any] = {"feature_dim": region.feature_dim, "link": FFNLink(match.record.fqn)}

    def swap(cls: type[ExpertLinear], site: LinearSite, **options: Any) -> Swap:
        old = index.model.get_submodule(site.name)
        bias = stacked[site.bias].parameter if site.bias is not None else None
        new = expert_linear(cls, stacked[site.weight].parameter, bias, **common, **options)
        return Swap(index.names_of(old), old, new.train(old.training))

    entries = [
        swap(EntryLinear, site, index=order, count=len(region.entries), router=router)
        for order, (site, router) in enumerate(
            zip(region.entries, _routers(index, match, config), strict=True)
        )
    ]
    return [*entries, swap(ExitLinear, region.exit)]


def _routers(index: ModelIndex, match: Match, config: MoEConfig) -> list[Router | None]:
    """The leader's router, and none for the entries that follow it."""
    leader, *followers = match.region.entries
    refuse_router_clash(index.model.get_submodule(leader.name), leader.name, match.record.fqn)
    like = index.model.get_parameter(leader.weight)
    return [configured_router(config, leader.in_features, leader.name, like), *[None] * len(followers)]
