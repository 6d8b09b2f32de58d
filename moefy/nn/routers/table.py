"""``ROUTERS``: the routers by name. What each computes is in the table of ``moefy.nn.routers``."""

from __future__ import annotations

from moefy.nn.routers.base import Router
from moefy.nn.routers.bias_balanced import BiasBalancedRouter
from moefy.nn.routers.cosine import CosineRouter
from moefy.nn.routers.custom import CustomRouter
from moefy.nn.routers.dc import DCRouter
from moefy.nn.routers.expert_choice import ExpertChoiceRouter
from moefy.nn.routers.group_limited import GroupLimitedRouter
from moefy.nn.routers.gshard import GShardRouter
from moefy.nn.routers.multi import MultiRouter
from moefy.nn.routers.noisy_top_k import NoisyTopKRouter
from moefy.nn.routers.replay import ReplayRouter
from moefy.nn.routers.scored import ScoreTopK, SigmoidTopK
from moefy.nn.routers.swipe import SwipeRouter
from moefy.nn.routers.switch import SwitchRouter
from moefy.nn.routers.token_hash import HashRouter
from moefy.nn.routers.topology import TopologyRouter
from moefy.nn.routers.tutel import TutelTopRouter
from moefy.nn.routers.zero import ZeroRouter

ROUTERS: dict[str, type[Router]] = {
    "top_k": Router,
    "softmax_top_k": ScoreTopK,
    "sigmoid": SigmoidTopK,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "noisy_top_k": NoisyTopKRouter,
    "tutel_top": TutelTopRouter,
    "cosine": CosineRouter,
    "dc": DCRouter,
    "swipe": SwipeRouter,
    "zero": ZeroRouter,
    "topology": TopologyRouter,
    "group_limited": GroupLimitedRouter,
    "bias_balanced": BiasBalancedRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "replay": ReplayRouter,
    "multi": MultiRouter,
    "custom": CustomRouter,
}
