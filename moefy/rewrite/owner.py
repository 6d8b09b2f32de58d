"""An owner, a module whose whole forward is the FFN, becomes an ``MoE`` under the names of its parameters.

``mlp`` with ``up_proj``, ``act`` and ``down_proj`` becomes

    mlp.router                  new
    mlp.up_proj, mlp.down_proj  ``ExpertLinear`` [E, out, in]
    mlp.act                     the very same module, which all experts share

Contract: the model is only read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn

from moefy.config import MoEConfig
from moefy.model.paths import relative
from moefy.nn import Body, InPlaceMoE, WeightRef
from moefy.nn.routers import configured_router
from moefy.passes.match import Match
from moefy.passes.match.linears import LinearSite
from moefy.rewrite.index import ModelIndex, refuse_router_clash
from moefy.rewrite.methods import Stacked
from moefy.rewrite.mirror import mirror
from moefy.rewrite.swaps import Swap


def owner_swaps(
    index: ModelIndex, match: Match, config: MoEConfig, stacked: Mapping[str, Stacked]
) -> list[Swap]:
    """The owner's ``MoE``.

    Raises:
        NameClash: the router's name, or one that ``MoE`` itself needs, is taken.
    """
    fqn, region = match.record.fqn, match.region
    assert match.body is not None, f"{fqn}: a module match without its body"
    owner = index.model.get_submodule(fqn)
    refuse_router_clash(owner, fqn, fqn)
    like = index.model.get_parameter(region.entries[0].weight)
    moe = InPlaceMoE(
        entries=[_ref(site, fqn) for site in region.entries],
        exit=_ref(region.exit, fqn),
        body=Body.from_graph(match.body, match.known),
        tail=Body.from_graph(match.tail) if match.tail is not None else None,
        router=configured_router(config, region.entries[0].in_features, fqn, like),
        num_experts=config.num_experts,
        feature_dim=region.feature_dim,
        returns="tuple" if match.returns_tuple else "tensor",
        input_name=_input_name(owner),
    )
    mirror(owner, moe, {relative(name, fqn): s.parameter for name, s in stacked.items()}, fqn)
    moe.train(owner.training)
    return [Swap(index.names_of(owner), owner, moe)]


def _ref(site: LinearSite, fqn: str) -> WeightRef:
    bias = relative(site.bias, fqn) if site.bias is not None else None
    return WeightRef(relative(site.weight, fqn), bias)


def _input_name(owner: nn.Module) -> str:
    """The name of the forward's input, for callers that pass it by keyword."""
    try:
        return next(iter(inspect.signature(owner.forward).parameters))
    except (StopIteration, TypeError, ValueError):
        return "x"
