"""``Family``: one model and what moefy must make of it. Plain data; no import of moefy.

Each family is a builder with its expectation, written from reading the model's code before running it:

    >>> @family(ffns("h.{}.mlp", 2, "c_fc", "c_proj", gelu), why="both layers call an MLP and add it to x")
    ... def nanogpt():
    ...     return NanoGPT(), (tokens(),), {}

A linear is written as its path below the FFN's module; ``"c_fc:io"`` says that its dense weight is [in, out]
(GPT-2's Conv1D), ``"fc1:conv"`` that it is a 1x1 convolution; ``raw("w1", "b1")`` names bare parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Layout = Literal["oi", "io", "conv"]
Form = Literal["module", "linears", "either"]
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ANY = "*"  # refused, and any reason that is named is true


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lin:
    """One dense linear: parameter FQNs and the layout of its dense weight."""

    weight: str
    bias: str | None
    layout: Layout = "oi"

    @property
    def module(self) -> str:
        """The FQN of the module that owns the weight."""
        return self.weight.rpartition(".")[0]

    def dense_as_oi(self, weight: Tensor) -> Tensor:
        """The dense weight as [out, in]."""
        if self.layout == "io":
            return weight.t()
        return weight.flatten(1) if self.layout == "conv" else weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class FFN:
    """One FFN that must be rewritten.

    ``at`` is the module whose whole forward is the FFN (form "module") or the deepest module that holds its linears
    (form "linears"); "either" where a trailing dropout or scale leaves both readings open. ``body_params`` are the
    parameters that the body reads, by keyword; ``post`` follows the exit inside ``at``; ``calls`` counts the
    executions per forward.
    """

    at: str
    entries: tuple[Lin, ...]
    exit: Lin
    body: Callable[..., Tensor]
    form: Form = "module"
    body_params: Mapping[str, str] = dataclasses.field(default_factory=dict)
    feature_dim: int = -1
    calls: int = 1
    post: Callable[[Tensor], Tensor] | None = None
    gated: bool = False

    def router(self, form: str) -> str:
        """The FQN of the router weight, for the form that moefy chose."""
        if form == "module":
            return f"{self.at}.router.weight" if self.at else "router.weight"
        return f"{self.entries[0].module}.router.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model, its inputs, the FFNs to rewrite and the look-alikes to refuse (FQN part -> reason code)."""

    name: str
    build: Callable[[], Built]
    ffns: tuple[FFN, ...]
    refused: Mapping[str, str]
    why: str
    library: str
    fp64: bool = True

    @property
    def inline(self) -> bool:
        return any(f.form == "linears" for f in self.ffns)

    @property
    def gated(self) -> bool:
        return any(f.gated for f in self.ffns)

    @property
    def sibling_inline(self) -> bool:
        return any(f.form == "linears" and f.gated and len(f.entries) > 1 for f in self.ffns)

    @property
    def conv1x1(self) -> bool:
        return any(f.exit.layout == "conv" for f in self.ffns)

    def make(self) -> Built:
        """The seeded model in eval mode with its inputs; the global RNG is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, args, kwargs = self.build()
        return model.eval(), args, kwargs


FAMILIES: dict[str, Family] = {}


def family(
    *groups: Sequence[FFN],
    why: str,
    refused: Mapping[str, str] | None = None,
    library: str = "torch",
    fp64: bool = True,
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Register a builder under ``library/function_name``."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        name = f"{library}/{build.__name__.lstrip('_')}"
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(
            name=name,
            build=build,
            ffns=tuple(f for group in groups for f in group),
            refused=dict(refused or {}),
            why=why,
            library=library,
            fp64=fp64,
        )
        return build

    return register


def raw(weight: str, bias: str | None = None, layout: Layout = "oi") -> Lin:
    """Bare parameters, by their path below the FFN's module."""
    return Lin(weight=weight, bias=bias, layout=layout)


def parse(linear: str | Lin, bias: bool) -> Lin:
    """``"c_fc:io"`` -> ``Lin("c_fc.weight", "c_fc.bias", "io")``."""
    if isinstance(linear, Lin):
        return linear
    path, _, layout = linear.partition(":")
    return Lin(
        weight=f"{path}.weight",
        bias=f"{path}.bias" if bias else None,
        layout=layout or "oi",  # type: ignore[arg-type]
    )


def below(prefix: str, path: str | None) -> str | None:
    return path if path is None or not prefix else f"{prefix}.{path}"


def ffns(
    at: str,
    layers: int | Sequence[Any] | None,
    entries: str | Lin | Sequence[str | Lin],
    exit: str | Lin,
    body: Callable[..., Tensor],
    *,
    bias: bool = True,
    gated: bool | None = None,
    body_params: Mapping[str, str] | None = None,
    **options: Any,
) -> list[FFN]:
    """The same FFN at ``at.format(i)`` for each layer; ``layers=None`` means once. Paths are relative to ``at``.

    ``gated`` defaults to "more than one entry"; say it for merged forms.
    """
    entry_list = [entries] if isinstance(entries, str | Lin) else list(entries)
    indices = [None] if layers is None else range(layers) if isinstance(layers, int) else layers
    found = []
    for i in indices:
        here = at if i is None else at.format(*i) if isinstance(i, tuple) else at.format(i)
        found.append(
            FFN(
                at=here,
                entries=tuple(place(parse(e, bias), here) for e in entry_list),
                exit=place(parse(exit, bias), here),
                body=body,
                gated=len(entry_list) > 1 if gated is None else gated,
                body_params={k: str(below(here, v)) for k, v in (body_params or {}).items()},
                **options,
            )
        )
    return found


def place(linear: Lin, at: str) -> Lin:
    """The linear with its paths relative to the model."""
    return dataclasses.replace(linear, weight=str(below(at, linear.weight)), bias=below(at, linear.bias))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in an output: nested tuples, dicts, dataclasses and Hugging Face outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
