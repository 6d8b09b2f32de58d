"""What a provider of ``moefy bench layer`` is, what its layer must compute, and how its error is measured.

T tokens, D model width, H expert hidden width, E experts, K top-k; P = 2H with a gate (first half gate), else H.

Contract: ``out[t] = sum_k softmax(chosen logits)[t, k] * W2[e] @ act(W1[e] @ x[t])`` with e the k-th of the K largest
logits; act is SwiGLU, or tanh-gelu without a gate. The backward gives the gradients of x, W1, W2 and the logits.
``reference`` computes both by a loop over experts, in fp32 on a GPU and in fp64 on a CPU.

    >>> relative_errors({"out": torch.tensor([1.1])}, {"out": torch.tensor([1.0])})     # doctest: +ELLIPSIS
    {'out': 0.1000...}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.bench.layer.shapes import Inputs, Shape


class Unsupported(Exception):
    """A provider cannot run a shape, by design; the message says why."""


class Leaves(NamedTuple):
    """The tensors that get a gradient."""

    x_TD: Tensor
    logits_TE: Tensor
    w1_EPD: Tensor
    w2_EDH: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundLayer:
    """A provider's layer, bound to fixed inputs.

    Args:
        forward: the layer's output.
        step: forward and backward.
        answer: output and gradients of one step, by name; None for a provider that computes no layer.
        clear: drop the gradients that ``step`` left.
    """

    forward: Callable[[], Tensor]
    step: Callable[[], object]
    answer: Callable[[], dict[str, Tensor]] | None
    clear: Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provider:
    """An implementation of the layer. ``package`` is the third-party module that it needs."""

    name: str
    build: Callable[[Inputs], BoundLayer]
    package: str | None = None


LayerFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]
Bind = Callable[[Leaves, Shape], Callable[[], Tensor]]


def from_function(function: LayerFunction) -> Callable[[Inputs], BoundLayer]:
    """A ``Provider.build`` from ``function(x, logits, w1, w2, top_k, gated)``."""

    def bind(leaves: Leaves, shape: Shape) -> Callable[[], Tensor]:
        return lambda: function(*leaves, shape.top_k, shape.gated)

    return lambda inputs: differentiable(inputs, bind)


def _same(weight: Tensor) -> Tensor:
    return weight


def differentiable(
    inputs: Inputs,
    bind: Bind,
    *,
    pack: Callable[[Tensor], Tensor] = _same,
    unpack: Callable[[Tensor], Tensor] = _same,
) -> BoundLayer:
    """The ``BoundLayer`` of a forward that autograd differentiates.

    Args:
        inputs: shared with the other providers, not copied.
        bind: from the leaves to the forward.
        pack: from W1 ``[E, P, D]`` to the layout that the forward wants.
        unpack: the way back, for W1's gradient.
    """
    tensors = (inputs.x_TD, inputs.logits_TE, pack(inputs.w1_EPD), inputs.w2_EDH)
    leaves = Leaves(*(tensor.detach().requires_grad_() for tensor in tensors))
    forward = bind(leaves, inputs.shape)

    def clear() -> None:
        for leaf in leaves:
            leaf.grad = None

    def step() -> Tensor:
        clear()
        out_TD = forward()
        out_TD.backward(inputs.grad_TD)
        return out_TD.detach()

    def answer() -> dict[str, Tensor]:
        out_TD = step()
        dx, dlogits, dw1, dw2 = (_gradient(leaf) for leaf in leaves)
        clear()
        return {"out": out_TD, "dx": dx, "dW1": unpack(dw1), "dW2": dw2, "dlogits": dlogits}

    return BoundLayer(forward=forward, step=step, answer=answer, clear=clear)


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError(f"no gradient for the input of shape {tuple(leaf.shape)}")
    return leaf.grad


def choose(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``(weights, ids)`` of the K best experts, ``[T, K]`` each; a softmax over the chosen logits."""
    values_TK, index_TK = logits_TE.topk(top_k, dim=1)
    return values_TK.softmax(dim=1), index_TK


def activate(rows_NP: Tensor, gated: bool) -> Tensor:
    """``[N, P]`` to ``[N, H]``: SwiGLU, or tanh-gelu."""
    if not gated:
        return F.gelu(rows_NP, approximate="tanh")
    gate_NH, up_NH = rows_NP.chunk(2, dim=1)
    return F.silu(gate_NH) * up_NH


def expert_loop(
    x_TD: Tensor, logits_TE: Tensor, w1_EPD: Tensor, w2_EDH: Tensor, top_k: int, gated: bool
) -> Tensor:
    """The layer as a loop over experts."""
    weights_TK, index_TK = choose(logits_TE, top_k)
    out_TD = torch.zeros_like(x_TD)
    # unbind, not indexing: its backward stacks the experts' gradients once instead of adding E full-size tensors
    for expert, (w1_PD, w2_DH) in enumerate(zip(w1_EPD.unbind(0), w2_EDH.unbind(0), strict=True)):
        token_M, choice_M = torch.where(index_TK == expert)
        y_MD = activate(x_TD[token_M] @ w1_PD.t(), gated) @ w2_DH.t()
        weight_M1 = weights_TK[token_M, choice_M].unsqueeze(1)
        out_TD = out_TD.index_add(0, token_M, y_MD * weight_M1.to(y_MD.dtype))
    return out_TD


def reference(inputs: Inputs) -> dict[str, Tensor]:
    """What the layer must give on ``inputs``: the output, and the gradients unless the shape only decodes."""
    dtype = torch.float32 if inputs.x_TD.is_cuda else torch.float64
    tensors = {name: value.to(dtype) for name, value in vars(inputs).items() if isinstance(value, Tensor)}
    layer = from_function(expert_loop)(dataclasses.replace(inputs, **tensors))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no tf32
    try:
        if inputs.shape.decode or layer.answer is None:
            with torch.no_grad():
                return {"out": layer.forward()}
        return layer.answer()
    finally:
        torch.set_float32_matmul_precision(precision)


def relative_errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """``norm(got - expected) / norm(expected)`` by name, in the dtype of ``expected``."""
    return {name: _relative_error(value, expected[name]) for name, value in got.items()}


def _relative_error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        raise RuntimeError(f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    difference = got.detach().to(expected.dtype) - expected
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(expected)).item()
