"""The oracle itself: against dense torch modules, hand-computed cases and finite differences."""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor, nn

E, D, H, T = 3, 4, 6, 7


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def layer(body: object = torch.tanh, top_k: int = 2, entries: int = 1) -> oracles.LoopLayer:
    torch.manual_seed(0)
    return oracles.LoopLayer(
        entries=[(random(E, H, D), random(E, H)) for _ in range(entries)],
        exit=(random(E, D, H), random(E, D)),
        body=body,  # type: ignore[arg-type]
        router_ED=random(E, D),
        top_k=top_k,
    )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_experts_are_the_dense_mlp(top_k: int) -> None:
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)).double()
    up, down = dense[0], dense[2]
    loop = oracles.LoopLayer(
        entries=[(up.weight.expand(E, H, D), up.bias.expand(E, H))],
        exit=(down.weight.expand(E, D, H), down.bias.expand(E, D)),
        body=nn.functional.gelu,
        router_ED=random(E, D),
        top_k=top_k,
    )
    x = random(2, T, D)
    assert oracles.relative_error(loop(x), dense(x)) < 1e-14


def test_one_expert_by_hand() -> None:
    loop = layer(top_k=1)
    x_TD = random(T, D)
    y_TD = loop(x_TD)
    for t in range(T):
        (e,) = loop.chosen[t]
        assert e == int(torch.argmax(loop.router_ED @ x_TD[t]))
        up, b = loop.entries[0][0][e], loop.entries[0][1][e]  # type: ignore[index]
        down, c = loop.exit[0][e], loop.exit[1][e]  # type: ignore[index]
        assert torch.allclose(y_TD[t], down @ torch.tanh(up @ x_TD[t] + b) + c, atol=1e-12)


def test_all_experts_by_hand() -> None:
    loop = layer(body=lambda g, u: torch.sigmoid(g) * u, top_k=E, entries=2)
    x_TD = random(T, D)
    weights_TE = torch.softmax(x_TD @ loop.router_ED.T, dim=-1)
    rows = [torch.einsum("ehd,td->teh", w, x_TD) + b for w, b in loop.entries]
    h_TEH = torch.sigmoid(rows[0]) * rows[1]
    y_TED = torch.einsum("edh,teh->ted", loop.exit[0], h_TEH) + loop.exit[1]
    assert oracles.relative_error(loop(x_TD), (weights_TE[..., None] * y_TED).sum(1)) < 1e-14


def test_ties_go_to_the_lowest_id() -> None:
    assert oracles.choose(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 3) == [1, 2, 4]
    loop = layer()
    loop(torch.zeros(1, D, dtype=torch.float64))
    assert loop.chosen == [[0, 1]]


def test_gradients_are_those_of_finite_differences() -> None:
    loop = layer(top_k=E)  # all experts chosen, so that no step changes the choice
    inputs = (random(2, D), loop.router_ED, *loop.entries[0], *loop.exit)

    def function(x: Tensor, router: Tensor, *weights: Tensor) -> Tensor:
        up, b, down, c = weights
        loop.entries, loop.exit, loop.router_ED = [(up, b)], (down, c), router
        return loop(x)

    assert torch.autograd.gradcheck(function, inputs)


def test_any_feature_axis() -> None:
    loop = layer()
    x = random(2, D, 3, 2)
    y = loop(x, feature_dim=1)
    assert y.shape == x.shape
    assert torch.equal(y.movedim(1, -1), loop(x.movedim(1, -1)))


def test_no_token() -> None:
    assert layer()(torch.zeros(2, 0, D, dtype=torch.float64)).shape == (2, 0, D)


def test_relative_error_sees_what_it_must() -> None:
    ones = torch.ones(3)
    assert oracles.relative_error(ones, ones) == 0
    assert oracles.relative_error(ones, ones[:2]) == float("inf")
    assert oracles.relative_error(ones * float("nan"), ones) == float("inf")
    assert oracles.relative_error(torch.zeros(3), ones) == 1
    masked = torch.tensor([1.0, float("-inf")])
    assert oracles.relative_error(masked, masked) == 0
