"""The maths between the linears, written out by hand so that no activation kernel is shared with moefy.

A body maps the entry outputs of some tokens, each ``[n, H_i]``, to the exit's input ``[n, H]``:

    >>> glu(silu)(gate_nH, up_nH)       # silu(gate) * up
    >>> merged(silu)(both_n2H)          # first half gated
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Body = Callable[..., Tensor]


def identity(x: Tensor) -> Tensor:
    return x


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def relu2(x: Tensor) -> Tensor:
    return relu(x) * relu(x)


def relu6(x: Tensor) -> Tensor:
    return relu(x) - relu(x - 6)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def quick_gelu(x: Tensor) -> Tensor:
    return x * sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def tanh(x: Tensor) -> Tensor:
    return 2 * sigmoid(2 * x) - 1


def hardswish(x: Tensor) -> Tensor:
    return x * relu6(x + 3) / 6


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x) - 1)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + relu(x)


def mish(x: Tensor) -> Tensor:
    return x * tanh(softplus(x))


def leaky_relu(slope: float) -> Body:
    return lambda x: torch.where(x > 0, x, slope * x)


def squared(x: Tensor) -> Tensor:
    return x * x


def glu(act: Body) -> Body:
    """Two entries in call order, the first activated."""
    return lambda gate, up: act(gate) * up


def glu_last(act: Body) -> Body:
    """Two entries in call order, the second activated."""
    return lambda up, gate: up * act(gate)


def merged(act: Body) -> Body:
    """One entry of width 2H, first half activated."""

    def body(both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        return act(both[..., :half]) * both[..., half:]

    return body


def merged_last(act: Body) -> Body:
    """One entry of width 2H, second half activated."""

    def body(both: Tensor) -> Tensor:
        half = both.shape[-1] // 2
        return both[..., :half] * act(both[..., half:])

    return body


def star_relu(x: Tensor, *, scale: Tensor, bias: Tensor) -> Tensor:
    """MetaFormer's StarReLU: ``scale * relu(x)**2 + bias``."""
    return scale * relu2(x) + bias


def prelu(x: Tensor, *, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


def xielu(x: Tensor, *, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5, eps: float = -1e-6) -> Tensor:
    """xIELU (arXiv 2411.13010) with the learnable slopes behind a softplus, as in transformers."""
    positive, negative = softplus(alpha_p), beta + softplus(alpha_n)
    clipped = torch.minimum(x, torch.full_like(x, eps))
    return torch.where(
        x > 0,
        positive * x * x + beta * x,
        (torch.expm1(clipped) - x) * negative + beta * x,
    )
