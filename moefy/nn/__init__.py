"""The modules: ``MoE`` and its relatives, routers, experts, and the seam between them.

One forward, from tokens to tokens, and where each step is:

    router(x)             score and choose          routers/        then seats, sort, counters: route.py, routing/
    dispatch              tokens to experts         dispatch.py     experts/input_weighting.py where weights go in
    experts               rows to rows              experts/
    combine               experts to tokens         dispatch.py
    + shared experts                                experts/shared.py

    moe.py                a layer of its own
    in_place.py           a layer in the place of a user's FFN module
    inline.py             a pair in the place of linears inside a user's block, rows between them: routed_rows.py
    losses/               balance and other auxiliary losses, and their way into the gradients

They know ``moefy.ops`` and nothing above it.
"""

from moefy.nn.dispatch import Dispatcher, LocalDispatcher
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
    "Dispatcher",
    "EntryLinear",
    "ExitLinear",
    "ExpertLinear",
    "FFNLink",
    "InPlaceMoE",
    "KnownBody",
    "LocalDispatcher",
    "MoE",
    "RoutedRows",
    "Router",
    "Routing",
    "WeightRef",
]
