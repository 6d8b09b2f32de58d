"""``encode`` and ``decode`` against loops over tokens, each the other's adjoint, and a batched expert between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from moefy.config import Capacity
from moefy.errors import ShapeError
from moefy.nn import MoE, Router, Routing
from moefy.nn.experts.buffers import decode, encode
from nn.blocks import assert_same, results

D, H, E, K = 5, 7, 4, 2


def router(capacity: Capacity | None = None) -> Router:
    """One that spreads its weights."""
    torch.manual_seed(0)
    made = Router(D, E, K, std=1.0, dtype=torch.float64)
    made.capacity = capacity
    return made


def places(routing: Routing, capacity: int) -> list[tuple[int, int, int, int]]:
    """(token, choice, expert, place) of every slot that has a place, counted token by token."""
    taken, found = [0] * E, []
    for t, row in enumerate(routing.top_k_index.tolist()):
        for k, e in enumerate(row):
            if e < E:
                if taken[e] < capacity:
                    found.append((t, k, e, taken[e]))
                taken[e] += 1
    return found


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("capacity", [0, 1, 3, 20])
@pytest.mark.parametrize("limit", [None, Capacity(factor=0.6, drop="probability")])
def test_loops(tokens: int, capacity: int, limit: Capacity | None) -> None:
    x, y = torch.randn(tokens, D, dtype=torch.float64), torch.randn(E, capacity, H, dtype=torch.float64)
    routing = router(limit)(x)
    buffers, out = x.new_zeros(E, capacity, D), x.new_zeros(tokens, H)
    for t, k, e, c in places(routing, capacity):
        buffers[e, c] = x[t]
        out[t] += routing.top_k_weights[t, k].detach() * y[e, c]
    assert torch.equal(encode(x, routing, capacity), buffers)
    torch.testing.assert_close(decode(y, routing), out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("capacity", [2, 9])
def test_gradients(capacity: int) -> None:
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    y = torch.randn(E, capacity, H, dtype=torch.float64, requires_grad=True)
    routing = router()(x.detach())
    weights = routing.top_k_weights.detach().requires_grad_()

    def weighted(y: Tensor, weights: Tensor) -> Tensor:
        routing.top_k_weights = weights
        return decode(y, routing)

    assert torch.autograd.gradcheck(lambda x: encode(x, routing, capacity), x)
    assert torch.autograd.gradcheck(weighted, (y, weights))
    # <encode(x), z> = <x, decode(z)> where every weight is 1
    z = torch.randn(E, capacity, D, dtype=torch.float64)
    left, right = (encode(x, routing, capacity) * z).sum(), (x * weighted(z, torch.ones_like(weights))).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-12)


def batched(moe: MoE, x: Tensor, capacity: int) -> Tensor:
    """The layer's experts as batched products over padded buffers."""
    routing = moe.router(x)
    x_ECD = encode(x, routing, capacity)
    h_ECH = F.gelu(torch.baddbmm(moe.up_proj.bias[:, None], x_ECD, moe.up_proj.weight.mT))
    return decode(torch.baddbmm(moe.down_proj.bias[:, None], h_ECH, moe.down_proj.weight.mT), routing)


@pytest.mark.parametrize("capacity", [None, Capacity(factor=0.5, rule="tutel", drop="batch_prioritized")])
def test_batched_experts_equal_the_grouped_ones(capacity: Any) -> None:
    torch.manual_seed(0)
    moe, x = MoE(D, H, E, top_k=K, dtype=torch.float64), torch.randn(9, D, dtype=torch.float64)
    moe.router.capacity = capacity
    seats = moe.router(x).capacity or 9
    assert isinstance(seats, int)
    assert_same(results(lambda x: batched(moe, x, seats), moe, x), results(moe, moe, x), 1e-11)


def test_wrong_sizes() -> None:
    x = torch.randn(9, D, dtype=torch.float64)
    routing = router()(x)
    with pytest.raises(ShapeError, match="capacity -1"):
        encode(x, routing, -1)
    with pytest.raises(ShapeError, match="18"):
        encode(x[:5], routing, 3)
    with pytest.raises(ShapeError, match="3 experts"):
        decode(torch.randn(E - 1, 3, D), routing)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_lengths() -> None:
    torch.manual_seed(0)
    moe, counter = MoE(D, H, E, top_k=K, dtype=torch.float64), CompileCounter()
    moe.router.capacity = Capacity(factor=1.0)

    def layer(x: Tensor) -> Tensor:
        return batched(moe, x, -(-x.shape[0] * K // E))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (9, 6, 40):
        x = torch.randn(tokens, D, dtype=torch.float64)
        assert_same([compiled(x)], [layer(x)], 1e-12)
    assert counter.frame_count == 1
