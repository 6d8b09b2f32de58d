"""The modules: ``Router``, ``ExpertLinear``, ``MoE``, and the pair that stands in for linears inside a user's block.

They know ``moefy.ops`` and nothing above it; ``functional`` is the core that all of them call.
"""

from moefy.nn.experts.body import Body
from moefy.nn.experts.linear import ExpertLinear
from moefy.nn.experts.stacked import WeightRef
from moefy.nn.in_place import InPlaceMoE
from moefy.nn.inline import EntryLinear, ExitLinear, FFNLink
from moefy.nn.moe import MoE
from moefy.nn.routed_rows import RoutedRows
from moefy.nn.routers import Router
from moefy.nn.routing.routing import Choice, Routing
from moefy.records import KnownBody

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
