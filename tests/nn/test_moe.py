"""``MoE`` by itself and in the place of a user's FFN, its body, its router, its entry and its exit."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import LoopLayer
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

from moefy.errors import ConfigError, RoutingError, ShapeError
from moefy.nn import Body, ExpertLinear, InPlaceMoE, KnownBody, MoE, Router, WeightRef
from moefy.nn.dispatch import Exchange, expert_entry, expert_exit, route_by
from moefy.nn.experts.body import activate
from moefy.nn.routers import router_init_
from moefy.nn.routing.layout import as_tokens
from nn.blocks import assert_same, results

D, H, E, K = 8, 12, 4, 2
SHAPES = [(D,), (5, D), (2, 5, D), (2, 1, 3, D), (0, D), (2, 0, D)]


def layer(**options: Any) -> MoE:
    """A float64 layer whose router spreads its weights."""
    moe = MoE(D, H, E, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        moe.router.weight.mul_(50)
    return moe


def loop(moe: MoE, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same layer token by token."""
    names = ("gate_proj", "up_proj") if hasattr(moe, "gate_proj") else ("up_proj",)
    body = (lambda gate, up: act(gate) * up) if len(names) == 2 else act
    stacked = [(getattr(moe, n).weight, getattr(moe, n).bias) for n in (*names, "down_proj")]
    spec = LoopLayer(entries=stacked[:-1], exit=stacked[-1], body=body, router_ED=moe.router.weight, top_k=K)
    return spec(x.reshape(-1, D)).reshape(x.shape)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("options", "act"),
    [({}, F.gelu), ({"activation": "silu", "glu": True}, F.silu), ({"activation": "relu", "bias": False}, F.relu),
     ({"activation": "gelu_tanh", "glu": True, "bias": True}, lambda h: F.gelu(h, approximate="tanh"))],
)  # fmt: skip
def test_distinct_experts_equal_the_loop(options: Any, act: Callable[[Tensor], Tensor], fused: bool) -> None:
    moe, x = layer(**options), torch.randn(3, 5, D, dtype=torch.float64)
    moe.body.known = moe.body.known if fused else None
    assert_same(results(moe, moe, x), results(lambda x: loop(moe, act, x), moe, x), 1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_copied_experts_equal_the_dense_layer(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    moe = MoE(D, H, E, dtype=dtype)
    with torch.no_grad():
        for weight in (*moe.up_proj.parameters(), *moe.down_proj.parameters()):
            weight.copy_(weight[:1].expand_as(weight))
    up, down = moe.up_proj, moe.down_proj
    x = torch.randn(shape, dtype=dtype)
    dense = F.linear(F.gelu(F.linear(x, up.weight[0], up.bias[0])), down.weight[0], down.bias[0])
    assert_same([moe(x)], [dense], tolerance)


def test_no_tokens_give_no_gradient() -> None:
    moe = layer()
    got = results(moe, moe, torch.randn(0, D, dtype=torch.float64))
    assert all(not g.any() for g in got)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("known", [True, False])
def test_one_graph_for_all_lengths(known: bool) -> None:
    moe, counter = layer(glu=True), CompileCounter()
    moe.body.known = moe.body.known if known else None
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 1, 2, 5, 33, 0):
        x = torch.randn(2, tokens, D, dtype=torch.float64)
        assert_same([compiled(x)], [moe(x)])
    assert counter.frame_count <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_share_compiled_code() -> None:
    counter, layers = CompileCounter(), nn.Sequential(*[custom() for _ in range(12)])
    for one in layers:
        one.compile(backend=counter, fullgraph=True)
    layers(torch.randn(2, 5, D))
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_has_the_same_gradients() -> None:
    moe, x = layer(glu=True), torch.randn(2, 5, D, dtype=torch.float64)
    assert_same(results(torch.compile(moe, fullgraph=True), moe, x), results(moe, moe, x), 1e-10)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    moe, x = layer(), torch.randn(2, 5, D, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: batch},), strict=strict)
    other = torch.randn(7, 5, D, dtype=torch.float64)
    assert_same([program.module()(other)], [moe(other)], 1e-12)


def test_copies_and_state_dict() -> None:
    moe, x = layer(glu=True), torch.randn(2, 5, D, dtype=torch.float64)
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(copied(x), moe(x))
    assert {n: tuple(p.shape) for n, p in moe.state_dict().items()} == {
        "gate_proj.weight": (E, H, D),
        "up_proj.weight": (E, H, D),
        "down_proj.weight": (E, D, H),
        "router.weight": (E, D),
    }
    other = layer(glu=True, seed=1)
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))


def test_print() -> None:
    text = repr(MoE(D, H, E, glu=True, activation="silu"))
    assert "experts=4, top_k=2, body='silu', glu='separate'" in text
    assert "(router): Router(d_model=8, num_experts=4, top_k=2)" in text


def test_dtypes_and_devices() -> None:
    x = torch.randn(2, 5, D)
    assert MoE(D, H, E).half()(x.half()).dtype == torch.float16
    moe = MoE(D, H, E).to(torch.bfloat16)
    assert moe(x.bfloat16()).dtype == torch.bfloat16
    meta = MoE(D, H, E, device="meta")
    assert meta(x.to("meta")).shape == x.shape
    made = meta.to_empty(device="cpu")
    made.reset_parameters()
    assert torch.equal(made.router.weight, MoE(D, H, E).router.weight) and made(x).isfinite().all()


def test_autocast_routes_in_fp32() -> None:
    moe, x = MoE(D, H, E), torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x), moe.router(x)
    assert y.dtype == torch.bfloat16
    assert routing.router_logits.dtype == routing.top_k_weights.dtype == torch.float32
    assert torch.equal(routing.router_logits, moe.router(x).router_logits)
    assert (y.float() - moe(x)).norm() / moe(x).norm() < 2e-2


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_hidden": -1}, "d_hidden"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 2.0}, "num_experts"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": E + 1}, "top_k"),
        ({"activation": "geluu"}, "activation"),
        ({"router": "topk"}, "router"),
        ({"router": Router(D, E + 1, K)}, "router"),
    ],
)
def test_bad_options(options: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        MoE(**{"d_model": D, "d_hidden": H, "num_experts": E, **options})
    assert caught.value.option == option


def test_a_misspelt_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gelu'"):
        MoE(D, H, E, activation="geluu")
    with pytest.raises(TypeError):
        MoE(D, H, E, topk=1)  # pyright: ignore[reportCallIssue]


def test_a_wrong_width() -> None:
    with pytest.raises(ShapeError, match="8 features"):
        MoE(D, H, E)(torch.randn(2, D + 1))


def test_an_own_router_is_used() -> None:
    router = Router(D, E, K, std=1.0)
    assert MoE(D, H, E, router=router).router is router


class StarReLU(nn.Module):
    """``s * relu(x)^2 + b`` with learnable s and b (MetaFormer baselines)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(-0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


def star_graph() -> fx.Graph:
    """A body of a learnable module and a functional dropout."""
    graph = fx.Graph()
    hidden = graph.call_module("act", (graph.placeholder("h0"),))
    training = graph.get_attr("training")
    graph.output(graph.call_function(F.dropout, (hidden, 0.5, training)))
    return graph


def custom(known: KnownBody | None = None, **options: Any) -> MoE:
    """An MoE under the names of somebody's FFN, with a learnable activation."""
    moe = InPlaceMoE(
        entries=[WeightRef("fc1.weight", "fc1.bias")],
        exit=WeightRef("fc2.weight", "fc2.bias"),
        body=Body.from_graph(star_graph(), known),
        router=Router(D, E, K, std=1.0),
        num_experts=E,
        **options,
    )
    moe.fc1, moe.fc2, moe.act = ExpertLinear(D, H, E), ExpertLinear(H, D, E), StarReLU()
    return moe.eval()


def test_in_place_equals_the_loop() -> None:
    moe, x = custom().double(), torch.randn(2, 5, D, dtype=torch.float64)

    def reference(x: Tensor) -> Tensor:
        spec = LoopLayer(
            entries=[(moe.fc1.weight, moe.fc1.bias)],
            exit=(moe.fc2.weight, moe.fc2.bias),
            body=moe.act,
            router_ED=moe.router.weight,
            top_k=K,
        )
        return spec(x.reshape(-1, D)).reshape(x.shape)

    assert_same(results(moe, moe, x), results(reference, moe, x), 1e-11)
    assert "fc1.weight" in moe.state_dict() and "act.scale" in moe.state_dict()


def test_in_place_on_channels() -> None:
    flat, channels = custom(), custom(feature_dim=-3)
    channels.load_state_dict(flat.state_dict())
    x = torch.randn(2, D, 3, 4)
    expected = flat(x.movedim(1, -1)).movedim(-1, 1)
    assert_same([channels(x), channels(x[0])], [expected, expected[0]], 1e-6)
    assert channels(x).is_contiguous()


def test_in_place_answers_as_the_module_did() -> None:
    x = torch.randn(2, 5, D)
    moe = custom(returns="tuple", input_name="hidden_states")
    y, bias = moe(hidden_states=x)
    assert bias is None and torch.equal(y, moe(x)[0])
    with pytest.raises(TypeError, match="hidden_states"):
        moe(x, torch.randn(2))
    with pytest.raises(TypeError, match="hidden_states"):
        moe()
    with pytest.raises(ConfigError, match="entries"):
        InPlaceMoE(
            entries=[], exit=WeightRef("w"), body=Body.of("gelu"), router=Router(D, E, K), num_experts=E
        )


def test_an_active_dropout_runs_the_body_as_written() -> None:
    graph = fx.Graph()
    dropped = graph.call_module("drop", (graph.call_function(F.gelu, (graph.placeholder("h0"),)),))
    graph.output(dropped)
    body = Body.from_graph(graph, KnownBody("gelu"))
    owner = nn.Module()
    owner.drop, owner.act = nn.Dropout(0.5), nn.ReLU()
    assert body.fused(owner.train()) is None
    assert body.fused(owner.eval()) == KnownBody("gelu")
    owner.drop.train()  # Monte-Carlo dropout: the owner evaluates, the dropout does not
    assert body.fused(owner) is None
    owner.drop.p = 0.0
    assert body.fused(owner.train()) == KnownBody("gelu")
    functional_dropout = Body.from_graph(star_graph(), KnownBody("relu2"))
    assert functional_dropout.fused(owner.train()) is None
    assert functional_dropout.fused(owner.eval()) == KnownBody("relu2")


@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first", "merged_gate_last"])
@pytest.mark.parametrize("gate", [0, 1])
def test_known_bodies(glu: Any, gate: int) -> None:
    body = Body.of("silu", glu, gate)
    rows = [torch.randn(1, 6, H), torch.randn(1, 6, H)]
    if glu == "none":
        got, expected = body(nn.Module(), rows[0]), F.silu(rows[0])
    elif glu == "separate":
        got, expected = body(nn.Module(), *rows), F.silu(rows[gate]) * rows[1 - gate]
    else:
        act, other = rows if glu == "merged_gate_first" else rows[::-1]
        got, expected = body(nn.Module(), torch.cat(rows, -1)), F.silu(act) * other
    assert_same([got], [expected], 1e-6)  # fp32; halves are strided, which rounds otherwise


@pytest.mark.parametrize("bad", [{"activation": "nope"}, {"activation": "gelu", "glu": "nope"}])
def test_unknown_bodies(bad: Any) -> None:
    with pytest.raises(ConfigError):
        Body.of(**bad)
    with pytest.raises(ConfigError):
        Body.from_graph(star_graph(), KnownBody(**bad))


def test_a_body_pickles_as_text_and_equal_ones_share_their_function() -> None:
    body = Body.from_graph(star_graph())
    again = pickle.loads(pickle.dumps(body))
    assert again.function is body.function is Body.from_graph(star_graph()).function
    assert "self.act(h0)" in body.code and "dropout" in repr(body)
    assert copy.deepcopy(body).function is body.function


def test_a_body_shows_its_source_in_tracebacks() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(operator.add, (graph.placeholder("h0"), "no tensor")))
    with pytest.raises(TypeError) as caught:
        Body.from_graph(graph)(nn.Module(), torch.randn(2))
    assert "no tensor" in str(caught.traceback[-1].statement)


def test_activate() -> None:
    x = torch.randn(4)
    assert torch.equal(activate(x, "relu2"), F.relu(x).square())


def test_router_depends_on_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    same = [Router(D, E, K, seed=3, fqn="a.b").weight for _ in range(2)]
    assert torch.equal(*same) and torch.equal(torch.get_rng_state(), state)
    others = [Router(D, E, K, seed=4, fqn="a.b"), Router(D, E, K, seed=3, fqn="a.c")]
    assert all(not torch.equal(other.weight, same[0]) for other in others)
    wide = router_init_(torch.empty(64, 512), seed=0, fqn="x", std=0.02)
    assert abs(wide.std().item() / 0.02 - 1) < 0.02 and abs(wide.mean().item()) < 1e-3


def test_ties_go_to_the_lowest_id_and_weights_sum_to_one() -> None:
    router = Router(D, E, 3)
    with torch.no_grad():
        router.weight.zero_()
    routing = router(torch.randn(2, 5, D))
    assert routing.top_k_index.tolist() == [[0, 1, 2]] * 10
    assert_same([routing.top_k_weights.sum(-1)], [torch.ones(10)], 1e-6)
    assert routing.tokens_per_expert.tolist() == [10, 10, 10, 0]
    assert (routing.leading, routing.top_k) == ((2, 5), 3)


def test_nan_stays_with_its_token() -> None:
    moe, x = MoE(D, H, E), torch.randn(5, D)
    expected = moe(x)
    x[2] = float("nan")
    routing = moe.router(x)
    assert ((routing.top_k_index >= 0) & (routing.top_k_index < E)).all()
    others = [0, 1, 3, 4]
    assert moe(x)[2].isnan().all()
    assert_same([moe(x)[others]], [expected[others]])


@pytest.mark.parametrize(
    ("shape", "feature_dim", "rows"),
    [
        ((D,), -1, (K, H)),
        ((5, D), -1, (10, H)),
        ((2, 5, D), -1, (1, 20, H)),
        ((2, 5, D), 2, (1, 20, H)),
        ((2, 3, 5, D), -1, (1, 1, 60, H)),
        ((2, D, 5), 1, (20, H, 1)),
        ((2, D, 5, 3), 1, (60, H, 1, 1)),
        ((2, D, 5, 3), -3, (60, H, 1, 1)),
        ((D, 5, 3), -3, (H, 30, 1)),
        ((2, D, 2, 2, 2), -4, (32, H, 1, 1, 1)),
    ],
)
def test_rows_keep_rank_and_feature_axis(
    shape: tuple[int, ...], feature_dim: int, rows: tuple[int, ...]
) -> None:
    x, router = torch.randn(shape), torch.randn(E, D)
    up, down = torch.randn(E, H, D), torch.randn(E, D, H)
    exchange = exchange_by(x, router, feature_dim)
    h = expert_entry(x, up, None, exchange)
    assert h.shape == rows
    y = expert_exit(h, down, None, exchange)
    tokens = x.movedim(feature_dim, -1).reshape(-1, D)
    spec = LoopLayer(entries=[(up, None)], exit=(down, None), body=lambda h: h, router_ED=router, top_k=K)
    assert y.shape == x.shape
    assert_same([y.movedim(feature_dim, -1).reshape(-1, D)], [spec(tokens).to(y.dtype)])


def exchange_by(x: Tensor, weight_ED: Tensor, feature_dim: int = -1) -> Exchange:
    """The exchange of ``x`` by a router of that matrix."""
    router = Router(D, E, K)
    with torch.no_grad():
        router.weight.copy_(weight_ED)
    return route_by(router, x, feature_dim=feature_dim)


def test_functional_errors() -> None:
    x = torch.randn(5, D)
    with pytest.raises(ShapeError, match="feature axis"):
        as_tokens(x, 2)
    with pytest.raises(RoutingError, match="9 rows"):
        expert_exit(torch.randn(9, H), torch.randn(E, D, H), None, exchange_by(x, torch.randn(E, D)))


def test_expert_linear() -> None:
    linear = ExpertLinear(D, H, E)
    assert (linear.weight.shape, linear.bias.shape) == ((E, H, D), (E, H))
    assert linear.weight.abs().max() <= D**-0.5 and linear.weight.std() > 0.1
    assert ExpertLinear(D, H, E, bias=False).bias is None
    with pytest.raises(NotImplementedError, match="MoE"):
        linear(torch.randn(2, D))
    with pytest.raises(ConfigError, match="out_features"):
        ExpertLinear(D, 0, E)
