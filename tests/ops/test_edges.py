"""What an op must not do at the edges: spread NaN, reorder ties, depend on layout, hold memory, break vmap."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from torch.testing import assert_close

from moefy import ops
from moefy.ops import reference
from ops.layer import parameters, results, routed, tokens
from ops.samples import E, K, ffn_arguments, index


def test_nan_in_one_token_stays_there():
    args = list(ffn_arguments(5, "separate", True, torch.float32))
    clean = torch.ops.moefy.expert_ffn(*args, "silu", "separate", True, False)[0]
    args[0] = args[0].detach().clone()
    args[0][3] = float("nan")
    out = torch.ops.moefy.expert_ffn(*args, "silu", "separate", True, False)[0]
    keep = [0, 1, 2, 4]
    assert out[3].isnan().all()
    assert torch.equal(out[keep], clean[keep])


def test_nan_in_an_idle_expert_is_never_read():
    args = list(ffn_arguments(5, "separate", True, torch.float32))
    with torch.no_grad():
        for stacked in args[4:]:
            stacked[2] = float("nan")
    out = torch.ops.moefy.expert_ffn(*args, "silu", "separate", True, False)[0]
    out.sum().backward()
    assert not out.isnan().any()
    for stacked in args[4:]:
        assert not stacked.grad.isnan().any()
        assert not stacked.grad[2].any()


def test_nan_in_the_token_of_a_dropped_slot_alone_is_not_computed_with():
    x_TD = torch.ones(3, 2)
    x_TD[1] = float("nan")
    order_N, offsets_E = ops.sort_by_expert(torch.tensor([[0], [-1], [1]]), 2)
    y_ND = ops.grouped_linear(ops.permute(x_TD, order_N, 1), torch.ones(2, 2, 2), torch.ones(2, 2), offsets_E)
    assert_close(ops.combine(y_ND, torch.ones(3, 1), order_N), torch.tensor([[3.0, 3], [0, 0], [3, 3]]))


def test_sort_is_stable_and_the_rounding_order_fixed():
    """Equal ids keep slot order; the sum over choices runs in the order of the choices, not of the experts."""
    order_N, _ = ops.sort_by_expert(torch.zeros(4, 3, dtype=torch.int64), 1)
    assert order_N.tolist() == list(range(12))
    values = torch.tensor([[1e8], [1.0], [-1e8]])
    seen = set()
    for ids in itertools.permutations(range(3)):
        order_N, _ = ops.sort_by_expert(torch.tensor([ids]), 3)
        # Row e is expert e's; 1e8 + 1 rounds to 1e8 in fp32, so the order of addition shows.
        got = ops.combine(values, torch.ones(1, 3), order_N).item()
        assert got == in_order(values, ids)
        seen.add(got)
    assert seen == {0.0, 1.0}


def in_order(values, ids) -> float:
    total = torch.zeros(())
    for e in ids:
        total = total + values[e, 0]
    return total.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_runs_give_the_same_bits(dtype):
    first = results(routed, tokens(33, dtype), parameters(dtype), fused=True)
    for _ in range(20):
        again = results(routed, tokens(33, dtype), parameters(dtype), fused=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_token_alone_equals_itself_in_a_batch():
    """No token's result depends on which others are there (to rounding: GEMMs of other sizes add in other orders)."""
    weights, x_TD = parameters(torch.float64), tokens(33, torch.float64)
    together = routed(x_TD, *weights, fused=True)
    alone = torch.cat([routed(x_TD[t : t + 1], *weights, fused=True) for t in range(33)])
    assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_saved_rows_or_not_gives_the_same_gradients():
    """Without saved pre-activations the backward computes them again."""
    for glu in ops.GLU_FORMS:
        grads = []
        for save in (True, False):
            args = ffn_arguments(5, glu, True, torch.float64)
            outputs = torch.ops.moefy.expert_ffn(*args, "gelu", glu, save, False)
            assert outputs[2].numel() == (args[6].shape[1] * 5 * K if save else 0)
            outputs[0].square().sum().backward()
            grads.append([a.grad for a in args if a is not None and a.is_floating_point()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_only_what_the_backward_needs_is_kept():
    """The hidden rows and the experts' outputs are freed; x, weights and pre-activations are all that is saved."""
    args = ffn_arguments(5, "separate", True, torch.float32)
    out = torch.ops.moefy.expert_ffn(*args, "silu", "separate", True, False)[0]
    saved = [t for t in out.grad_fn.saved_tensors if t is not None and t.is_floating_point()]
    given = {a.data_ptr() for a in args if a is not None}
    extra = [t.shape for t in saved if t.data_ptr() not in given]
    assert extra == [(5 * K, 4), (5 * K, 4)]


def test_nothing_outlives_the_graph():
    x_TD = tokens(9)
    seen = weakref.ref(x_TD)
    routed(x_TD, *parameters(), fused=True).sum().backward()
    del x_TD
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_without_gradients(mode, fused):
    want = routed(tokens(9), *parameters(), fused=fused)
    with mode():
        got = routed(tokens(9), *parameters(), fused=fused)
    assert torch.equal(got, want) and not got.requires_grad


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_vmap_equals_a_loop(fused):
    x_BTD = torch.stack([tokens(7).detach() + i for i in range(3)])
    weights = [w.detach() for w in parameters()]

    def one(x_TD):
        return routed(x_TD, *weights, fused=fused)

    got = torch.vmap(one, in_dims=1, out_dims=1)(x_BTD.transpose(0, 1))
    assert_close(got, torch.stack([one(x) for x in x_BTD], dim=1))


def test_vmap_over_weights_has_gradients():
    """An ensemble: three sets of expert weights, one batch."""
    up_BEHD = torch.stack([parameters()[2].detach() * (1 + i) for i in range(3)]).requires_grad_()
    router, gate, _, bias, down = (w.detach() for w in parameters())
    x_TD = tokens(7).detach()

    def member(up_EHD):
        return routed(x_TD, router, gate, up_EHD, bias, down, fused=True)

    (got,) = torch.autograd.grad(torch.vmap(member)(up_BEHD).square().sum(), up_BEHD)
    (want,) = torch.autograd.grad(sum(member(up).square().sum() for up in up_BEHD), up_BEHD)
    assert_close(got, want)


@pytest.mark.parametrize("experts", [1, 2, 63, 64, 65, 257, 1024])
def test_many_experts(experts):
    """More experts than rows, and counts around powers of two, against the eager twin."""
    generator = torch.Generator().manual_seed(experts)
    top_k = min(2, experts)
    ids_TK = torch.rand(9, experts, generator=generator).argsort(1)[:, :top_k]
    order_N, offsets_E = ops.sort_by_expert(ids_TK, experts)
    assert torch.equal(order_N, reference.sort_by_expert(ids_TK, experts)[0])
    assert torch.equal(offsets_E, reference.sort_by_expert(ids_TK, experts)[1])
    x_ND = torch.randn(9 * top_k, 3, generator=generator, dtype=torch.float64)
    weight_EOI = torch.randn(experts, 4, 3, generator=generator, dtype=torch.float64)
    got = ops.grouped_linear(x_ND, weight_EOI, None, offsets_E)
    assert_close(got, reference.grouped_linear(x_ND, weight_EOI, None, offsets_E))


@pytest.mark.parametrize("glu", ops.GLU_FORMS)
def test_equals_the_eager_twin(glu):
    """The reference that ships with the ops, gradients included."""
    found = []
    for module in (ops, reference):
        args = ffn_arguments(5, glu, True, torch.float64)
        x, weights, order, offsets, w_gate, b_gate, w_up, b_up, w_down, b_down = args
        out = module.expert_ffn(
            x, weights, order, offsets, w_up, b_up, w_down, b_down,
            w_gate=w_gate, b_gate=b_gate, activation="gelu_tanh", glu=glu,
        )  # fmt: skip
        out.square().sum().backward()
        found.append([out, *(a.grad for a in args if a is not None and a.is_floating_point())])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert index(5).max() < E


def test_fake_and_meta_tensors_need_no_data():
    x_TD = torch.empty(7, 6, device="meta", requires_grad=True)
    weights = [w.to("meta").detach().requires_grad_() for w in parameters()]
    for fused in (True, False):
        out = routed(x_TD, *weights, fused=fused)
        out.sum().backward()
        assert out.shape == (7, 6)
        assert weights[1].grad.shape == weights[1].shape
