"""Tutel (Hwang et al. 2023) in one process: ``moe_layer`` and the pieces it is built of.

    from moefy.compat import tutel as tutel_moe
    layer = tutel_moe.moe_layer(
        gate_type={"type": "top", "k": 2}, model_dim=512,
        experts={"type": "ffn", "count_per_node": 8, "hidden_size_per_expert": 2048},
    )
    y = layer(x)
    (y.sum() + 0.01 * y.l_aux).backward()

Where Tutel surprises, so does this. ``traps`` names what can be switched off (``moe_layer(..., traps=())``):

    "zero_capacity_factor"  ``forward(capacity_factor=0)`` means the gate's own factor (versions up to 0.3.3); 0 works
                            only through the gate
    "batch_priority_need"   with ``batch_prioritized_routing`` and a factor <= 0, the need is read from the last row of
                            the table of places, which is too low: tokens are dropped although none should be
    "load_loss_units"       the load loss subtracts a noisy *logit* from a clean *probability*

Always so: the capacity is ``k * int(factor * ceil(S / E))``, then rounded up to a multiple of the overlap degree; first
choices are seated before second ones; weights are not renormalised after drops; ``a2a_ffn_overlap_degree`` and
``adaptive_r`` given to a call stay for later ones. Not so: a state_dict without an expert's weights raises instead of
filling zeros, fp64 is not computed in fp32, and the dicts that describe gates and experts are left as they were.
"""

from moefy.compat.tutel.layer import MOELayer, moe_layer
from moefy.compat.tutel.routing import (
    TRAPS,
    extract_critical,
    fast_cumsum_sub_one,
    fast_decode,
    fast_encode,
    get_dispatch_count,
    get_topk_selection,
    gshard_loss,
    load_importance_loss,
    top_k_routing,
)

__all__ = [
    "TRAPS",
    "MOELayer",
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_encode",
    "get_dispatch_count",
    "get_topk_selection",
    "gshard_loss",
    "load_importance_loss",
    "moe_layer",
    "top_k_routing",
]
