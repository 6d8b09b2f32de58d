"""Who writes over the rows that ``expert_ffn`` saves, eager and compiled, and that nobody sees it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from moefy.ops.cpu import ffn as expert_kernels
from moefy.ops.saved_rows import SavedRows, claim
from ops.layer import parameters, routed, tokens
from ops.samples import SAMPLES

OVER_THEM, BESIDE_THEM, COMPUTED_AGAIN = "written over", "left alone", "computed again"


@pytest.fixture
def taken(monkeypatch):
    """What each backward did with the saved rows."""
    torch._dynamo.reset()
    found: list[str] = []

    def watched(*rows: Tensor) -> SavedRows:
        saved = claim(*rows)
        found.append(COMPUTED_AGAIN if saved.up is None else OVER_THEM if saved.overwrite else BESIDE_THEM)
        return saved

    monkeypatch.setattr(expert_kernels, "claim", watched)
    yield found
    torch._dynamo.reset()


def layer(x_TD: Tensor, *weights: Tensor) -> Tensor:
    return routed(x_TD, *weights, fused=True)


def twice(x_TD: Tensor, *weights: Tensor) -> Tensor:
    """Two equal calls with unequal gradients: compilers run one forward for both."""
    return layer(x_TD, *weights).sin() + 2 * layer(x_TD, *weights).cos()


def compiled(function, backend: str = "aot_eager"):
    return function if backend == "eager" else torch.compile(function, backend=backend, fullgraph=True)


def leaves() -> list[Tensor]:
    return [tokens(7, torch.float64), *parameters(torch.float64)]


def gradients(out_TD: Tensor, inputs: list[Tensor], **options) -> list[Tensor]:
    return list(torch.autograd.grad(out_TD.square().sum(), inputs, **options))


def expected(function) -> list[Tensor]:
    """Of a kept graph, in which nothing is written over."""
    inputs = leaves()
    return gradients(function(*inputs), inputs, retain_graph=True)


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_last_backward_writes_over_them(backend, taken):
    inputs = leaves()
    got = gradients(compiled(layer, backend)(*inputs), inputs)
    assert taken == [OVER_THEM]
    assert_close(got, expected(layer))


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_kept_graph_is_walked_again(backend, taken):
    """Not by Inductor, which refuses where its cache holds a backward that has donated buffers."""
    inputs = leaves()
    out_TD = compiled(layer, backend)(*inputs)
    walks = [gradients(out_TD, inputs, retain_graph=keep) for keep in (True, True, False)]
    assert taken == [BESIDE_THEM, BESIDE_THEM, OVER_THEM]
    for got in walks:
        assert_close(got, expected(layer))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_two_backwards_of_one_forward(backend, taken):
    """Without the mark on the rows the second would read gradients for pre-activations."""
    inputs = leaves()
    got = gradients(compiled(twice, backend)(*inputs), inputs)
    assert taken == [OVER_THEM, COMPUTED_AGAIN]
    assert_close(got, expected(twice))


def test_one_backward_for_several_gradients(taken):
    inputs, draw = leaves(), torch.Generator().manual_seed(0)
    out_TD = layer(*inputs)
    grads_BTD = torch.randn(3, *out_TD.shape, generator=draw)
    want = [torch.autograd.grad(out_TD, inputs, g_TD, retain_graph=True) for g_TD in grads_BTD]
    got = torch.autograd.grad(out_TD, inputs, grads_BTD, is_grads_batched=True)
    assert taken[3:] == [OVER_THEM, COMPUTED_AGAIN, COMPUTED_AGAIN]
    assert_close(list(got), [torch.stack(column) for column in zip(*want, strict=True)])


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_without_donated_buffers_they_stay(backend, taken):
    inputs = leaves()
    with functorch_config.patch(donated_buffer=False):
        got = gradients(compiled(layer, backend)(*inputs), inputs)
    assert taken == [BESIDE_THEM]
    assert_close(got, expected(layer))


def test_rows_that_were_moved_are_read(taken):
    """As offloading does, which may write to its copies."""

    def restore(stored: Tensor) -> Tensor:
        return torch.empty_like(stored).copy_(stored)

    inputs = leaves()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, restore):
        got = gradients(layer(*inputs), inputs)
    assert taken == [BESIDE_THEM]
    assert_close(got, expected(layer))


def test_rows_that_the_caller_keeps_are_read(taken):
    """They are outputs of the op to whom does not call it private."""
    args = next(a for a in SAMPLES["expert_ffn"](torch.float64) if a[-3] == "separate" and a[0].numel())
    out_TD, *rows = torch.ops.moefy.expert_ffn(*args[:-2], True, False)
    before = [r.clone() for r in rows]
    out_TD.sum().backward()
    assert taken == [BESIDE_THEM]
    assert all(torch.equal(a, b) for a, b in zip(rows, before, strict=True))


def test_rows_without_a_version():
    """An exported program saves rows in inference mode too."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in SAMPLES["expert_ffn"](torch.float32)[0]]
    want = torch.ops.moefy.expert_ffn(*args[:-2], False, False)[0]
    with torch.inference_mode():
        out_TD, _, up_rows = torch.ops.moefy.expert_ffn(*args[:-2], True, True)
    assert up_rows.is_inference()
    assert torch.equal(out_TD, want)
