"""Checked mode: NaN scores are an error by name inside it, and stay in their own tokens outside."""

from __future__ import annotations

import pytest
import torch

import moefy
from moefy.errors import NonFiniteScores
from moefy.nn.routers import ROUTERS, make_router

D, E = 8, 4


def layer_and_tokens() -> tuple[moefy.MoE, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, D)
    x[2, 3] = float("nan")
    return moefy.MoE(D, 16, E), x


def test_nan_is_named_inside_and_stays_in_its_token_outside() -> None:
    layer, x = layer_and_tokens()
    with (
        moefy.checked_mode(),
        pytest.raises(NonFiniteScores, match=r"1 of 6 tokens .*\(tokens 2\)") as caught,
    ):
        layer(x)
    assert caught.value.tokens == [2]
    assert layer(x).isnan().any(-1).tolist() == [t == 2 for t in range(6)]


def test_the_name_of_the_layer_is_in_the_error() -> None:
    router = make_router("top_k", D, E, 2, fqn="layers.3.mlp")
    with moefy.checked_mode(), pytest.raises(NonFiniteScores, match=r"^layers\.3\.mlp: "):
        router(torch.full((2, D), float("inf")))


def test_padding_and_forbidden_experts_are_no_fault() -> None:
    layer, x = layer_and_tokens()
    mask = torch.arange(6) != 2
    with moefy.checked_mode():
        layer(x, mask=mask)
        layer.router.bias = torch.nn.Parameter(torch.tensor([0.0, 0.0, 0.0, -float("inf")]))
        assert layer(x[3:]).isfinite().all()


def test_blocks_nest_and_end_with_an_error() -> None:
    layer, x = layer_and_tokens()
    with moefy.checked_mode():
        for _ in range(2):
            with pytest.raises(NonFiniteScores), moefy.checked_mode():
                layer(x)
        with pytest.raises(NonFiniteScores):
            layer(x)
    layer(x)


def test_compiled_code_does_not_look(fresh_dynamo: None) -> None:
    layer, x = layer_and_tokens()
    with moefy.checked_mode():
        assert torch.compile(layer, backend="eager", fullgraph=True)(x).isnan().any()


@pytest.mark.parametrize(("router", "top_k"), [("top_k", 2), ("switch", 1), ("hash", 1)])
def test_a_config_knows_its_router_s_k(router: str, top_k: int) -> None:
    config = moefy.MoEConfig(num_experts=E, router=router)
    assert config.top_k == top_k and router in ROUTERS
    assert moefy.MoEConfig.from_json(config.to_json()) == config
    assert moefy.MoEConfig(num_experts=1).top_k == 1
