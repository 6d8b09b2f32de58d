"""Verify: the rewritten model's outputs against the dense ones, on the inputs of the traced run.

A router whose weights do not sum to 1 makes another model on purpose. The rewrite is checked all the same, with
``even_routing`` in that router's place.

Shape letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moefy.capture.runs import Part
from moefy.errors import CheckFailed
from moefy.model.compare import Comparison, compare
from moefy.model.run_quietly import quiet
from moefy.nn import Choice, Router, Routing
from moefy.nn.route import make_routing
from moefy.nn.routing.layout import TokenLayout
from moefy.passes.match import Match


def verify_outputs(parts: Iterable[Part], matches: Sequence[Match]) -> Comparison | None:
    """Run every module again and compare with its dense outputs.

    Args:
        parts: the modules, now rewritten, with their inputs and what they returned when they were dense.
        matches: the rewritten FFNs; the narrowest dtype of their weights sets the tolerance.

    Returns:
        The worst comparison; ``None`` when there are no real outputs.

    Raises:
        CheckFailed: an output differs by more than rounding.
    """
    dtype = _narrowest(matches)
    found = [_compare(part, dtype) for part in parts if part.trace.outputs is not None]
    return max(found, key=lambda verdict: verdict.error, default=None)


def _compare(part: Part, dtype: torch.dtype) -> Comparison:
    routers = [m for m in part.module.modules() if isinstance(m, Router)]
    aside = [r for r in routers if r.departure() is not None or not r.self_contained]
    with quiet(part.module), even_routing(aside):
        verdict = compare(part.trace.outputs, part.module(*part.inputs.args, **part.inputs.kwargs), dtype)
    if not verdict.passed:
        raise CheckFailed(verdict.error, verdict.tolerance, verdict.dtype, verdict.where)
    return verdict


def _narrowest(matches: Sequence[Match]) -> torch.dtype:
    nodes = [match.region.entries[0].weight_node for match in matches]
    dtypes = [node.meta["dtype"] for node in nodes if node is not None]
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)


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
