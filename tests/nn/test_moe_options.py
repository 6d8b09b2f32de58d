"""``MoE`` for one's own model: activations, widths, weighting, shared experts, masks, overrides, iterators, seeds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import choose
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import moefy
from moefy import RouterSpec
from moefy.errors import ConfigError, DtypeError, ShapeError
from moefy.nn import MoE, Router
from nn.blocks import assert_same, results

D, H, E, K = 8, 12, 4, 2


def layer(**options: Any) -> MoE:
    """A float64 layer whose router spreads its weights."""
    moe = MoE(D, H, E, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in moe.router_parameters():
            parameter.mul_(50)
    return moe.to(options.get("dtype", torch.float64))


def tokens(*leading: int) -> Tensor:
    return torch.randn(*(leading or (2, 5)), D, dtype=torch.float64)


def mixture(
    moe: MoE, x_TD: Tensor, expert: Callable[[int, Tensor], Tensor], top_k: int = K, pre: bool = False
) -> Tensor:
    """The layer token by token; ``expert(e, x_D)`` is one expert on one token."""
    rows = []
    for x_D in x_TD:
        logits_E = moe.router.weight @ x_D
        chosen = choose(logits_E, top_k)
        weights = torch.softmax(logits_E[chosen], 0)
        parts = [
            expert(e, w * x_D) if pre else w * expert(e, x_D) for w, e in zip(weights, chosen, strict=True)
        ]
        rows.append(sum(parts))
    return torch.stack(rows)  # type: ignore[arg-type]


def ffn(moe: MoE, act: Callable[[Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
    """``down(act(up(x)))``, or its gated form, with the weights of one expert."""

    def linear(name: str, e: int, x: Tensor) -> Tensor:
        stacked = getattr(moe, name)
        y = stacked.weight[e] @ x
        return y if stacked.bias is None else y + stacked.bias[e]

    def expert(e: int, x: Tensor) -> Tensor:
        up = linear("up_proj", e, x)
        hidden = act(linear("gate_proj", e, x)) * up if hasattr(moe, "gate_proj") else act(up)
        return linear("down_proj", e, hidden)

    return expert


def cube(x: Tensor) -> Tensor:
    return x**3 - x


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    ("activation", "act", "known"),
    [
        ("relu", torch.relu, True),
        (F.silu, F.silu, True),
        (nn.GELU("tanh"), lambda h: F.gelu(h, approximate="tanh"), True),
        (cube, cube, False),
        (nn.Softplus(), F.softplus, False),
    ],
)
def test_activations(activation: Any, act: Any, known: bool, glu: bool, pre: bool) -> None:
    moe, x = layer(activation=activation, glu=glu, weighting="input" if pre else "output"), tokens(7)
    assert (moe.body.known is not None) is known
    reference = lambda x: mixture(moe, x, ffn(moe, act), pre=pre)  # noqa: E731
    assert_same(results(moe, moe, x), results(reference, moe, x), 1e-11)


def test_a_learnable_activation_is_trained_and_shared() -> None:
    prelu, x = nn.PReLU(dtype=torch.float64), tokens(7)
    moe = layer(activation=prelu)
    reference = lambda x: mixture(moe, x, ffn(moe, lambda h: F.prelu(h, prelu.weight)))  # noqa: E731
    assert_same(results(moe, moe, x), results(reference, moe, x), 1e-11)
    assert moe.activation is prelu and prelu.weight.grad.abs().sum() > 0
    assert [p is prelu.weight for p in moe.shared_parameters()] == [True]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("activation", ["gelu", cube])
def test_another_output_width(activation: Any, pre: bool) -> None:
    moe = layer(d_out=3, activation=activation, weighting="input" if pre else "output")
    x, act = tokens(7), F.gelu if activation == "gelu" else cube
    reference = lambda x: mixture(moe, x, ffn(moe, act), pre=pre)  # noqa: E731
    assert_same(results(moe, moe, x), results(reference, moe, x), 1e-11)
    assert moe(tokens(2, 5)).shape == (2, 5, 3) and moe(tokens(0)).shape == (0, 3)


def test_pre_score_in_half_precision_and_without_tokens() -> None:
    moe, exact = layer(weighting="input", dtype=torch.bfloat16), layer(weighting="input")
    exact.load_state_dict(moe.state_dict())
    x = tokens(3, 7)
    y = moe(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact(x.bfloat16().double())).norm() < 2e-2 * exact(x).norm()
    assert all(not g.any() for g in results(exact, exact, tokens(0)))


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_shared_experts(glu: bool, gate: bool) -> None:
    moe = layer(shared_experts=2, shared_hidden=5, shared_gate=gate, glu=glu, activation="silu")
    shared, x = moe.shared_experts, tokens(7)

    def reference(x: Tensor) -> Tensor:
        hidden = F.silu(shared.gate_proj(x)) * shared.up_proj(x) if glu else F.silu(shared.up_proj(x))
        y = shared.down_proj(hidden)
        scale = torch.sigmoid(x @ moe.shared_gate.weight.t()) if gate else 1.0
        return mixture(moe, x, ffn(moe, F.silu)) + scale * y

    assert_same(results(moe, moe, x), results(reference, moe, x), 1e-11)
    assert shared.up_proj.weight.shape == (10, D)
    assert len(list(moe.shared_parameters())) == (3 if glu else 4) + gate


def test_a_shared_module_of_ones_own() -> None:
    own = nn.Linear(D, D, dtype=torch.float64)
    moe, x = layer(shared_experts=own), tokens()
    assert_same([moe(x)], [mixture(moe, x.view(-1, D), ffn(moe, F.gelu)).view_as(x) + own(x)], 1e-11)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_padding_is_not_routed(dtype: torch.dtype) -> None:
    moe, x = layer(shared_experts=1), tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).to(dtype)
    plain = moe(x)
    shared = moe.shared_experts(x)
    expected = torch.where(mask.bool()[..., None], plain, shared)
    assert_same([moe(x, mask=mask)], [expected], 1e-12)


def test_replaced_tokens() -> None:
    moe, x = layer(d_out=3), tokens(2, 3)
    ids = torch.tensor([[0, 1, 2], [7, 0, 0]])
    row = torch.randn(3, dtype=torch.float64, requires_grad=True)
    plain, y = moe(x), moe(x, replace_ids=ids, replacements={1: row, 2: -1.0})
    expected = plain.clone()
    expected[0, 1], expected[0, 2], expected[1, 0] = row, -1.0, 0.0
    assert_same([y], [expected], 1e-12)
    y.sum().backward()
    assert torch.equal(row.grad, torch.ones(3, dtype=torch.float64))
    seen: list[Tensor] = []
    moe.router.register_forward_hook(lambda router, args, routing: seen.append(routing.top_k_index))
    moe(x, replace_ids=ids)
    assert torch.equal((seen[0] < E).all(1), ids.view(-1) == 0)  # the replaced ones go to no expert
    both = moe(x, mask=torch.tensor([[0, 1, 1], [1, 1, 1]]), replace_ids=ids, replacements={1: row, 2: -1.0})
    expected = expected.detach().clone()
    expected[0, 0] = 0.0
    assert_same([both], [expected], 1e-12)


def test_bad_masks() -> None:
    moe, x = layer(), tokens(2, 5)
    with pytest.raises(ShapeError, match="mask"):
        moe(x, mask=torch.ones(2, 4))
    with pytest.raises(DtypeError, match="mask"):
        moe(x, mask=torch.ones(2, 5))
    with pytest.raises(ShapeError, match="replace_ids"):
        moe(x, replace_ids=torch.ones(10, dtype=torch.int64))


def test_overrides_for_one_call() -> None:
    moe, x = layer(), tokens(7)
    assert_same([moe(x, top_k=3)], [mixture(moe, x, ffn(moe, F.gelu), top_k=3)], 1e-11)
    assert moe.top_k == K
    assert_same([moe(x, capacity_factor=0)], [moe(x)], 1e-12)
    same = torch.ones(
        8, D, dtype=torch.float64
    )  # all to one pair of experts, 2 seats each under a factor of 0.5
    y = moe(same, capacity_factor=0.5)
    assert_same([y[:2], y[2:]], [moe(same)[:2], torch.zeros(6, D, dtype=torch.float64)], 1e-12)
    other = tokens(7)
    routing = moe.router(other)
    assert not torch.equal(routing.top_k_index, moe.router(x).top_k_index)
    scored = moe(x, router_input=other)
    rows = [
        sum(w * ffn(moe, F.gelu)(e, x[t]) for w, e in zip(routing.top_k_weights[t], ids, strict=True))
        for t, ids in enumerate(routing.top_k_index.tolist())
    ]
    assert_same([scored], [torch.stack(rows)], 1e-11)


def test_a_capacity_of_the_layer() -> None:
    moe, same = layer(capacity=0.5), torch.ones(8, D, dtype=torch.float64)
    y = moe(same)
    assert y[:2].any() and not y[2:].any()
    passing = layer(capacity=moefy.config.Capacity(factor=0.5, residual=True))
    assert_same([passing(same)[2:]], [same[2:]], 1e-12)
    other = tokens(8)  # what passes is the token, not what the router read
    assert_same([passing(other, router_input=same)[2:]], [other[2:]], 1e-12)
    with pytest.raises(ShapeError, match="residual=False"):
        layer(d_out=3, capacity=moefy.Capacity(factor=0.5, residual=True))(same)


def test_reserved_axes() -> None:
    moe, x = layer(reserve_dims=2), tokens(2, 5)
    flat = layer()
    flat.load_state_dict(moe.state_dict())
    assert_same([moe(x.view(2, 5, 2, 4))], [flat(x)], 1e-12)
    with pytest.raises(ShapeError, match="last 2 axes"):
        moe(x)


def test_parameters_are_in_exactly_one_iterator() -> None:
    moe = layer(shared_experts=1, shared_gate=True, activation=nn.PReLU(), glu=True)
    parts = [moe.router_parameters(), moe.expert_parameters(), moe.shared_parameters()]
    ids = [id(p) for part in parts for p in part]
    assert sorted(ids) == sorted(id(p) for p in moe.parameters())
    assert {id(p) for p in layer().shared_parameters()} == set()


def test_seeds() -> None:
    state = torch.get_rng_state()
    made = [MoE(D, H, E, seed=3, expert_seed=5, shared_experts=1) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert_same([*made[0].parameters()], [*made[1].parameters()], 0.0)
    torch.manual_seed(11)  # what Tutel does with its local seed
    others = MoE(D, H, E, seed=3, expert_seed=6, shared_experts=1)
    assert torch.equal(others.router.weight, made[0].router.weight)
    assert torch.equal(others.shared_experts.up_proj.weight, made[0].shared_experts.up_proj.weight)
    assert not torch.equal(others.up_proj.weight, made[0].up_proj.weight)
    assert not torch.equal(MoE(D, H, E, seed=4).router.weight, made[0].router.weight)
    before = copy.deepcopy(made[0])
    with torch.no_grad():
        for parameter in made[0].parameters():
            parameter.zero_()
    made[0].reset_parameters()
    assert_same([*made[0].parameters()], [*before.parameters()], 0.0)


def test_the_gate_hook_is_a_forward_hook() -> None:
    moe, seen = layer(), []
    moe.router.register_forward_hook(lambda router, args, routing: seen.append(routing.top_k_index))
    moe(tokens(7))
    assert [tuple(s.shape) for s in seen] == [(7, K)]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("weighting", ["output", "input"])
def test_one_graph_for_every_option(weighting: Any) -> None:
    moe = layer(activation=lambda h: h.sigmoid() * h, shared_experts=1, shared_gate=True, weighting=weighting)
    counter = CompileCounter()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for n in (7, 3, 5, 33, 0):
        x, mask = tokens(2, n), torch.rand(2, n) > 0.3
        ids = torch.arange(2 * n).view(2, n) % 3
        got = compiled(x, mask=mask, replace_ids=ids, replacements={1: 2.0})
        assert_same([got], [moe(x, mask=mask, replace_ids=ids, replacements={1: 2.0})], 1e-12)
    assert counter.frame_count <= 3


def test_copies() -> None:
    moe, x = layer(activation=cube, shared_experts=1, weighting="input"), tokens()
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(copied(x), moe(x))


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"d_hidden": None}, "d_hidden"),
        ({"num_experts": None}, "num_experts"),
        ({"d_out": 0}, "d_out"),
        ({"reserve_dims": 0}, "reserve_dims"),
        ({"activation": 3}, "activation"),
        ({"weighting": "both"}, "weighting"),
        ({"shared_experts": -1}, "shared_experts"),
        ({"shared_experts": 1, "shared_hidden": -2}, "shared_hidden"),
        ({"shared_gate": True}, "shared_gate"),
        ({"capacity": "big"}, "capacity"),
        ({"router": Router(D + 1, E, K)}, "router"),
    ],
)
def test_bad_options(options: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        MoE(**{"d_model": D, "d_hidden": H, "num_experts": E, **options})
    assert caught.value.option == option


def test_a_tree_needs_experts_of_its_own() -> None:
    with pytest.raises(ShapeError, match="dict"):
        layer()({"x": tokens()})


def test_several_routers_over_the_same_experts() -> None:
    moe, x = layer(router=["top_k", RouterSpec("sigmoid", top_k=1)]), tokens()
    singles = [
        MoE(D, H, E, router=moe.router.routers[i], top_k=(K, 1)[i], dtype=torch.float64) for i in range(2)
    ]
    for index, single in enumerate(singles):
        experts = {n: v for n, v in moe.state_dict().items() if not n.startswith("router")}
        single.load_state_dict(experts, strict=False)
        assert_same([moe(x, router_index=index)], [single(x)], 1e-12)
    assert_same([moe(x)], [singles[0](x)], 1e-12)
    assert len(list(moe.router_parameters())) == 2
    with pytest.raises(ConfigError, match="router_index"):
        moe(x, router_index=2)


def test_the_auxiliary_loss_of_the_layer() -> None:
    moe, x = layer(aux_loss=moefy.AuxLoss(weight=0.5, delivery="by_hand")), tokens(7)
    assert layer().l_aux is None
    moe(x)
    scores = torch.softmax(x @ moe.router.weight.t(), -1)
    slots = torch.zeros(E, dtype=torch.float64)
    for row in scores.tolist():
        for e in choose(torch.tensor(row), K):
            slots[e] += 1 / (7 * K)
    assert_same([moe.l_aux], [0.5 * E * (slots * scores.mean(0)).sum()], 1e-12)
    moe.l_aux.backward()
    assert moe.router.weight.grad.any()
    assert layer(aux_loss=0.25).router.aux_loss == moefy.AuxLoss(weight=0.25)


def test_a_layer_without_parameters_is_reset_too() -> None:
    moe = MoE(D, num_experts=2, experts=nn.Identity, router="zero")
    moe.reset_parameters()
    x = tokens()
    assert_same(moe(x), x)
