"""The CUDA kernels against the CPU's, where there is a GPU: same numbers, same bits again, autocast, opcheck."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from ops.layer import parameters, results, routed, tokens
from ops.samples import SAMPLES, cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CASES = cases(torch.float32)


def on_cuda(args):
    def move(a):
        return a.detach().cuda().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a

    return [move(a) for a in args]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_equals_cpu_and_repeats(name, i, dtype):
    op, args = getattr(torch.ops.moefy, name).default, SAMPLES[name](dtype)[i]
    moved = on_cuda(args)
    want, got, again = op(*args), op(*moved), op(*moved)
    eps = 8 * torch.finfo(dtype).eps

    def as_list(result):
        # what expert_ffn saves for its backward is each device's own business
        return [result] if isinstance(result, Tensor) else list(result)[: 1 if name == "expert_ffn" else None]

    for a, b, c in zip(as_list(got), as_list(want), as_list(again), strict=True):
        assert torch.equal(a, c)
        if a.is_floating_point():  # in the norm: sums run in another order than on the CPU
            assert (a.cpu().double() - b.double()).norm() <= eps * b.double().norm()
        else:
            assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_on_cuda(name):
    torch.library.opcheck(
        getattr(torch.ops.moefy, name).default, tuple(on_cuda(SAMPLES[name](torch.float32)[0]))
    )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_layer(fused, autocast):
    got = results(
        routed, tokens(33, device="cuda"), parameters(device="cuda"), autocast=autocast, fused=fused
    )
    want = results(routed, tokens(33), parameters(), autocast=autocast, fused=fused)
    assert got[0].dtype is want[0].dtype
    for a, b in zip(got, want, strict=True):
        assert (a.cpu() - b).norm() <= 8 * torch.finfo(want[0].dtype).eps * b.norm()


def test_routing_does_not_wait_for_the_device():
    """top-k, sort, permute and combine: no host sync."""
    from moefy import ops

    logits_TE = torch.randn(33, 4, device="cuda", requires_grad=True)
    x_TD = torch.randn(33, 8, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        w_TK, index_TK = ops.top_k_softmax(logits_TE, 2)
        order_N, _ = ops.sort_by_expert(index_TK, 4)
        ops.combine(ops.permute(x_TD, order_N, 2), w_TK, order_N).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x_TD.grad is not None and logits_TE.grad is not None


@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_last"])
def test_a_retained_graph_can_be_walked_again(glu):
    """A last backward writes over the saved pre-activations; one that keeps the graph must not."""
    args = on_cuda(next(a for a in SAMPLES["expert_ffn"](torch.bfloat16) if a[-3] == glu and a[0].numel()))
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out_TD = torch.ops.moefy.expert_ffn(*args[:-2], True, True)[0]
    kept = torch.autograd.grad(out_TD.sum(), inputs, retain_graph=True)
    for again in (torch.autograd.grad(out_TD.sum(), inputs, retain_graph=True),
                  torch.autograd.grad(out_TD.sum(), inputs)):  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def layer_arguments(glu, dtype, tokens_, seed):
    """Arguments of ``expert_ffn`` and a gradient of its output, all new tensors."""
    from moefy import ops

    width, hidden, experts, top_k = 64, 128, 4, 2
    torch.manual_seed(seed)
    entry = 2 * hidden if glu.startswith("merged") else hidden
    x_TD, grad_TD = (torch.randn(tokens_, width, device="cuda", dtype=dtype) for _ in range(2))
    weights_TK, index_TK = ops.top_k_softmax(torch.randn(tokens_, experts, device="cuda"), top_k)
    order_N, offsets_E = ops.sort_by_expert(index_TK, experts)
    entries = torch.randn(2, experts, entry, width, device="cuda", dtype=dtype) / 8
    w_gate, w_up = entries.unbind(0)  # always as far apart, which is of the kind of a call
    w_gate = w_gate if glu == "separate" else None
    w_down = torch.randn(experts, width, hidden, device="cuda", dtype=dtype) / 8
    return (x_TD, weights_TK, order_N, offsets_E, w_gate, None, w_up, None, w_down, None), grad_TD


@pytest.mark.parametrize("tokens_", [5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first"])
def test_replayed_launches_give_the_same_bits(glu, dtype, tokens_):
    """Launches are repeated from the third call on; other tensors and another routing come out as by launching anew."""
    from moefy.ops.cuda import ffn as cuda_ffn
    from moefy.ops.cuda.choose import recorded

    mask = [True, True, glu == "separate", False, True, False, True, False]
    tapes = [recorded(f)._tapes for f in (cuda_ffn._forward, cuda_ffn._backward)]
    for known in tapes:
        known.clear()
    held = []
    for seed in range(5):
        args, grad_TD = layer_arguments(glu, dtype, tokens_, seed)
        apart = cuda_ffn._apart(args[4], args[6])
        got = torch.ops.moefy.expert_ffn(*args, "silu", glu, True, False)
        want = cuda_ffn._forward(args, ("silu", glu, True, apart))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        rows = [None if r.dim() == 1 else r for r in want[1:]]
        got = torch.ops.moefy.expert_ffn_backward(grad_TD, *args, *want[1:], "silu", glu, mask)
        want = cuda_ffn._backward((grad_TD, *args, *rows), ("silu", glu, tuple(mask), False, apart))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        held.append(([*got], [g.clone() for g in got]))
    assert all(torch.equal(a, b) for now, then in held for a, b in zip(now, then, strict=True))
    assert all(hasattr(tape, "replay") for known in tapes for tape in known.values())


@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first"])
def test_replayed_backwards_that_write_over_the_saved_rows(glu):
    """The same bits as a backward that leaves them alone."""
    from moefy.ops.cuda import ffn as cuda_ffn

    mask = (True, True, glu == "separate", False, True, False, True, False)
    for seed in range(5):
        args, grad_TD = layer_arguments(glu, torch.bfloat16, 300, seed)
        apart = cuda_ffn._apart(args[4], args[6])
        _, *rows = cuda_ffn._forward(args, ("silu", glu, True, apart))
        rows = [None if r.dim() == 1 else r for r in rows]
        want = cuda_ffn._backward((grad_TD, *args, *rows), ("silu", glu, mask, False, apart))
        places = [i for i in (0, 1, 4, 6, 8) if args[i] is not None]
        inputs = {i: args[i].detach().requires_grad_() for i in places}
        out_TD = torch.ops.moefy.expert_ffn(
            *(inputs.get(i, a) for i, a in enumerate(args)), "silu", glu, True, True
        )[0]
        got = torch.autograd.grad(out_TD, [*inputs.values()], grad_TD)
        wanted = [w for w, m in zip(want, mask, strict=True) if m]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_replayed_launches_in_a_cuda_graph():
    """A graph that captured a replay follows another routing."""
    args, _ = layer_arguments("none", torch.bfloat16, 300, seed=0)
    call = lambda: torch.ops.moefy.expert_ffn(*args, "silu", "none", False, False)[0]  # noqa: E731
    for _ in range(3):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_TD = call()
    other, _ = layer_arguments("none", torch.bfloat16, 300, seed=1)
    for mine, new in zip(args, other, strict=True):
        if mine is not None:
            mine.copy_(new)
    graph.replay()
    assert torch.equal(out_TD, call())


@pytest.mark.slow
@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first"])
def test_a_compiled_step_takes_no_more_memory(glu):
    """The peak of forward and backward, at the shape of a layer whose saved rows are most of it."""
    from moefy import ops

    tokens_, width, hidden, experts, top_k = 8192, 512, 512, 8, 4
    entry = 2 * hidden if glu.startswith("merged") else hidden
    shapes = [(tokens_, width), (experts, entry, width), (experts, width, hidden)]
    shapes += [(experts, hidden, width)] * (glu == "separate")
    leaves = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    scores_TE = torch.randn(tokens_, experts, device="cuda")
    weights_TK, index_TK = ops.top_k_softmax(scores_TE, top_k)
    order_N, offsets_E = ops.sort_by_expert(index_TK, experts)

    def layer(x_TD, w_up, w_down, w_gate=None):
        return ops.expert_ffn(
            x_TD, weights_TK, order_N, offsets_E, w_up, None, w_down, None,
            w_gate=w_gate, activation="silu", glu=glu,
        )  # fmt: skip

    def peak(function) -> int:
        for _ in range(2):
            gc.collect()  # what an earlier test left must not be freed within the step
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.autograd.grad(function(*leaves).sum(), leaves)
        return torch.cuda.max_memory_allocated() - before

    eager = peak(layer)
    assert peak(torch.compile(layer, fullgraph=True)) <= 1.02 * eager


@pytest.mark.slow
def test_more_than_2_31_elements():
    """Rows times hidden width beyond int32: the last tokens come out as they do alone, forward and backward."""
    from moefy import ops

    tokens_, width, hidden, experts, top_k, last = 300_000, 64, 2048, 4, 4, 1000
    assert tokens_ * top_k * hidden > 2**31
    like = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    x_TD = torch.randn(tokens_, width, **like)
    logits_TE = torch.randn(tokens_, experts, device="cuda")
    w_up = torch.randn(experts, hidden, width, **like) / 8
    w_down = torch.randn(experts, width, hidden, **like) / 45
    results_ = []
    for part in (slice(None), slice(-last, None)):
        x = x_TD[part].detach().requires_grad_()
        weights_TK, index_TK = ops.top_k_softmax(logits_TE[part], top_k)
        order_N, offsets_E = ops.sort_by_expert(index_TK, experts)
        y = ops.expert_ffn(
            x, weights_TK, order_N, offsets_E, w_up, None, w_down, None, activation="gelu_tanh"
        )
        y[-last:].float().square().sum().backward()
        results_.append((y[-last:].detach().float(), x.grad[-last:].float()))
    for whole, alone in zip(*results_, strict=True):
        assert (whole - alone).norm() <= 1e-2 * alone.norm()
