"""A transform that fails at any step leaves the model bit by bit as it was, and works afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import moefy
from integration.models import (
    EXACT,
    TORCH_CASES,
    assert_close,
    batch,
    call,
    dense,
    encoder,
    scalar,
)
from integration.snapshot import Snapshot
from moefy import verbs
from moefy.nn.routers import make
from moefy.rewrite import build, graph, plan, swaps, verify
from moefy.rewrite.methods import copy, noise

DTYPE = torch.float32


class Injected(Exception):
    """What the tests raise inside moefy."""


def fail_at(calls: int) -> tuple[Callable[[Callable[..., Any]], Callable[..., Any]], list[int]]:
    """A wrapper that raises at its ``calls``-th call (from 1), and the count of calls so far."""
    seen: list[int] = []

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            if len(seen) == calls:
                raise Injected(f"call {calls}")
            return function(*args, **kwargs)

        return wrapped

    return wrap, seen


# What is made to fail, and at which of its calls.
STEPS: dict[str, tuple[Any, str, int]] = {
    "survey": (verbs, "capture", 1),
    "select": (plan, "select", 1),
    "build-first": (build, "build_layer", 1),
    "build-last": (build, "build_layer", 2),
    "stack": (copy, "copies", 3),
    "router": (make, "make_router", 5),  # once to check the name, once a layer to plan and once to build
    "install-first": (swaps.ModuleEdit, "install", 1),
    "install-last": (swaps.ModuleEdit, "install", 2),
    "put-first": (swaps, "_put", 1),
    "put-second": (swaps, "_put", 2),
    "verify": (verbs, "verify_outputs", 1),
    "compare": (verify, "compare", 1),
    "quiet": (verify, "quiet", 1),
}


def ready(name: str) -> nn.Module:
    """With gradients and mixed modes."""
    model = dense(name, DTYPE)
    scalar(call(model, batch(name, dtype=DTYPE))).backward()
    model.layers[1].eval()
    return model


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TORCH_CASES)
def test_a_failure_at_any_step(name: str, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = ready(name), batch(name, dtype=DTYPE)
    before = Snapshot(model)
    with torch.no_grad():
        expected = call(model, inputs)
    owner, attribute, count = STEPS[step]
    wrap, seen = fail_at(count)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
        with pytest.raises(Injected):
            moefy.transform(model, 4, example_args=(inputs[""],))
    assert len(seen) >= count
    before.check(model)
    with torch.no_grad():
        assert torch.equal(call(model, inputs), expected)
    moefy.transform(model, 4, example_args=(inputs[""],))
    with torch.no_grad():
        assert_close(call(model, inputs), expected, EXACT[DTYPE])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RecursionError])
def test_interrupts_restore_too(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is no ``Exception``."""
    model, inputs = ready("glu"), batch("glu", dtype=DTYPE)
    before = Snapshot(model)

    def stop(*args: Any) -> None:
        raise error

    monkeypatch.setattr(verbs, "verify_outputs", stop)
    with pytest.raises(error):
        moefy.transform(model, 4, example_args=(inputs[""],))
    before.check(model)


def test_flags_of_the_fused_encoder_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = encoder().eval()
    before = Snapshot(model)
    assert model.use_nested_tensor
    wrap, _ = fail_at(1)
    monkeypatch.setattr(verbs, "verify_outputs", wrap(lambda *a: None))
    with pytest.raises(Injected):
        moefy.transform(model, 4, example_args=(batch("encoder", dtype=DTYPE)[""],))
    before.check(model)
    assert model.use_nested_tensor


GRAPH_STEPS: dict[str, tuple[Any, str]] = {
    "install": (graph, "put_graph"),
    "verify": (verbs, "verify_outputs"),
    "ffn_to_moe": (graph, "ffn_to_moe"),
    "stack": (copy, "copies"),
}


@pytest.mark.parametrize("step", GRAPH_STEPS)
def test_a_graph_module_is_restored(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = batch("inline", dtype=DTYPE)[""]
    model = fx.symbolic_trace(dense("inline", DTYPE))
    code, output = model.code, model(x)
    nodes = [(n.op, n.target, n.name) for n in model.graph.nodes]
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    owner, attribute = GRAPH_STEPS[step]
    wrap, _ = fail_at(1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, wrap(getattr(owner, attribute)))
        with pytest.raises(Injected):
            moefy.transform(model, 4, example_args=(x,))
    assert [(n.op, n.target, n.name) for n in model.graph.nodes] == nodes
    assert model.code == code
    state = model.state_dict()
    assert state.keys() == keys.keys()
    assert all(torch.equal(state[k], keys[k]) for k in keys)
    assert torch.equal(model(x), output)
    moefy.transform(model, 4, example_args=(x,))
    assert_close(model(x), output, EXACT[DTYPE])


def test_a_failing_seal_or_noise_is_no_half_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise comes after the check and before the point of no return."""
    model, inputs = ready("inline"), batch("inline", dtype=DTYPE)
    before = Snapshot(model)
    wrap, _ = fail_at(3)
    with monkeypatch.context() as patch:
        patch.setattr(noise, "add_noise", wrap(noise.add_noise))
        with pytest.raises(Injected):
            moefy.transform(model, 4, example_args=(inputs[""],), expert_noise=0.1)
    before.check(model)
