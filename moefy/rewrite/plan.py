"""The plan: which matches are rewritten, by which method, with which routers, and what that comes to in numbers.

Contract: nothing is built and nothing changes. ``find`` and a dry ``report`` end here.

    >>> plan = make_plan(captured.matches, config, include="layers.0.*")
    >>> [(record.fqn, record.action) for record in plan.records]
    [('layers.0.mlp', 'moe'), ('layers.1.mlp', 'skipped')]
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moefy.config import MoEConfig, router_name
from moefy.errors import PatternError
from moefy.model.paths import count_parameters
from moefy.nn import Router
from moefy.nn.routers import configured_router
from moefy.passes.match import Match
from moefy.records import NOT_EXACT, FFNMatch, LayerRecord, Selection
from moefy.rewrite.methods import Method, method_of


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is to be rewritten.

    Attributes:
        matches: every candidate. Those that ``include`` and ``exclude`` leave out are refused ones.
        records: what becomes of each, in the same order.
        config: how; ``None`` when FFNs are only looked for.
        method: how experts are made; ``None`` without a config.
        warnings: what the user should know, one sentence each.
    """

    matches: tuple[Match, ...]
    records: tuple[LayerRecord, ...]
    config: MoEConfig | None
    method: Method | None
    warnings: tuple[str, ...]

    @property
    def accepted(self) -> tuple[Match, ...]:
        """The matches that are rewritten."""
        return tuple(match for match in self.matches if match.record.accepted)

    def finish(self, weights: Mapping[str, Tensor]) -> None:
        """The method's last change of one edit's experts, after the check."""
        if self.method is not None:
            self.method.finish(weights)


def make_plan(
    matches: Sequence[Match],
    config: MoEConfig | None,
    include: Selection = None,
    exclude: Selection = None,
) -> Plan:
    """Plan the rewrite of ``matches``.

    Raises:
        PatternError: a glob of ``include`` or ``exclude`` that matches no candidate.
        ConfigError, UnknownOption: a router that no layer of these sizes can have.
    """
    chosen = tuple(select(matches, include, exclude))
    if config is None:
        return Plan(chosen, tuple(_found(match.record) for match in chosen), None, None, ())
    method = method_of(config)
    routers = [_router(match.record, config) if match.record.accepted else None for match in chosen]
    records = tuple(
        _found(match.record) if router is None else _planned(match.record, config, method, router)
        for match, router in zip(chosen, routers, strict=True)
    )
    built = [router for router in routers if router is not None]
    return Plan(chosen, records, config, method, _warnings(config, method, built))


def select(matches: Sequence[Match], include: Selection, exclude: Selection) -> list[Match]:
    """All matches, those that ``include`` and ``exclude`` leave out as refused.

    Raises:
        PatternError: a glob that matches no candidate.
    """
    keep = _predicate(matches, include, "include") if include is not None else lambda record: True
    drop = _predicate(matches, exclude, "exclude") if exclude is not None else lambda record: False
    chosen = []
    for match in matches:
        if match.record.accepted and drop(match.record):
            match = match.refused("excluded", "left out by exclude")
        elif match.record.accepted and not keep(match.record):
            match = match.refused("excluded", "left out by include")
        chosen.append(match)
    return chosen


def _predicate(matches: Sequence[Match], selection: Selection, option: str) -> Callable[[FFNMatch], bool]:
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else list(selection or ())
    names = [match.record.fqn for match in matches]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PatternError(repr(pattern), names, option=option)
        if not fnmatch.filter(names, pattern):
            raise PatternError(pattern, names, option=option)
    return lambda record: any(fnmatch.fnmatchcase(record.fqn, p) for p in patterns)


def _router(match: FFNMatch, config: MoEConfig) -> Router:
    """The router that the layer will have, on the meta device: to be counted and asked."""
    place = match.fqn if match.form == "module" else match.entries[0]
    return configured_router(config, match.d_model, place, torch.empty(0, device="meta"))


def _planned(match: FFNMatch, config: MoEConfig, method: Method, router: Router) -> LayerRecord:
    """A layer that becomes an MoE. FLOPs are per token and forward: 2 per multiply-add, the router included."""
    scorer = count_parameters(router)
    return dataclasses.replace(
        _found(match),
        num_experts=config.num_experts,
        top_k=config.experts_per_token,
        params_total=method.params_total(match) + scorer,
        params_active=method.params_active(match) + scorer,
        flops_active=2 * match.calls * (method.multiply_adds_active(match) + scorer),
        exactness=method.exactness if router.departure() is None else NOT_EXACT,
    )


def _found(match: FFNMatch) -> LayerRecord:
    """A candidate as it stands: refused, or found while nobody says how to rewrite it."""
    flops = 2 * match.multiply_adds * match.calls
    return LayerRecord(
        fqn=match.fqn,
        action="moe" if match.accepted else "skipped",
        reason=match.reason,
        code=match.code,
        kind=match.kind,
        activation=match.activation,
        form=match.form,
        d_model=match.d_model,
        d_hidden=match.d_hidden,
        num_experts=0,
        top_k=0,
        calls=match.calls,
        params_dense=match.params,
        params_total=match.params,
        params_active=match.params,
        flops_dense=flops,
        flops_active=flops,
        exactness="-",
    )


def _warnings(config: MoEConfig, method: Method, routers: Sequence[Router]) -> tuple[str, ...]:
    reasons = dict.fromkeys(router.departure() for router in routers)
    departures = [reason for reason in reasons if reason is not None]
    if departures:
        name, why = router_name(config.router), "; ".join(departures)
        return (f"router {name!r}: {why}, so the output differs from the dense model's from the start",)
    warning = method.warning() if routers else None
    return () if warning is None else (warning,)
