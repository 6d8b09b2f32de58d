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


STEPS = {
    "survey": ("moefy.verbs.survey", 1),
    "select": ("moefy.verbs.select", 1),
    "build-first": ("moefy.verbs.build_layer", 1),
    "build-last": ("moefy.verbs.build_layer", 2),
    "stack": ("moefy.rewrite.modules.stack", 3),
    "router": ("moefy.rewrite.modules.configured_router", 2),
    "install-first": ("moefy.rewrite.modules.Layer.install", 1),
    "install-last": ("moefy.rewrite.modules.Layer.install", 2),
    "put-first": ("moefy.rewrite.modules._put", 1),
    "put-second": ("moefy.rewrite.modules._put", 2),
    "verify": ("moefy.verbs._verify", 1),
    "compare": ("moefy.verbs.compare", 1),
    "quiet": ("moefy.verbs.quiet", 1),
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
    target, count = STEPS[step]
    wrap, seen = fail_at(count)
    path, _, attribute = target.rpartition(".")
    with monkeypatch.context() as patch:
        owner = _resolve(path)
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

    monkeypatch.setattr("moefy.verbs._verify", stop)
    with pytest.raises(error):
        moefy.transform(model, 4, example_args=(inputs[""],))
    before.check(model)


def test_flags_of_the_fused_encoder_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = encoder().eval()
    before = Snapshot(model)
    assert model.use_nested_tensor
    wrap, _ = fail_at(1)
    monkeypatch.setattr("moefy.verbs._verify", wrap(lambda *a: None))
    with pytest.raises(Injected):
        moefy.transform(model, 4, example_args=(batch("encoder", dtype=DTYPE)[""],))
    before.check(model)
    assert model.use_nested_tensor


@pytest.mark.parametrize("step", ["install", "verify", "ffn_to_moe", "stack"])
def test_a_graph_module_is_restored(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = batch("inline", dtype=DTYPE)[""]
    model = fx.symbolic_trace(dense("inline", DTYPE))
    graph, code, output = model.graph, model.code, model(x)
    nodes = [(n.op, n.target, n.name) for n in graph.nodes]
    keys = {k: v.clone() for k, v in model.state_dict().items()}
    target = {
        "install": "moefy.rewrite.graph._put_graph",
        "verify": "moefy.verbs._verify",
        "ffn_to_moe": "moefy.rewrite.graph.ffn_to_moe",
        "stack": "moefy.rewrite.graph.stack",
    }[step]
    path, _, attribute = target.rpartition(".")
    wrap, _ = fail_at(1)
    with monkeypatch.context() as patch:
        owner = _resolve(path)
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
    """After the check nothing may fail but the machine; if noise does, the model is still the exact MoE or dense."""
    model, inputs = ready("inline"), batch("inline", dtype=DTYPE)
    with torch.no_grad():
        expected = call(model, inputs)
    wrap, _ = fail_at(1)
    with monkeypatch.context() as patch:
        patch.setattr("moefy.verbs.add_noise", wrap(lambda *a: None))
        with pytest.raises(Injected):
            moefy.transform(model, 4, example_args=(inputs[""],), expert_noise=0.1)
    with torch.no_grad():
        assert_close(call(model, inputs), expected, EXACT[DTYPE])


def _resolve(path: str) -> Any:
    """A module, or a class in it."""
    import importlib

    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(importlib.import_module(parent), name)
