"""Entries and exits under ``torch.compile``, export, ``make_fx`` and ``vmap``: the numbers and gradients of eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from nn.blocks import (
    BLOCKS,
    BareGlu,
    Custom,
    D,
    Glu,
    H,
    Mlp,
    NoisyRouter,
    assert_same,
    inputs,
    results,
    rewrite,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
ALL = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
LINEAR = pytest.mark.parametrize("make", [Mlp, Glu, BareGlu])


@ALL
def test_one_graph(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    expected = results(block, block, x)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend=backend)
        assert_same(results(compiled, block, x), expected)


@LINEAR
@pytest.mark.parametrize("place", ["nowhere", "entry", "exit"])
def test_inductor_with_a_checkpoint_or_a_graph_break(make: Callable[[], nn.Module], place: str) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    if place == "nowhere":
        run = torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True)
    else:
        run = torch.compile(Broken(block, place))
    assert_same(results(run, block, x), results(block, block, x))


@LINEAR
@pytest.mark.parametrize("reentrant", [False, True])
def test_one_graph_with_a_checkpoint(make: Callable[[], nn.Module], reentrant: bool) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    run = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=reentrant), fullgraph=True, backend="aot_eager"
    )
    assert_same(results(run, block, x), results(block, block, x))


def test_a_checkpoint_returns_its_output_alone() -> None:
    """The routing that is handed from entry to exit must not become saved activations."""
    block, x, graphs = rewrite(BareGlu()), torch.randn(2, 5, D), []
    backend = lambda gm, _: graphs.append(gm) or gm  # noqa: E731
    torch.compile(lambda x: checkpoint(block, x, use_reentrant=False), fullgraph=True, backend=backend)(x)
    (body,) = [m for n, m in graphs[0].named_children() if n.startswith("wrap_body")]
    (output,) = body.graph.find_nodes(op="output")
    assert len(output.args[0]) == 1


def test_a_compiled_noisy_router_routes_once() -> None:
    dense = Glu()
    block, x = rewrite(dense, router=NoisyRouter), inputs(dense)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, block, x), results(block, block, x))


class Broken(nn.Module):
    """A block with a graph break at one place of its FFN."""

    def __init__(self, block: nn.Module, place: str) -> None:
        super().__init__()
        self.block, self.place = block, place

    def at(self, place: str) -> None:
        if place == self.place:
            torch._dynamo.graph_break()

    def forward(self, x: Tensor) -> Tensor:
        b, n = self.block, self.block.source(x)
        if isinstance(b, Mlp):
            hidden = b.fc1(n)
            self.at("entry")
            hidden = F.gelu(hidden)
            self.at("exit")
            return x + b.fc2(hidden)
        gate = b.w1(n)
        self.at("between")
        up = b.w3(n)
        self.at("entry")
        hidden = F.silu(gate) * up
        self.at("exit")
        return x + b.w2(hidden)


@LINEAR
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("place", ["entry", "exit", "between"])
def test_a_graph_break_inside_the_ffn(make: Callable[[], nn.Module], backend: str, place: str) -> None:
    if place == "between" and make is Mlp:
        place = "entry"
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(Broken(block, place), backend=counter)
    assert_same(results(run, block, x), results(block, block, x))
    assert counter.frame_count >= 2


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (Mlp, ["fc1"]),
        (Mlp, ["drop"]),
        (Mlp, ["fc2"]),
        (Mlp, ["fc1", "fc2"]),
        (Glu, ["w1"]),
        (Glu, ["w3", "w2"]),
    ],
)
def test_single_modules_compiled(make: Callable[[], nn.Module], pieces: list[str]) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    expected = results(block, block, x)
    for name in pieces:
        getattr(block, name).compile(backend="aot_eager")
    assert_same(results(block, block, x), expected)


def test_a_function_that_dynamo_must_not_enter() -> None:
    dense = Mlp()
    block, x = rewrite(dense), inputs(dense)
    expected = results(block, block, x)
    block.drop.forward = torch._dynamo.disable(block.drop.forward)
    assert_same(results(torch.compile(block, backend="aot_eager"), block, x), expected)


@LINEAR
def test_an_abandoned_compiled_call_does_not_reach_the_next(make: Callable[[], nn.Module]) -> None:
    """Entries compiled alone leave their routing behind; eager and compiled calls after it are right."""
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    expected = block(x)
    entry = torch.compile(getattr(block, dense.ENTRIES[0]), backend="eager")
    run = torch.compile(block, backend="eager")
    for _ in range(6):
        entry(torch.randn(2, 5, D))
        assert_same([run(x)], [expected])
    entry(torch.randn(2, 5, D))
    assert_same([block(x)], [expected])


@ALL
def test_dynamic_shapes_do_not_recompile(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, counter = rewrite(dense), CompileCounter()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    shape = list(dense.SHAPE)
    axis = 2 if dense.FEATURE_DIM == -3 else 1
    for size in (7, 2, 5, 33, 1, 0, 12):
        shape[axis] = size
        x = torch.randn(shape)
        assert_same([compiled(x)], [block(x)])
    assert counter.frame_count <= 3, "one graph, and Dynamo's own special cases 0 and 1"


@LINEAR
def test_layers_share_compiled_code(make: Callable[[], nn.Module]) -> None:
    counter = CompileCounter()
    blocks = nn.Sequential(*[rewrite(make()) for _ in range(12)])
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    x = torch.randn(2, 5, D)
    blocks(x)
    assert counter.frame_count <= 2, "the first input needs no gradient, the others do"


@ALL
@pytest.mark.parametrize("strict", [True, False])
def test_export(make: Callable[[], nn.Module], strict: bool) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: batch},), strict=strict)
    other = torch.randn(7, *x.shape[1:])
    for value in (x, other):
        assert_same([program.module()(value)], [block(value)])


@ALL
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "pre_dispatch"])
def test_make_fx(make: Callable[[], nn.Module], mode: str) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    options: dict[str, Any] = {"tracing_mode": mode, "_allow_non_fake_inputs": True}
    if mode == "pre_dispatch":
        options = {"pre_dispatch": True}
    graph = make_fx(lambda x: block(x), **options)(x)
    assert_same([graph(x)], [block(x)])


@LINEAR
def test_make_fx_of_forward_and_backward(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense).requires_grad_()

    def grad(x: Tensor) -> Tensor:
        return torch.autograd.grad(block(x).square().sum(), x)[0]

    assert_same([make_fx(grad)(x)(x)], [grad(x)])


@LINEAR
def test_vmap(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, x = rewrite(dense), torch.randn(3, 4, D)
    assert_same([torch.func.vmap(block)(x)], [torch.stack([block(one) for one in x])])


@LINEAR
def test_autocast_compiled(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(results(compiled, block, x), results(block, block, x))


class Square(torch.autograd.Function):
    """An activation with a backward of its own, as fused ones have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def halves(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def in_place(b: nn.Module, h: Tensor) -> Tensor:
    h = h * 1
    h += 1
    h *= 2
    return F.relu_(h)


def flat_and_back(b: nn.Module, h: Tensor) -> Tensor:
    batch, time, channels = h.shape
    return F.gelu(h.reshape(batch * time, channels)).view(batch, time, channels)


HALF = H // 2
BODIES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "chunk_last": (lambda b, h: halves(*h.chunk(2, dim=-1)), HALF),
    "chunk_2": (lambda b, h: halves(*h.chunk(2, dim=2)), HALF),
    "split_method": (lambda b, h: halves(*h.split(HALF, dim=-1)), HALF),
    "split_sizes": (lambda b, h: halves(*h.split([HALF, HALF], -1)), HALF),
    "split_function": (lambda b, h: halves(*torch.split(h, HALF, dim=2)), HALF),
    "unflatten": (lambda b, h: halves(*h.unflatten(-1, (2, HALF)).unbind(-2)), HALF),
    "slices": (lambda b, h: halves(h[..., :HALF], h[..., HALF:]), HALF),
    "strides": (lambda b, h: halves(h[..., ::2], h[..., 1::2]), HALF),
    "glu": (lambda b, h: F.glu(h, dim=2), HALF),
    "shape": (flat_and_back, H),
    "flat": (lambda b, h: F.gelu(h).flatten(0, 1), H),
    "transpose": (lambda b, h: F.gelu(h.transpose(1, 2)).transpose(1, 2), H),
    "permute": (lambda b, h: F.gelu(h.permute(0, 2, 1)).permute(0, 2, 1), H),
    "per_channel": (lambda b, h: F.gelu(h) * b.scale, H),
    "prelu": (lambda b, h: F.prelu(h.transpose(1, 2), b.scale).transpose(1, 2), H),
    "learnable": (lambda b, h: b.slope * F.relu(h) ** 2, H),
    "operators": (lambda b, h: (1 - h) / (2 + abs(h)) + 2.0**h - -h, H),
    "cast": (lambda b, h: F.gelu(h.double()).type_as(h), H),
    "in_place": (in_place, H),
    "lists": (lambda b, h: torch.stack([F.silu(h), h]).prod(0), H),
    "cat": (lambda b, h: torch.cat([h.chunk(2, -1)[1], h.chunk(2, -1)[0]], dim=-1), H),
    "keywords": (lambda b, h: torch.where(condition=h > 0, input=h, other=0.1 * h), H),
    "not_overridable": (lambda b, h: F.hardswish(h) + F.tanh(h) + F.hardsigmoid(h), H),
    "autograd_function": (lambda b, h: Square.apply(h), H),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_keep_their_meaning(name: str) -> None:
    """Against the dense block in eager mode (copies), against eager when compiled (distinct experts)."""
    act, width = BODIES[name]
    dense = Custom(act, width)
    x = inputs(dense)
    copies = rewrite(dense, distinct=False)
    assert_same(results(copies, copies, x)[:2], results(dense, dense, x)[:2])
    block = rewrite(dense)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_same(results(compiled, block, x), results(block, block, x))


def test_a_scripted_activation() -> None:
    """TorchScript drops tensor subclasses; the exit takes the routing of the FFN's last call."""
    script = torch.jit.script(swish)
    dense = Custom(lambda b, h: script(h))
    x = inputs(dense)
    copies = rewrite(dense, distinct=False)
    assert_same(results(copies, copies, x)[:2], results(dense, dense, x)[:2])


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def test_a_copy_of_a_traced_block_is_independent() -> None:
    block, x = rewrite(Glu()), torch.randn(2, 5, D)
    torch.compile(block, fullgraph=True, backend="eager")(x)
    other = copy.deepcopy(block)
    assert_same([other(x)], [block(x)], 0.0)
