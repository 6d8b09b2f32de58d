"""From what a user writes as ``router=`` to a ``Router`` of a layer's sizes.

    "switch"                                   a name of ``ROUTERS``
    RouterSpec("switch", jitter=0.1)           a name with options
    SwitchRouter, partial(SwitchRouter, ...)   a class or a factory, called like ``Router``
    MyGate                                     a factory of any module from tokens to logits or to a ``Choice``
    SwitchRouter(16, 8, 1), nn.Linear(16, 8)   a router or such a module of this layer's sizes

Contract: a factory is called with ``d_model, num_experts, top_k`` and with those of ``std, seed, fqn, device, dtype``
that it takes by name. It draws from a random state that depends on the seed and the layer's name alone, so that all
ranks agree and the global random state is untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from moefy.config import AuxLoss, Capacity, MoEConfig, RouterSpec
from moefy.errors import ConfigError, UnknownOption, suggest
from moefy.nn.routers.base import ROUTERS, Router
from moefy.nn.routers.custom import CustomRouter
from moefy.nn.seeding import seeded

RouterLike: TypeAlias = str | RouterSpec | nn.Module | Callable[..., nn.Module]
# Arguments that the layer decides, so that they are no options of a RouterSpec.
_PLACE = ("self", "d_model", "num_experts", "top_k", "fqn", "device", "dtype")


def router_class(name: str) -> type[Router]:
    """The class of that name.

    Raises:
        ConfigError: for a name that does not exist.
    """
    if name not in ROUTERS:
        known = sorted(ROUTERS)
        raise ConfigError("router", got=name, expected=f"one of {known}{suggest(str(name), known)}")
    return ROUTERS[name]


def make_router(router: RouterLike, d_model: int, num_experts: int, top_k: int, **place: Any) -> Router:
    """The router that ``router`` describes, or ``router`` itself when it fits.

    Args:
        router: see the top of the file.
        d_model: D.
        num_experts: E.
        top_k: K.
        place: ``std``, ``seed``, ``fqn``, ``device``, ``dtype``; a spec's own options lie over them.

    Raises:
        ConfigError: for a name that does not exist, a router of other sizes, or a factory that makes no module.
        UnknownOption: for an option that the router does not take.
    """
    sizes = {"d_model": d_model, "num_experts": num_experts, "top_k": top_k}
    if isinstance(router, str | RouterSpec):
        return _by_name(RouterSpec.of(router), sizes, place)
    if not isinstance(router, nn.Module):
        router = _by_factory(router, sizes, place)
    if not isinstance(router, Router):
        return CustomRouter(**sizes, module=router, **place)
    got = (router.d_model, router.num_experts, router.top_k)
    if got != (d_model, num_experts, top_k):
        expected = f"(d_model, num_experts, top_k) = {(d_model, num_experts, top_k)}"
        raise ConfigError("router", got=got, expected=expected)
    return router


def configured_router(config: MoEConfig, d_model: int, fqn: str, like: torch.Tensor) -> Router:
    """The router that ``config`` describes for the layer ``fqn``, on the device and in the dtype of ``like``.

    Raises:
        ConfigError, UnknownOption: as ``make_router``.
    """
    place = {
        "std": config.router_std,
        "seed": config.seed,
        "fqn": fqn,
        "device": like.device,
        "dtype": like.dtype,
    }
    router = make_router(config.router, d_model, config.num_experts, config.experts_per_token, **place)
    router.capacity = Capacity.of(config.capacity)
    router.aux_loss = AuxLoss.of(config.aux_loss)
    return router


def check_router(config: MoEConfig) -> None:
    """Raise ``ConfigError`` or ``UnknownOption`` for a router by name that no layer could have."""
    if isinstance(config.router, str | RouterSpec):
        make_router(config.router, 8, config.num_experts, config.experts_per_token, device="meta")


def _by_name(spec: RouterSpec, sizes: dict[str, int], place: dict[str, Any]) -> Router:
    cls = router_class(spec.name)
    known = [name for name in _parameters(cls) if name not in _PLACE]
    for name in spec.options:
        if name not in known:
            raise UnknownOption(name, known, where=f"router {spec.name!r}")
    return cls(**sizes, **{**place, **spec.options})


def _by_factory(factory: Any, sizes: dict[str, int], place: dict[str, Any]) -> nn.Module:
    if not callable(factory):
        raise ConfigError(
            "router", got=factory, expected="a name, a RouterSpec, a module or a factory of one"
        )
    names = inspect.signature(factory).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in names.values())
    taken = getattr(factory, "keywords", {})  # functools.partial's own
    given = {n: v for n, v in place.items() if (takes_all or n in names) and n not in taken}
    with seeded(place.get("seed", 0), place.get("fqn", "")):
        by_name = takes_all or "d_model" in names
        args = () if by_name else tuple(sizes.values())
        named = {n: v for n, v in sizes.items() if by_name and (takes_all or n in names)}
        made = factory(*args, **named, **given)
    if not isinstance(made, nn.Module):
        raise ConfigError("router", got=type(made).__name__, expected="a factory that returns a module")
    unplaced = {n: place[n] for n in ("device", "dtype") if n not in given and place.get(n) is not None}
    return made.to(**unplaced) if unplaced else made


def _parameters(cls: type[Router]) -> list[str]:
    """The names that the constructor takes, those that its bases take by ``**options`` included."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names.update((p.name, None) for p in parameters if p.kind is not p.VAR_KEYWORD)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)
