"""Under autocast the GEMMs run in its dtype and the routing weights keep theirs; forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefy import ops
from ops.layer import parameters, results, routed, tokens
from ops.samples import SAMPLES

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
@pytest.mark.parametrize("params", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_equals_casting_by_hand(dtype, params, fused):
    weights, x_TD = parameters(params), tokens(9, params)
    got = results(routed, x_TD, weights, autocast=dtype, fused=fused)

    def by_hand(x_TD, router_ED, *linears, fused):
        """The router in full precision from the uncast tokens, the rest cast."""
        weights_TK, index_TK = (x_TD.float() @ router_ED.float().t()).softmax(-1).topk(2)
        order_N, offsets_E = ops.sort_by_expert(index_TK, 4)
        gate, up, bias, down = (p.to(dtype) for p in linears)
        return ops.expert_ffn(
            x_TD.to(dtype), weights_TK, order_N, offsets_E, up, bias, down, None,
            w_gate=gate, activation="silu", glu="separate",
        )  # fmt: skip

    want = results(by_hand, x_TD, weights, fused=fused)
    assert got[0].dtype is dtype
    assert [g.dtype for g in got[1:]] == [params] * 6
    eps = max(torch.finfo(dtype).eps, torch.finfo(params).eps)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) if fused else (a - b).norm() <= 4 * eps * b.norm()


def test_backward_inside_the_region_gives_the_same_bits():
    """For the experts: the router's backward is torch's matmul, which autocast does cast there."""
    experts = parameters()[1:]
    want = results(routed, tokens(9), parameters(), autocast=torch.bfloat16, fused=True)[3:]
    with torch.autocast("cpu", torch.bfloat16):
        out = routed(tokens(9), parameters()[0], *experts, fused=True)
        grads = torch.autograd.grad(out.float().sum(), experts)
    assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))


def test_routing_weights_are_not_rounded():
    """One token, one expert, identity: out = w * x exactly, with a w that bf16 cannot hold."""
    weight_TK = torch.full((1, 1), 1 + 2**-16)
    order_N, offsets_E = ops.sort_by_expert(torch.zeros(1, 1, dtype=torch.int64), 1)
    with torch.autocast("cpu", torch.bfloat16):
        y_ND = ops.grouped_linear(torch.ones(1, 1), torch.ones(1, 1, 1), None, offsets_E)
        assert y_ND.dtype is torch.bfloat16
        assert ops.combine(y_ND.float(), weight_TK, order_N).item() == 1 + 2**-16
        out = ops.combine(y_ND, weight_TK.requires_grad_(), order_N)
    assert out.grad_fn.saved_tensors[1].dtype is torch.float32


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_fp64_is_left_alone(name):
    """As torch does: autocast never touches float64, so every op gives the bits that it gives without."""
    op = getattr(torch.ops.moefy, name)
    for args in SAMPLES[name](torch.float64):
        want = op(*args)
        with torch.autocast("cpu", torch.bfloat16):
            got = op(*args)
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize(
    "name", ["sum_slots", "combine_backward", "grouped_linear_backward", "permute", "top_k_softmax"]
)
def test_ops_without_operands_to_cast_keep_fp32(name):
    op = getattr(torch.ops.moefy, name)
    for args in SAMPLES[name](torch.float32):
        want = op(*args)
        with torch.autocast("cpu", torch.bfloat16):
            got = op(*args)
        pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_second_order_under_autocast():
    weights, x_TD = parameters(), tokens(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = routed(x_TD, *weights, fused=True)
        (grad,) = torch.autograd.grad(out.float().square().sum(), x_TD, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), weights)
    full = routed(x_TD, *weights, fused=True)
    (grad,) = torch.autograd.grad(full.square().sum(), x_TD, create_graph=True)
    for a, b in zip(second, torch.autograd.grad(grad.square().sum(), weights), strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()
