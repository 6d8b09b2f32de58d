"""The activations of ``moefy.ops.ACTIVATIONS`` and their derivatives, as device functions on fp32 tiles.

Contract: ``activate(x, NAME)`` is ``act(x)``, ``activate_backward(x, NAME)`` is ``(act(x), act'(x))``; the name is a
compile-time constant, so a kernel holds the one function that it was made for. tanh is written with the sigmoid, which
the interpreter knows and which costs the same.

    hidden = activate(gate, "silu") * up
"""

from __future__ import annotations

import triton.language as tl

from moefy.triton_ops.launch import jit

NAMES = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "sigmoid", "tanh", "identity")


@jit
def _sigmoid(x):
    # Epilogues have nothing beside them, so instructions count: with exp and a division the hidden gradient of a GLU
    # has 5000 of them, like this 3800.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@jit
def _tanh(x):
    return 2 * _sigmoid(2 * x) - 1


@jit
def activate(x, NAME: tl.constexpr):
    """``act(x)`` of an fp32 tile."""
    tl.static_assert(NAME != "", "an activation needs a name")
    if NAME == "silu":
        y = x * _sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z)
        y = x * _sigmoid(x * (1.5957691216057308 + 0.07135481282553529 * (x * x)))
    elif NAME == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif NAME == "relu":
        y = tl.where(x > 0, x, tl.where(x != x, x, 0.0))
    elif NAME == "relu2":
        y = tl.where(x > 0, x * x, tl.where(x != x, x, 0.0))
    elif NAME == "sigmoid":
        y = _sigmoid(x)
    elif NAME == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(NAME == "identity", "an activation that triton_ops does not know")
        y = x
    return y


@jit
def activate_backward(x, NAME: tl.constexpr):
    """``(act(x), act'(x))`` of an fp32 tile."""
    if NAME == "silu":
        s = _sigmoid(x)
        y = x * s
        dy = s + y * (1 - s)
    elif NAME == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * cdf
        dy = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        square = x * x
        s = _sigmoid(x * (1.5957691216057308 + 0.07135481282553529 * square))
        y = x * s
        dy = s + y * (1 - s) * (1.5957691216057308 + 0.21406443847660586 * square)
    elif NAME == "quick_gelu":
        s = _sigmoid(1.702 * x)
        y = x * s
        dy = s + 1.702 * y * (1 - s)
    elif NAME == "relu":
        y = activate(x, NAME)
        dy = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        y = activate(x, NAME)
        dy = tl.where(x > 0, 2 * x, 0.0)
    elif NAME == "sigmoid":
        y = _sigmoid(x)
        dy = y * (1 - y)
    elif NAME == "tanh":
        y = _tanh(x)
        dy = 1 - y * y
    else:
        y = activate(x, NAME)
        dy = tl.full(x.shape, 1.0, tl.float32)
    return y, dy
