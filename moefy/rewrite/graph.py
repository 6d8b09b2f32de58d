"""Surgery on a caller's ``GraphModule``: parameters become stacked experts, ``ffn_to_moe`` rewrites the nodes.

The same contract as ``surgery``: built beside, installed, removed or sealed.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import fx, nn

from moefy.config import MoEConfig
from moefy.errors import NameClash
from moefy.nn import ExpertLinear, Router
from moefy.nn.routers import configured_router
from moefy.passes.match.linears import LinearSite
from moefy.passes.match.rules import Match
from moefy.passes.moe.ffn_to_moe import GraphMatch, ffn_to_moe
from moefy.passes.trace.recorder import Trace
from moefy.records import PassRecord
from moefy.rewrite.methods.copy import Origin, stack


@dataclasses.dataclass(eq=False)
class GraphShell:
    """What ``undo`` needs: the caller's graph, the replaced modules, and where the stacked weights come from.

    The graph is None after a pickle: then there is no way back.
    """

    graph: fx.Graph | None
    modules: dict[str, nn.Module]
    routers: tuple[str, ...]
    origins: dict[str, Origin]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None}  # a pickled GraphModule keeps code, not graphs

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphShell:
        return GraphShell(self.graph, copy.deepcopy(self.modules, memo), self.routers, self.origins)


@dataclasses.dataclass(eq=False)
class GraphLayer:
    """All FFNs of one graph: the new graph and, by path, the new modules and parameters."""

    graph: fx.Graph
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    routers: dict[str, Router]
    origins: dict[str, Origin]
    before: tuple[fx.Graph, dict[str, nn.Module], dict[str, nn.Parameter]] | None = None

    def install(self, model: nn.Module) -> None:
        """Swap graph, modules and parameters in."""
        assert isinstance(model, fx.GraphModule)
        self.before = (
            model.graph,
            {path: model.get_submodule(path) for path in self.modules},
            {path: model.get_parameter(path) for path in self.parameters},
        )
        _put_modules(model, self.modules)
        _put_parameters(model, self.parameters)
        for path, router in self.routers.items():
            _put_modules(model, {path: router})
        _put_graph(model, self.graph)

    def remove(self, model: nn.Module) -> None:
        """Swap the caller's own back in."""
        if self.before is None:
            return
        assert isinstance(model, fx.GraphModule)
        graph, modules, parameters = self.before
        for path in self.routers:
            _drop_module(model, path)
        _put_modules(model, modules)
        _put_parameters(model, parameters)
        _put_graph(model, graph)

    def seal(self) -> None:
        """Let go of the dense weights; the shell hangs on the first new router."""
        if self.before is None:
            return
        graph, modules, parameters = self.before
        for module in modules.values():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
                    )
        parameters.clear()
        shell = GraphShell(graph, modules, tuple(self.routers), self.origins)
        next(iter(self.routers.values())).__dict__["_dense_graph"] = shell


def build_graph_layer(
    model: fx.GraphModule, matches: list[Match], trace: Trace, config: MoEConfig
) -> tuple[GraphLayer, PassRecord]:
    """The rewritten graph and its modules; ``model`` is only read."""
    modules: dict[str, nn.Module] = {}
    parameters: dict[str, nn.Parameter] = {}
    routers: dict[str, Router] = {}
    origins: dict[str, Origin] = {}
    graph_matches = []
    for match in matches:
        region = match.region
        first = region.entries[0]
        for site in (*region.entries, region.exit):
            _stack_site(model, site, trace, config, modules, parameters, origins)
        place = f"{first.owner}.router" if first.owner else "router"
        if hasattr(model.get_submodule(place.rpartition(".")[0]), "router") or place in routers:
            raise NameClash(first.name, "router", layer=match.record.fqn)
        routers[place] = _router(model, first, config).train(model.training)
        graph_matches.append(GraphMatch(match, trace, place))
    graph, record = ffn_to_moe(model.graph, graph_matches)
    return GraphLayer(graph, modules, parameters, routers, origins), record


def restore_graph(model: fx.GraphModule, shell: GraphShell, dense: dict[str, nn.Parameter]) -> None:
    """Give ``model`` its own graph and ``dense`` parameters (by FQN) back."""
    assert shell.graph is not None
    for path in shell.routers:
        _drop_module(model, path)
    for fqn, parameter in dense.items():
        path, _, name = fqn.rpartition(".")
        if path in shell.modules:
            shell.modules[path]._parameters[name] = parameter
        else:
            _put_parameters(model, {fqn: parameter})
    _put_modules(model, shell.modules)
    _put_graph(model, shell.graph)


def _stack_site(
    model: fx.GraphModule,
    site: LinearSite,
    trace: Trace,
    config: MoEConfig,
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    origins: dict[str, Origin],
) -> None:
    """Stack the site's parameters, at every name under which the graph module holds them."""
    old = model.get_submodule(site.owner)
    own = {n for n, p in old._parameters.items() if p is not None}
    stacked: dict[str, nn.Parameter] = {}
    for fqn, layout in ((site.weight, site.layout), (site.bias, "bias")):
        if fqn is not None:
            dense = model.get_parameter(fqn)
            stacked[fqn] = stack(dense, config.num_experts, layout)  # type: ignore[arg-type]
            origin = Origin.of(dense, layout, stacked[fqn])  # type: ignore[arg-type]
            origins.update(dict.fromkeys(trace.aliases.get(fqn, (fqn,)), origin))
    whole = {f"{site.owner}.{n}" for n in own}
    if whole == set(stacked) and not old._modules and old is not model and own <= {"weight", "bias"}:
        widths = (site.in_features, site.out_features, config.num_experts)
        new = ExpertLinear(*widths, bias=site.bias is not None, device="meta")
        for fqn, parameter in stacked.items():
            setattr(new, fqn.rpartition(".")[2], parameter)
        new.training = old.training
        for alias in trace.aliases.get(site.weight, (site.weight,)):
            modules[alias.rpartition(".")[0]] = new
    else:
        for fqn, parameter in stacked.items():
            parameters.update(dict.fromkeys(trace.aliases.get(fqn, (fqn,)), parameter))


def _router(model: fx.GraphModule, entry: LinearSite, config: MoEConfig) -> Router:
    return configured_router(config, entry.in_features, entry.name, model.get_parameter(entry.weight))


def _put_graph(model: fx.GraphModule, graph: fx.Graph) -> None:
    model.graph = graph
    model.recompile()


def _put_modules(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = module


def _drop_module(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    del model.get_submodule(parent)._modules[name]


def _put_parameters(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for path, parameter in parameters.items():
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._parameters[name] = parameter
