"""The activations that ``expert_ffn`` knows, each with its derivative.

Contract: ``forward(x)`` is differentiable torch code, ``backward(grad, x, out)`` writes ``grad * forward'(x)`` by the
kernels of torch's own autograd, so that a fused op and a dense layer agree to rounding.

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
        backward: ``(grad, x, out)``, writes ``grad * act'(x)`` to ``out``, which may be ``grad`` or a view.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], object]


def _quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` (Hendrycks and Gimpel 2016; CLIP's and GPT-1's gelu)."""
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    s = torch.sigmoid(1.702 * x)
    torch.mul(grad, s + 1.702 * x * s * (1 - s), out=out)


def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.gelu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _relu2_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.mul(grad, 2 * F.relu(x), out=out)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.silu_backward.grad_input(grad, x, grad_input=out)


def _sigmoid_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.sigmoid_backward.grad_input(grad, x.sigmoid(), grad_input=out)


def _tanh_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    aten.tanh_backward.grad_input(grad, x.tanh(), grad_input=out)


def _identity_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    out.copy_(grad)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": Activation(forward=F.gelu, backward=_gelu_backward),
        "gelu_tanh": Activation(
            forward=lambda x: F.gelu(x, approximate="tanh"), backward=_gelu_tanh_backward
        ),
        "quick_gelu": Activation(forward=_quick_gelu, backward=_quick_gelu_backward),
        "relu": Activation(forward=F.relu, backward=_relu_backward),
        # Squared ReLU: So et al. 2021, "Primer".
        "relu2": Activation(forward=lambda x: F.relu(x).square(), backward=_relu2_backward),
        "silu": Activation(forward=F.silu, backward=_silu_backward),
        "sigmoid": Activation(forward=torch.sigmoid, backward=_sigmoid_backward),
        "tanh": Activation(forward=torch.tanh, backward=_tanh_backward),
        "identity": Activation(forward=lambda x: x, backward=_identity_backward),
    }
)
