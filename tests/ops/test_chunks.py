"""Experts that a CPU takes in several chunks give what they give at once: outputs, gradients, dropped slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefy import ops
from moefy.ops import expert_kernels
from moefy.ops.expert_kernels import Layer, chunks

T, D, H, E, K = 11, 6, 8, 5, 2


def step(glu: ops.GLU, activation: str) -> list[Tensor]:
    """Output and gradients of a layer in which expert 3 has no rows and two slots are dropped."""
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
    leaves += [g for g in gate if g is not None]
    return [out_TD.detach(), *torch.autograd.grad(out_TD.square().sum(), leaves)]


@pytest.mark.parametrize("chunk_bytes", [1, 300], ids=["one expert each", "some together"])
@pytest.mark.parametrize("activation", ["gelu", "identity"])
@pytest.mark.parametrize("glu", ops.GLU_FORMS)
def test_chunks_change_nothing(glu, activation, chunk_bytes, monkeypatch):
    at_once = step(glu, activation)
    monkeypatch.setattr(expert_kernels, "CHUNK_BYTES", chunk_bytes)
    for got, expected in zip(step(glu, activation), at_once, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_every_row_and_expert_is_in_one_chunk(monkeypatch):
    monkeypatch.setattr(expert_kernels, "CHUNK_BYTES", 3 * D * 4)  # three rows
    bounds = [(0, 2), (2, 3), (3, 9), (9, 9), (9, 10)]
    w_up, w_down = torch.empty(E, D, D), torch.empty(E, D, D)
    x_TD, order_N = torch.empty(12, D), torch.arange(12)
    layer = Layer(
        x_TD, torch.ones(12, 1), order_N, order_N[:E], None, None, w_up, None, w_down, None, "relu", "none"
    )
    found = chunks(layer, bounds)
    assert [(c.experts.start, c.experts.stop) for c in found] == [(0, 2), (2, 3), (3, 5)]
    assert [(c.rows.start, c.rows.stop) for c in found] == [(0, 3), (3, 9), (9, 12)]
    assert [c.bounds for c in found] == [[(0, 2), (2, 3)], [(0, 6)], [(0, 0), (0, 1)]]
    assert len(chunks(layer._replace(order_N=order_N[:3]), bounds)) == 1
