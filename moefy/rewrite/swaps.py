"""``ModuleEdit``: the modules of one FFN, swapped for others at every name under which they are registered.

owner ``mlp`` (its whole forward is the FFN)    ->  ``MoE``                          (``owner``)
``fc1`` .. ``fc2`` inside a larger forward      ->  ``EntryLinear`` .. ``ExitLinear``  (``inline``)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from moefy.model.paths import below, put_module, put_parameter, relative
from moefy.model.shells import attach_shell
from moefy.rewrite.methods import Stacked
from moefy.rewrite.shells import ModuleShell, emptied


@dataclasses.dataclass(frozen=True, eq=False)
class Swap:
    """One module for another, at every name under which the old one is registered."""

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module


@dataclasses.dataclass(frozen=True, eq=False)
class Flag:
    """An attribute of a module that has to change with the swap (fused fast paths)."""

    module: nn.Module
    name: str
    value: Any
    before: Any


class ModuleEdit:
    """The swaps of one FFN: an ``Edit``.

    Args:
        swaps: the modules.
        flags: attributes of the modules around them.
        stacked: the experts' weights by the FQNs of the dense ones.
    """

    def __init__(self, swaps: Sequence[Swap], flags: Sequence[Flag], stacked: Mapping[str, Stacked]) -> None:
        self.swaps, self.flags, self.stacked = swaps, flags, stacked

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The stacked parameters by the FQNs of the dense ones."""
        return {fqn: stacked.parameter for fqn, stacked in self.stacked.items()}

    def install(self, model: nn.Module) -> None:
        """Swap the new modules in."""
        for swap in self.swaps:
            _put(model, swap.names, swap.new)
        for flag in self.flags:
            setattr(flag.module, flag.name, flag.value)

    def remove(self, model: nn.Module) -> None:
        """Swap the old modules back in."""
        for swap in self.swaps:
            _put(model, swap.names, swap.old)
        for flag in self.flags:
            setattr(flag.module, flag.name, flag.before)

    def seal(self) -> None:
        """Let go of the dense weights; each old module becomes the shell of its new one."""
        flags = [(flag.module, flag.name, flag.before) for flag in self.flags]
        for swap in self.swaps:
            name = swap.names[0]
            origins = {
                relative(fqn, name): stacked.origin
                for fqn, stacked in self.stacked.items()
                if below(fqn, name)
            }
            for path in origins:
                put_parameter(swap.old, path, emptied(swap.old.get_parameter(path)))
            attach_shell(swap.new, ModuleShell(swap.old, origins, flags))
            flags = []


def _put(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        put_module(model, name, module)
