"""Auxiliary losses: the formulas, what a layer adds up, and how the sum reaches the gradients.

balance, variation, z     formulas        registry   their names        counting, scopes   what they count over
gradients                 hand-written gradients of two of them
layer                     a layer's loss  delivery   into the model's own backward
outputs                   where a model's output has its loss
"""

from moefy.nn.losses.balance import fastmoe_gshard, fastmoe_switch, gshard, mixtral, switch
from moefy.nn.losses.counting import Assignment, Reduce, assignment_totals
from moefy.nn.losses.registry import BALANCE_LOSSES, BalanceLoss, balance_loss
from moefy.nn.losses.scopes import GlobalCounts, per_sequence
from moefy.nn.losses.variation import (
    cv_squared,
    importance,
    load_importance,
    smooth_load,
    sparse_importance,
    tutel_load_importance,
)
from moefy.nn.losses.z import z_loss

load = smooth_load
"""The loss's name in Shazeer et al. 2017."""

__all__ = [
    "BALANCE_LOSSES",
    "Assignment",
    "BalanceLoss",
    "GlobalCounts",
    "Reduce",
    "assignment_totals",
    "balance_loss",
    "cv_squared",
    "fastmoe_gshard",
    "fastmoe_switch",
    "gshard",
    "importance",
    "load",
    "load_importance",
    "mixtral",
    "per_sequence",
    "smooth_load",
    "sparse_importance",
    "switch",
    "tutel_load_importance",
    "z_loss",
]
