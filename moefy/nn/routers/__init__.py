"""Routers: one small file each, a pure function under a thin module.

    moefy.transform(model, num_experts=8, router="switch")
    moefy.MoE(512, 2048, 8, router=moefy.RouterSpec("sigmoid", scale=2.5))

``print(router_table())`` shows each router's name, formula, source and options, as its class states them:

    top_k         c = top K of l;  w = softmax(l[c])               FastMoE's naive gate, Mixtral
    switch        l of x * U[1 - j, 1 + j];  K = 1;  w = s[c]      Fedus et al. 2022
                  options: jitter=0.01, noise='input', and those of softmax_top_k
    ...

l = logits, s = softmax over all experts, c = the K chosen, w = their weights, U and N = uniform and normal noise
(training only).

Contract of all routers: ties go to the lowest id, NaN scores give valid ids, the maths is in fp32 (fp64 for fp64
inputs), and evaluation has no noise, drops nothing at random and counts nothing. ``router.sums_to_one`` says whether
equal experts give the dense output.

A new router is a file with a subclass of ``Router`` under ``@register_router("name")``, its case in
``tests/nn/router_cases.py``, and its line below.
"""

from moefy.nn.routers import (  # noqa: F401  importing a file registers its routers
    bias_balanced,
    cosine,
    custom,
    dc,
    expert_choice,
    group_limited,
    gshard,
    multi,
    noisy_top_k,
    replay,
    scored,
    swipe,
    switch,
    token_hash,
    topology,
    tutel,
    zero,
)
from moefy.nn.routers.base import ROUTERS, Call, Router, register_router, router_init_
from moefy.nn.routers.make import RouterLike, check_router, configured_router, make_router, router_class
from moefy.nn.routers.replay import Trace, play, record
from moefy.nn.routers.table import router_table
from moefy.nn.routers.token_hash import route_by_token_ids

__all__ = [
    "ROUTERS",
    "Call",
    "Router",
    "RouterLike",
    "Trace",
    "check_router",
    "configured_router",
    "make_router",
    "play",
    "record",
    "register_router",
    "route_by_token_ids",
    "router_class",
    "router_init_",
    "router_table",
]
