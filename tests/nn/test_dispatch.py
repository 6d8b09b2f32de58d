"""A second dispatcher under every form of a layer: the numbers of the local one, and never the fused op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import moefy
from moefy import ops
from moefy.config import Capacity
from moefy.errors import DtypeError
from moefy.nn import Body, Choice, EntryLinear, ExpertLinear, InPlaceMoE, MoE, RoutedRows, Router, WeightRef
from moefy.nn.dispatch import LOCAL, Exchange
from moefy.nn.experts.buffers import from_buffers, to_buffers
from moefy.nn.experts.modules import ExpertList
from moefy.nn.route import make_routing
from moefy.nn.routed_rows import mark_of
from moefy.nn.routing.layout import TokenLayout
from nn.blocks import BareGlu, Conv, D, E, Glu, H, K, Mlp, assert_same, rewrite
from nn.dispatchers import AllToAll, OneRank, Reversed, placed, use

ORDER = (2, 0, 3, 1)
PASSING = Capacity(factor=0.6, residual=True)


def moe(**options: Any) -> MoE:
    return MoE(D, None if "experts" in options else H, None if "experts" in options else E, **options)


def expert(i: int) -> nn.Module:
    """One of several that differ in size, with a norm."""
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 5 + i), nn.Tanh(), nn.Linear(5 + i, D))


class OneForAll(nn.Module):
    """All experts as one module, called with the rows and their offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, D))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return ops.grouped_linear(rows, self.weight, None, offsets)


class OfTrees(nn.Module):
    """An expert of trees: ids as they are, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(D, D), nn.Embedding(9, 6)

    def forward(self, tree: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.linear(tree["x"]), self.table(tree["ids"]).view(-1, 2, 3)


class Trees(nn.Module):
    """A layer of trees as a function of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = moe(experts=[OfTrees() for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.layer({"x": x, "ids": torch.arange(10).view(2, 5) % 9})
        return y + z.flatten(2).sum(-1, keepdim=True)


def in_place(feature_dim: int = -1) -> MoE:
    layer = InPlaceMoE(
        entries=[WeightRef("fc1.weight", "fc1.bias")],
        exit=WeightRef("fc2.weight", "fc2.bias"),
        body=Body.of("gelu"),
        router=Router(D, E, K),
        num_experts=E,
        feature_dim=feature_dim,
    )
    layer.fc1, layer.fc2 = ExpertLinear(D, H, E), ExpertLinear(H, D, E)
    return layer


def graph(block: nn.Module) -> nn.Module:
    """A caller's graph of two-layer or gated FFNs, rewritten."""
    return moefy.transform(fx.symbolic_trace(block), E, top_k=K, example_args=(torch.randn(block.SHAPE),))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: moe(activation="silu", glu=True),
    "composed": lambda: moe(activation=lambda h: h.sigmoid() * h),
    "input-weighted": lambda: moe(weighting="input"),
    "modules": lambda: moe(experts=[expert(i) for i in range(E)]),
    "modules, input-weighted": lambda: moe(experts=[expert(i) for i in range(E)], weighting="input"),
    "one module": lambda: MoE(D, num_experts=E, experts=OneForAll()),
    "trees": Trees,
    "in place": in_place,
    "in place, channels": lambda: in_place(-3),
    "inline": lambda: rewrite(Mlp()),
    "inline, two entries": lambda: rewrite(Glu()),
    "inline, bare": lambda: rewrite(BareGlu()),
    "inline, channels": lambda: rewrite(Conv()),
    "graph": lambda: graph(Mlp()),
    "graph, two entries": lambda: graph(Glu()),
}
forms = pytest.mark.parametrize("form", FORMS)


def made(form: str, capacity: Capacity | None = None) -> tuple[nn.Module, Tensor]:
    """The form with decisive random parameters, and an input."""
    torch.manual_seed(0)
    model = FORMS[form]().double()
    for module in model.modules():
        if isinstance(module, Router):
            nn.init.normal_(module.weight)
            module.capacity = None if form == "trees" else capacity
    for name, parameter in model.named_parameters():
        if "router" not in name and parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.5)
    shape = (2, D, 3, 2) if "channels" in form else (2, 5, D)
    return model, torch.randn(shape, dtype=torch.float64)


def outcome(
    model: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None
) -> tuple[list[Tensor], nn.Module]:
    """``[output, gradient of x]``, and a copy of ``model`` whose parameters are their gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    assert type(y) is Tensor
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for own, p in zip(gradients.parameters(), model.parameters(), strict=True):
            own.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    return [y.detach(), x.grad], gradients


def assert_equal(got: tuple[list[Tensor], nn.Module], expected: tuple[list[Tensor], nn.Module]) -> None:
    assert_same(got[0], expected[0], 1e-11)
    names = [n for n, _ in expected[1].named_parameters()]
    assert names == [n for n, _ in got[1].named_parameters()]
    assert_same([*got[1].parameters()], [*expected[1].parameters()], 1e-11)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of the fused op."""
    calls: list[int] = []
    op = ops.expert_ffn
    monkeypatch.setattr(ops, "expert_ffn", lambda *a, **k: calls.append(1) or op(*a, **k))
    return calls


@forms
@pytest.mark.parametrize("capacity", [None, PASSING], ids=["dropless", "passing"])
def test_another_dispatcher_gives_the_same_numbers(
    form: str, capacity: Capacity | None, fused: list[int]
) -> None:
    """Rows in another order, more of them than slots, dropped ones not sent, experts placed elsewhere."""
    model, x = made(form, capacity)
    output, gradients = outcome(model, x)
    assert bool(fused) == (form in ("fused", "input-weighted", "in place", "in place, channels"))
    fused.clear()
    dispatcher = AllToAll(ORDER)
    twin = use(placed(model, ORDER), dispatcher)
    assert_equal(outcome(twin, x), (output, placed(gradients, ORDER)))
    assert not fused
    assert dispatcher.plans == 1, "one plan per call, whatever the number of entries or leaves"
    # Two leaves; or two entries with a user's code between them, which may write to their source.
    twice = ("trees", "inline, two entries", "inline, bare")
    assert dispatcher.dispatched == (2 if form in twice else 1)


@forms
def test_a_rank_with_some_of_the_experts(form: str) -> None:
    """Two ranks that all have every token, each with some of the experts; their outputs add up."""
    model, x = made(form)
    first, second = (use(placed(model, own), OneRank(own)) for own in ((1, 3), (0, 2)))
    blocks = "inline" in form or "graph" in form  # which add their input
    assert_same([first(x) + second(x) - (x if blocks else 0)], [model(x)], 1e-11)


def test_static_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seats for what the dispatcher says an expert gets at most, not for what the routing says."""
    model, x = made("modules", Capacity(factor=0.6))
    expected = outcome(model, x)
    seats = []
    forward = ExpertList.forward
    monkeypatch.setattr(ExpertList, "forward", lambda *a: seats.append(a[3]) or forward(*a))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_equal(outcome(model, x), expected)
    twin = use(placed(model, ORDER), AllToAll(ORDER))
    assert_equal(outcome(twin, x), (expected[0], placed(expected[1], ORDER)))
    assert seats == [3, 4]
    assert OneRank((0,)).row_limit(model.router(x)) is None


def test_buffers_of_any_dispatcher() -> None:
    model, x = made("fused")
    twin, dispatcher = placed(model, ORDER), AllToAll(ORDER)

    def batched(x: Tensor) -> Tensor:
        rows, offsets, handle = dispatcher.dispatch(x.flatten(0, 1), twin.router(x))
        x_ECD = to_buffers(rows, offsets, 12)
        h_ECH = F.silu(x_ECD @ twin.gate_proj.weight.mT) * (x_ECD @ twin.up_proj.weight.mT)
        y_RD = from_buffers(h_ECH @ twin.down_proj.weight.mT, offsets, handle.num_rows)
        return dispatcher.combine(y_RD, handle).view(x.shape)

    output, gradients = outcome(model, x)
    assert_equal(outcome(twin, x, batched), (output, placed(gradients, ORDER)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["composed", "inline, two entries", "graph"])
def test_a_checkpoint_plans_again(form: str, reentrant: bool) -> None:
    model, x = made(form)
    output, gradients = outcome(model, x)
    twin = use(placed(model, ORDER), AllToAll(ORDER))
    run = lambda x: checkpoint(twin, x, use_reentrant=reentrant)  # noqa: E731
    assert_equal(outcome(twin, x, run), (output, placed(gradients, ORDER)))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "form", ["fused", "composed", "input-weighted", "in place", "inline", "inline, two entries"]
)
def test_compiled_rows_carry_another_plan(form: str) -> None:
    model, x = made(form)
    output, gradients = outcome(model, x)
    order, counter = tuple(reversed(range(E))), CompileCounter()
    twin = use(placed(model, order), Reversed())
    run = torch.compile(twin, fullgraph=True, backend=counter)
    assert_equal(outcome(twin, x, run), (output, placed(gradients, order)))
    assert counter.frame_count == 1


def test_rows_carry_their_exchange() -> None:
    model, x = made("inline")
    dispatcher = AllToAll(ORDER)
    use(model, dispatcher)
    rows = model.fc1(x)
    assert isinstance(rows, RoutedRows)
    exchange = mark_of(F.gelu(rows))
    assert isinstance(exchange, Exchange) and exchange.dispatcher is dispatcher
    assert exchange.handle.num_rows == rows.shape[1] > 2 * 5 * K


def test_the_local_plan_is_the_routing() -> None:
    x = torch.tensor([[10.0], [20.0]])
    index = torch.tensor([[1], [0]])
    choice = Choice(index=index, weights=torch.ones(2, 1), logits=torch.zeros(2, 2))
    routing = make_routing(choice, 2, TokenLayout.of(x))
    rows, offsets, handle = LOCAL.dispatch({"x": x, "ids": torch.tensor([3, 4])}, routing)
    assert rows["x"].tolist() == [[20.0], [10.0]] and rows["ids"].tolist() == [4, 3]
    assert offsets.tolist() == [1, 2] and handle is routing
    assert LOCAL.combine(2 * rows["x"], handle).tolist() == [[20.0], [40.0]]
    with pytest.raises(DtypeError, match="floating point"):
        LOCAL.combine(rows["ids"], handle)


def test_every_layer_is_local_by_default() -> None:
    for form in FORMS:
        model, _ = made(form)
        holders = [m for m in model.modules() if isinstance(m, MoE | EntryLinear | Router)]
        assert holders and all(m.dispatcher is LOCAL for m in holders)
        assert not any("dispatcher" in vars(m) for m in holders), "a pickle holds no dispatcher"
