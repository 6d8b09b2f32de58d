"""What every FFN's rewrite asks of the model: names of modules, fused encoders, dense weights."""

from __future__ import annotations

from torch import nn

from moefy.errors import NameClash
from moefy.model.paths import below
from moefy.passes.match import Match
from moefy.rewrite.methods import DenseWeight
from moefy.rewrite.swaps import Flag


class ModelIndex:
    """Names and fused encoders of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, tuple[str, ...]] = {}
        self.encoders: list[tuple[str, nn.Module]] = []
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)] = (*self.names.get(id(module), ()), name)
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                self.encoders.append((name, module))

    def names_of(self, module: nn.Module) -> tuple[str, ...]:
        """Every name under which ``module`` is registered."""
        return self.names[id(module)]

    def fast_path_flags(self, exit_fqn: str) -> list[Flag]:
        """Flags that keep ``nn.TransformerEncoder*`` off fused kernels, which read ``linear1.weight`` as a matrix."""
        flags = []
        for name, module in self.encoders:
            if not below(exit_fqn, name):
                continue
            if isinstance(module, nn.TransformerEncoderLayer):
                flags.append(Flag(module, "activation_relu_or_gelu", 0, module.activation_relu_or_gelu))
            elif isinstance(module, nn.TransformerEncoder):
                flags.append(Flag(module, "use_nested_tensor", False, module.use_nested_tensor))
        return flags


def dense_weights(model: nn.Module, match: Match) -> list[DenseWeight]:
    """The parameters of a match's linears, entries first, weight before bias."""
    found = []
    for site in (*match.region.entries, match.region.exit):
        found.append(DenseWeight(site.weight, model.get_parameter(site.weight), site.layout))
        if site.bias is not None:
            found.append(DenseWeight(site.bias, model.get_parameter(site.bias), "bias"))
    return found


def refuse_router_clash(module: nn.Module, place: str, layer: str, taken: bool = False) -> None:
    """Raise ``NameClash`` where ``module`` has a ``router`` already, or one was planned for it (``taken``)."""
    if taken or hasattr(module, "router"):
        raise NameClash(place, "router", layer=layer)
