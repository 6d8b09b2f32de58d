"""``undo``: a transformed model back to its dense form.

The modules that ``transform`` replaced were kept as shells without weights. ``undo`` fills each from one expert and puts
it back. Experts start as copies and symmetry breaking leaves expert 0 alone, so until training this is bitwise.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import fx, nn

from moefy.errors import ConfigError, ExpertsDiverged, NotTransformed
from moefy.graph_surgery import GraphShell, restore_graph
from moefy.nn.upcycling import Origin, unstack
from moefy.surgery import Shell
from moefy.upcycle import bare_module

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
    graphs = {
        fqn: s
        for fqn, m in root.named_modules()
        if isinstance(s := m.__dict__.get("_dense_graph"), GraphShell)
    }
    if not shells and not any(shell.graph is not None for shell in graphs.values()):
        raise NotTransformed(type(root).__name__)
    for fqn, module in shells:
        _check_expert(fqn, module, module.__dict__["_dense"].origins, expert)
    for shell in graphs.values():
        _check_expert("", root, shell.origins, expert)
    for _, module in shells:
        _restore(root, module, module.__dict__["_dense"], expert or 0)
    for shell in graphs.values():
        assert isinstance(root, fx.GraphModule)
        dense: dict[int, nn.Parameter] = {}  # by stacked parameter: what was tied is tied again
        for fqn, origin in shell.origins.items():
            dense.setdefault(id(root.get_parameter(fqn)), _dense(root, fqn, origin, expert or 0))
        restore_graph(root, shell, {f: dense[id(root.get_parameter(f))] for f in shell.origins})
    root.__dict__.pop("_moefy_report", None)
    return model


def _shells(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(fqn, m) for fqn, m in model.named_modules() if isinstance(m.__dict__.get("_dense"), Shell)]


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
    for owner, attribute, value in shell.flags:
        setattr(owner, attribute, value)


def _dense(module: nn.Module, path: str, origin: Origin, expert: int) -> nn.Parameter:
    """One expert's weight as a dense parameter."""
    stacked = module.get_parameter(path)
    with torch.no_grad():
        return nn.Parameter(unstack(stacked, expert, origin), requires_grad=stacked.requires_grad)
