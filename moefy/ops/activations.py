"""The activations that ``expert_ffn`` knows, each with its derivative.

Contract: ``forward(x)`` is differentiable torch code, ``backward(grad, x)`` is ``grad * forward'(x)`` in the kernels of
torch's own autograd, so that a fused op and a dense layer agree to rounding.

    >>> ACTIVATIONS["relu2"].forward(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """An element-wise function and its derivative.

    Args:
        forward: ``x -> act(x)``.
        backward: ``(grad, x) -> grad * act'(x)``.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` (Hendrycks and Gimpel 2016; CLIP's and GPT-1's gelu)."""
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * (s + 1.702 * x * s * (1 - s))


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return aten.gelu_backward(grad, x, approximate="tanh")


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": Activation(forward=F.gelu, backward=lambda g, x: aten.gelu_backward(g, x)),
        "gelu_tanh": Activation(
            forward=lambda x: F.gelu(x, approximate="tanh"), backward=_gelu_tanh_backward
        ),
        "quick_gelu": Activation(forward=_quick_gelu, backward=_quick_gelu_backward),
        "relu": Activation(forward=F.relu, backward=lambda g, x: aten.threshold_backward(g, x, 0)),
        # Squared ReLU: So et al. 2021, "Primer".
        "relu2": Activation(forward=lambda x: F.relu(x).square(), backward=lambda g, x: g * (2 * F.relu(x))),
        "silu": Activation(forward=F.silu, backward=lambda g, x: aten.silu_backward(g, x)),
        "sigmoid": Activation(
            forward=torch.sigmoid, backward=lambda g, x: aten.sigmoid_backward(g, x.sigmoid())
        ),
        "tanh": Activation(forward=torch.tanh, backward=lambda g, x: aten.tanh_backward(g, x.tanh())),
        "identity": Activation(forward=lambda x: x, backward=lambda g, x: g),
    }
)
