"""A router that draws noise at each call: the entries of one FFN must share one draw.

The expected output comes from the dense formula on the routing that the router was seen to draw.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from integration.models import (
    SAME,
    InlineGLUBlock,
    assert_close,
    assert_same,
    backward,
    batch,
    gradients,
    moe,
    scalar,
)
from moefy.nn import Router, Routing


class NoisyRouter(Router):
    """Adds noise as wide as the logits, from the global generator, at every call."""

    def logits(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        clean = super().logits(x, feature_dim)
        return clean + 3.0 * torch.randn_like(clean)


def noisy(name: str) -> nn.Module:
    model = moe(name)
    found = [m for m in model.modules() if type(m) is Router]
    assert len(found) == 2
    for router in found:
        router.__class__ = NoisyRouter
    return model


class Seen:
    """The routings that each router of a model drew, in order."""

    def __init__(self, model: nn.Module) -> None:
        self.routings: list[Routing] = []
        for module in model.modules():
            if isinstance(module, Router):
                module.register_forward_hook(self.note)

    def note(self, router: nn.Module, args: Any, routing: Routing) -> None:
        self.routings.append(routing)


def expert(block: InlineGLUBlock, e: Tensor, y: Tensor) -> Tensor:
    """One token through one expert of a gated block."""
    hidden = F.silu(block.w1.weight[e] @ y) * (block.w3.weight[e] @ y)
    return block.w2.weight[e] @ hidden


def by_hand(model: nn.Module, x: Tensor, routings: list[Routing]) -> Tensor:
    """The stack of gated blocks token by token under the given routings."""
    x = model.proj(x)
    for block, routing in zip(model.layers, routings, strict=True):
        tokens = block.norm(x).flatten(0, 1)
        chosen = zip(tokens, routing.top_k_index, routing.top_k_weights, strict=True)
        rows = [sum(w * expert(block, e, y) for e, w in zip(ids, ws, strict=True)) for y, ids, ws in chosen]
        x = x + torch.stack(rows).view_as(x)
    return model.head(x)


def test_sibling_entries_share_one_draw() -> None:
    model, inputs = noisy("glu"), batch("glu")
    seen = Seen(model)
    output, found = backward(model, inputs)
    assert len(seen.routings) == 2
    model.zero_grad()
    expected = by_hand(model, inputs[""], seen.routings)
    assert_close(output, expected, SAME[torch.float64])
    again, _ = backward(model, inputs)
    assert not torch.allclose(again, output), "the router is not noisy"
    assert set(found) == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["glu", "inline", "aligned"])
def test_gradients_are_those_of_the_drawn_routing(name: str) -> None:
    """The same seed draws the same noise: a second model without any sharing agrees, gradients included."""
    model, inputs = noisy(name), batch(name)
    torch.manual_seed(11)
    output, found = backward(model, inputs)
    torch.manual_seed(11)
    again, found_again = backward(model, inputs)
    assert torch.equal(output, again)
    assert_same(found_again, found, 0.0)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["glu", "inline"])
def test_checkpointing_draws_the_noise_again(name: str, reentrant: bool) -> None:
    """Checkpointing restores the random state, so that the second forward routes as the first one did."""
    model, inputs = noisy(name), batch(name)
    torch.manual_seed(11)
    output, expected = backward(model, inputs)
    model.zero_grad()
    torch.manual_seed(11)
    x = model.proj(inputs[""])
    for layer in model.layers:
        x = checkpoint(layer, x, use_reentrant=reentrant)
    got = model.head(x)
    scalar(got).backward()
    assert_close(got, output, SAME[torch.float64])
    assert_same(gradients(model), expected, SAME[torch.float64])


@pytest.mark.parametrize("name", ["glu", "inline"])
def test_compiled(name: str, fresh_dynamo: None) -> None:
    model, inputs = noisy(name), batch(name)
    torch.manual_seed(11)
    output, expected = backward(model, inputs)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(11)
    got, found = backward(fast, inputs)
    assert_close(got, output, SAME[torch.float64])
    found = {k.removeprefix("_orig_mod."): v for k, v in found.items()}
    assert_same(found, expected, SAME[torch.float64])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_entries_share_one_draw(strict: bool) -> None:
    model, inputs = noisy("glu").eval(), batch("glu")
    program = torch.export.export(model, (inputs[""],), strict=strict)
    draws = [n for n in program.graph.nodes if "randn" in str(n.target)]
    assert len(draws) == 2, draws
    torch.manual_seed(11)
    expected = model(inputs[""])
    torch.manual_seed(11)
    assert_close(program.module()(inputs[""]), expected, SAME[torch.float64])
