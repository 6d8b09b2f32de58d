"""Runs one family through moefy and through the oracle.

``moe_model`` transforms, ``randomize`` makes the experts distinct, ``Capture`` records what goes in and out of every
rewritten layer, and ``compare`` holds each call against the token loop of ``oracles``:

    >>> model, found = moe_model(family, num_experts=4, top_k=2)
    >>> randomize(model, found)
    >>> errors = layer_errors(family, model, found)      # {"h.0.mlp #0 output": 1e-16, ...}

A rewritten layer's output is detached from what follows, so that the gradients of one call are its own even when the
layer is called again (ALBERT) or shares weights with another part of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import oracles
import torch
from torch import Tensor, nn

import moefy
from moefy.records import FFNMatch
from zoo.family import ANY, FFN, Family, Lin, tensors

EXACT = 1e-5  # relative norm, fp32, copied experts
FP64, FP32 = 1e-10, 1e-5  # relative norm against the oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewritten:
    """An expected FFN with the form that moefy chose for it."""

    ffn: FFN
    form: str

    @property
    def router(self) -> str:
        return self.ffn.router(self.form)

    @property
    def source_module(self) -> str:
        return self.ffn.at if self.form == "module" else self.ffn.entries[0].module

    @property
    def output_module(self) -> str:
        return self.ffn.at if self.form == "module" else self.ffn.exit.module

    @property
    def expert_weights(self) -> list[str]:
        linears = [*self.ffn.entries, self.ffn.exit]
        return [n for lin in linears for n in (lin.weight, lin.bias) if n is not None]


def linear_name(name: str) -> str:
    """``h.0.mlp.up`` and ``h.0.mlp.up.weight`` name the same linear."""
    return name.removesuffix(".weight")


def key(match: FFNMatch) -> tuple[frozenset[str], str]:
    """What identifies an FFN: its linears."""
    return frozenset(map(linear_name, match.entries)), linear_name(match.exit)


def expected_key(ffn: FFN) -> tuple[frozenset[str], str]:
    entries = frozenset(linear_name(e.weight) for e in ffn.entries)
    return entries, linear_name(ffn.exit.weight)


def find(family: Family) -> list[FFNMatch]:
    """All candidates that moefy sees in the family's model."""
    model, args, kwargs = family.make()
    return moefy.find(model, 4, example_args=args, example_kwargs=kwargs)


def accepted(matches: Iterable[FFNMatch]) -> dict[tuple[frozenset[str], str], FFNMatch]:
    return {key(m): m for m in matches if m.accepted}


def refusal(matches: Iterable[FFNMatch], part: str, codes: str) -> str | None:
    """``None`` when a refused candidate that names ``part`` has one of ``codes``, else what was seen instead."""
    seen = [m for m in matches if any(part in n for n in (m.fqn, *m.entries, m.exit))]
    refused = [m for m in seen if not m.accepted]
    allowed = codes.split("|")
    if any((codes == ANY and m.code) or m.code in allowed for m in refused):
        return None
    return f"expected {codes} at {part!r}, saw {[(m.fqn, m.entries, m.exit, m.code) for m in seen]}"


def moe_model(
    family: Family, num_experts: int, top_k: int
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[Rewritten]]:
    """The transformed model, its inputs, and each expected FFN with the form it was given."""
    model, args, kwargs = family.make()
    matches = accepted(moefy.find(model, num_experts, example_args=args, example_kwargs=kwargs))
    rewritten = [Rewritten(ffn=f, form=matches[expected_key(f)].form) for f in family.ffns]
    out = moefy.transform(
        model, num_experts, top_k=top_k, example_args=args, example_kwargs=kwargs, check=False
    )
    assert out is model, "transform works in place and returns the model"
    return model, args, kwargs, rewritten


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters under every name they have (shared modules have several)."""
    return dict(model.named_parameters(remove_duplicate=False))


def randomize(model: nn.Module, rewritten: Iterable[Rewritten], seed: int = 1) -> None:
    """Distinct random experts and a decisive router, the scale of each weight kept."""
    generator = torch.Generator().manual_seed(seed)
    parameters = named(model)
    with torch.no_grad():
        for layer in rewritten:
            for name in layer.expert_weights:
                p = parameters[name]
                scale = 1.5 / p.shape[-1] ** 0.5 if p.dim() == 3 else 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
            router = parameters[layer.router]
            router.copy_(torch.randn(router.shape, generator=generator))


def spread_routers(model: nn.Module, args: Any, kwargs: Any, rewritten: Iterable[Rewritten]) -> None:
    """Take the mean token out of every router, just before its layer first runs.

    Random models give tokens that are nearly alike; without this the common part would decide the routing.
    """
    parameters, handles, seen = named(model), [], set()

    def project(router: Tensor, feature_dim: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if id(router) in seen:
                return
            seen.add(id(router))
            x = next(tensors([*args, *kwargs.values()])).detach().movedim(feature_dim, -1)
            if x.numel() > x.shape[-1]:
                mean = x.reshape(-1, x.shape[-1]).mean(0)
                router.sub_(torch.outer(router @ mean, mean) / mean.dot(mean))

        return hook

    with torch.no_grad():
        for layer in rewritten:
            hook = project(parameters[layer.router].data, layer.ffn.feature_dim)
            module = model.get_submodule(layer.source_module)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        model(*args, **kwargs)
        for handle in handles:
            handle.remove()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in nested containers to ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: cast(v, dtype) for k, v in value.items()}
    return type(value)(cast(v, dtype) for v in value) if isinstance(value, list | tuple) else value


@dataclasses.dataclass
class Call:
    """One execution of a rewritten layer: source and output still in the autograd graph, and the source's values."""

    source: Tensor
    values: Tensor
    output: Tensor


class Capture:
    """Hooks that record every call of one rewritten layer and cut the graph behind it."""

    def __init__(self, model: nn.Module, layer: Rewritten) -> None:
        self.calls: list[Call] = []
        self.sources: list[Tensor] = []
        entry, exit_ = (
            model.get_submodule(layer.source_module),
            model.get_submodule(layer.output_module),
        )
        self.handles = [
            entry.register_forward_pre_hook(self.before, with_kwargs=True),
            exit_.register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.sources.append(next(tensors([*args, *kwargs.values()])))

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        source = self.sources.pop()
        self.calls.append(Call(source, source.detach().clone(), y))
        cut = y.detach().clone().requires_grad_().clone()  # no leaf: models add to it in place
        return (cut, *output[1:]) if isinstance(output, tuple) else cut

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def oracle_layer(
    layer: Rewritten, parameters: dict[str, Tensor], top_k: int
) -> tuple[oracles.LoopLayer, list[tuple[str, Tensor]]]:
    """The token loop with its own fp64 copies of the layer's parameters, and these by name."""
    copies: dict[str, Tensor] = {}

    def leaf(name: str) -> Tensor:
        if name not in copies:
            copies[name] = parameters[name].detach().to(torch.float64).requires_grad_()
        return copies[name]

    def stacked(lin: Lin) -> oracles.Stacked:
        return leaf(lin.weight), None if lin.bias is None else leaf(lin.bias)

    entries = [stacked(e) for e in layer.ffn.entries]
    exit_ = stacked(layer.ffn.exit)
    shared = {k: leaf(v) for k, v in layer.ffn.body_params.items()}
    loop = oracles.LoopLayer(
        entries=entries,
        exit=exit_,
        body=lambda *rows: layer.ffn.body(*rows, **shared),
        router_ED=leaf(layer.router),
        top_k=top_k,
    )
    return loop, list(copies.items())


def call_errors(
    layer: Rewritten, call: Call, parameters: dict[str, Tensor], top_k: int, seed: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Relative errors of one call (output, gradients of source and parameters) and each token's experts."""
    loop, leaves = oracle_layer(layer, parameters, top_k)
    x = call.values.to(torch.float64).requires_grad_()
    expected = loop(x, layer.ffn.feature_dim)
    if layer.form == "module" and layer.ffn.post is not None:
        expected = layer.ffn.post(expected)
    errors = {"output": oracles.relative_error(call.output, expected)}
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    names = [n for n, _ in leaves]
    wanted = [call.source, *(parameters[n] for n in names)]
    got = oracles.gradients(call.output, wanted, cotangent.to(call.output.dtype))
    true = oracles.gradients(expected, [x, *(t for _, t in leaves)], cotangent)
    for name, a, b in zip(["input", *names], got, true, strict=True):
        errors[f"grad {name}"] = oracles.relative_error(a, b)
    return errors, loop.chosen


def layer_errors(
    family: Family, model: nn.Module, args: Any, kwargs: Any, rewritten: list[Rewritten], top_k: int
) -> dict[str, float]:
    """The errors of every call of every rewritten layer in one forward of the model."""
    dtype = torch.float64 if family.fp64 else torch.float32
    model.to(dtype).requires_grad_()
    args, kwargs = cast(args, dtype), cast(kwargs, dtype)
    spread_routers(model, args, kwargs, rewritten)
    captures = [Capture(model, layer) for layer in rewritten]
    for t in tensors([*args, *kwargs.values()]):
        t.requires_grad_()
    with torch.enable_grad():
        model(*args, **kwargs)
    parameters, errors = named(model), {}
    for layer, capture in zip(rewritten, captures, strict=True):
        capture.close()
        assert len(capture.calls) == layer.ffn.calls, (layer.ffn.at, len(capture.calls))
        chosen: list[list[int]] = []
        for i, call in enumerate(capture.calls):
            found, ids = call_errors(layer, call, parameters, top_k, seed=i)
            errors |= {f"{layer.ffn.at} #{i} {what}": e for what, e in found.items()}
            chosen += ids
        assert len({tuple(ids) for ids in chosen}) > 1 or len(chosen) < 4, "every token has the same experts"
    return errors
