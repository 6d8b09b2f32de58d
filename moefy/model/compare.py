"""Compare two outputs of one structure: the relative norm of their difference, tensor by tensor.

>>> compare(dense(x), rewritten(x), torch.float32).passed
True
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Relative norms within which rounding stays (DESIGN: fp64 1e-12, fp32 1e-5, half precision 2e-2)."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The largest relative error over the output tensors, where it is, and what is allowed there."""

    error: float
    tolerance: float
    dtype: str
    where: str

    @property
    def passed(self) -> bool:
        """Whether every output tensor is within its tolerance."""
        return self.error <= self.tolerance


def compare(dense: Any, rewritten: Any, compute_dtype: torch.dtype) -> Comparison:
    """Compare two outputs of one structure, ``||moe - dense|| / ||dense||`` per floating tensor.

    ``compute_dtype`` is the narrowest dtype of the rewritten layers: an fp32 output of a bf16 model is bf16-exact.
    """
    worst = Comparison(0.0, TOLERANCE.get(compute_dtype, 2e-2), str(compute_dtype), "no floating output")
    pairs = list(_pairs(dense, rewritten))
    for index, (expected, got) in enumerate(pairs):
        where = f"output {index} of {len(pairs)}, shape {tuple(expected.shape)}"
        dtype = min((expected.dtype, compute_dtype), key=lambda d: torch.finfo(d).bits)
        found = Comparison(relative_norm(got, expected), TOLERANCE.get(dtype, 2e-2), str(dtype), where)
        if not found.error / found.tolerance <= worst.error / worst.tolerance:  # NaN is worst
            worst = found
    return worst


def relative_norm(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in float64; equal NaNs and infinities count as equal."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().double(), expected.detach().double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    difference = torch.where(same, torch.zeros_like(got), got - expected)
    scale = torch.where(expected.isfinite(), expected, torch.zeros_like(expected)).norm()
    return float(difference.norm() / scale.clamp_min(torch.finfo(torch.float64).tiny))


def _pairs(dense: Any, rewritten: Any) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(_floats(dense), _floats(rewritten), strict=True)


def _floats(tree: Any) -> list[Tensor]:
    leaves, _ = tree_flatten(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
