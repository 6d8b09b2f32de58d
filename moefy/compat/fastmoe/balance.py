"""FastMoE's balance monitor: one profile by layer for each metric, under its names.

Contract: ``reset_balance_profile`` makes the lists, ``update_balance_profile`` fills in one layer from the ids that its
gate chose; as a ``gate_hook``:

    profile = {}
    reset_balance_profile(profile, num_layers=2, balance_strategy="gshard")
    hook = lambda ids, scores, ctx: update_balance_profile(profile, ids, scores, ctx, 0, num_expert=8)

The values are 0-dim tensors on the ids' device: reading one waits for it, keeping it does not. For models made by
``moefy.transform`` or of ``moefy.MoE`` there is ``moefy.expert_load``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy.nn.losses import assignment_totals

metrics: dict[str, Callable[[Tensor], Tensor]] = {
    "coefficient-variation": lambda c_e: c_e.std() / c_e.mean(),
    "Lmax-over-Lmin": lambda c_e: (c_e.max() + 1) / (c_e.min() + 1),
    "Lmax-over-Lmean": lambda c_e: c_e.max() / c_e.mean(),
}
"""Metrics of the counts ``[E]``: how many slots each expert got."""


def reset_balance_profile(
    balance_dict: dict[str, list[Any]], num_layers: int, balance_strategy: str | None
) -> None:
    """Empty lists for every metric, and for the strategy's loss."""
    for name in (*metrics, *([f"{balance_strategy}_loss"] if balance_strategy else [])):
        balance_dict[name] = [None] * num_layers


@torch.no_grad()
def update_balance_profile(
    balance_dict: dict[str, list[Any]],
    gate_top_k_idx: Tensor,
    _gate_score_top_k: Tensor | None,
    gate_context: Any,
    layer_idx: int,
    num_expert: int,
    balance_strategy: str | None = None,
) -> None:
    """The metrics of one layer; ``num_expert`` counts all workers' experts."""
    ids_NK = gate_top_k_idx.reshape(gate_top_k_idx.numel(), 1)
    counts_E = assignment_totals(ids_NK, num_expert)[:-1].float()
    for name, metric in metrics.items():
        balance_dict[name][layer_idx] = metric(counts_E)
