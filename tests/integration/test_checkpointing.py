"""Activation checkpointing of both kinds, eager and compiled: the gradients are those of the plain step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from integration.models import (
    SAME,
    Stack,
    assert_close,
    assert_same,
    backward,
    batch,
    moe,
)

KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
BLOCKS = ("aligned", "inline", "glu", "encoder")


class Checkpointed(nn.Module):
    """Runs the layers of a stack under ``checkpoint``."""

    def __init__(self, stack: nn.Module, **options: Any) -> None:
        super().__init__()
        self.stack, self.options = stack, options

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack.proj(x) if isinstance(self.stack, Stack) else x
        for layer in self.stack.layers:
            x = checkpoint(layer, x, **self.options)
        return self.stack.head(x) if isinstance(self.stack, Stack) else x


def of_stack(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("_orig_mod.").removeprefix("stack."): v for k, v in found.items()}


def inputs_of(name: str) -> dict[str, Tensor]:
    """The reentrant kind needs an input that requires grad."""
    return {"": batch(name)[""].requires_grad_()}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@KINDS
@pytest.mark.parametrize("name", BLOCKS)
def test_checkpointed_layers(name: str, reentrant: bool, compile: bool, fresh_dynamo: None) -> None:
    stack, inputs = moe(name), inputs_of(name)
    output, expected = backward(stack, inputs)
    dx = inputs[""].grad.clone()
    inputs[""].grad = None
    model: nn.Module = Checkpointed(stack, use_reentrant=reentrant)
    if compile:
        model = torch.compile(model, backend="aot_eager", fullgraph=not reentrant)
    got, found = backward(model, inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(of_stack(found), expected, SAME[torch.float64])
    assert_close(inputs[""].grad, dx, SAME[torch.float64], "input's gradient")


@pytest.mark.parametrize("name", BLOCKS)
def test_early_stop_off(name: str) -> None:
    """The whole block runs again, the exit included."""
    stack, inputs = moe(name), inputs_of(name)
    _, expected = backward(stack, inputs)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        _, found = backward(Checkpointed(stack, use_reentrant=False), inputs)
    assert_same(of_stack(found), expected, SAME[torch.float64])


@KINDS
@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_layers_under_an_eager_checkpoint(name: str, reentrant: bool, fresh_dynamo: None) -> None:
    stack, inputs = moe(name), inputs_of(name)
    output, expected = backward(stack, inputs)
    # torch 2.11 compiles weakref.__setitem__ while it recomputes, until fullgraph fails; of a dense encoder too
    fullgraph = not (torch.__version__.startswith("2.11") and name == "encoder")
    for layer in stack.layers:
        layer.compile(backend="aot_eager", fullgraph=fullgraph)
    got, found = backward(Checkpointed(stack, use_reentrant=reentrant), inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(of_stack(found), expected, SAME[torch.float64])


@pytest.mark.parametrize("name", ["inline", "glu"])
def test_checkpoint_begins_between_entry_and_exit(name: str, reentrant: bool = False) -> None:
    """The rows go into the checkpointed part with their routing, and the first linear stays outside.

    A reentrant checkpoint sees its tensor arguments alone and not the routing that they carry: it raises.
    """
    stack, inputs = moe(name), inputs_of(name)
    output, expected = backward(stack, inputs)

    def inline(block: Any, x: Tensor) -> Tensor:
        h = block.fc1(block.norm(x))
        return x + checkpoint(lambda r: block.fc2(nn.functional.gelu(r)), h, use_reentrant=reentrant)

    def glu(block: Any, x: Tensor) -> Tensor:
        y = block.norm(x)
        a, b = block.w1(y), block.w3(y)
        inner = functools.partial(checkpoint, use_reentrant=reentrant)
        return x + inner(lambda a, b: block.w2(nn.functional.silu(a) * b), a, b)

    for layer in stack.layers:
        layer.forward = functools.partial({"inline": inline, "glu": glu}[name], layer)
    got, found = backward(stack, inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(found, expected, SAME[torch.float64])


@pytest.mark.parametrize("name", BLOCKS)
def test_selective_checkpoint(name: str) -> None:
    """Only the products are kept."""
    stack, inputs = moe(name), inputs_of(name)
    _, expected = backward(stack, inputs)
    kept = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op.namespace == "moefy" and "grouped_linear" in str(op):
            kept.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    model = Checkpointed(stack, use_reentrant=False, context_fn=contexts)
    _, found = backward(model, inputs)
    assert_same(of_stack(found), expected, SAME[torch.float64])
    assert kept or name == "aligned"  # the aligned FFN is one op


@KINDS
@pytest.mark.parametrize("name", ["llama", "bert", "bart"])
def test_gradient_checkpointing_of_transformers(name: str, reentrant: bool) -> None:
    model, inputs = moe(name), batch(name)
    model.config.use_cache = False
    output, expected = backward(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    got, found = backward(model, inputs)
    assert_close(got, output, SAME[torch.float64])
    assert_same(found, expected, SAME[torch.float64], floor=1e-12)
