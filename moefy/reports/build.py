"""Put a ``RewriteReport`` together from the records of the stages, and keep it on the model.

The report of a transformed model hangs in the ``__dict__`` of its root: no child, no ``state_dict`` entry, and copied
and pickled along.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from moefy.config import MoEConfig, router_name
from moefy.model.compare import Comparison
from moefy.records import NOT_EXACT, LayerRecord, PassRecord
from moefy.reports.rewrite import RewriteReport

_KEY = "_moefy_report"


def make_report(
    model: nn.Module,
    layers: Sequence[LayerRecord],
    config: MoEConfig | None,
    *,
    params_dense: int,
    trace_source: str,
    inputs: str,
    not_run: Sequence[str],
    warnings: Sequence[str],
    dry_run: bool,
    verdict: Comparison | None = None,
    passes: Sequence[PassRecord] = (),
) -> RewriteReport:
    """The report on ``model``.

    Args:
        model: its class, dtype and device are named.
        layers: one record per candidate.
        config: how FFNs are rewritten.
        params_dense: parameters of the whole dense model.
        trace_source: how the graph was obtained.
        inputs: the example inputs in words.
        not_run: FQNs of the modules that no run reached.
        warnings: one sentence each.
        dry_run: whether the model is still dense.
        verdict: what the exactness check measured.
        passes: what graph passes did.
    """
    if config is not None and callable(config.router):  # a name has a JSON form, and pickles
        config = dataclasses.replace(config, router=router_name(config.router))
    records = tuple(layer if verdict is None else _measured(layer, verdict) for layer in layers)
    rewritten = [layer for layer in records if layer.action == "moe"]
    weight = next(model.parameters(), torch.empty(0))
    return RewriteReport(
        model_class=type(model).__name__,
        layers=records,
        config=config,
        dry_run=dry_run,
        params_dense=params_dense,
        params_total=params_dense + sum(x.params_total - x.params_dense for x in rewritten),
        params_active=params_dense + sum(x.params_active - x.params_dense for x in rewritten),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        trace_source=trace_source,
        inputs=inputs,
        check_error=verdict.error if verdict is not None else None,
        check_tolerance=verdict.tolerance if verdict is not None else None,
        passes=tuple(passes),
        unseen=tuple(not_run),
        warnings=tuple(warnings),
    )


def attach_report(model: nn.Module, report: RewriteReport) -> None:
    """Keep ``report`` on ``model``."""
    model.__dict__[_KEY] = report


def attached_report(model: nn.Module) -> RewriteReport | None:
    """The report that hangs on ``model``."""
    return model.__dict__.get(_KEY)


def drop_reports(model: nn.Module) -> None:
    """Take the reports off ``model`` and everything in it."""
    for module in model.modules():
        module.__dict__.pop(_KEY, None)


def _measured(layer: LayerRecord, verdict: Comparison) -> LayerRecord:
    """The layer with the error that the check measured over the whole model's output."""
    if layer.action != "moe" or layer.exactness == NOT_EXACT:
        return layer
    return dataclasses.replace(layer, exactness=f"{layer.exactness} {verdict.error:.0e}")
