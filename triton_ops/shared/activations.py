"""The activations that ``expert_ffn`` has fused: an activation is its entry in ``ACTIVATIONS`` and two branches below.

An entry has the formula and its derivative in torch, for the CPU and the references, and how the activation is spelled
in a model. The branches of ``activate`` and ``activate_backward`` are the same in Triton's language, on fp32 tiles.

Contract: ``forward(x)`` is differentiable torch code. ``backward(grad, x, out)`` writes ``grad * forward'(x)`` by the
kernels of torch's own autograd, so that a fused op and a dense layer agree to rounding. The file imports torch alone;
``device_functions`` brings Triton, when the first kernel is made.

    >>> ACTIVATIONS["relu2"].forward(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    hidden = activate(gate, "silu") * up                            # in a kernel
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import triton.language as tl

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """An element-wise function and its derivative.

    Args:
        forward: ``x -> act(x)``.
        backward: ``(grad, x, out)``, writes ``grad * act'(x)`` to ``out``, which may be ``grad`` or a view.
        functions: functions of torch that compute it.
        module: whether an ``nn.Module`` computes it.
        zero_at_zero: whether the kernels' ``act(0)`` is 0 to the last bit, so that rows of zeros stay so.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], object]
    functions: tuple[Callable[..., Tensor], ...] = ()
    module: Callable[[nn.Module], bool] = lambda module: False
    zero_at_zero: bool = True


# -- in torch ------------------------------------------------------------------------------------------------------
def _is(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) is kind


def _is_gelu(approximate: str) -> Callable[[nn.Module], bool]:
    return lambda module: type(module) is nn.GELU and module.approximate == approximate


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


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(forward=F.gelu, backward=_gelu_backward, functions=(F.gelu,), module=_is_gelu("none")),
    "gelu_tanh": Activation(
        forward=lambda x: F.gelu(x, approximate="tanh"),
        backward=_gelu_tanh_backward,
        module=_is_gelu("tanh"),
    ),
    "quick_gelu": Activation(forward=_quick_gelu, backward=_quick_gelu_backward),
    "relu": Activation(
        forward=F.relu, backward=_relu_backward, functions=(F.relu, torch.relu), module=_is(nn.ReLU)
    ),
    # Squared ReLU: So et al. 2021, "Primer".
    "relu2": Activation(forward=lambda x: F.relu(x).square(), backward=_relu2_backward),
    "silu": Activation(forward=F.silu, backward=_silu_backward, functions=(F.silu,), module=_is(nn.SiLU)),
    "sigmoid": Activation(
        forward=torch.sigmoid,
        backward=_sigmoid_backward,
        functions=(F.sigmoid, torch.sigmoid),
        module=_is(nn.Sigmoid),
        zero_at_zero=False,
    ),
    "tanh": Activation(
        forward=torch.tanh,
        backward=_tanh_backward,
        functions=(F.tanh, torch.tanh),
        module=_is(nn.Tanh),
        zero_at_zero=False,  # 2 * sigmoid(0) - 1 is off by a rounding
    ),
    "identity": Activation(forward=lambda x: x, backward=_identity_backward, module=_is(nn.Identity)),
}


# -- in Triton's language: the name is a compile-time constant, so a kernel holds the one function it is made for ----
def _sigmoid(x):
    # Epilogues have nothing beside them, so instructions count: with exp and a division the hidden gradient of a GLU
    # has 5000 of them, like this 3800.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


def _tanh(x):
    return 2 * _sigmoid(2 * x) - 1


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


DEVICE_FUNCTIONS = ("_sigmoid", "_tanh", "activate", "activate_backward")


@functools.cache
def device_functions() -> tuple[Any, Any]:
    """``(activate, activate_backward)`` as functions that kernels call.

    From here on the names above mean them, in this file too: Triton looks up what a function calls in its module.
    """
    import triton.language as tl

    from moefy.triton_ops.shared.launch import jit

    made = {name: jit(globals()[name]) for name in DEVICE_FUNCTIONS}
    globals().update(made, tl=tl)
    return made["activate"], made["activate_backward"]
