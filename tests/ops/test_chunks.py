"""Experts that a CPU takes in several parts or in a batch give what they give at once, dropped slots included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefy import ops
from moefy.ops.cpu import expert_groups as grouping
from moefy.ops.cpu import layout as row_layout
from moefy.ops.cpu.expert_groups import expert_groups
from moefy.ops.cpu.layout import Batch, InRows
from moefy.ops.ffn_args import FFNArgs

T, D, H, E, K = 11, 6, 8, 5, 2


def layer_of(glu: ops.GLU, activation: str) -> tuple[Tensor, list[Tensor]]:
    """Output and leaves of a layer in which expert 3 has no rows and two slots are dropped."""
    draw = torch.Generator().manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    width = 2 * H if glu.startswith("merged") else H
    index_TK = torch.randint(0, 3, (T, K), generator=draw)
    index_TK[index_TK == 2] = 4
    index_TK[2, 1] = index_TK[7, 0] = -1
    order_N, offsets_E = ops.sort_by_expert(index_TK, E)
    leaves = [leaf(T, D), leaf(T, K), leaf(E, width, D), leaf(E, width), leaf(E, D, H), leaf(E, D)]
    x_TD, w_TK, *entry_and_exit = leaves
    gate = [leaf(E, H, D), leaf(E, H)] if glu == "separate" else [None, None]
    out_TD = ops.expert_ffn(
        x_TD, w_TK, order_N, offsets_E, *entry_and_exit,
        w_gate=gate[0], b_gate=gate[1], activation=activation, glu=glu,
    )  # fmt: skip
    return out_TD, leaves + [g for g in gate if g is not None]


def step(glu: ops.GLU, activation: str) -> list[Tensor]:
    """Output and gradients."""
    out_TD, leaves = layer_of(glu, activation)
    return [out_TD.detach(), *torch.autograd.grad(out_TD.square().sum(), leaves)]


@pytest.mark.parametrize("call", [-1, 10**12], ids=["in rows", "batch"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("glu", ops.GLU_FORMS)
def test_a_kept_graph_gives_the_same_again(glu, activation, call, monkeypatch):
    monkeypatch.setattr(row_layout, "CALL", call)
    out_TD, leaves = layer_of(glu, activation)
    loss = out_TD.square().sum()
    kept = torch.autograd.grad(loss, leaves, retain_graph=True)
    for again in (torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)):
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.parametrize("call", [-1, 10**12], ids=["in rows", "batch"])
@pytest.mark.parametrize("chunk_bytes", [1, 300, 10**9], ids=["one expert each", "some together", "all"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("glu", ops.GLU_FORMS)
def test_parts_and_layouts_change_nothing(glu, activation, chunk_bytes, call, monkeypatch):
    monkeypatch.setattr(row_layout, "CALL", -1)
    at_once = step(glu, activation)
    monkeypatch.setattr(grouping, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(row_layout, "CALL", call)
    for got, expected in zip(step(glu, activation), at_once, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def five_experts(bounds: list[tuple[int, int]], rows: int, **sizes: int) -> list[grouping.ExpertGroup]:
    order_N = torch.arange(rows)
    layer = FFNArgs(
        torch.empty(rows, D), torch.ones(rows, 1), order_N, order_N[:E], None, None,
        torch.empty(E, D, D), None, torch.empty(E, D, D), None, "relu", "none",
    )  # fmt: skip
    return expert_groups(layer, bounds, **{"products": 1, "saved": 0, **sizes})


def test_every_row_and_expert_is_in_one_part(monkeypatch):
    monkeypatch.setattr(grouping, "CHUNK_BYTES", 3 * D * 4)  # three rows
    monkeypatch.setattr(row_layout, "CALL", -1)
    found = five_experts([(0, 2), (2, 3), (3, 9), (9, 9), (9, 10)], rows=12)
    assert [(p.experts.start, p.experts.stop) for p in found] == [(0, 2), (2, 3), (3, 5)]
    assert [(p.rows.start, p.rows.stop) for p in found] == [(0, 3), (3, 9), (9, 12)]
    assert [p.rows for p in found] == [p.places for p in found]
    layouts = [p.layout for p in found if isinstance(p.layout, InRows)]
    assert [layout.bounds for layout in layouts] == [[(0, 2), (2, 3)], [(0, 6)], [(0, 0), (0, 1)]]
    assert len(five_experts([(0, 2), (2, 2), (2, 2), (2, 2), (2, 3)], rows=3)) == 1


def test_rows_of_no_expert_are_a_part_behind_a_batch(monkeypatch):
    monkeypatch.setattr(row_layout, "CALL", 10**12)
    batch, rest = five_experts([(0, 2), (2, 3), (3, 5), (5, 5), (5, 6)], rows=8)
    assert isinstance(batch.layout, Batch) and batch.layout.place_R.tolist() == [0, 1, 2, 4, 5, 8]
    assert (batch.places, batch.rows) == (slice(0, 10), slice(0, 6))
    assert (rest.places, rest.rows, rest.experts) == (slice(10, 12), slice(6, 8), slice(5, 5))
