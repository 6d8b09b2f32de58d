"""Build every edit of a plan beside the model, which is only read.

>>> edits = build_edits(model, plan, captured.parts[0].trace)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import fx, nn

from moefy.passes.match import Match
from moefy.passes.trace import Trace
from moefy.records import PassRecord
from moefy.rewrite.edit import Edit
from moefy.rewrite.graph import GraphEdit, build_graph
from moefy.rewrite.index import ModelIndex, dense_weights
from moefy.rewrite.inline import inline_swaps
from moefy.rewrite.owner import owner_swaps
from moefy.rewrite.plan import Plan
from moefy.rewrite.swaps import ModuleEdit

Watch = Callable[..., Iterable[Any]]


def build_edits(model: nn.Module, plan: Plan, trace: Trace, watch: Watch | None = None) -> list[Edit]:
    """The edits of the plan's accepted matches: one for each module form, one for all of a graph.

    Args:
        model: the dense model.
        plan: with a config.
        trace: of ``model``, whose graph a ``GraphModule``'s matches are rewritten in.
        watch: ``watch(matches, "layers", work=elements)`` yields the matches and shows the progress.

    Raises:
        NameClash: a name that the new modules need is taken.
    """
    assert plan.config is not None and plan.method is not None
    of_modules = [match for match in plan.accepted if match.record.form != "graph"]
    of_graph = [match for match in plan.accepted if match.record.form == "graph"]
    index = ModelIndex(model)
    edits: list[Edit] = [build_layer(index, match, plan) for match in _watched(of_modules, plan, watch)]
    if of_graph and isinstance(model, fx.GraphModule):
        edits.append(build_graph(model, of_graph, trace, plan.config, plan.method))
    return edits


def build_layer(index: ModelIndex, match: Match, plan: Plan) -> ModuleEdit:
    """The edit of one FFN whose modules are swapped."""
    assert plan.config is not None and plan.method is not None
    stacked = plan.method.stack(dense_weights(index.model, match))
    swaps = (owner_swaps if match.record.form == "module" else inline_swaps)(
        index, match, plan.config, stacked
    )
    return ModuleEdit(swaps, index.fast_path_flags(match.record.exit), stacked)


def pass_records(edits: Iterable[Edit]) -> tuple[PassRecord, ...]:
    """What the graph passes did that made these edits."""
    return tuple(edit.record for edit in edits if isinstance(edit, GraphEdit))


def _watched(matches: Collection[Match], plan: Plan, watch: Watch | None) -> Iterable[Match]:
    if watch is None:
        return matches
    assert plan.method is not None
    work = sum(plan.method.params_total(match.record) for match in plan.accepted)
    return watch(matches, "layers", work=work)
