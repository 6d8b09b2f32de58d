"""Capacity and the padding mask in routers and layers: against a loop over tokens, compiled, checkpointed, copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import affine, choose
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moefy
from moefy.config import Capacity
from moefy.errors import ShapeError
from moefy.nn import MoE, Router
from moefy.nn.dispatch import LOCAL, add_residual, begin_exchange, expert_entry, expert_exit, stranded_tokens
from moefy.nn.routing.routing import Routing
from nn import blocks
from nn.blocks import Conv, Glu, Mlp, assert_same, results, rewrite

D, H, E, K = 8, 12, 4, 2


def layer(capacity: Capacity | None, dtype: torch.dtype = torch.float64) -> MoE:
    """A layer whose router spreads its weights."""
    torch.manual_seed(0)
    moe = MoE(D, H, E, top_k=K, dtype=dtype)
    with torch.no_grad():
        moe.router.weight.mul_(50)
    moe.router.capacity = capacity
    return moe


class Seats:
    """Seats by position, token by token, as anybody would count them."""

    def __init__(self, seats: int) -> None:
        self.seats, self.taken = seats, [0] * E

    def take(self, chosen: list[int]) -> list[int]:
        """The places k of those ``chosen`` that still have a seat."""
        kept = [k for k, e in enumerate(chosen) if self.taken[e] < self.seats]
        for k in kept:
            self.taken[chosen[k]] += 1
        return kept


def loop(moe: MoE, x: Tensor, seats: int, *, renormalize: bool, residual: bool, mask: list[bool]) -> Tensor:
    """The layer token by token."""
    queue, rows = Seats(seats), []
    up, down = moe.up_proj, moe.down_proj
    for x_D, real in zip(x.reshape(-1, D).unbind(0), mask, strict=True):
        logits_E = affine(moe.router.weight, None, x_D)
        chosen = choose(logits_E, K)
        weights_K = torch.softmax(torch.stack([logits_E[e] for e in chosen]), 0)
        kept = queue.take(chosen) if real else []
        y_D = torch.zeros_like(x_D)
        for k in kept:
            e = chosen[k]
            y_D = y_D + weights_K[k] * affine(
                down.weight[e], down.bias[e], F.gelu(affine(up.weight[e], up.bias[e], x_D))
            )
        if renormalize and kept:
            y_D = y_D / sum(weights_K[k] for k in kept)
        rows.append(x_D + 0 * y_D if residual and real and not kept else y_D)
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("factor", "seats"), [(0.5, 3), (-0.5, 3), (0.1, 1), (0.0, 99)])
def test_the_layer_equals_the_loop(
    factor: float, seats: int, masked: bool, residual: bool, renormalize: bool
) -> None:
    moe = layer(Capacity(factor=factor, renormalize=renormalize, residual=residual))
    x = torch.randn(2, 6, D, dtype=torch.float64)  # T*K/E = 6
    mask = torch.rand(2, 6) < 0.6 if masked else torch.ones(2, 6, dtype=torch.bool)
    options: Any = {"renormalize": renormalize, "residual": residual, "mask": mask.flatten().tolist()}

    def run(x: Tensor) -> Tensor:
        routing = moe.router(x, mask=mask if masked else None)
        return with_routing(moe, x, routing)

    assert_same(results(run, moe, x), results(lambda x: loop(moe, x, seats, **options), moe, x), 1e-11)


def with_routing(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """``moe`` on a routing that was made before."""
    up, down = (([linear.weight, linear.bias]) for linear in (moe.up_proj, moe.down_proj))
    exchange = begin_exchange(LOCAL, x, routing)
    return expert_exit(F.gelu(expert_entry(x, *up, exchange)), *down, exchange)


@pytest.mark.parametrize("residual", [False, True])
def test_the_modules_own_forward(residual: bool) -> None:
    moe = layer(Capacity(factor=0.3, residual=residual))
    x = torch.randn(3, 4, D, dtype=torch.float64)
    options: Any = {"renormalize": False, "residual": residual, "mask": [True] * 12}
    assert_same(results(moe, moe, x), results(lambda x: loop(moe, x, 2, **options), moe, x), 1e-11)


@pytest.mark.parametrize("kind", [Mlp, Glu, Conv])
@pytest.mark.parametrize("residual", [False, True])
def test_linears_inside_a_block(kind: Any, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries and exits get their seats from the leader's router."""
    torch.manual_seed(1)
    dense = kind().double()
    block = rewrite(dense)
    block.get_submodule(dense.ENTRIES[0]).router.capacity = Capacity(factor=0.4, residual=residual)
    stranded = []

    def mixing(logits: Tensor) -> Tensor:
        """Weights by a softmax over the K best, without those that found no seat."""
        tokens = logits.shape[:-1].numel()
        queue, weights = Seats(-(-tokens * K * 2 // (E * 5))), []
        stranded.clear()
        for row in logits.reshape(tokens, E):
            chosen = choose(row, K)
            kept = [chosen[k] for k in queue.take(chosen)]
            stranded.append(not kept)
            inside = torch.softmax(torch.stack([row[e] for e in chosen]), 0)
            zero = torch.zeros((), dtype=row.dtype)
            weights.append(torch.stack([inside[chosen.index(e)] if e in kept else zero for e in range(E)]))
        return torch.stack(weights).view(logits.shape)

    monkeypatch.setattr(blocks, "mixing", mixing)
    x = blocks.inputs(dense, torch.float64)

    def reference(x: Tensor) -> Tensor:
        # Every expert's block is x + ffn(source); with weights that sum to less, x must be topped up.
        mixed = blocks.reference(dense, block, x)
        source = block.source(x)
        logits = (
            source.movedim(dense.FEATURE_DIM, -1) @ block.get_submodule(dense.ENTRIES[0]).router.weight.t()
        )
        missing = (1 - mixing(logits).sum(-1, keepdim=True)).movedim(-1, dense.FEATURE_DIM)
        passed = torch.tensor(stranded).view(logits.shape[:-1]).unsqueeze(dense.FEATURE_DIM)
        return mixed + missing * x + (passed * source if residual else 0)

    got = results(block, block, x)
    assert_same(got, results(reference, block, x), 1e-11)
    assert any(stranded)


def test_a_call_overrides_the_factor() -> None:
    router, x = layer(Capacity(factor=0.5)).router, torch.randn(20, D, dtype=torch.float64)
    assert router(x).capacity == 5
    assert (router(x).top_k_index == E).any()
    full = router(x, capacity_factor=0)
    assert (full.top_k_index < E).all() and full.capacity.item() == full.tokens_per_expert.max()
    assert router(x, capacity_factor=2.0).capacity == 20
    router.capacity = None
    assert router(x).capacity is None
    assert router(x, capacity_factor=0.5).tokens_per_expert.max() == 5
    assert torch.equal(router(x).top_k_index, full.top_k_index)


def test_masked_tokens_take_no_seat() -> None:
    router, x = layer(None).router, torch.randn(2, 10, D, dtype=torch.float64)
    mask = torch.rand(2, 10) < 0.5
    x[~mask] = float("nan")
    routing = router(x, mask=mask)
    flat = mask.flatten()
    assert (routing.top_k_index[~flat] == E).all() and (routing.top_k_index[flat] < E).all()
    assert not routing.top_k_weights[~flat].any()
    assert routing.tokens_per_expert.sum() == K * mask.sum()
    assert torch.equal(routing.choice.mask, flat)
    alone = router(x[mask])
    assert torch.equal(routing.top_k_index[flat], alone.top_k_index)
    assert torch.equal(routing.top_k_weights[flat], alone.top_k_weights)


def test_the_choice_before_drops_is_kept() -> None:
    router, x = layer(Capacity(factor=0.5)).router, torch.randn(20, D, dtype=torch.float64)
    routing = router(x)
    assert (routing.choice.index < E).all() and (routing.top_k_index == E).any()


def test_no_tokens() -> None:
    for factor in (1.0, 0.0, -1.0):
        for drop in ("position", "probability", "batch_prioritized", "random"):
            moe = layer(Capacity(factor=factor, drop=drop, residual=True, rule="deepspeed"))
            got = results(moe, moe, torch.randn(0, D, dtype=torch.float64))
            assert all(not g.any() for g in got)


def test_a_token_cannot_pass_through_another_width() -> None:
    moe = layer(Capacity(factor=0.1, residual=True))
    x = torch.randn(9, D, dtype=torch.float64)
    routing = moe.router(x)
    with pytest.raises(ShapeError, match="residual=False"):
        add_residual(torch.zeros(9, D + 1), stranded_tokens(x, routing), routing.layout)


POLICIES = [
    Capacity(factor=0.5),
    Capacity(factor=-0.5, drop="probability", renormalize=True),
    Capacity(factor=0.6, rule="tutel", drop="batch_prioritized", residual=True, align=2),
    Capacity(factor=0.0),
    Capacity(factor=0.7, rule="switch"),
    Capacity(factor=0.7, rule="fastmoe_gshard"),
]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("capacity", POLICIES)
def test_one_graph_for_all_lengths(capacity: Capacity) -> None:
    moe, counter = layer(capacity), CompileCounter()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 2, 5, 33):
        x = torch.randn(2, tokens, D, dtype=torch.float64)
        assert_same([compiled(x)], [moe(x)])
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_masks_under_a_checkpoint() -> None:
    """The recomputation draws the same lots. A capacity factor is a constant of the graph."""
    moe = layer(Capacity(factor=0.5, drop="random"))
    # Not the "eager" backend, which keeps no random state for the recomputation.
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor, mask: Tensor) -> Tensor:
        forward = lambda x: moe(x, mask=mask, capacity_factor=0.7)  # noqa: E731
        return checkpoint(forward, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 9, 33):
        x, mask = torch.randn(2, tokens, D, dtype=torch.float64), torch.rand(2, tokens) < 0.7
        expected = results(lambda x, m=mask: run(x, m), moe, x)
        assert_same(results(lambda x, m=mask: compiled(x, m), moe, x), expected, 1e-12)
        assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    moe, x = layer(Capacity(factor=0.5, residual=True)), torch.randn(6, D, dtype=torch.float64)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: tokens},), strict=strict)
    other = torch.randn(11, D, dtype=torch.float64)
    assert_same([program.module()(other)], [moe(other)], 1e-12)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_has_the_same_gradients() -> None:
    moe = layer(Capacity(factor=0.5, drop="batch_prioritized", residual=True, renormalize=True))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    assert_same(results(compiled, moe, x), results(moe, moe, x), 1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_seats_the_same(reentrant: bool) -> None:
    moe = layer(Capacity(factor=0.5, drop="random"))
    x = torch.randn(2, 9, D, dtype=torch.float64)
    again = lambda x: checkpoint(moe, x, use_reentrant=reentrant)  # noqa: E731
    assert_same(results(again, moe, x), results(moe, moe, x), 1e-12)


def test_copies() -> None:
    moe, x = layer(Capacity(factor=0.5)), torch.randn(9, D, dtype=torch.float64)
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert copied.router.capacity == moe.router.capacity and torch.equal(copied(x), moe(x))
    assert not any("capacity" in name for name in moe.state_dict())


def test_low_precision() -> None:
    moe, x = layer(Capacity(factor=0.5, residual=True), torch.float32), torch.randn(3, 7, D)
    with torch.autocast("cpu", torch.bfloat16):
        routing, y = moe.router(x), moe(x)
    assert y.dtype == torch.bfloat16 and routing.top_k_weights.dtype == torch.float32
    assert torch.equal(routing.top_k_index, moe.router(x).top_k_index)
    assert (y.float() - moe(x)).norm() / moe(x).norm() < 2e-2
    half = copy.deepcopy(moe).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


class Model(nn.Module):
    """One inline FFN and one that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp()
        self.norm = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.ffn(self.norm(x))


@pytest.mark.parametrize("capacity", [0.5, Capacity(rule="tutel", factor=0.5, residual=True)])
def test_transform(capacity: Any) -> None:
    model, x = Model(), torch.randn(2, 16, D)
    moefy.transform(model, num_experts=E, capacity=capacity, example_args=(x,))
    routers = [m for m in model.modules() if isinstance(m, Router)]
    assert [router.capacity for router in routers] == [Capacity.of(capacity)] * 2
    assert moefy.report(model).config.capacity == capacity
    assert model(x).isfinite().all()


class OneFFN(nn.Module):
    """A block with its FFN as a module, or inline."""

    def __init__(self, inline: bool) -> None:
        super().__init__()
        self.norm, self.inline = nn.LayerNorm(D), inline
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
        self.ffn = None if inline else nn.Sequential(self.fc1, nn.GELU(), self.fc2)
        if not inline:
            del self.fc1, self.fc2

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + (self.fc2(F.gelu(self.fc1(n))) if self.inline else self.ffn(n))


@pytest.mark.parametrize("form", ["module", "inline", "graph"])
def test_tokens_pass_through_in_every_form(form: str) -> None:
    model, x = OneFFN(form == "inline"), torch.randn(2, 16, D)
    norm = copy.deepcopy(model.norm)
    model = fx.symbolic_trace(model) if form == "graph" else model
    moefy.transform(model, num_experts=E, capacity=Capacity(factor=0.3, residual=True), example_args=(x,))
    (router,) = [m for m in model.modules() if isinstance(m, Router)]
    stranded = (router(norm(x)).top_k_index == E).all(1).view(2, 16)
    assert 0 < stranded.sum() < 32
    passed = (model(x) - x - norm(x)).norm(dim=-1)
    assert passed[stranded].max() < 1e-5 and passed[~stranded].min() > 1e-2


def test_transform_without_drops_is_exact() -> None:
    dense, x = Model(), torch.randn(2, 16, D)
    expected = dense(x)
    model = moefy.transform(dense, num_experts=E, capacity=0, example_args=(x,))
    assert_same([model(x)], [expected])
