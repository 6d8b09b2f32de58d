"""bf16 autocast, half-precision weights, and fp16: near the fp32 model, router in fp32, gradients in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

import moefy
from integration.models import (
    ALL_CASES,
    EXACT,
    assert_close,
    backward,
    batch,
    call,
    dense,
    gradients,
    moe,
    routers,
    scalar,
    transformed,
)
from moefy.nn import Routing

HALF = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("name", ALL_CASES)
def test_copies_under_autocast_are_the_dense_model_under_autocast(name: str) -> None:
    inputs = batch(name, dtype=torch.float32)
    reference = dense(name, torch.float32)
    model = transformed(copy.deepcopy(reference), name)
    with autocast():
        expected, got = call(reference, inputs), call(model, inputs)
    assert got.dtype == expected.dtype
    assert_close(got, expected, EXACT[torch.bfloat16])


@pytest.mark.parametrize("name", ALL_CASES)
def test_distinct_experts_under_autocast(name: str) -> None:
    """Routing ignores autocast: each router, given its own input, picks what fp32 picks. Gradients stay fp32."""
    model, inputs = moe(name, torch.float32), batch(name, dtype=torch.float32)
    seen: list[tuple[torch.Tensor, torch.Tensor, Routing]] = []

    def note(router: torch.nn.Module, args: tuple[torch.Tensor, ...], routing: Routing) -> None:
        seen.append((args[0].detach(), router.weight.detach(), routing))

    handles = [router.register_forward_hook(note) for router in routers(model).values()]
    with autocast():
        output = call(model, inputs)
    scalar(output.float()).backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles)
    for x, weight, routing in seen:
        assert routing.top_k_weights.dtype == torch.float32
        assert routing.router_logits.dtype == torch.float32
        logits = x.float().flatten(0, -2) @ weight.float().t()
        assert_close(routing.router_logits, logits, 1e-6, "logits")
        assert torch.equal(routing.top_k_index, logits.topk(2).indices)
    found = gradients(model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found.values())


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_one_block_under_autocast_is_near_fp32(name: str) -> None:
    """Of one block, since a second router may choose otherwise on rounded inputs."""
    model, inputs = moe(name, torch.float32), batch(name, 8, torch.float32)
    block, x = model.layers[0], model.proj(inputs[""]).detach()
    block.requires_grad_(True)
    expected = block(x)
    scalar(expected).backward()
    plain = gradients(block)
    block.zero_grad()
    with autocast():
        got = block(x)
    scalar(got.float()).backward()
    assert_close(got.float(), expected, 2e-2)
    for key, grad in gradients(block).items():
        assert_close(grad, plain[key], 5e-2, key)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ALL_CASES)
def test_half_precision_weights(name: str, dtype: torch.dtype) -> None:
    reference, inputs = dense(name, dtype).eval(), batch(name, dtype=dtype)
    with torch.no_grad():
        expected = call(reference, inputs)
    model = transformed(copy.deepcopy(reference), name)
    assert moefy.report(model).check_tolerance == EXACT[dtype]
    assert {p.dtype for p in model.parameters()} == {dtype}
    got, found = backward(model, inputs)
    assert got.dtype == expected.dtype
    assert_close(got, expected, EXACT[dtype])
    assert all(g.dtype == dtype for g in found.values())


@pytest.mark.parametrize("name", ["aligned", "inline"])
def test_grad_scaler(name: str) -> None:
    """fp16 autocast with a scaler: the unscaled gradients are those without it."""
    model, inputs = moe(name, torch.float32), batch(name, dtype=torch.float32)
    with autocast(torch.float16):
        loss = scalar(call(model, inputs).float())
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    with autocast(torch.float16):
        loss = scalar(call(model, inputs).float())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for key, grad in gradients(model).items():
        assert_close(grad, expected[key], 1e-2, key)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scaler.step(optimizer)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
