"""The modules: ``Router``, ``ExpertLinear``, ``MoE``, and the pair that stands in for linears inside a user's block.

They know ``moefy.ops`` and nothing above it; ``functional`` is the core that all of them call.
"""

from moefy.nn.body import Body, KnownBody
from moefy.nn.entry_exit import EntryLinear, ExitLinear, FFNLink
from moefy.nn.expert_linear import ExpertLinear
from moefy.nn.in_place import InPlaceMoE
from moefy.nn.moe import MoE
from moefy.nn.routed_rows import RoutedRows
from moefy.nn.routers import Router
from moefy.nn.routing import Choice, Routing
from moefy.nn.stacked_ffn import WeightRef

__all__ = [
    "Body",
    "Choice",
    "EntryLinear",
    "ExitLinear",
    "ExpertLinear",
    "FFNLink",
    "InPlaceMoE",
    "KnownBody",
    "MoE",
    "RoutedRows",
    "Router",
    "Routing",
    "WeightRef",
]
