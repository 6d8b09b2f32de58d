"""Routers: one small file each, a pure function under a thin module, and the table of their names.

moefy.transform(model, num_experts=8, router="top_k")
moefy.MoE(512, 2048, 8, router=moefy.RouterSpec("top_k", std=0.01))
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from moefy.config import Capacity, MoEConfig, RouterSpec
from moefy.errors import ConfigError, UnknownOption, suggest
from moefy.nn.routers.base import Router, router_init_

ROUTERS: dict[str, type[Router]] = {
    "top_k": Router,
}
# What the layer decides, not the user's options.
_PLACE = ("self", "d_model", "num_experts", "top_k", "fqn", "device", "dtype")

__all__ = ["ROUTERS", "Router", "configured_router", "make_router", "router_class", "router_init_"]


def router_class(name: str) -> type[Router]:
    """The class of that name.

    Raises:
        ConfigError: for a name that does not exist.
    """
    if name not in ROUTERS:
        known = sorted(ROUTERS)
        raise ConfigError("router", got=name, expected=f"one of {known}{suggest(str(name), known)}")
    return ROUTERS[name]


def make_router(
    router: str | RouterSpec | Router, d_model: int, num_experts: int, top_k: int, **place: Any
) -> Router:
    """The router that ``router`` describes, or ``router`` itself when it fits.

    Args:
        router: a name of ``ROUTERS``, a spec with options, or a router of these sizes.
        d_model: D.
        num_experts: E.
        top_k: K.
        place: ``std``, ``seed``, ``fqn``, ``device``, ``dtype``; a spec's own options lie over them.

    Raises:
        ConfigError: for a name that does not exist or a router of other sizes.
        UnknownOption: for an option that the router does not take.
    """
    if isinstance(router, Router):
        got = (router.d_model, router.num_experts, router.top_k)
        if got != (d_model, num_experts, top_k):
            raise ConfigError(
                "router", got=got, expected=f"(d_model, num_experts, top_k) = {(d_model, num_experts, top_k)}"
            )
        return router
    spec = RouterSpec.of(router)
    cls = router_class(spec.name)
    known = [name for name in _parameters(cls) if name not in _PLACE]
    for name in spec.options:
        if name not in known:
            raise UnknownOption(name, known, where=f"router {spec.name!r}")
    return cls(d_model, num_experts, top_k, **{**place, **spec.options})


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
    router = make_router(config.router, d_model, config.num_experts, config.top_k, **place)
    router.capacity = Capacity.of(config.capacity)
    return router


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
