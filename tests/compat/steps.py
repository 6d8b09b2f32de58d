"""A hundred steps of plain SGD, of a layer and of the same mathematics written out.

Contract: ``train`` draws the same data and seeds the global generator alike before every forward, so that two functions
that draw the same noise in the same order see the same. ``routed`` is GShard's way to dispatch: einsums with
``[T, E, C]`` masks, from a seat for each slot.

    >>> train(layer, layer.parameters(), x, target)          # [losses], the last output

Shape letters: T tokens, D width, E experts, C capacity, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

STEPS, RATE, AUX = 100, 0.2, 0.1


def train(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    parameters: Iterable[Tensor],
    batches: Tensor,
    target: Tensor,
) -> tuple[list[float], Tensor]:
    """Mean squared error plus ``AUX`` times the balance loss; the losses by step and the last output."""
    parameters, curve = list(parameters), []
    y = target
    for step in range(STEPS):
        torch.manual_seed(step)
        y, aux = forward(batches[step % len(batches)])
        loss = (y - target).square().mean() + AUX * aux
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter.sub_(RATE * grad)
        curve.append(float(loss.detach()))
    return curve, y.detach()


def seats_in_order(chosen: list[list[int]], order: list[int], by_choice: bool) -> list[list[int]]:
    """Each slot's place in its expert's queue: tokens in ``order``; by choice first, or token by token."""
    places = [[0] * len(row) for row in chosen]
    taken: dict[int, int] = {}
    top_k = len(chosen[0]) if chosen else 0
    slots = (
        [(t, k) for k in range(top_k) for t in order]
        if by_choice
        else [(t, k) for t in order for k in range(top_k)]
    )
    for t, k in slots:
        e = chosen[t][k]
        places[t][k] = taken.get(e, 0)
        taken[e] = places[t][k] + 1
    return places


def routed(
    x: Tensor,
    weights: Tensor,
    chosen: list[list[int]],
    places: list[list[int]],
    capacity: int,
    num_experts: int,
    experts: Callable[[Tensor], Tensor],
    *,
    pre_score: bool = False,
) -> Tensor:
    """``combine . experts . dispatch`` with one-hot masks; a slot behind ``capacity``, or of expert -1, is in none."""
    dispatch = torch.zeros(len(chosen), num_experts, max(capacity, 1))
    combine = torch.zeros(len(chosen), num_experts, max(capacity, 1))
    for t, row in enumerate(chosen):
        for k, e in enumerate(row):
            if e < 0 or places[t][k] >= capacity:
                continue
            one = torch.zeros_like(dispatch)
            one[t, e, places[t][k]] = 1.0
            dispatch = dispatch + one
            combine = combine + one * weights[t, k]
    inner, outer = (combine, dispatch) if pre_score else (dispatch, combine)
    return torch.einsum("tec,ecd->td", outer, experts(torch.einsum("tec,td->ecd", inner, x)))


def best_first(scores: Tensor, top_k: int) -> list[list[int]]:
    """The ids of the ``top_k`` largest of each row."""
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in scores.tolist()]


def pick(scores: Tensor, chosen: list[list[int]]) -> Tensor:
    """``[T, K]``: the scores of the chosen."""
    return torch.stack([torch.stack([scores[t, e] for e in row]) for t, row in enumerate(chosen)])


def shares(chosen: list[list[int]], num_experts: int, column: int = 0) -> Tensor:
    """``[E]``: the share of tokens whose choice in ``column`` each expert is."""
    counts = [0.0] * num_experts
    for row in chosen:
        if row[column] >= 0:
            counts[row[column]] += 1
    return torch.tensor(counts) / len(chosen)


def squared_variation(values: Tensor) -> Tensor:
    """``var / mean^2`` with the unbiased variance."""
    mean = values.sum() / len(values)
    return (values - mean).square().sum() / (len(values) - 1) / (mean.square() + 1e-10)


def normal_cdf(x: Tensor) -> Tensor:
    """The distribution function of N(0, 1)."""
    return 0.5 * (1 + torch.erf(x / 2**0.5))


def assert_same_run(got: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """To three decimals, at every step."""
    curve, expected_curve = torch.tensor(got[0]), torch.tensor(expected[0])
    assert (curve - expected_curve).abs().max() < 5e-4
    assert (got[1] - expected[1]).abs().max() < 5e-4
    assert expected_curve[-1] < expected_curve[0] - 1e-2  # something was learnt
