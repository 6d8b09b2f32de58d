"""torch.compile without graph breaks or recompile storms, torch.export in both modes, make_fx."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from ops.layer import K, parameters, results, routed, tokens

COUNTS = (0, 1, 2, 5, 7, 33, 128)
# Dynamo specialises sizes 0 and 1; everything else must be one graph.
GRAPHS = 3


def targets(graph: torch.fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if "moefy" in str(n.target)}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_three_graphs_for_all_token_counts(backend, fused):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(routed, backend=counter, fullgraph=True, dynamic=True)
    for count in COUNTS:
        got = results(compiled, tokens(count), parameters(), fused=fused)
        want = results(routed, tokens(count), parameters(), fused=fused)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= GRAPHS


@pytest.mark.parametrize(
    ("backend", "fused", "counts"),
    [
        ("aot_eager", True, COUNTS),
        ("aot_eager", False, COUNTS),
        pytest.param("inductor", True, (5, 33), marks=pytest.mark.slow),
    ],
)
def test_autocast_adds_no_graph(backend, fused, counts):
    """Inductor keeps fp32 between fused element-wise ops, hence the tolerance in the norm."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(routed, backend=counter, fullgraph=True, dynamic=True)
    for count in counts:
        got = results(compiled, tokens(count), parameters(), autocast=torch.bfloat16, fused=fused)
        want = results(routed, tokens(count), parameters(), autocast=torch.bfloat16, fused=fused)
        assert got[0].dtype is torch.bfloat16
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 4 * torch.finfo(torch.bfloat16).eps * b.norm()
    assert counter.frame_count <= GRAPHS


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_automatic_dynamic_shapes_compile_at_most_one_more(fused):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(routed, backend=counter, fullgraph=True)
    for count in reversed(COUNTS):
        results(compiled, tokens(count), parameters(), fused=fused)
    assert counter.frame_count <= GRAPHS + 1


def test_no_grad_is_compiled_once_and_saves_nothing():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(routed, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for count in (2, 5, 7, 33):
            got = compiled(tokens(count), *parameters(), fused=True)
            assert_close(got, routed(tokens(count), *parameters(), fused=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_token_count_that_only_the_data_knows(fused):
    """An unbacked size (here from a mask) traces through: no check of the ops reads it."""

    def masked(x_TD, keep_T, *weights):
        return routed(x_TD[keep_T], *weights, fused=fused)

    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        for count in (9, 4, 12):
            keep_T = torch.arange(count) % 3 != 0
            x_TD = tokens(count).detach()
            assert_close(compiled(x_TD, keep_T, *parameters()), masked(x_TD, keep_T, *parameters()))


class Layer(torch.nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.router, self.gate, self.up, self.bias, self.down = map(torch.nn.Parameter, parameters())
        self.fused = fused

    def forward(self, x_TD):
        return routed(x_TD, self.router, self.gate, self.up, self.bias, self.down, fused=self.fused)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_export_with_a_dynamic_token_count(strict, fused):
    layer = Layer(fused)
    sizes = {"x_TD": {0: torch.export.Dim("T", min=2, max=4096)}}
    program = torch.export.export(layer, (tokens(5).detach(),), dynamic_shapes=sizes, strict=strict)
    expected = {"moefy.sort_by_expert.default"} | (
        {"moefy.expert_ffn.default"}
        if fused
        else {f"moefy.{n}.default" for n in ("permute", "grouped_linear", "combine")}
    )
    assert targets(program.graph) == expected
    for count in (2, 33, 128):
        assert_close(program.module()(tokens(count)), layer(tokens(count)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "small ops"])
def test_make_fx_forward_and_backward(mode, fused):
    def step(x_TD, *weights):
        return results(routed, x_TD, list(weights), fused=fused)

    args = (tokens(7), *parameters())
    graph = make_fx(step, tracing_mode=mode)(*args)
    names = targets(graph.graph)
    assert ("moefy.expert_ffn_backward.default" in names) is fused
    assert ("moefy.grouped_linear_backward.default" in names) is not fused
    for a, b in zip(graph(*args), step(*args), strict=True):
        assert torch.equal(a, b)


def test_checkpointing_saves_on_request_only():
    """Selective checkpointing sees the op as one unit, so a policy can name it."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context, op, *args, **kwargs):
        keep = op is torch.ops.moefy.expert_ffn.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def saved(x_TD, *weights, fused):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(routed, x_TD, *weights, fused=fused, use_reentrant=False, context_fn=contexts)

    want = results(routed, tokens(9), parameters(), fused=True)
    for function in (saved, torch.compile(saved, backend="aot_eager", fullgraph=True)):
        for a, b in zip(results(function, tokens(9), parameters(), fused=True), want, strict=True):
            assert_close(a, b)
    assert K == 2
