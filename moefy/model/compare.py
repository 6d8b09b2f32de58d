"""The exactness check: the rewritten model's output against the dense one's, on the traced inputs.

A router whose weights do not sum to 1 makes another model on purpose. The rewrite is checked all the same, with
``even_routing`` in that router's place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from moefy.nn import Choice, Router, Routing
from moefy.nn.route import make_routing
from moefy.nn.routing.layout import TokenLayout

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


@contextlib.contextmanager
def even_routing(routers: Iterable[Router]) -> Iterator[None]:
    """Within the block these routers give each token K experts with weight 1 / K, all experts in turn."""
    held = list(routers)
    for router in held:
        router.__dict__["forward"] = functools.partial(_even, router)
    try:
        yield
    finally:
        for router in held:
            router.__dict__.pop("forward", None)


def _even(router: Router, x: Tensor, feature_dim: int = -1, **overrides: Any) -> Routing:
    layout = TokenLayout.of(x, feature_dim)
    first_T1 = torch.arange(layout.num_tokens, device=x.device).unsqueeze(1)
    index_TK = (first_T1 + torch.arange(router.top_k, device=x.device)) % router.num_experts
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights_TK = torch.full_like(index_TK, 1 / router.top_k, dtype=dtype)
    logits_TE = torch.zeros((layout.num_tokens, router.num_experts), dtype=dtype, device=x.device)
    choice = Choice(index=index_TK, weights=weights_TK, logits=logits_TE)
    return make_routing(choice, router.num_experts, layout)


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
