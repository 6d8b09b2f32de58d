"""``top_k_softmax`` on its own: the eager twin's results and gradients, ties, NaN, half types, tracing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from moefy import ops
from moefy.nn import Router
from moefy.ops import reference

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "k"), [(9, 4, 2), (3, 1, 1), (5, 7, 7), (0, 4, 2)])
def test_equals_the_eager_twin_to_second_order(tokens, experts, k, dtype):
    values = torch.randn(tokens, experts).to(dtype)
    found = []
    for module in (ops, reference):
        logits_TE = values.clone().requires_grad_()
        weights_TK, index_TK = module.top_k_softmax(logits_TE, k)
        (first,) = torch.autograd.grad(weights_TK.float().sin().sum(), logits_TE, create_graph=True)
        (second,) = torch.autograd.grad(first.float().square().sum(), logits_TE)
        found.append((index_TK, weights_TK, first, second))
    eps = torch.finfo(dtype).eps
    assert torch.equal(found[0][0], found[1][0])
    for got, want in zip(*(f[1:] for f in found), strict=True):
        assert got.dtype is dtype
        assert_close(got, want, rtol=8 * eps, atol=4 * eps)


def test_ties_go_to_the_lowest_id_and_nan_comes_first():
    rows = [[1.0, 2, 2, 1], [0.0, -0.0, 0.0, -0.0], [1.0, NAN, 2, NAN], [NAN] * 4, [-INF, INF, -INF, INF]]
    weights_TK, index_TK = ops.top_k_softmax(torch.tensor(rows), 3)
    assert index_TK.tolist() == [[1, 2, 0], [0, 1, 2], [1, 3, 2], [0, 1, 2], [1, 3, 0]]
    assert weights_TK[2:].isnan().all() and not weights_TK[:2].isnan().any()


def test_the_layers_function_is_the_op():
    logits_TE = torch.randn(5, 4)
    choice = Router(3, 4, 2).choose(logits_TE, 2)
    for got, want in zip((choice.weights, choice.index), ops.top_k_softmax(logits_TE, 2), strict=True):
        assert torch.equal(got, want)


def test_weights_keep_fp32_under_autocast():
    logits_TE = torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        weights_TK, _ = ops.top_k_softmax(logits_TE, 2)
    assert torch.equal(weights_TK, ops.top_k_softmax(logits_TE, 2)[0])


def loss(logits_TE):
    weights_TK, index_TK = ops.top_k_softmax(logits_TE, 2)
    return (weights_TK * index_TK).sum()


def gradient(logits_TE):
    logits_TE = logits_TE.detach().requires_grad_()
    return torch.autograd.grad(loss(logits_TE), logits_TE)[0]


def test_one_graph_for_all_token_counts(fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 33):
        logits_TE = torch.randn(tokens, 4, requires_grad=True)
        got, want = (torch.autograd.grad(f(logits_TE), logits_TE)[0] for f in (compiled, loss))
        assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_one_op_and_one_for_its_gradient(mode):
    logits_TE = torch.randn(5, 4)
    graph = make_fx(gradient, tracing_mode=mode)(logits_TE).graph
    seen = [n.target for n in graph.nodes if "moefy" in str(n.target)]
    assert seen == [torch.ops.moefy.top_k_softmax.default, torch.ops.moefy.top_k_softmax_backward.default]


def test_vmap_equals_a_loop():
    logits_BTE = torch.randn(3, 5, 4, requires_grad=True)
    got, want = torch.vmap(loss)(logits_BTE), torch.stack([loss(x) for x in logits_BTE])
    assert_close(got, want)
    assert_close(*(torch.autograd.grad(r.square().sum(), logits_BTE)[0] for r in (got, want)))
