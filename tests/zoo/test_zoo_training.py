"""Train mode: with copied experts every gradient of the MoE model is the dense model's, the experts' summed.

A sum over experts is right because each token's weights sum to one; the router of identical experts gets no gradient.
Runs without dropout, since the two models draw masks of different shapes.
"""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error
from torch import Tensor, nn

import zoo.families  # noqa: F401  (registers the families)
from zoo import harness
from zoo.family import FAMILIES, Family, tensors

LIGHT = [f for f in FAMILIES.values() if f.library in ("torch", "transformers") and f.ffns and f.fp64]
TOLERANCE = 1e-9  # fp64, relative norm


@pytest.fixture(autouse=True)
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout keeps everything, also where a model passes a constant probability."""
    monkeypatch.setattr(torch._VF, "dropout", lambda x, p, training: x)
    monkeypatch.setattr(torch._VF, "dropout_", lambda x, p, training: x)


def training(model: nn.Module) -> nn.Module:
    """The fp64 model in train mode, every parameter trainable, attention's own dropout at zero."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
    return model.double().requires_grad_().train()


def gradients(
    model: nn.Module, args: tuple, kwargs: dict, seed: int = 3
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The outputs and the gradient of a fixed random functional of them, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        outputs = list(
            tensors(model(*harness.cast(args, torch.float64), **harness.cast(kwargs, torch.float64)))
        )
        used = [y for y in outputs if y.requires_grad]
        loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in used)
        loss.backward()  # type: ignore[union-attr]
    found = {n: p.grad for n, p in harness.named(model).items() if p.grad is not None}
    return [y.detach() for y in outputs], found


@pytest.mark.parametrize("family", [pytest.param(f, id=f.name) for f in LIGHT])
def test_training_gradients_equal_the_dense_models(family: Family) -> None:
    dense, args, kwargs = family.make()
    expected_out, expected = gradients(training(dense), args, kwargs)
    model, args, kwargs, rewritten = harness.moe_model(family, num_experts=3, top_k=2)
    outputs, found = gradients(training(model), args, kwargs)
    worst = max(relative_error(a, b) for a, b in zip(outputs, expected_out, strict=True))
    assert worst <= TOLERANCE
    parameters = harness.named(dense)
    linears = [lin for r in rewritten for lin in (*r.ffn.entries, r.ffn.exit)]
    weights = {id(parameters[lin.weight]): lin for lin in linears}
    biases = {id(parameters[lin.bias]) for lin in linears if lin.bias}
    scale = max(float(g.norm()) for g in expected.values())
    for name, grad in expected.items():
        got, p = found[name], parameters[name]
        if id(p) in weights:
            got, grad = got.sum(0), weights[id(p)].dense_as_oi(grad)
        elif id(p) in biases:
            got = got.sum(0)
        error = float((got - grad).norm()) / max(float(grad.norm()), 1e-6 * scale)
        assert error <= TOLERANCE, (name, error)
    for layer in rewritten:
        if layer.ffn.exit.weight in expected:  # else the layer's output is not used
            assert float(found[layer.router].norm()) <= 1e-9 * scale, layer.router
