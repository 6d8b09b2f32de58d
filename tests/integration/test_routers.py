"""Every router in every form: the layer, an inline FFN, a rewritten graph; compiled, checkpointed, in the config.

Forms that route by one seed must agree with each other, gradients included.
"""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import moefy
from integration.models import assert_close
from moefy.config import default_top_k
from moefy.errors import ConfigError
from moefy.nn import Router
from moefy.nn.routers import ROUTERS, Trace, make_router, play, record
from moefy.nn.routers.replay import ReplayRouter
from moefy.nn.routers.scored import ScoreTopK

D, H, E, T = 8, 12, 4, 10
SPECS: dict[str, Any] = {
    **{name: name for name in ROUTERS},
    "topology": moefy.RouterSpec("topology", experts_per_node=2),
    "swipe": moefy.RouterSpec("swipe", num_workers=2),
    "tutel_top": moefy.RouterSpec("tutel_top", gate_noise=1.0),
    "group_limited": moefy.RouterSpec("group_limited", n_groups=2, topk_groups=1),
    "bias_balanced": moefy.RouterSpec("bias_balanced", n_groups=2, topk_groups=1, rate=0.1),
    "multi": moefy.RouterSpec("multi", routers=("top_k", moefy.RouterSpec("sigmoid", scale=2.0))),
    "custom": lambda d_model, num_experts: nn.Linear(d_model, num_experts),
}
each = pytest.mark.parametrize("name", SPECS)
# Nothing in them learns.
WITHOUT_PARAMETERS = ("zero", "hash")


class Block(nn.Module):
    """An inline FFN with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def distinct(model: nn.Module) -> nn.Module:
    """Random experts and decisive routers, by one seed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "tau" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
    for router in model.modules():
        if isinstance(router, ReplayRouter):
            slots = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], 1)
            router.set_trace(slots)
    return model


def inline(name: str, layers: int = 1) -> nn.Module:
    dense = nn.Sequential(*[Block() for _ in range(layers)]).double()
    return distinct(moefy.transform(dense, E, router=SPECS[name], example_args=(tokens(),)))


def tokens(seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, T // 2, D, dtype=torch.float64, generator=generator)


def results(forward: Any, model: nn.Module, x: Tensor, seed: int = 11) -> list[Tensor]:
    """Output and every gradient, of one draw."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [y.detach(), x.grad, *[g.clone() for g in grads]]  # pyright: ignore[reportReturnType]


def assert_all_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-10) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def by_hand(block: nn.Module, x: Tensor) -> Tensor:
    """The block token by token under the routing that its router draws."""
    fc1, fc2 = block.fc1, block.fc2
    source = block.norm(x)  # pyright: ignore
    routing = fc1.router(source)  # pyright: ignore
    rows = []
    for token, ids, weights in zip(
        source.reshape(-1, D), routing.top_k_index, routing.top_k_weights, strict=True
    ):
        parts = [
            w * (fc2.weight[e] @ F.gelu(fc1.weight[e] @ token + fc1.bias[e]) + fc2.bias[e])  # pyright: ignore
            for e, w in zip(ids.tolist(), weights, strict=True)
            if 0 <= e < E
        ]
        rows.append(sum(parts, torch.zeros(D, dtype=x.dtype)))
    return x + torch.stack(rows).view_as(x)


@each
def test_inline_equals_the_token_loop(name: str) -> None:
    model, x = inline(name), tokens()
    for mode in (model.train(), model.eval()):
        assert_all_close(results(mode, model, x), results(lambda x: by_hand(model[0], x), model, x))  # pyright: ignore
    reached = [
        n for n, p in model.named_parameters() if "router" in n and p.grad is not None and p.grad.any()
    ]
    assert bool(reached) == (name not in WITHOUT_PARAMETERS)


@each
def test_the_layer_equals_the_inline_form(name: str) -> None:
    model, x = inline(name).eval(), tokens()
    fc1, fc2 = model[0].fc1, model[0].fc2  # pyright: ignore
    moe = moefy.MoE(D, H, E, router=SPECS[name], dtype=torch.float64).eval()
    pairs = [(moe.up_proj, fc1), (moe.down_proj, fc2)]
    for new, old in pairs:
        new.weight.data, new.bias.data = old.weight.data, old.bias.data  # pyright: ignore
    moe.router.load_state_dict(fc1.router.state_dict())  # pyright: ignore
    distinct_trace = getattr(fc1.router, "trace", None)
    if isinstance(moe.router, ReplayRouter):
        moe.router.set_trace(distinct_trace)  # pyright: ignore
    assert_close(x + moe(model[0].norm(x)), model(x), 1e-10)  # pyright: ignore


@each
@pytest.mark.parametrize("kind", ["symbolic_trace", "export"])
def test_a_rewritten_graph_equals_the_inline_form(name: str, kind: str) -> None:
    x, model = tokens(), inline(name)
    dense = nn.Sequential(Block()).double()
    graph = (
        fx.symbolic_trace(dense) if kind == "symbolic_trace" else torch.export.export(dense, (x,)).module()
    )
    gm = distinct(moefy.transform(graph, E, router=SPECS[name], example_args=(x,)))
    gm.load_state_dict(model.state_dict())
    assert_all_close([r.detach() for r in results(gm, gm, x)[:2]], results(model, model, x)[:2])
    pickles = kind == "symbolic_trace" and name != "custom"
    twin = pickle.loads(pickle.dumps(gm)) if pickles else copy.deepcopy(gm)
    torch.manual_seed(1)
    want = gm(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), want)
    if kind == "symbolic_trace":
        torch.manual_seed(1)
        assert torch.equal(fx.symbolic_trace(gm)(x), want)


@each
def test_compiled_without_recompiles(name: str, fresh_dynamo: None) -> None:
    model = inline(name)
    counter = CompileCounter()
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    batches = (2,) if name == "replay" else (2, 3, 7)
    for batch in batches:
        x = tokens(batch=batch)
        assert_all_close(results(fast, model, x), results(model, model, x))
    frames = counter.frame_count
    for batch in batches:
        results(fast, model, tokens(seed=1, batch=batch))
    assert counter.frame_count == frames == 1


@each
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed(name: str, reentrant: bool) -> None:
    model, x = inline(name), tokens()
    plain = results(model, model, x)
    again = results(lambda x: checkpoint(model, x, use_reentrant=reentrant), model, x)
    assert_all_close(again, plain, 1e-12)


@pytest.mark.parametrize("name", ["switch", "gshard", "bias_balanced", "expert_choice"])
def test_checkpointed_and_compiled(name: str, fresh_dynamo: None) -> None:
    model, x = inline(name), tokens()
    plain = results(model, model, x)

    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)  # pyright: ignore

    assert_all_close(results(torch.compile(run, backend="aot_eager", fullgraph=True), model, x), plain)


@each
def test_copies_of_a_model(name: str) -> None:
    model, x = inline(name).eval(), tokens()
    twins = [copy.deepcopy(model)] + ([] if name == "custom" else [pickle.loads(pickle.dumps(model))])
    for twin in twins:
        assert torch.equal(twin(x), model(x))


@each
def test_exported(name: str) -> None:
    model, x = inline(name).eval(), tokens()
    batch = {0: torch.export.Dim("batch", min=2, max=64)} if name != "replay" else None
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,) if batch else None, strict=False)
    other = tokens(batch=5) if batch else x
    assert_close(program.module()(other), model(other), 1e-12)


# -- exactness ---------------------------------------------------------------------------------------------------------
@each
def test_the_report_says_whether_it_is_exact(name: str) -> None:
    dense, x = nn.Sequential(Block(), Block()).eval(), tokens().float()
    expected = dense(x)
    model = moefy.transform(copy.deepcopy(dense), E, router=SPECS[name], example_args=(x,))
    report, dry = moefy.report(model), moefy.report(dense, E, router=SPECS[name], example_args=(x,))
    exact = {layer.exactness.split()[0] for layer in report.layers}
    assert len(exact) == 1 and report.check_error is not None and report.check_error < 1e-6
    assert {layer.exactness.split()[0] for layer in dry.layers} == exact
    assert [layer.params_total for layer in dry.layers] == [layer.params_total for layer in report.layers]
    held = sum(p.numel() for p in model.parameters())
    assert report.params_total == held
    departs = exact == {"not"}
    assert departs == any("differs from the dense" in warning for warning in report.warnings)
    assert departs == ("even weights" in str(report).replace("\n", " "))
    if name not in ("replay",):
        error = ((model(x) - expected).norm() / expected.norm()).item()
        assert departs or error < 1e-6
    if name in ("softmax_top_k", "switch", "expert_choice"):
        assert departs and error > 1e-3
    moefy.undo(model)
    assert torch.equal(model(x), expected)


def test_a_wrong_rewrite_fails_the_check_of_any_router(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefy.rewrite.methods import copy

    def wrong(dense: Tensor, num_experts: int, layout: Any) -> nn.Parameter:
        stacked = copies(dense, num_experts, layout)
        stacked.data[1] *= 2
        return stacked

    copies = copy.copies
    monkeypatch.setattr(copy, "copies", wrong)
    with pytest.raises(moefy.errors.CheckFailed):
        moefy.transform(nn.Sequential(Block()), E, router="switch", example_args=(tokens().float(),))


def test_a_router_by_token_ids_is_transformed_without_them() -> None:
    spec = moefy.RouterSpec("hash", by="token", size=64)
    model = moefy.transform(nn.Sequential(Block()), E, router=spec, example_args=(tokens().float(),))
    assert moefy.report(model).layers[0].exactness.startswith("exact")
    assert model[0].fc1.router.top_k == 1  # pyright: ignore


# -- config ------------------------------------------------------------------------------------------------------------
class Doubled(Router):
    """A subclass of one's own."""

    def __init__(self, *args: Any, factor: float = 2.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.factor = factor

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        return self.factor * super().logits(x, feature_dim)


@pytest.mark.parametrize("router", [Doubled, functools.partial(Doubled, factor=3.0)])
def test_a_class_of_ones_own(router: Any) -> None:
    x = tokens().float()
    model = moefy.transform(nn.Sequential(Block()), E, router=router, example_args=(x,))
    assert type(model[0].fc1.router) is Doubled  # pyright: ignore
    assert type(moefy.MoE(D, H, E, router=router).router) is Doubled
    report = moefy.report(pickle.loads(pickle.dumps(model)))
    assert "Doubled" in str(report) and "Doubled" in report.to_json()
    with pytest.raises(ConfigError, match="no JSON form"):
        moefy.MoEConfig(num_experts=E, router=router).to_json()


def test_one_router_cannot_serve_all_layers() -> None:
    with pytest.raises(ConfigError, match="one router per layer"):
        moefy.transform(nn.Sequential(Block()), E, router=Router(D, E, 2), example_args=(tokens().float(),))
    with pytest.raises(ConfigError, match="router"):
        moefy.MoEConfig(num_experts=E, router=3)  # pyright: ignore


def test_a_bad_router_is_refused_before_anything_runs() -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    for options in (
        {"router": "nope"},
        {"router": moefy.RouterSpec("switch", jitter=2.0)},
        {"router": "gshard", "top_k": 1},
    ):
        with pytest.raises(ConfigError):
            moefy.transform(Never(), E, example_args=(1,), **options)  # pyright: ignore


def test_config_round_trip() -> None:
    spec = moefy.RouterSpec("multi", routers=["top_k", moefy.RouterSpec("dc", rates=[1.5, 2.5])])
    config = moefy.MoEConfig(num_experts=E, router=spec)
    again = moefy.MoEConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    rates = make_router(again.router, D, E, 2).routers[1].rates  # pyright: ignore
    assert rates == (1.5, 2.5)
    with pytest.raises(ConfigError, match="'module'"):
        moefy.MoEConfig(num_experts=E, router=moefy.RouterSpec("custom", module=F.relu)).to_json()


def test_default_k_is_the_routers_own() -> None:
    for name, cls in ROUTERS.items():
        if cls.only_top_k is not None:
            assert default_top_k(name, 8) == cls.only_top_k == default_top_k(cls, 8)
    assert moefy.MoEConfig.resolve(None, num_experts=8, router="switch").top_k == 1
    assert moefy.MoE(D, H, E, router="switch").top_k == 1 and moefy.MoE(D, H, E).top_k == 2
    assert moefy.MoE(D, H, E, router=Router(D, E, 3)).top_k == 3


def test_at_compile_time(fresh_dynamo: None) -> None:
    from moefy.compiler.backend import backend

    model, x = nn.Sequential(Block()).eval(), tokens().float()
    options = {"num_experts": E, "router": moefy.RouterSpec("sigmoid", scale=2.0), "inner": "eager"}
    with pytest.warns(UserWarning, match="optimizer"):
        torch.compile(model, backend=backend, options=options)(x)
    router = model[0].fc1.router  # pyright: ignore
    assert isinstance(router, ScoreTopK) and router.scale == 2.0


# -- record and replay -------------------------------------------------------------------------------------------------
def test_record_and_replay(tmp_path: Any) -> None:
    dense, batches = nn.Sequential(Block(), Block()).double(), [tokens(seed) for seed in range(3)]
    model = distinct(moefy.transform(copy.deepcopy(dense), E, example_args=(batches[0],)))
    with record(model) as trace:
        want = [model(x) for x in batches]
        checkpoint(model, batches[0].requires_grad_(), use_reentrant=False).sum().backward()  # pyright: ignore
    assert {len(v) for v in trace.entries.values()} == {4} and len(trace.entries) == 2
    path = tmp_path / "routing.pt"
    trace.save(path)
    spec = moefy.RouterSpec("replay", trace=str(path))
    twin = moefy.transform(dense, E, example_args=(batches[0],), router=spec)
    twin.load_state_dict(model.state_dict())
    with play(twin):
        for x, y in zip(batches, want, strict=True):
            assert torch.allclose(twin(x), y, rtol=1e-12)
    with play(twin, start=1):
        assert torch.allclose(twin(batches[1]), want[1], rtol=1e-12)
    with play(twin, start=1):
        assert not torch.allclose(twin(batches[0]), want[0])
    with pytest.raises(moefy.errors.ShapeError, match="the trace has 10"):
        twin(batches[0][:, :3])
    with pytest.raises(moefy.errors.RoutingError, match="no trace"):
        make_router("replay", D, E, 2)(batches[0])
    with pytest.raises(ConfigError, match="a router of the trace"):
        Trace.load(path).of("nobody")


def test_a_checkpoint_replays_the_same_entry() -> None:
    model, x = inline("replay"), tokens()
    router = model[0].fc1.router  # pyright: ignore
    router.set_trace(torch.randint(0, E, (4, T, 2)))
    with play(model):
        plain = [results(model, model, x) for _ in range(3)]
    outer = Checkpointed(model)
    with play(outer):
        for want in plain:
            assert_all_close(results(outer, model, x), want, 1e-12)


class Checkpointed(nn.Module):
    """Runs its model under a checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)  # pyright: ignore
