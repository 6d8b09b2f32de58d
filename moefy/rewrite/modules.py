"""Surgery: replace one matched FFN of a live model by experts, or take it back.

``build_layer`` makes the new modules beside the old ones and touches nothing; ``Layer.install`` swaps them in and
``Layer.remove`` swaps them out again. Only ``Layer.seal``, after every check, lets go of the dense weights: the old
modules stay as shells on the meta device, so that ``undo`` can bring them back.

    owner ``mlp`` (its whole forward is the FFN)    ->  ``MoE``
    ``fc1`` .. ``fc2`` inside a larger forward      ->  ``EntryLinear`` .. ``ExitLinear``
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from moefy.config import MoEConfig
from moefy.errors import NameClash
from moefy.nn import Body, EntryLinear, ExitLinear, ExpertLinear, FFNLink, InPlaceMoE, Router, WeightRef
from moefy.nn.routers import configured_router
from moefy.passes.match.linears import LinearSite
from moefy.passes.match.regions import Region
from moefy.passes.match.rules import Match
from moefy.rewrite.methods.copy import Origin, stack


@dataclasses.dataclass(eq=False)
class Swap:
    """One module for another, at every name under which the old one is registered."""

    names: tuple[str, ...]
    old: nn.Module
    new: nn.Module


@dataclasses.dataclass(eq=False)
class Flag:
    """An attribute of a module that has to change with the swap (fused fast paths)."""

    module: nn.Module
    name: str
    value: Any
    before: Any


@dataclasses.dataclass(eq=False)
class Layer:
    """One FFN's surgery, not yet done."""

    fqn: str
    swaps: list[Swap]
    flags: list[Flag]
    origins: dict[str, Origin]

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
        """Let go of the dense weights; the old modules become the shells that ``undo`` fills again."""
        flags = [(flag.module, flag.name, flag.before) for flag in self.flags]
        for swap in self.swaps:
            name = swap.names[0]
            inside = {_relative(p, name): origin for p, origin in self.origins.items() if _below(p, name)}
            for path, origin in inside.items():
                _release(swap.old, path, origin)
            swap.new.__dict__["_dense"] = Shell(swap.old, inside, flags)
            flags = []


@dataclasses.dataclass(eq=False)
class Shell:
    """What ``undo`` needs: the dense module without its weights, where these come from, and flags to restore.

    ``origins`` are by path relative to the module.

    Kept in the new module's ``__dict__``: no child, no parameter, no state_dict entry; copied and pickled along.
    """

    module: nn.Module
    origins: dict[str, Origin]
    flags: list[tuple[nn.Module, str, Any]]


class ModelIndex:
    """Names and fused encoders of a model, looked up once for all layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[int, tuple[str, ...]] = {}
        self.encoders: list[tuple[str, nn.Module]] = []
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)] = (*self.names.get(id(module), ()), name)
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
                self.encoders.append((name, module))


def build_layer(index: ModelIndex, match: Match, config: MoEConfig) -> Layer:
    """The new modules for ``match``; the model is only read.

    Raises:
        NameClash: the router's name, or one that ``MoE`` itself needs, is taken.
    """
    origins: dict[str, Origin] = {}
    if match.record.form == "module":
        swaps = [_moe_swap(index, match, config, origins)]
    else:
        swaps = _linear_swaps(index, match, config, origins)
    return Layer(match.record.fqn, swaps, _fast_path_flags(index, match), origins)


# -- an owner becomes an MoE -----------------------------------------------------------------------------------------
def _moe_swap(index: ModelIndex, match: Match, config: MoEConfig, origins: dict[str, Origin]) -> Swap:
    model = index.model
    fqn, region = match.record.fqn, match.region
    owner = model.get_submodule(fqn)
    prefix = f"{fqn}." if fqn else ""
    sites = [*region.entries, region.exit]
    if match.body is None:
        raise AssertionError(f"{fqn}: a module match without its body")
    router = _router(model, region, config, fqn, fqn)
    refs = [_ref(site, prefix) for site in sites]
    moe = InPlaceMoE(
        entries=refs[:-1],
        exit=refs[-1],
        body=Body.from_graph(match.body, match.known),
        tail=Body.from_graph(match.tail) if match.tail is not None else None,
        router=router,
        num_experts=config.num_experts,
        feature_dim=region.feature_dim,
        returns="tuple" if match.returns_tuple else "tensor",
        input_name=_input_name(owner),
    )
    _mirror(owner, moe, fqn, {s.weight[len(prefix) :]: s for s in sites}, config, origins, prefix)
    moe.train(owner.training)
    return Swap(index.names[id(owner)], owner, moe)


def _mirror(
    old: nn.Module,
    new: nn.Module,
    fqn: str,
    sites: dict[str, LinearSite],
    config: MoEConfig,
    origins: dict[str, Origin],
    prefix: str,
) -> None:
    """Give ``new`` the tree of ``old``: linears as stacked experts, everything else as the very same objects."""
    biases = {s.bias[len(prefix) :]: s for s in sites.values() if s.bias is not None}
    handled: set[str] = set()
    for path, module in _linear_modules(old, sites):
        site = sites[f"{path}.weight"]
        linear = _expert_linear(ExpertLinear, module, site, config, origins)
        _mount(new, path, linear, fqn)
        handled.add(path)
    for path, site in {**sites, **biases}.items():
        if path.rpartition(".")[0] not in handled or path.rpartition(".")[2] not in ("weight", "bias"):
            is_bias = path in biases
            parameter = _stacked(
                old.get_parameter(path), f"{prefix}{path}", site, config, origins, bias=is_bias
            )
            _mount(new, path, parameter, fqn)
    for path, module in old.named_modules():
        inner = [p for p in (*sites, *biases) if path == "" or p.startswith(f"{path}.")]
        if path in handled or any(path.startswith(f"{h}.") for h in handled):
            continue
        if path != "" and not inner:
            parent = path.rpartition(".")[0]
            kept_whole = parent == "" or any(p.startswith(f"{parent}.") for p in (*sites, *biases))
            if kept_whole:
                _mount(new, path, module, fqn)
            continue
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            full = f"{path}.{name}" if path else name
            if value is not None and full not in sites and full not in biases:
                persistent = name not in module._non_persistent_buffers_set
                _mount(new, full, value, fqn, persistent=persistent)


def _linear_modules(old: nn.Module, sites: dict[str, LinearSite]) -> list[tuple[str, nn.Module]]:
    """The modules of ``old`` that are exactly one of the linears: no other parameter, no children."""
    found = []
    for weight, site in sites.items():
        path, _, name = weight.rpartition(".")
        if name != "weight" or path == "":
            continue
        module = old.get_submodule(path)
        names = {n for n, p in module._parameters.items() if p is not None}
        plain_bias = site.bias is None or site.bias.rpartition(".")[0] == site.weight.rpartition(".")[0]
        if names <= {"weight", "bias"} and not module._modules and plain_bias:
            found.append((path, module))
    return found


def _mount(
    root: nn.Module, path: str, value: nn.Module | Tensor, fqn: str, *, persistent: bool = True
) -> None:
    """Register ``value`` on ``root`` under the dotted ``path``, making containers on the way."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            _refuse_clash(root, parent, fqn)
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    _refuse_clash(root, name, fqn)
    if isinstance(value, nn.Module):
        root.add_module(name, value)
    elif isinstance(value, nn.Parameter):
        root.register_parameter(name, value)
    else:
        root.register_buffer(name, value, persistent=persistent)


def _refuse_clash(root: nn.Module, name: str, fqn: str) -> None:
    if hasattr(root, name):
        raise NameClash(fqn, name)


def _ref(site: LinearSite, prefix: str) -> WeightRef:
    return WeightRef(site.weight[len(prefix) :], site.bias[len(prefix) :] if site.bias is not None else None)


def _input_name(owner: nn.Module) -> str:
    import inspect

    try:
        return next(iter(inspect.signature(owner.forward).parameters))
    except (StopIteration, TypeError, ValueError):
        return "x"


# -- linears inside a larger forward ---------------------------------------------------------------------------------
def _linear_swaps(
    index: ModelIndex, match: Match, config: MoEConfig, origins: dict[str, Origin]
) -> list[Swap]:
    model, region = index.model, match.region
    link = FFNLink(match.record.fqn)
    common: dict[str, Any] = {"feature_dim": region.feature_dim, "link": link}
    swaps = []
    for order, site in enumerate(region.entries):
        old = model.get_submodule(site.name)
        router = _router(model, region, config, site.name, match.record.fqn) if order == 0 else None
        options = {**common, "index": order, "count": len(region.entries), "router": router}
        new = _expert_linear(EntryLinear, old, site, config, origins, **options)
        swaps.append(Swap(index.names[id(old)], old, new))
    old = model.get_submodule(region.exit.name)
    new = _expert_linear(ExitLinear, old, region.exit, config, origins, **common)
    return [*swaps, Swap(index.names[id(old)], old, new)]


def _expert_linear(
    cls: type[ExpertLinear],
    old: nn.Module,
    site: LinearSite,
    config: MoEConfig,
    origins: dict[str, Origin],
    **options: Any,
) -> Any:
    """A stacked linear of class ``cls`` whose experts are copies of ``old``."""
    args = (site.in_features, site.out_features, config.num_experts)
    new = cls(*args, bias=site.bias is not None, device="meta", **options)
    names = {"weight": site.weight} | ({"bias": site.bias} if site.bias is not None else {})
    for name, fqn in names.items():
        parameter = _stacked(old.get_parameter(name), fqn, site, config, origins, bias=name == "bias")
        setattr(new, name, parameter)
    new.train(old.training)
    return new


def _stacked(
    dense: nn.Parameter,
    fqn: str,
    site: LinearSite,
    config: MoEConfig,
    origins: dict[str, Origin],
    *,
    bias: bool,
) -> nn.Parameter:
    parameter = stack(dense, config.num_experts, "bias" if bias else site.layout)
    origins[fqn] = Origin.of(dense, "bias" if bias else site.layout, parameter)
    return parameter


def _router(model: nn.Module, region: Region, config: MoEConfig, place: str, layer: str) -> Router:
    """The router, on the device and in the dtype of the first entry's weight, seeded by its place."""
    if hasattr(model.get_submodule(place), "router"):
        raise NameClash(place, "router", layer=layer)
    weight = model.get_parameter(region.entries[0].weight)
    return configured_router(config, region.entries[0].in_features, place, weight)


# -- the model's names -----------------------------------------------------------------------------------------------
def _put(model: nn.Module, names: tuple[str, ...], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = module


def _fast_path_flags(index: ModelIndex, match: Match) -> list[Flag]:
    """``nn.TransformerEncoder*`` read ``linear1.weight`` in a fused kernel, which stacked experts do not fit."""
    flags: list[Flag] = []
    for name, module in index.encoders:
        if isinstance(module, nn.TransformerEncoderLayer) and _below(match.record.exit, name):
            flags.append(Flag(module, "activation_relu_or_gelu", 0, module.activation_relu_or_gelu))
        elif isinstance(module, nn.TransformerEncoder) and _below(match.record.exit, name):
            flags.append(Flag(module, "use_nested_tensor", False, module.use_nested_tensor))
    return flags


def _below(path: str, prefix: str) -> bool:
    return prefix == "" or path == prefix or path.startswith(f"{prefix}.")


def _relative(path: str, prefix: str) -> str:
    return path[len(prefix) + 1 :] if prefix else path


def _release(module: nn.Module, path: str, origin: Origin) -> None:
    """Replace a dense parameter by an empty one on the meta device."""
    parent, _, name = path.rpartition(".")
    empty = torch.empty(origin.shape, dtype=origin.dtype, device="meta")
    module.get_submodule(parent)._parameters[name] = nn.Parameter(empty, requires_grad=origin.requires_grad)
