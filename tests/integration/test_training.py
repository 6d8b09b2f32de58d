"""One process trains a transformed model: gradients, AdamW, clipping, accumulation, symmetry breaking."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moefy
from integration.models import (
    ALL_CASES,
    EXACT,
    SAME,
    TORCH_CASES,
    assert_close,
    assert_same,
    backward,
    batch,
    call,
    dense,
    gradients,
    moe,
    routers,
    scalar,
    stacked_parameters,
    transformed,
)


def as_dense(model: nn.Module, found: dict[str, Tensor], shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Gradients of a transformed model under the dense names: an expert's weights are summed over the experts."""
    experts = set(stacked_parameters(model))
    return {
        name: grad.sum(0).reshape(shapes[name]) if name in experts else grad
        for name, grad in found.items()
        if "router." not in name
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL_CASES)
def test_copies_train_like_the_dense_model(name: str, dtype: torch.dtype) -> None:
    """sum_e dW_e is the dense dW, every other gradient is the dense one, and the router gets none yet."""
    reference, inputs = dense(name, dtype), batch(name, dtype=dtype)
    expected_out, expected = backward(reference, inputs)
    shapes = {n: p.shape for n, p in reference.named_parameters()}
    model = transformed(dense(name, dtype), name)
    output, found = backward(model, inputs)
    assert_close(output, expected_out, EXACT[dtype])
    scale = max(float(g.norm()) for g in expected.values())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert_same(as_dense(model, found, shapes), expected, tolerance, floor=1e-3 * tolerance * scale)
    assert len(routers(model)) == len(moefy.report(model).rewritten)
    for router in routers(model).values():
        assert router.weight.grad is not None
        assert float(router.weight.grad.norm()) <= 1e-3 * tolerance * scale


@pytest.mark.parametrize("name", ALL_CASES)
def test_every_parameter_of_distinct_experts_learns(name: str) -> None:
    model = moe(name)
    _, found = backward(model, batch(name, 8))
    without = [n for n, p in model.named_parameters() if p.requires_grad and n not in found]
    assert not without
    for router in routers(model).values():
        assert float(router.weight.grad.norm()) > 0
    for fqn in stacked_parameters(model):
        assert float(found[fqn].norm()) > 0, fqn


@pytest.mark.parametrize("name", TORCH_CASES)
def test_expert_noise_gives_the_router_a_gradient(name: str) -> None:
    """Without noise equal experts cancel in the router's gradient; with it expert 0 is still the dense FFN."""
    inputs, reference = batch(name), dense(name)
    shapes = {n: p.shape for n, p in reference.named_parameters()}
    norms = {}
    for noise in (0.0, 0.01):
        model = transformed(dense(name), name, expert_noise=noise)
        _, found = backward(model, inputs)
        norms[noise] = min(float(r.weight.grad.norm()) for r in routers(model).values())
        for fqn in stacked_parameters(model):
            experts = model.get_parameter(fqn)
            assert torch.equal(experts[0].reshape(shapes[fqn]), reference.get_parameter(fqn)), fqn
            same = all(torch.equal(e, experts[0]) for e in experts[1:])
            varies = bool(
                (experts[0] != experts[0].flatten()[0]).any()
            )  # nn.TransformerEncoder starts its biases at zero
            assert same == (noise == 0 or not varies), fqn
        if noise == 0:
            largest = max(float(g.norm()) for g in found.values())
            assert max(float(r.weight.grad.norm()) for r in routers(model).values()) < 1e-12 * largest
    assert norms[0.01] > 1e6 * norms[0.0]


@pytest.mark.parametrize("name", ["aligned", "glu", "encoder", "bert"])
def test_adamw_implementations_agree(name: str) -> None:
    """foreach, fused and the plain loop take the same three steps, clipping included."""
    ways = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    ends, norms = {}, {}
    for way, options in ways.items():
        model = moe(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        norms[way] = []
        for step in range(3):
            backward(model, batch(name, seed=step))
            norms[way].append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
        ends[way] = {n: p.detach() for n, p in model.named_parameters()}
    start = dict(moe(name).named_parameters())
    assert all(not torch.equal(p, start[n]) for n, p in ends["loop"].items())
    for way in ("foreach", "fused"):
        # a key's bias moves no attention: its gradient is rounding, and so is the little that Adam moves it
        assert_same(ends[way], ends["loop"], SAME[torch.float64], floor=1e-12)
        assert_close(torch.stack(norms[way]), torch.stack(norms["loop"]), SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu", "llama", "bert"])
def test_loss_falls_below_what_it_was_at_the_dense_start(name: str) -> None:
    inputs = batch(name, 8, torch.float32)
    model = transformed(dense(name, torch.float32), name, expert_noise=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        target = torch.randn_like(call(dense(name, torch.float32), inputs))
    losses = []
    for _ in range(12):
        loss = nn.functional.mse_loss(call(model, inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    with torch.no_grad():
        start = nn.functional.mse_loss(call(dense(name, torch.float32), inputs), target)
    assert losses[0] == pytest.approx(float(start), rel=1e-2)  # the noise moves it a little
    assert losses[-1] < 0.95 * float(start)


@pytest.mark.parametrize("name", ["aligned", "glu"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name: str) -> None:
    model, inputs = moe(name), batch(name, 4)
    _, whole = backward(model, inputs)
    model.zero_grad()
    for part in inputs[""].chunk(2):
        (scalar(model(part)) / 2).backward()
    assert_same(gradients(model), whole, SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_frozen_parts_stay_frozen(name: str) -> None:
    """``requires_grad`` of the dense weights carries over, and the router alone can be trained."""
    start = dense(name)
    for fqn, parameter in start.named_parameters():
        parameter.requires_grad_("layers.0" not in fqn)
    model = transformed(start, name)
    for fqn, parameter in model.named_parameters():
        assert parameter.requires_grad == ("layers.0" not in fqn or "router" in fqn), fqn
    model = moe(name)
    _, every = backward(model, batch(name))
    model.requires_grad_(False)
    for router in routers(model).values():
        router.requires_grad_(True)
    _, found = backward(model, batch(name))
    assert_same(found, {n: g for n, g in every.items() if "router" in n}, SAME[torch.float64])


def test_dropout_between_the_linears_is_active_in_training_only() -> None:
    from integration.models import InlineBlock, Stack

    torch.manual_seed(1)
    model = Stack(lambda: InlineBlock(dropout=0.5)).double()
    x = batch("inline")[""]
    reference = copy.deepcopy(model).eval()
    moefy.transform(model, 4, example_args=(x,))
    assert model.training
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert_close(model(x), reference(x), EXACT[torch.float64])
    assert torch.equal(model(x), model(x))
