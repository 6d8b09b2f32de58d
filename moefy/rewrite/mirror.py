"""Give an ``MoE`` the tree of the module that it replaces, with stacked experts in the place of its dense weights.

One walk over the old tree decides for each module:

    it holds no stacked weight                      ->  the very same module is mounted
    it is a linear: weight and bias, both stacked   ->  an ``ExpertLinear`` of these
    it holds stacked weights and more               ->  a plain container; its tensors are mounted one by one

Contract: paths stay as they were, so that the body's ``get_attr`` and ``call_module`` targets still resolve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from moefy.errors import NameClash
from moefy.model.paths import below, join
from moefy.nn import ExpertLinear

LinearT = TypeVar("LinearT", bound=ExpertLinear)


def mirror(old: nn.Module, new: nn.Module, stacked: Mapping[str, nn.Parameter], layer: str) -> None:
    """Mount on ``new`` what ``old`` holds.

    Args:
        old: the dense module, which is only read.
        new: the module in its place.
        stacked: the experts' parameters by the path of the dense ones below ``old``.
        layer: the layer's name, for errors.

    Raises:
        NameClash: ``new`` has one of the names already.
    """
    _Mirror(stacked, layer).fill(old, new, "")


class _Mirror:
    def __init__(self, stacked: Mapping[str, nn.Parameter], layer: str) -> None:
        self.stacked, self.layer = stacked, layer
        self.made: dict[int, nn.Module] = {}  # a child with two names stays one module

    def fill(self, old: nn.Module, new: nn.Module, path: str) -> None:
        """Mount the tensors and the children of ``old``, which lies at ``path``, on ``new``."""
        for name, value, persistent in _tensors(old):
            self._refuse_clash(new, name)
            value = self.stacked.get(join(path, name), value)
            if isinstance(value, nn.Parameter):
                new.register_parameter(name, value)
            else:
                new.register_buffer(name, value, persistent=persistent)
        for name, child in old._modules.items():
            if child is not None:
                self._refuse_clash(new, name)
                new.add_module(name, self._twin(child, join(path, name)))

    def _twin(self, old: nn.Module, path: str) -> nn.Module:
        """What stands at ``path`` in the new tree."""
        if id(old) not in self.made:
            inside = [name for name in self.stacked if below(name, path)]
            if not inside:
                return old
            if _is_linear(old, path, inside):
                self.made[id(old)] = self._linear(old, path)
            else:
                self.made[id(old)] = nn.Module()
                self.fill(old, self.made[id(old)], path)
        return self.made[id(old)]

    def _linear(self, old: nn.Module, path: str) -> nn.Module:
        weight, bias = self.stacked[f"{path}.weight"], self.stacked.get(f"{path}.bias")
        return expert_linear(ExpertLinear, weight, bias).train(old.training)

    def _refuse_clash(self, new: nn.Module, name: str) -> None:
        if hasattr(new, name):
            raise NameClash(self.layer, name)


def expert_linear(
    cls: type[LinearT], weight: nn.Parameter, bias: nn.Parameter | None, **options: Any
) -> LinearT:
    """A stacked linear of class ``cls`` that holds these parameters, ``[E, out, in]`` and ``[E, out]``."""
    num_experts, out_features, in_features = weight.shape
    made = cls(in_features, out_features, num_experts, bias=bias is not None, device="meta", **options)
    made.weight, made.bias = weight, bias
    return made


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, value and persistence of a module's own parameters and buffers."""
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None:
            yield name, value, name not in module._non_persistent_buffers_set


def _is_linear(module: nn.Module, path: str, stacked: list[str]) -> bool:
    """Whether the module is exactly one linear: its tensors are the stacked weight and bias, and it has no children."""
    own = {join(path, name) for name, _, _ in _tensors(module)}
    allowed = {f"{path}.weight", f"{path}.bias"}
    return not module._modules and f"{path}.weight" in stacked and own == set(stacked) <= allowed
