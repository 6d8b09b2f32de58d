"""``torch.compile`` of transformed models: whole graphs, graph breaks inside an FFN, free shapes, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moefy
from integration.models import (
    SAME,
    TEXT,
    TORCH_CASES,
    BrokenBlock,
    Stack,
    assert_close,
    assert_same,
    backward,
    batch,
    call,
    moe,
    randomize,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(options.pop("backend", "aot_eager"))
    return torch.compile(model, backend=counter, **options), counter


def without_prefix(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


@pytest.mark.parametrize("name", TORCH_CASES)
def test_one_graph_with_gradients(name: str) -> None:
    model, inputs = moe(name), batch(name)
    output, expected = backward(model, inputs)
    fast, counter = compiled(model, fullgraph=True)
    got, found = backward(fast, inputs)
    assert counter.frame_count == 1
    assert_close(got, output, SAME[torch.float64])
    assert_same(without_prefix(found), expected, SAME[torch.float64])
    backward(fast, batch(name, seed=1))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers_models_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXT, "num_hidden_layers", 1)
    model, inputs = moe(name), batch(name)
    output, expected = backward(model, inputs)
    fast, _ = compiled(model)
    got, found = backward(fast, inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(without_prefix(found), expected, SAME[torch.float64], floor=1e-12)


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_inductor(name: str) -> None:
    model, inputs = moe(name), batch(name)
    output, expected = backward(model, inputs)
    got, found = backward(torch.compile(model, fullgraph=True), inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(without_prefix(found), expected, SAME[torch.float64])


@pytest.mark.parametrize("name", TORCH_CASES)
def test_free_shapes_compile_once(name: str) -> None:
    """A counting backend sees a dynamic frame twice at its first call, that of a dense model too; then no more."""
    model = moe(name).eval()
    fast, counter = compiled(model, fullgraph=True, dynamic=True)
    graphs = []
    for size, length in ((2, 6), (3, 5), (7, 9), (4, 17)):
        x = torch.randn(size, length, 16, dtype=torch.float64)
        with torch.no_grad():
            assert_close(fast(x), model(x), SAME[torch.float64])
        graphs.append(counter.frame_count)
    assert graphs[0] <= 2 and len(set(graphs)) == 1


def test_graph_break_between_entry_and_exit() -> None:
    """The rows cross from one compiled frame into another with their routing."""
    torch.manual_seed(1)
    model, inputs = Stack(BrokenBlock, layers=1).double(), batch("inline")
    moefy.transform(model, 4, example_args=(inputs[""],))
    randomize(model)
    output, expected = backward(model, inputs)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(inputs[""])
    fast, counter = compiled(model)
    got, found = backward(fast, inputs)
    assert counter.frame_count >= 2
    assert_close(got, output, SAME[torch.float64])
    assert_same(without_prefix(found), expected, SAME[torch.float64])


@pytest.mark.parametrize("part", ["entry", "exit", "router"])
@pytest.mark.parametrize("name", ["inline", "glu"])
def test_a_disabled_part_still_finds_its_routing(name: str, part: str) -> None:
    """Only one of the FFN's linears runs outside the graph."""
    model, inputs = moe(name), batch(name)
    output, expected = backward(model, inputs)
    paths = {"inline": {"entry": "fc1", "exit": "fc2"}, "glu": {"entry": "w1", "exit": "w2"}}[name]
    for layer in model.layers:
        target = getattr(layer, paths["entry"]).router if part == "router" else getattr(layer, paths[part])
        target.forward = torch._dynamo.disable(target.forward)
    fast, counter = compiled(model)
    got, found = backward(fast, inputs)
    assert counter.frame_count >= 1
    assert_close(got, output, SAME[torch.float64])
    assert_same(without_prefix(found), expected, SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_regional_compile(name: str) -> None:
    """Each block by itself, all from one compiled code; eight layers stay below no limit."""
    torch.manual_seed(1)
    from integration.models import CASES

    block = type(CASES[name].build().layers[0])
    model = Stack(block, layers=10).double()
    inputs = batch(name)
    moefy.transform(model, 4, example_args=(inputs[""],), check=False)
    randomize(model)
    output, expected = backward(model, inputs)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    got, found = backward(model, inputs)
    assert counter.frame_count == 1
    assert_close(got, output, SAME[torch.float64])
    assert_same(found, expected, SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline"])
def test_transform_inside_a_compiled_model(name: str) -> None:
    """``transform`` of a ``torch.compile`` wrapper rewrites the module inside, also after a first call."""
    from integration.models import dense

    model, inputs = dense(name), batch(name)
    fast, counter = compiled(model)
    before = call(fast, inputs).detach()
    assert moefy.transform(fast, 4, example_args=(inputs[""],)) is fast
    assert_close(call(fast, inputs), before, 1e-12)
    randomize(model)
    assert_close(call(fast, inputs), call(model, inputs), SAME[torch.float64])
    assert counter.frame_count >= 2
