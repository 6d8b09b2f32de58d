"""Experts that are modules: each its own, all of one kind, one for all; static seats; trees of tokens."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracles import choose
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from moefy import ops
from moefy.errors import ConfigError, DtypeError, ShapeError
from moefy.nn import MoE
from moefy.nn.experts.modules import ExpertList
from nn.blocks import assert_same, results

D, E, K = 8, 4, 2


class Expert(nn.Module):
    """A norm of the row and two linears."""

    def __init__(self, hidden: int = 5, out: int = D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x / x.norm(dim=-1, keepdim=True))))


def different() -> list[Any]:
    return [Expert(3), partial(Expert, 4), nn.Sequential(nn.Linear(D, 2), nn.Linear(2, D)), nn.Identity()]


def layer(experts: Any = Expert, **options: Any) -> MoE:
    num_experts = None if isinstance(experts, list) else E
    moe = MoE(D, num_experts=num_experts, experts=experts, **options).double()
    with torch.no_grad():
        moe.router.weight.mul_(50)
    return moe


def tokens(*leading: int) -> Tensor:
    return torch.randn(*(leading or (2, 5)), D, dtype=torch.float64)


def mixture(moe: MoE, x: Tensor, experts: Any, pre: bool = False) -> Tensor:
    """The layer token by token."""
    rows = []
    for x_D in x.reshape(-1, D):
        logits_E = moe.router.weight @ x_D
        chosen = choose(logits_E, K)
        weights = torch.softmax(logits_E[chosen], 0)
        ys = [
            experts[e]((w * x_D if pre else x_D)[None])[0] * (1 if pre else w)
            for w, e in zip(weights, chosen, strict=True)
        ]
        rows.append(sum(ys))
    return torch.stack(rows).view(*x.shape[:-1], -1)  # type: ignore[arg-type]


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("experts", [Expert, lambda: Expert(4, 3), different()])
def test_modules_equal_the_loop(experts: Any, pre: bool) -> None:
    moe, x = layer(copy.deepcopy(experts), weighting="input" if pre else "output"), tokens()
    got, expected = results(moe, moe, x), results(lambda x: mixture(moe, x, moe.experts, pre), moe, x)
    assert_same(got, expected, 1e-11)
    assert moe.num_experts == E and len(moe.experts) == E


class Fused(nn.Module):
    """All experts at once, on rows sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, D))

    def forward(self, rows_ND: Tensor, offsets_E: Tensor) -> Tensor:
        return ops.grouped_linear(rows_ND, self.weight, None, offsets_E).tanh()


@pytest.mark.parametrize("pre", [False, True])
def test_one_module_for_all(pre: bool) -> None:
    fused = Fused()
    moe, x = layer(fused, weighting="input" if pre else "output"), tokens()
    single = [lambda x, e=e: (x @ fused.weight[e].t()).tanh() for e in range(E)]
    assert moe.experts is fused
    assert_same(results(moe, moe, x), results(lambda x: mixture(moe, x, single, pre), moe, x), 1e-11)
    assert next(iter(moe.expert_parameters())) is fused.weight


def only_first_experts(moe: MoE) -> None:
    """Route everything to experts 0 and 1."""
    with torch.no_grad():
        moe.router.weight.zero_()


@pytest.mark.parametrize("shape", [(2, 5), (0,), (1,)])
def test_experts_without_tokens_have_zero_gradients(shape: tuple[int, ...]) -> None:
    moe = layer()
    only_first_experts(moe)
    moe(tokens(*shape)).sum().backward()
    assert all(p.grad is not None for p in moe.experts.parameters())
    assert all(not p.grad.any() for e in (2, 3) for p in moe.experts[e].parameters())
    assert any(p.grad.any() for p in moe.experts[1].parameters()) is (shape != (0,))


@pytest.mark.parametrize("counts", [[3, 0, 2, 1], [0, 0, 0, 0], [6, 0, 0, 0], [0, 0, 0, 2]])
@pytest.mark.parametrize("dropped", [0, 2])
def test_seats_equal_slices(counts: list[int], dropped: int) -> None:
    experts = ExpertList([Expert() for _ in range(E)]).double()
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    rows = tokens(sum(counts) + dropped)
    runs: list[Callable[[Tensor], Tensor]] = [
        lambda x, seats=seats: experts(x, offsets, seats) for seats in (None, max(*counts, 1), 7)
    ]
    slices, tight, loose = (results(run, experts, rows) for run in runs)
    assert_same(tight, slices, 1e-12)
    assert_same(loose, slices, 1e-12)
    assert slices[0].shape == rows.shape and not slices[0][sum(counts) :].any()


@pytest.mark.usefixtures("fresh_dynamo")
def test_static_seats_are_one_graph() -> None:
    moe, counter = layer(different(), capacity=1.0), CompileCounter()
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=counter)
    for n in (8, 5, 16, 33):
        x = tokens(n)
        assert_same(results(compiled, moe, x), results(moe, moe, x), 1e-11)
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_without_a_capacity_a_graph_break_and_no_recompiles() -> None:
    moe, counter = layer(), CompileCounter()
    compiled = torch.compile(moe, backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        frames = 0
        for n in (8, 5, 1, 0, 16, 33, 21, 40, 13, 9, 18, 27, 34):
            x = tokens(n)
            assert_same([compiled(x)], [moe(x)], 1e-11)
            frames = counter.frame_count if n == 0 else frames
    assert counter.frame_count == frames  # graphs for a first length, any length, 1 and 0, and no more


@pytest.mark.usefixtures("fresh_dynamo")
def test_static_seats_in_a_compiled_checkpoint() -> None:
    moe, x = layer(different(), capacity=1.0), tokens()
    run = lambda x: checkpoint(moe, x, use_reentrant=False)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, moe, x), results(moe, moe, x), 1e-11)


@pytest.mark.parametrize("strict", [True, False])
def test_static_seats_export(strict: bool) -> None:
    moe = layer(different(), capacity=1.0).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(moe, (tokens(),), dynamic_shapes=shapes, strict=strict)
    x = tokens(7, 5)
    assert_same([program.module()(x)], [moe(x)], 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    moe, x = layer(different()), tokens()
    run = lambda x: checkpoint(moe, x, use_reentrant=reentrant)  # noqa: E731
    assert_same(results(run, moe, x), results(moe, moe, x), 1e-12)


def test_copies_and_autocast() -> None:
    moe, x = layer(), tokens()
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(copied(x), moe(x))
    moe, x = moe.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16 and (y.float() - moe(x)).norm() < 3e-2 * moe(x).norm()


class Pair(nn.Module):
    """Reads and returns a tree, with ids that are not floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(D, D), nn.Embedding(9, 3)

    def forward(self, tree: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        y = self.linear(tree["x"])
        return y * tree["scale"][0], [self.table(tree["ids"])[:, None].expand(-1, 2, -1)]


def tree(x: Tensor) -> dict[str, Any]:
    leading = x.shape[:-1]
    ids = torch.arange(x[..., 0].numel()).view(leading) % 9
    return {"x": x, "scale": (torch.full((*leading, 1), 2.0, dtype=torch.float64),), "ids": ids}


@pytest.mark.parametrize("leading", [(7,), (2, 5), (0,)])
def test_trees(leading: tuple[int, ...]) -> None:
    moe, x = layer(Pair), tokens(*leading)
    y, [z] = moe(tree(x))
    assert y.shape == (*leading, D) and z.shape == (*leading, 2, 3)
    if not x.numel():
        return
    first = [lambda v, e=e: 2 * e.linear(v) for e in moe.experts]
    assert_same([y], [mixture(moe, x, first)], 1e-11)
    flat, ids = x.view(-1, D), tree(x)["ids"].view(-1)
    routing = moe.router(flat)
    for t in range(flat.shape[0]):
        pairs = zip(routing.top_k_weights[t], routing.top_k_index[t].tolist(), strict=True)
        expected = sum(w * moe.experts[e].table.weight[ids[t]] for w, e in pairs)
        assert_same([z.reshape(-1, 2, 3)[t]], [expected.expand(2, 3)], 1e-11)  # type: ignore[union-attr]


def test_replacements_and_residual_in_trees() -> None:
    moe, x = layer(Pair), tokens(3)
    y, [z] = moe(tree(x), replace_ids=torch.tensor([0, 5, 0]), replacements={5: 4.0})
    assert (y[1] == 4).all() and (z[1] == 4).all() and not (y[0] == 4).any()
    from moefy.config import Capacity

    passing = layer(Expert, capacity=Capacity(factor=0.5, residual=True))
    same = torch.ones(8, D, dtype=torch.float64)
    assert_same([passing(same)[2:], passing(same)[:2]], [same[2:], layer_output(passing, same)[:2]], 1e-12)
    shrinking = layer(lambda: Expert(4, 3), capacity=Capacity(factor=0.5, residual=True))
    with pytest.raises(ShapeError, match="residual=False"):
        shrinking(same)


def layer_output(moe: MoE, x: Tensor) -> Tensor:
    """The layer without its capacity."""
    free = copy.deepcopy(moe)
    free.router.capacity = None
    return free(x)


def test_reserved_axes_reach_the_experts() -> None:
    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[1:] == (2, 4)
            return x.transpose(1, 2)

    moe, x = layer(Wide, reserve_dims=2), tokens().view(2, 5, 2, 4)
    assert_same([moe(x)], [x.transpose(-1, -2)], 1e-12)


def test_bad_experts_and_trees() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        MoE(D, experts=Expert)
    with pytest.raises(ConfigError, match="length of experts"):
        MoE(D, num_experts=3, experts=different())
    with pytest.raises(ConfigError, match="experts"):
        MoE(D, experts=[])
    moe = layer(Pair)
    with pytest.raises(ShapeError, match="leading shape"):
        moe({**tree(tokens(3)), "ids": torch.zeros(4, dtype=torch.int64)})
    with pytest.raises(DtypeError, match="tensors only"):
        moe({**tree(tokens(3)), "ids": 3})
    with pytest.raises(DtypeError, match="floating point"):
        layer(lambda: IntegerExpert())(tokens())


class IntegerExpert(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)
