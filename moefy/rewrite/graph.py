"""``GraphEdit``: a caller's ``GraphModule``. Its parameters become stacked experts, ``ffn_to_moe`` rewrites the nodes.

All FFNs of one graph are one edit, since they share the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from moefy.config import MoEConfig
from moefy.model.paths import drop_module, join, put_module, put_parameter, split
from moefy.model.shells import attach_shell
from moefy.nn import ExpertLinear, Router
from moefy.nn.routers import configured_router
from moefy.passes.match import Match
from moefy.passes.match.linears import LinearSite
from moefy.passes.moe.ffn_to_moe import GraphMatch, ffn_to_moe
from moefy.passes.trace import Trace
from moefy.records import PassRecord
from moefy.rewrite.index import dense_weights, refuse_router_clash
from moefy.rewrite.methods import Method, Stacked
from moefy.rewrite.mirror import expert_linear
from moefy.rewrite.shells import GraphShell, emptied, put_graph


@dataclasses.dataclass(frozen=True, eq=False)
class _Dense:
    """What an edit took out: graph, modules and parameters by path."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]


class GraphEdit:
    """The new graph and, by path, the new modules, parameters and routers: an ``Edit``.

    Args:
        graph: the rewritten graph.
        modules: the modules in the place of the caller's linears.
        parameters: stacked parameters in the place of those that are no module's own.
        routers: the routers, at paths that were free.
        stacked: the experts' weights by the FQNs of the dense ones.
        trace: of the caller's graph; its aliases are the other names of one parameter.
        record: what ``ffn_to_moe`` did.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        parameters: dict[str, nn.Parameter],
        routers: dict[str, Router],
        stacked: Mapping[str, Stacked],
        trace: Trace,
        record: PassRecord,
    ) -> None:
        self.graph, self.modules, self.parameters, self.routers = graph, modules, parameters, routers
        self.stacked, self.trace, self.record = stacked, trace, record
        self.dense: _Dense | None = None

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The stacked parameters by the FQNs of the dense ones."""
        return {fqn: stacked.parameter for fqn, stacked in self.stacked.items()}

    def install(self, model: nn.Module) -> None:
        """Swap graph, modules and parameters in."""
        assert isinstance(model, fx.GraphModule)
        self.dense = _Dense(
            model.graph,
            {path: model.get_submodule(path) for path in self.modules},
            {path: model.get_parameter(path) for path in self.parameters},
        )
        _put(model, {**self.modules, **self.routers}, self.parameters)
        put_graph(model, self.graph)

    def remove(self, model: nn.Module) -> None:
        """Swap the caller's own back in."""
        if self.dense is None:
            return
        assert isinstance(model, fx.GraphModule)
        for path in self.routers:
            parent, name = split(path)
            if name in model.get_submodule(parent)._modules:
                drop_module(model, path)
        _put(model, self.dense.modules, self.dense.parameters)
        put_graph(model, self.dense.graph)

    def seal(self) -> None:
        """Let go of the dense weights; the shell hangs on the first new router."""
        assert self.dense is not None
        for module in self.dense.modules.values():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = emptied(parameter)
        self.dense.parameters.clear()
        origins = {
            name: stacked.origin
            for fqn, stacked in self.stacked.items()
            for name in names_of(self.trace, fqn)
        }
        shell = GraphShell(self.dense.graph, self.dense.modules, tuple(self.routers), origins)
        attach_shell(next(iter(self.routers.values())), shell)


def build_graph(
    model: fx.GraphModule, matches: Sequence[Match], trace: Trace, config: MoEConfig, method: Method
) -> GraphEdit:
    """The rewritten graph and its modules; ``model`` is only read.

    Raises:
        NameClash: the place of a router is taken.
    """
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}
    routers: dict[str, Router] = {}
    stacked: dict[str, Stacked] = {}
    found = []
    for match in matches:
        stacked |= method.stack(dense_weights(model, match))
        for site in (*match.region.entries, match.region.exit):
            if _is_module(model, site):
                modules |= _linear(model, site, trace, stacked)
            else:
                parameters |= _raw(site, trace, stacked)
        place = _place(model, match, routers)
        routers[place] = _router(model, match, config)
        found.append(GraphMatch(match, trace, place))
    graph, record = ffn_to_moe(model.graph, found)
    return GraphEdit(graph, modules, parameters, routers, stacked, trace, record)


def names_of(trace: Trace, fqn: str) -> tuple[str, ...]:
    """Every name under which the graph module holds the parameter ``fqn``."""
    return trace.aliases.get(fqn, (fqn,))


def _is_module(model: fx.GraphModule, site: LinearSite) -> bool:
    """Whether the site's owner is a linear of its own: just these parameters, no children."""
    owner = model.get_submodule(site.owner)
    own = {join(site.owner, name) for name, p in owner._parameters.items() if p is not None}
    wanted = {site.weight, site.bias} - {None}
    plain = wanted <= {f"{site.owner}.weight", f"{site.owner}.bias"}
    return plain and own == wanted and not owner._modules and owner is not model


def _linear(
    model: fx.GraphModule, site: LinearSite, trace: Trace, stacked: Mapping[str, Stacked]
) -> dict[str, nn.Module]:
    """The stacked linear of a site, at every name of its module."""
    bias = stacked[site.bias].parameter if site.bias is not None else None
    new = expert_linear(ExpertLinear, stacked[site.weight].parameter, bias)
    new.training = model.get_submodule(site.owner).training
    return {split(name)[0]: new for name in names_of(trace, site.weight)}


def _raw(site: LinearSite, trace: Trace, stacked: Mapping[str, Stacked]) -> dict[str, nn.Parameter]:
    """The stacked parameters of a site that is no module, at every name of theirs."""
    fqns = [fqn for fqn in (site.weight, site.bias) if fqn is not None]
    return {name: stacked[fqn].parameter for fqn in fqns for name in names_of(trace, fqn)}


def _place(model: fx.GraphModule, match: Match, routers: Mapping[str, Router]) -> str:
    first = match.region.entries[0]
    place = join(first.owner, "router")
    refuse_router_clash(model.get_submodule(first.owner), first.name, match.record.fqn, place in routers)
    return place


def _router(model: fx.GraphModule, match: Match, config: MoEConfig) -> Router:
    first = match.region.entries[0]
    like = model.get_parameter(first.weight)
    return configured_router(config, first.in_features, first.name, like).train(model.training)


def _put(model: nn.Module, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]) -> None:
    for path, module in modules.items():
        put_module(model, path, module)
    for path, parameter in parameters.items():
        put_parameter(model, path, parameter)
