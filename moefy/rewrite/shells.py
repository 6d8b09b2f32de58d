"""Shells: the dense modules of a rewritten model without their weights, for ``undo``.

Contract: a shell lives in the ``__dict__`` of a module that the rewrite put in, the holder. So it is no child, has no
parameter and no ``state_dict`` entry, and is copied and pickled along. ``origins`` tell of each stacked parameter, by
its path below the holder (below the graph module, for a rewritten graph), where it came from.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from moefy.errors import AlreadyTransformed
from moefy.model.paths import drop_module, put_module, put_parameter, split
from moefy.rewrite.methods import Origin

_KEY = "_moefy_shell"


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


def attach_shell(holder: nn.Module, shell: Shell) -> None:
    """Hang ``shell`` on ``holder``."""
    holder.__dict__[_KEY] = shell


def find_shells(model: nn.Module) -> list[tuple[str, nn.Module, Shell]]:
    """FQN, holder and shell of everything in ``model`` that was rewritten."""
    return [(fqn, m, m.__dict__[_KEY]) for fqn, m in model.named_modules() if _KEY in m.__dict__]


def is_transformed(model: nn.Module) -> bool:
    """Whether anything in ``model`` was rewritten. ``undo`` of a part may have left nothing."""
    return any(_KEY in module.__dict__ for module in model.modules())


def refuse_transformed(model: nn.Module) -> None:
    """Raise ``AlreadyTransformed`` for a model of which anything was rewritten before."""
    for fqn, _, _ in find_shells(model):
        raise AlreadyTransformed(fqn)


def emptied(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape and dtype on the meta device."""
    empty = torch.empty_like(parameter, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def put_graph(model: fx.GraphModule, graph: fx.Graph) -> None:
    """Give ``model`` another graph."""
    model.graph = graph
    model.recompile()
