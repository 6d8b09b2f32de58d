"""``undo``: a transformed model back to its dense form.

The modules that ``transform`` replaced were kept as shells without weights. ``undo`` fills each from one expert and
puts it back. Experts start as copies and symmetry breaking leaves expert 0 alone, so until training this is bitwise.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import fx, nn

from moefy.errors import ConfigError, ExpertsDiverged, NotTransformed
from moefy.nn.losses.delivery import withdraw
from moefy.rewrite.graph import GraphShell, restore_graph
from moefy.rewrite.methods.copy import Origin, unstack
from moefy.rewrite.modules import Shell
from moefy.verbs import bare_module

ModelT = TypeVar("ModelT", bound=nn.Module)


def undo(model: ModelT, *, expert: int | None = None) -> ModelT:
    """Give ``model`` its dense FFNs back, in place.

    Args:
        model: what ``transform`` returned, or a copy of it, or what was pickled of it.
        expert: which expert to keep. By default expert 0, which must be as ``transform`` left it.

    Returns:
        ``model``. For a ``GraphModule`` the graph is the caller's own again.

    Raises:
        NotTransformed: there is nothing to undo.
        ExpertsDiverged: experts were trained and none was named.
        ConfigError: no such expert.
    """
    root = bare_module(model)
    shells = _shells(root)
    graphs = _graph_shells(root)
    if not shells and not graphs:
        raise NotTransformed(type(root).__name__)
    for fqn, module in shells:
        _check_expert(fqn, module, module.__dict__["_dense"].origins, expert)
    for owner, shell in graphs:
        _check_expert("", owner, shell.origins, expert)
    for _, module in shells:
        _restore(root, module, module.__dict__["_dense"], expert or 0)
    for _, module in shells:
        _restore_flags(module.__dict__["_dense"])
    for owner, shell in graphs:
        _restore_graph(owner, shell, expert or 0)
    withdraw(root)
    for module in root.modules():
        module.__dict__.pop("_moefy_report", None)
    return model


def _shells(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(fqn, m) for fqn, m in model.named_modules() if isinstance(m.__dict__.get("_dense"), Shell)]


def _graph_shells(model: nn.Module) -> list[tuple[fx.GraphModule, GraphShell]]:
    """Each rewritten graph that can be had back, with its ``GraphModule``: the shell hangs on its first router."""
    found = []
    for fqn, module in model.named_modules():
        shell = module.__dict__.get("_dense_graph")
        if isinstance(shell, GraphShell) and shell.graph is not None:
            owner = model.get_submodule(fqn.removesuffix(shell.routers[0]).rstrip("."))
            assert isinstance(owner, fx.GraphModule)
            found.append((owner, shell))
    return found


def _check_expert(fqn: str, module: nn.Module, origins: dict[str, Origin], expert: int | None) -> None:
    for path, origin in origins.items():
        stacked = module.get_parameter(path)
        count = stacked.shape[0]
        if expert is None:
            if not origin.untouched(stacked):
                raise ExpertsDiverged(f"{fqn}.{path}" if fqn else path, count)
        elif isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < count:
            raise ConfigError("expert", got=expert, expected=f"0 <= expert < {count}")


def _restore(model: nn.Module, module: nn.Module, shell: Shell, expert: int) -> None:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    for full_path, origin in shell.origins.items():
        path, _, name = full_path.rpartition(".")
        dense = _dense(module, full_path, origin, expert)
        shell.module.get_submodule(path)._parameters[name] = dense
    shell.module.train(module.training)
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = shell.module


def _restore_flags(shell: Shell) -> None:
    """Allow the fused paths again, but not in an encoder that still holds experts."""
    for owner, attribute, value in shell.flags:
        if not _shells(owner):
            setattr(owner, attribute, value)


def _restore_graph(model: fx.GraphModule, shell: GraphShell, expert: int) -> None:
    dense: dict[int, nn.Parameter] = {}  # by stacked parameter: what was tied is tied again
    for fqn, origin in shell.origins.items():
        dense.setdefault(id(model.get_parameter(fqn)), _dense(model, fqn, origin, expert))
    restore_graph(model, shell, {fqn: dense[id(model.get_parameter(fqn))] for fqn in shell.origins})


def _dense(module: nn.Module, path: str, origin: Origin, expert: int) -> nn.Parameter:
    """One expert's weight as a dense parameter."""
    stacked = module.get_parameter(path)
    with torch.no_grad():
        return nn.Parameter(unstack(stacked, expert, origin), requires_grad=stacked.requires_grad)
