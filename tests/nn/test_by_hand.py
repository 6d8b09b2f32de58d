"""Gradients written by hand: exact, to any order, in few launches, and the same where the plain formula runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefy.nn import losses
from moefy.ops import sort_by_expert

T, E, K = 12, 4, 2
VIEWS = {"detach", "expand", "slice", "squeeze", "unsqueeze", "view", "alias"}


def closed_form(logits: Tensor, mask: Tensor | None = None) -> tuple[float, Tensor]:
    """The z-loss and its gradient by loops over float64 numbers."""
    rows = logits.double().tolist()
    real = [t for t in range(len(rows)) if mask is None or mask[t]]
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    total = 0.0
    for t in real:
        top = max(rows[t])
        lse = top + math.log(math.fsum(math.exp(v - top) for v in rows[t]))
        total += lse**2 / len(real)
        grad[t] = torch.tensor([2 * lse / len(real) * math.exp(v - lse) for v in rows[t]])
    return total, grad


def far(logits: Tensor) -> Tensor:
    return logits + torch.tensor([[1e4], [-1e4], [3e2]]).repeat(T // 3, 1)


def shut(logits: Tensor) -> Tensor:
    return logits.index_fill(1, torch.tensor([1]), -math.inf)


@pytest.mark.parametrize("change", [lambda v: v, lambda v: 30 * v, far, shut, lambda v: v[:, :1]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_z_loss_in_fp32(change: Callable[[Tensor], Tensor], masked: bool, given: bool) -> None:
    logits = change(torch.randn(T, E, generator=torch.Generator().manual_seed(0))).requires_grad_()
    mask = torch.arange(T) % 3 > 0 if masked else None
    value, grad = closed_form(logits, mask)
    got = losses.z_loss(logits, mask_T=mask, softmax_TE=logits.softmax(-1) if given else None)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(value, rel=1e-6)
    (dlogits,) = torch.autograd.grad(got, logits)
    torch.testing.assert_close(dlogits.double(), grad, rtol=2e-5, atol=1e-30)  # fp32 knows no smaller ones


def test_a_softmax_in_a_lower_precision_is_not_taken() -> None:
    logits = torch.randn(T, E).bfloat16()
    value, _ = closed_form(logits)
    got = losses.z_loss(logits, softmax_TE=logits.softmax(-1))
    assert got.item() == pytest.approx(value, rel=1e-6)


def test_padding_of_nan_gets_no_gradient_of_the_z_loss() -> None:
    logits, mask = torch.randn(T, E, dtype=torch.float64), torch.arange(T) % 3 > 0
    value, grad = closed_form(logits, mask)
    padded = logits.masked_fill(~mask.unsqueeze(1), math.nan).requires_grad_()
    loss = losses.z_loss(padded, mask_T=mask)
    (got,) = torch.autograd.grad(loss, padded)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(got, grad)


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "z": losses.z_loss,
    "z masked": lambda v: losses.z_loss(v, mask_T=torch.arange(v.shape[-2]) % 3 > 0),
    "z of a softmax": lambda v: losses.z_loss(v, softmax_TE=v.softmax(-1)),
    "cv": lambda v: losses.cv_squared(v.exp().sum(-2)),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(CASES[name], logits)


@pytest.mark.parametrize("name", CASES)
def test_a_kept_graph_gives_the_same_again(name: str) -> None:
    logits = torch.randn(T, E, requires_grad=True)
    loss = CASES[name](logits)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", CASES)
def test_functorch_and_batches(name: str) -> None:
    """Axes in front, ``vmap`` and ``torch.func.grad`` give what one batch after the other gives."""
    logits = torch.randn(3, T, E, dtype=torch.float64)
    each = [CASES[name](one) for one in logits]
    grads = [torch.autograd.grad(CASES[name](v), v)[0] for v in logits.clone().requires_grad_().unbind()]
    mapped = torch.vmap(CASES[name])(logits)
    torch.testing.assert_close(mapped, torch.stack(each))
    torch.testing.assert_close(torch.vmap(torch.func.grad(CASES[name]))(logits), torch.stack(grads))
    if "masked" not in name:
        torch.testing.assert_close(CASES[name](logits), torch.stack(each))


class Launches(TorchDispatchMode):
    """Counts the ops that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "most"), [("switch", 8), ("gshard", 8), ("mixtral", 8), ("importance", 11), ("z", 10)]
)
def test_launches_of_a_loss_and_its_gradient(name: str, most: int) -> None:
    scores = torch.rand(T, E, requires_grad=True)
    index = torch.rand(T, E).topk(1).indices
    offsets = sort_by_expert(index, E)[1]
    one = torch.ones(())
    with Launches() as launches:
        if name == "z":
            loss = losses.z_loss(scores)
        else:
            loss = losses.BALANCE_LOSSES[name](scores, index, E, offsets_E=offsets)
        torch.autograd.grad(loss, scores, one)
    assert len(launches.names) <= most, launches.names
