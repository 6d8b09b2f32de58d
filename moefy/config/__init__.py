"""What decides how a dense FFN becomes a Mixture-of-Experts. Plain, frozen data, one file each.

``MoEConfig`` is the whole. ``RouterSpec`` names a router and its options, which are checked where the routers are
known. ``Capacity`` limits how many tokens an expert takes. ``AuxLoss`` says what is minimised beside the model's loss.

>>> config = MoEConfig(num_experts=8, top_k=2)
>>> MoEConfig.from_json(config.to_json()) == config
True
"""

from moefy.config.aux_loss import AUX_DELIVERIES, AUX_SCOPES, AuxLoss
from moefy.config.capacity import DROP_POLICIES, SLOT_ORDERS, Capacity
from moefy.config.capacity_rules import CAPACITY_RULES, CapacityRule
from moefy.config.moe_config import MAX_EXPERTS, SCHEMA_VERSION, MoEConfig
from moefy.config.router_spec import ONE_EXPERT_ROUTERS, RouterSpec, default_top_k, router_name

__all__ = [
    "AUX_DELIVERIES",
    "AUX_SCOPES",
    "CAPACITY_RULES",
    "DROP_POLICIES",
    "MAX_EXPERTS",
    "ONE_EXPERT_ROUTERS",
    "SCHEMA_VERSION",
    "SLOT_ORDERS",
    "AuxLoss",
    "Capacity",
    "CapacityRule",
    "MoEConfig",
    "RouterSpec",
    "default_top_k",
    "router_name",
]
