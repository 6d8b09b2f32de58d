"""Undo: fill the shells of a rewritten model from one expert and put them back.

Each stacked parameter knows by its ``Origin`` which upcycling method made it, and that method says whether the dense
weight can still be had bit by bit, and what one expert's weight is in the dense layout.
"""

from __future__ import annotations

import torch
from torch import nn

from moefy.config.fields import is_int
from moefy.errors import ConfigError, ExpertsDiverged, NotTransformed
from moefy.model.paths import join
from moefy.model.shells import find_shells
from moefy.rewrite.methods import METHODS, Origin
from moefy.rewrite.shells import GraphShell, Shell


def restore_dense(root: nn.Module, expert: int | None = None) -> None:
    """Give ``root`` its dense FFNs back, in place.

    Args:
        root: a transformed model, or a copy of one.
        expert: which expert to keep; by default expert 0, which must be as the rewrite left it.

    Raises:
        NotTransformed: there is nothing to restore.
        ExpertsDiverged: experts were trained and none was named.
        ConfigError: no such expert.
    """
    shells = [(fqn, holder, shell) for fqn, holder, shell in find_shells(root) if _can_restore(shell)]
    if not shells:
        raise NotTransformed(type(root).__name__)
    for fqn, holder, shell in shells:
        name = "" if isinstance(shell, GraphShell) else fqn
        _check_expert(name, shell.weights_of(root, holder), shell.origins, expert)
    for _, holder, shell in shells:
        dense = _dense(shell.weights_of(root, holder), shell.origins, expert or 0)
        shell.restore(root, holder, dense)
    for _, _, shell in shells:
        shell.restore_flags()


def _can_restore(shell: Shell) -> bool:
    return not isinstance(shell, GraphShell) or shell.graph is not None


def _check_expert(fqn: str, module: nn.Module, origins: dict[str, Origin], expert: int | None) -> None:
    for path, origin in origins.items():
        stacked = module.get_parameter(path)
        count = stacked.shape[0]
        if expert is None:
            if not METHODS[origin.method].is_untouched(stacked, origin):
                raise ExpertsDiverged(join(fqn, path), count)
        elif not (is_int(expert, 0) and expert < count):
            raise ConfigError("expert", got=expert, expected=f"0 <= expert < {count}")


def _dense(module: nn.Module, origins: dict[str, Origin], expert: int) -> dict[str, nn.Parameter]:
    """One expert's weights as dense parameters, by path. What was tied is tied again."""
    made: dict[int, nn.Parameter] = {}
    dense = {}
    for path, origin in origins.items():
        stacked = module.get_parameter(path)
        if id(stacked) not in made:
            with torch.no_grad():
                weight = METHODS[origin.method].restore(stacked, origin, expert)
            made[id(stacked)] = nn.Parameter(weight, requires_grad=stacked.requires_grad)
        dense[path] = made[id(stacked)]
    return dense
