"""Which modules of a model a rewrite put in: those that a shell hangs on.

Contract: a shell lives in the ``__dict__`` of the module that the rewrite put in, its holder. So it is no child, has no
parameter and no ``state_dict`` entry, and is copied and pickled along. What a shell is, ``moefy.rewrite.shells`` knows.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moefy.errors import AlreadyTransformed

_KEY = "_moefy_shell"


def attach_shell(holder: nn.Module, shell: Any) -> None:
    """Hang ``shell`` on ``holder``."""
    holder.__dict__[_KEY] = shell


def find_shells(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    """FQN, holder and shell of everything in ``model`` that was rewritten."""
    return [(fqn, m, m.__dict__[_KEY]) for fqn, m in model.named_modules() if _KEY in m.__dict__]


def is_transformed(model: nn.Module) -> bool:
    """Whether anything in ``model`` was rewritten. ``undo`` of every part leaves nothing."""
    return bool(find_shells(model))


def refuse_transformed(model: nn.Module) -> None:
    """Raise ``AlreadyTransformed`` for a model of which anything was rewritten before."""
    for fqn, _, _ in find_shells(model):
        raise AlreadyTransformed(fqn)
