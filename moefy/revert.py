"""``undo``: a transformed model back to its dense form.

The modules that ``transform`` replaced were kept as shells without weights. ``undo`` fills each from one expert and puts
it back. Experts start as copies and symmetry breaking leaves expert 0 alone, so until training this is bitwise.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from moefy.errors import ConfigError, ExpertsDiverged, NotTransformed
from moefy.nn.upcycling import unstack
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
    replaced = [(fqn, m) for fqn, m in root.named_modules() if isinstance(m.__dict__.get("_dense"), Shell)]
    if not replaced:
        raise NotTransformed(type(root).__name__)
    for fqn, module in replaced:
        _check_expert(fqn, module, module.__dict__["_dense"], expert)
    for _, module in replaced:
        _restore(root, module, module.__dict__["_dense"], expert or 0)
    root.__dict__.pop("_moefy_report", None)
    return model


def _check_expert(fqn: str, module: nn.Module, shell: Shell, expert: int | None) -> None:
    for path, origin in shell.origins.items():
        stacked = module.get_parameter(path)
        count = stacked.shape[0]
        if expert is None:
            if not origin.untouched(stacked):
                raise ExpertsDiverged(f"{fqn}.{path}", count)
        elif isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < count:
            raise ConfigError("expert", got=expert, expected=f"0 <= expert < {count}")


def _restore(model: nn.Module, module: nn.Module, shell: Shell, expert: int) -> None:
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is module]
    for full_path, origin in shell.origins.items():
        stacked = module.get_parameter(full_path)
        path, _, name = full_path.rpartition(".")
        with torch.no_grad():
            dense = nn.Parameter(unstack(stacked, expert, origin), requires_grad=stacked.requires_grad)
        shell.module.get_submodule(path)._parameters[name] = dense
    shell.module.train(module.training)
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = shell.module
    for owner, attribute, value in shell.flags:
        setattr(owner, attribute, value)
