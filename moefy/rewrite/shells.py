"""Shells: the dense modules of a rewritten model without their weights, for ``undo``.

A shell hangs on its holder, the module that took the dense one's place (``moefy.model.shells``). ``origins`` say of
each stacked parameter where it came from, by its path below the holder, or below the graph module of a rewritten graph.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from moefy.model.paths import drop_module, put_module, put_parameter, split
from moefy.model.shells import find_shells
from moefy.rewrite.methods import Origin


@dataclasses.dataclass(eq=False)
class ModuleShell:
    """One module that was swapped out.

    Attributes:
        module: the dense module, its stacked weights on the meta device.
        origins: by path below the module.
        flags: ``(module, attribute, value)`` to restore: fused paths that the experts do not fit.
    """

    module: nn.Module
    origins: dict[str, Origin]
    flags: list[tuple[nn.Module, str, Any]]

    def weights_of(self, root: nn.Module, holder: nn.Module) -> nn.Module:
        """The module that ``origins`` count from."""
        return holder

    def restore(self, root: nn.Module, holder: nn.Module, dense: Mapping[str, nn.Parameter]) -> None:
        """Put the dense module, filled with ``dense``, wherever ``holder`` is registered."""
        for path, parameter in dense.items():
            put_parameter(self.module, path, parameter)
        self.module.train(holder.training)
        for name in [n for n, m in root.named_modules(remove_duplicate=False) if m is holder]:
            put_module(root, name, self.module)

    def restore_flags(self) -> None:
        """Allow the fused paths again, except in an encoder that still holds experts."""
        for owner, attribute, value in self.flags:
            if not find_shells(owner):
                setattr(owner, attribute, value)


@dataclasses.dataclass(eq=False)
class GraphShell:
    """A caller's graph that was rewritten; its holder is the first new router.

    Attributes:
        graph: the caller's. ``None`` after a pickle, which keeps code and no graphs: then there is no way back.
        modules: the modules that were swapped out, by path.
        routers: the paths of the routers that were added.
        origins: by path below the graph module.
    """

    graph: fx.Graph | None
    modules: dict[str, nn.Module]
    routers: tuple[str, ...]
    origins: dict[str, Origin]

    def weights_of(self, root: nn.Module, holder: nn.Module) -> nn.Module:
        """The rewritten graph module, which ``origins`` count from."""
        path = next(name for name, module in root.named_modules() if module is holder)
        return root.get_submodule(path.removesuffix(self.routers[0]).rstrip("."))

    def restore(self, root: nn.Module, holder: nn.Module, dense: Mapping[str, nn.Parameter]) -> None:
        """Give the graph module its own graph and ``dense`` back."""
        model = self.weights_of(root, holder)
        assert isinstance(model, fx.GraphModule) and self.graph is not None
        for path in self.routers:
            drop_module(model, path)
        for fqn, parameter in dense.items():
            path, name = split(fqn)
            if path in self.modules:
                self.modules[path]._parameters[name] = parameter
            else:
                put_parameter(model, fqn, parameter)
        for path, module in self.modules.items():
            put_module(model, path, module)
        put_graph(model, self.graph)

    def restore_flags(self) -> None:
        """A graph has none."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "graph": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphShell:
        return GraphShell(self.graph, copy.deepcopy(self.modules, memo), self.routers, self.origins)


Shell = ModuleShell | GraphShell


def emptied(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and dtype on the meta device."""
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def put_graph(model: fx.GraphModule, graph: fx.Graph) -> None:
    """Give ``model`` another graph."""
    model.graph = graph
    model.recompile()
