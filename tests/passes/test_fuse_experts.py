"""``fuse_experts``: same numbers, one op per FFN, and everything that must not fuse stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moefy.nn import EntryLinear, ExitLinear, FFNLink, Router
from moefy.passes import run_pipeline
from moefy.passes.graphs import op_counts
from moefy.passes.moe.fuse_experts import FuseExperts

UNFUSED = {"moefy.permute", "moefy.grouped_linear", "moefy.combine"}
D, H, E = 8, 12, 4


def gelu_by_hand(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


class Block(nn.Module):
    """An inline FFN after surgery, random distinct experts."""

    def __init__(self, body, *, entries=1, width=H, hidden=H, bias=True, dtype=torch.float32):
        super().__init__()
        link = FFNLink("block")
        torch.manual_seed(0)
        self.up = nn.ModuleList(
            EntryLinear(
                D, width, E, bias=bias, link=link, index=i, count=entries,
                router=Router(D, E, 2) if i == 0 else None,
            )
            for i in range(entries)
        )  # fmt: skip
        self.down = ExitLinear(hidden, D, E, bias=bias, link=link)
        self.body = body
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.to(dtype)

    def forward(self, x):
        return x + self.down(self.body(*(entry(x) for entry in self.up)))


class Capture:
    """A backend that runs the passes and keeps what it saw."""

    def __init__(self, **options):
        self.options, self.before, self.after, self.records = options, [], [], []

    def __call__(self, gm, example_inputs):
        self.before.append(op_counts(gm))
        self.records.append(run_pipeline(gm, **self.options)[0])
        self.after.append(op_counts(gm))
        return gm.forward


def run(model, x):
    """Output, input gradient and parameter gradients."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


def compile_and_compare(model, x, *, tolerance, dynamic=False, **options):
    capture = Capture(**options)
    expected = run(model, x)
    torch._dynamo.reset()
    got = run(torch.compile(model, backend=capture, fullgraph=True, dynamic=dynamic), x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return capture


def chunk_gate_last(h):
    a, b = h.chunk(2, dim=-1)
    return a * F.silu(b)


BODIES = {
    "gelu": (F.gelu, {}),
    "by hand": (gelu_by_hand, {}),
    "flattened": (lambda h: F.relu(h.reshape(-1, H)).reshape(1, -1, H), {}),
    "reads its shape": (lambda h: F.silu(h.view(h.shape[0], h.shape[1], h.shape[2])), {}),
    "inactive dropout": (lambda h: F.dropout(F.relu(h), 0.5, training=False), {}),
    "in place": (lambda h: F.relu(h, inplace=True), {}),
    "merged": (chunk_gate_last, {"width": 2 * H}),
    "two entries": (lambda a, b: F.silu(a) * b, {"entries": 2}),
    "two entries, swapped": (lambda a, b: a * gelu_by_hand(b), {"entries": 2}),
    "no bias": (F.gelu, {"bias": False}),
}


@pytest.mark.parametrize("name", BODIES)
def test_known_bodies_become_one_op(name):
    body, options = BODIES[name]
    model = Block(body, **options)
    x = torch.randn(2, 5, D)
    capture = compile_and_compare(model, x, tolerance=1e-5)
    (before,), (after,), (record,) = capture.before, capture.after, capture.records
    assert record.name == "fuse_experts" and record.matched == 1 and record.preserving
    assert record.nodes_after < record.nodes_before
    assert before["moefy.grouped_linear"] == 1 + len(model.up) and "expert_ffn" not in before
    assert after["expert_ffn"] == 1 and not UNFUSED & set(after)


def test_float64_is_exact_to_rounding():
    compile_and_compare(Block(F.gelu, dtype=torch.float64), torch.randn(3, 4, D).double(), tolerance=1e-12)


@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (1, 1)])
def test_dynamic_shapes(shape):
    model = Block(lambda a, b: F.silu(a) * b, entries=2)
    capture = compile_and_compare(model, torch.randn(*shape, D), tolerance=1e-5, dynamic=True)
    assert capture.records[0].matched == 1


def test_rows_many_times_the_probe():
    model = Block(F.gelu)
    (record,) = compile_and_compare(model, torch.randn(2, 22000, D), tolerance=1e-3).records
    assert record.matched == 1 and 2 * 2 * 22000 * H > 2**20


class Scaled(nn.Module):
    """A learnable activation that is a plain relu today."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, h):
        return self.scale * F.relu(h)


def keep_hidden(store):
    def body(h):
        store.append(h)
        return F.gelu(h)

    return body


KEPT = {
    "an unknown activation": (F.mish, "no known body"),
    "a parameter": (Scaled(), "the body reads"),
    "a cast that rounds": (lambda h: F.gelu(h.bfloat16()).float(), "no known body"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_bodies_stay(name):
    body, reason = KEPT[name]
    capture = compile_and_compare(Block(body), torch.randn(2, 5, D), tolerance=1e-6)
    (record,) = capture.records
    assert record.matched == 0 and f"1 kept: {reason}" in record.note
    assert capture.after == capture.before


def test_active_dropout_stays():
    model = Block(lambda h: F.dropout(F.gelu(h), 0.25, training=True))
    capture = Capture()
    torch.compile(model, backend=capture, fullgraph=True)(torch.randn(2, 5, D))
    assert capture.records[0].matched == 0 and "active dropout" in capture.records[0].note


def test_a_hidden_value_that_is_read_outside_stays():
    class Leaky(Block):
        def forward(self, x):
            rows = self.up[0](x)
            return x + self.down(F.gelu(rows)) + rows.mean()

    capture = Capture()
    torch.compile(Leaky(F.gelu), backend=capture)(torch.randn(2, 5, D))
    assert any("is used outside the FFN" in r.note for r in capture.records)
    assert sum(r.matched for r in capture.records) == 0


def test_a_source_written_between_the_entries_stays():
    class Mutating(Block):
        def forward(self, x):
            x = x * 2
            first = self.up[0](x)
            x.add_(1)
            return self.down(F.silu(first) * self.up[1](x))

    model = Mutating(None, entries=2)
    x, capture = torch.randn(2, 5, D), Capture()
    with torch.no_grad():
        got = torch.compile(model, backend=capture, fullgraph=True)(x)
        torch.testing.assert_close(got, model(x))
    assert capture.records[0].matched == 0 and "writes in place" in capture.records[0].note


def test_autocast_inside_and_around():
    class Around(Block):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    class Half(Block):
        def forward(self, x):
            rows = self.up[0](x)
            with torch.autocast("cpu", torch.bfloat16):
                return x + self.down(F.gelu(rows))

    x = torch.randn(2, 5, D)
    assert compile_and_compare(Around(F.gelu), x, tolerance=5e-2).records[0].matched == 1
    (record,) = compile_and_compare(Half(F.gelu), x, tolerance=1e-6).records
    assert record.matched == 0 and "autocast changes inside" in record.note


def test_inside_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(F.gelu)

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    capture = compile_and_compare(Checkpointed(), torch.randn(2, 5, D), tolerance=1e-5)
    assert capture.records[0].matched == 1 and capture.after[0]["expert_ffn"] == 1


def test_several_layers_and_disabling():
    model = nn.Sequential(Block(F.gelu), Block(F.mish), Block(chunk_gate_last, width=2 * H)).double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    capture = compile_and_compare(model, x, tolerance=1e-12)
    assert capture.records[0].matched == 2 and capture.after[0]["moefy.combine"] == 1
    kept = Capture(passes=[FuseExperts()], disable=())
    torch.compile(model, backend=kept)(x)
    assert kept.records[0].matched == 2


def test_rows_equal_to_a_width_are_not_confused():
    """16 rows of width 16: the view's arguments say 16 twice."""
    capture = compile_and_compare(Block(F.gelu, width=16, hidden=16), torch.randn(1, 8, D), tolerance=1e-5)
    assert capture.records[0].matched == 1
