"""Values of another type than an option has: an error by name, never a comparison that fails inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moefy
from moefy.config import MoEConfig
from moefy.errors import ConfigError, DtypeError, ShapeError
from moefy.nn.routers import make_router

D, E = 8, 4
OPTIONS = [
    ("top_k", {"std": "0.02"}),
    ("top_k", {"std": -1.0}),
    ("switch", {"jitter": None}),
    ("sigmoid", {"scale": "2"}),
    ("sigmoid", {"scale": True}),
    ("cosine", {"proj_dim": 1.5}),
    ("cosine", {"init_t": "0.5"}),
    ("dc", {"rates": 1.2}),
    ("dc", {"rates": ("1", "2")}),
    ("dc", {"num_workers": 1.5}),
    ("swipe", {"num_workers": 2.0}),
    ("group_limited", {"n_groups": "2"}),
    ("group_limited", {"group_best": 1.0}),
    ("bias_balanced", {"rate": "0.001"}),
    ("expert_choice", {"factor": "1"}),
    ("hash", {"size": "100"}),
    ("replay", {"trace": 5}),
    ("multi", {"routers": 5}),
    ("multi", {"router_index": "0"}),
    ("custom", {"module": None}),
    ("topology", {"experts_per_node": "2"}),
    ("topology", {"node": 0.0}),
    ("topology", {"outgoing_fraction": "0.1"}),
    ("noisy_top_k", {"noise_epsilon": "0.01"}),
    ("tutel_top", {"gate_noise": "1"}),
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=[f"{n}-{next(iter(o))}-{i}" for i, (n, o) in enumerate(OPTIONS)]
)
def test_router_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_router(moefy.RouterSpec(name, **options), D, E, 1 if name == "switch" else 2)
    assert caught.value.option == next(iter(options))


def test_a_custom_router_without_its_module() -> None:
    with pytest.raises(ConfigError, match="module"):
        make_router("custom", D, E, 2)


@pytest.mark.parametrize("top_k", [1.5, True, "2"])
def test_top_k(top_k: Any) -> None:
    with pytest.raises(ConfigError, match="top_k"):
        moefy.MoE(D, 8, E, top_k=top_k)
    with pytest.raises(ConfigError, match="top_k"):
        moefy.MoE(D, 8, E)(torch.randn(3, D), top_k=top_k)


CALLS: list[tuple[type[Exception], dict[str, Any]]] = [
    (ConfigError, {"capacity_factor": "1"}),
    (ConfigError, {"router_index": "0"}),
    (DtypeError, {"mask": [True, True, False]}),
    (DtypeError, {"replace_ids": 1}),
]


@pytest.mark.parametrize(
    ("error", "options"), CALLS, ids=[f"{next(iter(o))}-{i}" for i, (_, o) in enumerate(CALLS)]
)
def test_calls(error: type[Exception], options: dict[str, Any]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        moefy.MoE(D, 8, E)(torch.randn(3, D), **options)


def test_a_replacement_of_another_width() -> None:
    ids = torch.tensor([0, 7, 0])
    with pytest.raises(ShapeError, match=r"replacements\[7\]"):
        moefy.MoE(D, 8, E)(torch.randn(3, D), replace_ids=ids, replacements={7: torch.ones(1)})


def test_token_ids_are_integers() -> None:
    layer = moefy.MoE(D, 8, E, router=moefy.RouterSpec("hash", by="token"))
    with pytest.raises(DtypeError, match="token ids"):
        layer(torch.randn(3, D), token_ids=torch.ones(3))


@pytest.mark.parametrize(
    "experts",
    [5, ["a"], [nn.Identity(), lambda: None], lambda: 5],
    ids=["number", "string", "factory of nothing", "factory of a number"],
)
def test_experts(experts: Any) -> None:
    with pytest.raises(ConfigError, match="experts"):
        moefy.MoE(D, num_experts=2, experts=experts)


@pytest.mark.parametrize("data", [[], None, 5])
def test_a_config_that_is_no_object(data: Any) -> None:
    with pytest.raises(ConfigError, match="config"):
        MoEConfig.from_dict(data)


@pytest.mark.parametrize("router", [{}, {"name": "switch", "options": 5}, {"name": "switch", "option": {}}])
def test_a_router_in_json(router: Any) -> None:
    with pytest.raises(ConfigError, match="router"):
        MoEConfig.from_dict({"num_experts": 4, "router": router})
