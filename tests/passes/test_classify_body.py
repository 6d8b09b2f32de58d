"""``classify_body``: every spelling of a known body is named, every near miss is not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefy.ops import ACTIVATIONS
from moefy.passes.match.classify_body import classify_body


def gelu_erf(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_new(x):
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_megatron(x):
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def in_fp32(x):
    return F.silu(x.float()).type_as(x)


PLAIN = [
    ("gelu", gelu_erf),
    ("gelu", nn.GELU()),
    ("gelu_tanh", gelu_new),
    ("gelu_tanh", nn.GELU("tanh")),
    ("quick_gelu", lambda x: torch.sigmoid(1.702 * x) * x),
    ("relu", lambda x: x.clamp(min=0)),
    ("relu2", lambda x: torch.pow(F.relu(x), 2)),
    ("silu", lambda x: x / (1 + torch.exp(-x))),
    ("tanh", lambda x: 2 * torch.sigmoid(2 * x) - 1),
    ("identity", lambda x: F.dropout(x, 0.1, training=False)),
]


@pytest.mark.parametrize(("name", "fn"), PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_plain_body_is_named(name, fn, dtype):
    known = classify_body(fn, [24], dtype=dtype)
    assert known is not None
    assert (known.activation, known.glu, known.gate) == (name, "none", 0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_glu_arrangements(name):
    act = ACTIVATIONS[name].forward

    def first(h):
        a, b = h.chunk(2, dim=-1)
        return act(a) * b

    def last(h):
        return act(h[..., 7:]) * h[..., :7]

    glus = {("merged_gate_first", 0): ([14], first), ("merged_gate_last", 0): ([14], last)}
    glus[("separate", 0)] = ([7, 7], lambda a, b: act(a) * b)
    glus[("separate", 1)] = ([7, 7], lambda a, b: a * act(b))
    for expected, (widths, fn) in glus.items():
        known = classify_body(fn, widths, dtype=torch.float64)
        assert known is not None and known.activation == name
        if name == "identity":  # a * b has no gate side
            assert known.glu.split("_")[0] == expected[0].split("_")[0]
        else:
            assert (known.glu, known.gate) == expected


@pytest.mark.parametrize("fn", [gelu_megatron, in_fp32])
def test_rounded_spellings_pass_only_below_float64(fn):
    assert classify_body(fn, [16]) is not None
    assert classify_body(fn, [16], dtype=torch.float64) is None


@pytest.mark.parametrize(
    "fn",
    [
        F.mish,
        F.relu6,
        F.softplus,
        F.elu,
        nn.LeakyReLU(1e-3),
        lambda x: F.silu(x).clamp(max=800.0),
        lambda x: F.gelu(x) * 1.00001,
        lambda x: F.gelu(x) + 1e-5,
        lambda x: F.dropout(F.gelu(x), 0.1, training=True),
        lambda x: F.silu(x[..., ::2]) * x[..., 1::2],  # interleaved halves
        lambda x: F.gelu(x).transpose(1, 2),
        lambda x: x.log(),
        lambda x: F.gelu(x.bfloat16()).double(),
        lambda x: x > 0,
        lambda x: (x, x),
        nn.PReLU(init=0.0).double(),  # learnable: a relu today only
        nn.Linear(16, 16).double(),
    ],
)
def test_near_misses_are_none(fn):
    assert classify_body(fn, [16]) is None


def test_convolutional_features_and_widths():
    def glu(x):
        a, b = x.chunk(2, dim=1)
        return a * F.silu(b)

    known = classify_body(glu, [10], feature_dim=1, rank=4)
    assert known is not None and known.glu == "merged_gate_last"
    assert classify_body(F.gelu, [1]) is not None
    assert classify_body(F.gelu, [5000]) is not None
    assert classify_body(lambda a, b, c: a * b * c, [4, 4, 4]) is None
    assert classify_body(lambda a, b: F.silu(a) * b[..., :4], [4, 8]) is None


def test_nothing_global_changes():
    state = torch.get_rng_state()
    assert classify_body(lambda x: F.dropout(x, 0.5, training=True), [8]) is None
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_inside_fake_tensor_mode_and_default_device():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.device("meta"):
        known = classify_body(gelu_erf, [8])
    assert known is not None and known.activation == "gelu"
