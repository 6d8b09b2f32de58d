"""``torch.export`` strict and not, and ``make_fx``, of transformed models with distinct experts."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from integration.models import (
    HF_CASES,
    SAME,
    TORCH_CASES,
    assert_close,
    assert_same,
    backward,
    batch,
    call,
    gradients,
    moe,
    named,
    positional,
    scalar,
)

MODES = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


def dynamic(name: str, inputs: dict[str, Any]) -> Any:
    """A free batch and sequence length."""
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return tuple(axes for _ in positional(inputs)) if positional(inputs) else {k: axes for k in inputs}


def export(model: nn.Module, inputs: dict[str, Any], strict: bool, **options: Any) -> Any:
    return torch.export.export(model, positional(inputs), named(inputs), strict=strict, **options)


def eager(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return call(model, inputs)


@MODES
@pytest.mark.parametrize("name", [*TORCH_CASES, "llama", "bert"])
def test_export(name: str, strict: bool) -> None:
    """The program computes what eager does, also on other values that route otherwise."""
    model = moe(name).eval()
    inputs = batch(name) | ({"use_cache": False} if name in ("llama", "bart") else {})
    program = export(model, inputs, strict)
    for seed in range(3):
        other = inputs | batch(name, seed=seed)
        assert_close(eager(program.module(), other), eager(model, other), SAME[torch.float64])
    targets = {str(n.target) for n in program.graph.nodes}
    assert any(t.startswith("moefy.") for t in targets), targets
    assert set(program.state_dict) == set(model.state_dict())


@MODES
@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_export_with_free_batch_and_length(name: str, strict: bool) -> None:
    model, inputs = moe(name).eval(), batch(name, 3)
    program = export(model, inputs, strict, dynamic_shapes=dynamic(name, inputs))
    for size, length in ((1, 5), (7, 2), (4, 11)):
        x = torch.randn(size, length, 16, dtype=torch.float64)
        assert_close(eager(program.module(), {"": x}), eager(model, {"": x}), SAME[torch.float64])


@MODES
@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_exported_program_trains(name: str, strict: bool) -> None:
    model, inputs = moe(name), batch(name)
    _, expected = backward(model, inputs)
    program = export(model, inputs, strict).module()
    output, found = backward(program, inputs)
    assert_close(output, call(model, inputs), SAME[torch.float64])
    assert_same(found, expected, SAME[torch.float64])


@MODES
@pytest.mark.parametrize("name", ["aligned", "glu"])
def test_exported_program_survives_a_file(name: str, strict: bool) -> None:
    model, inputs = moe(name).eval(), batch(name)
    file = io.BytesIO()
    torch.export.save(export(model, inputs, strict), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert_close(eager(loaded, inputs), eager(model, inputs), SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_export_leaves_the_model_usable(name: str) -> None:
    """No fake tensor and no waiting routing stays behind."""
    model, inputs = moe(name), batch(name)
    output, found = backward(model, inputs)
    for strict in (False, True, False):
        export(model, inputs, strict)
    again, found_again = backward(model, inputs)
    assert torch.equal(again, output)
    assert_same(found_again, found, 0.0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("aligned", "inline", "glu") for mode in ("real", "fake", "symbolic")),
        *((name, "fake") for name in ("encoder", *HF_CASES)),  # attention masks read values
    ],
)
def test_make_fx(name: str, mode: str) -> None:
    model, inputs = moe(name).eval(), batch(name)
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    keys = list(inputs)
    extra = {"use_cache": False} if name in ("llama", "bart") else {}

    def run(state: dict[str, torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(keys, values, strict=True))
        out = functional_call(model, state, positional(given), {**named(given), **extra})
        return out.logits if hasattr(out, "logits") else out

    with torch.no_grad():
        graph = make_fx(run, tracing_mode=mode)(state, *inputs.values())
    for seed in range(2):
        other = batch(name, seed=seed)
        with torch.no_grad():
            got = graph(state, *other.values())
        assert_close(got, eager(model, other), SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_make_fx_of_forward_and_backward(name: str) -> None:
    model, inputs = moe(name), batch(name)
    _, expected = backward(model, inputs)
    parameters = dict(model.named_parameters())

    def step(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        loss = scalar(functional_call(model, parameters, (x,)))
        return list(torch.autograd.grad(loss, list(parameters.values())))

    graph = make_fx(step)(parameters, inputs[""])
    found = dict(zip(parameters, graph(parameters, inputs[""]), strict=True))
    assert_same(found, expected, SAME[torch.float64])
    model.zero_grad()
    scalar(call(model, inputs)).backward()
    assert_same(gradients(model), expected, 0.0)
