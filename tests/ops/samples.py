"""Sample arguments for every registered op: what opcheck, gradcheck and the repeatability test run on.

Contract: ``SAMPLES[name]`` makes argument tuples for ``torch.ops.moefy.<name>`` in the dtype asked for. Small, but with
an idle expert, a dropped slot, and once with no token at all. ``test_registry.py`` fails for an op without samples.

    >>> torch.ops.moefy.permute(*SAMPLES["permute"](torch.float64)[0])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy import ops

D, H, E, K = 3, 4, 4, 2
Args = tuple[Any, ...]


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def index(tokens: int) -> Tensor:
    """Choices that leave expert 2 idle and drop one slot."""
    rows = [[0, 1], [3, 0], [1, -1], [0, 3], [3, 1]]
    return torch.tensor(rows[:tokens], dtype=torch.int64).reshape(tokens, K)


def routing(tokens: int) -> tuple[Tensor, Tensor]:
    return ops.sort_by_expert(index(tokens), E)


def sort_by_expert(dtype: torch.dtype) -> list[Args]:
    return [(index(5), E), (index(0), E), (index(5).int(), 1)]


def first_run(dtype: torch.dtype) -> list[Args]:
    return [(index(5),), (randn(0, 3, dtype=dtype).detach(),)]


def loss_scale(dtype: torch.dtype) -> list[Args]:
    grad = randn(2, dtype=torch.float32).detach()
    return [(grad, randn(2, dtype=dtype).detach()), (grad[:0], randn(0, 3, dtype=dtype).detach())]


def scores(tokens: int, dtype: torch.dtype) -> Tensor:
    """Half a unit apart in each row, so that finite differences choose the same experts."""
    places = randn(tokens, E, dtype=torch.float64).detach().argsort(1)
    return (0.5 * places).to(dtype).requires_grad_()


def top_k_softmax(dtype: torch.dtype) -> list[Args]:
    return [(scores(5, dtype), K), (scores(5, dtype), E), (scores(0, dtype), K)]


def top_k_softmax_backward(dtype: torch.dtype) -> list[Args]:
    found = []
    for t in (5, 0):
        weights = randn(t, K, dtype=torch.float64, seed=2).detach().softmax(1).to(dtype).requires_grad_()
        found.append((randn(t, K, dtype=dtype), weights, index(t).remainder(E), E))
    return found


def permute(dtype: torch.dtype) -> list[Args]:
    return [(randn(t, D, dtype=dtype), routing(t)[0], K) for t in (5, 0)]


def sum_slots(dtype: torch.dtype) -> list[Args]:
    return [(randn(t * K, D, dtype=dtype), routing(t)[0], K) for t in (5, 0)]


def grouped_linear(dtype: torch.dtype) -> list[Args]:
    found = []
    for t, with_bias in ((5, True), (5, False), (0, True)):
        bias = randn(E, H, dtype=dtype) if with_bias else None
        found.append((randn(t * K, D, dtype=dtype), randn(E, H, D, dtype=dtype), bias, routing(t)[1]))
    return found


def grouped_linear_backward(dtype: torch.dtype) -> list[Args]:
    masks = ([True, True, True], [True, False, False], [False, True, False], [False, False, True])
    found = []
    for t, mask in (*((5, m) for m in masks), (0, masks[0])):
        x, weight = randn(t * K, D, dtype=dtype), randn(E, H, D, dtype=dtype)
        found.append((randn(t * K, H, dtype=dtype), x, weight, routing(t)[1], mask))
    return found


def combine(dtype: torch.dtype) -> list[Args]:
    return [(randn(t * K, D, dtype=dtype), randn(t, K, dtype=dtype), routing(t)[0]) for t in (5, 0)]


def combine_backward(dtype: torch.dtype) -> list[Args]:
    return [(randn(a[1].shape[0], D, dtype=dtype, seed=1), *a) for a in combine(dtype)]


def ffn_arguments(tokens: int, glu: str, bias: bool, dtype: torch.dtype) -> Args:
    """The tensors of expert_ffn in schema order."""
    width = 2 * H if glu.startswith("merged") else H
    gate = randn(E, H, D, dtype=dtype, seed=5) if glu == "separate" else None
    biases = [randn(E, n, dtype=dtype, seed=6 + n) for n in (H, width, D)] if bias else [None] * 3
    return (
        randn(tokens, D, dtype=dtype),
        randn(tokens, K, dtype=dtype),
        *routing(tokens),
        gate,
        biases[0] if gate is not None else None,
        randn(E, width, D, dtype=dtype, seed=3),
        biases[1],
        randn(E, D, H, dtype=dtype, seed=4),
        biases[2],
    )


def ffn_forms() -> list[tuple[int, str, bool, str]]:
    """Every GLU form with and without biases, every activation once, and an empty batch."""
    forms = [*itertools.product(ops.GLU_FORMS, (True, False)), ("none", True)]
    found = [(5, glu, bias, act) for (glu, bias), act in zip(forms, ops.ACTIVATIONS, strict=True)]
    return [*found, (0, "separate", True, "gelu")]


def expert_ffn(dtype: torch.dtype) -> list[Args]:
    found = [(*ffn_arguments(t, glu, b, dtype), act, glu, True, False) for t, glu, b, act in ffn_forms()]
    return [*found, (*ffn_arguments(5, "separate", True, dtype), "gelu", "separate", False, False)]


def expert_ffn_backward(dtype: torch.dtype) -> list[Args]:
    """Without saved rows: only then are the results a function of the other arguments alone."""
    found = []
    for t, glu, bias, act in ffn_forms():
        tensors = ffn_arguments(t, glu, bias, dtype)
        given = [tensors[i] is not None for i in (0, 1, 4, 5, 6, 7, 8, 9)]
        masks = [given] if glu != "separate" else [given, [True] + [False] * 7, [False] * 6 + given[6:]]
        grad, empty = randn(t, D, dtype=dtype, seed=9), torch.empty(0, dtype=dtype)
        found += [(grad, *tensors, empty, empty.clone(), act, glu, mask) for mask in masks]
    return found


WITHOUT_GRADIENTS = frozenset({"first_run", "loss_scale", "sort_by_expert"})
SAMPLES: dict[str, Callable[[torch.dtype], list[Args]]] = {
    "combine": combine,
    "combine_backward": combine_backward,
    "expert_ffn": expert_ffn,
    "expert_ffn_backward": expert_ffn_backward,
    "first_run": first_run,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
    "loss_scale": loss_scale,
    "permute": permute,
    "sort_by_expert": sort_by_expert,
    "sum_slots": sum_slots,
    "top_k_softmax": top_k_softmax,
    "top_k_softmax_backward": top_k_softmax_backward,
}


def registered() -> list[str]:
    """The names of all ops that torch knows under ``moefy::``."""
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.removeprefix("moefy::").partition(".")[0] for n in names if n.startswith("moefy::")})


def without_tokens(args: Args) -> bool:
    """Whether a sample is the empty batch."""
    return args[0].numel() == 0


def cases(dtype: torch.dtype) -> list[tuple[str, int]]:
    """(op, sample number) for parametrize."""
    return [(name, i) for name, make in SAMPLES.items() for i in range(len(make(dtype)))]
