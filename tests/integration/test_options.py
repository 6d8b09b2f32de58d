"""The corners of the options: one expert, all experts, 256 of them, every dtype, configs."""

from __future__ import annotations

import copy

import pytest
import torch

import moefy
from integration.models import (
    ALL_CASES,
    EXACT,
    TORCH_CASES,
    assert_close,
    backward,
    batch,
    call,
    dense,
    moe,
    routers,
    transformed,
)
from moefy import MoEConfig

SIZES = [(1, 1), (2, 1), (2, 2), (3, 3), (7, 5), (256, 1), (256, 2), (256, 256)]


@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("name", TORCH_CASES)
def test_numbers_of_experts(name: str, num_experts: int, top_k: int) -> None:
    inputs = batch(name)
    expected = call(dense(name), inputs)
    model = transformed(dense(name), name, num_experts, top_k)
    output, found = backward(model, inputs)
    assert_close(output, expected, EXACT[torch.float64])
    assert {n for n, p in model.named_parameters()} == set(found)
    for router in routers(model).values():
        assert (router.num_experts, router.top_k) == (num_experts, top_k)
        assert router.weight.shape[0] == num_experts
    for layer in moefy.report(model).rewritten:
        assert (layer.num_experts, layer.top_k) == (num_experts, top_k)
        router_params = num_experts * layer.d_model
        assert layer.params_total == num_experts * layer.params_dense + router_params
        assert layer.params_active == top_k * layer.params_dense + router_params


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4)])
@pytest.mark.parametrize("name", ["aligned", "glu"])
def test_all_experts_are_a_softmax_mixture(name: str, num_experts: int, top_k: int) -> None:
    """With top_k = E nothing is left out: permuting the experts together with the router changes nothing."""
    model, inputs = moe(name, num_experts=num_experts, top_k=top_k), batch(name)
    expected = call(model, inputs)
    order = torch.arange(num_experts).flip(0)
    with torch.no_grad():
        for fqn, parameter in model.named_parameters():
            if parameter.dim() == 3 or "router" in fqn or (parameter.dim() == 2 and "mlp" in fqn):
                parameter.copy_(parameter[order].clone())
    assert_close(call(model, inputs), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL_CASES)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    reference = dense(name, dtype).eval()
    inputs = batch(name, dtype=dtype)
    model = transformed(copy.deepcopy(reference), name)
    with torch.no_grad():
        got, expected = call(model, inputs), call(reference, inputs)
    assert got.dtype == expected.dtype
    assert_close(got, expected, EXACT[dtype])
    report = moefy.report(model)
    assert report.check_tolerance == EXACT[dtype]
    assert report.check_error <= EXACT[dtype]
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("name", ["aligned", "inline"])
def test_config_object_and_keywords(name: str) -> None:
    config = MoEConfig(num_experts=6, top_k=3, seed=5, router_std=0.1, expert_noise=0.05)
    assert MoEConfig.from_json(config.to_json()) == config
    example = (batch(name)[""],)
    one = moefy.transform(dense(name), config=config, example_args=example)
    two = moefy.transform(
        dense(name), 6, top_k=3, seed=5, router_std=0.1, expert_noise=0.05, example_args=example
    )
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert moefy.report(one).config == moefy.report(two).config == config
    laid_over = moefy.transform(dense(name), 8, config=config, example_args=example, top_k=1)
    assert moefy.report(laid_over).config == MoEConfig(
        num_experts=8, top_k=1, seed=5, router_std=0.1, expert_noise=0.05
    )


def test_defaults() -> None:
    for num_experts, top_k in ((1, 1), (2, 2), (8, 2)):
        model = moefy.transform(dense("aligned"), num_experts, example_args=(batch("aligned")[""],))
        assert moefy.report(model).config == MoEConfig(num_experts=num_experts, top_k=top_k)


@pytest.mark.parametrize("name", ALL_CASES)
def test_inputs_are_derived(name: str) -> None:
    """Without example inputs."""
    model, inputs = dense(name, torch.float32).eval(), batch(name, dtype=torch.float32)
    with torch.no_grad():
        expected = call(model, inputs)
        moefy.transform(model, 4)
        assert_close(call(model, inputs), expected, EXACT[torch.float32])
    assert moefy.report(model).check_error is not None
