"""Options of routers outside their domain: an error that names the option, before anything is made."""

from __future__ import annotations

import pytest
import torch

from moefy.config import RouterSpec
from moefy.errors import ConfigError, UnknownOption
from moefy.nn.routers import make_router
from nn.router_cases import D, E, K


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        (RouterSpec("switch"), "top_k"),
        (RouterSpec("softmax_top_k", score="tanh"), "score"),
        (RouterSpec("softmax_top_k", scale=0), "scale"),
        (RouterSpec("noisy_top_k", noise_epsilon=0), "noise_epsilon"),
        (RouterSpec("tutel_top", gate_noise=-1), "gate_noise"),
        (RouterSpec("cosine", proj_dim=0), "proj_dim"),
        (RouterSpec("cosine", init_t=0), "init_t"),
        (RouterSpec("dc", rates=(1.0,)), "rates"),
        (RouterSpec("dc", num_workers=0), "num_workers"),
        (RouterSpec("swipe", num_workers=3), "num_workers"),
        (RouterSpec("topology", experts_per_node=3), "experts_per_node"),
        (RouterSpec("topology", experts_per_node=1), "top_k"),
        (RouterSpec("topology", experts_per_node=4, node=2), "node"),
        (RouterSpec("topology", outgoing_fraction=2), "outgoing_fraction"),
        (RouterSpec("group_limited", n_groups=3), "n_groups"),
        (RouterSpec("group_limited", n_groups=2, topk_groups=3), "topk_groups"),
        (RouterSpec("group_limited", n_groups=8, topk_groups=1), "top_k"),
        (RouterSpec("group_limited", n_groups=4, group_best=3), "group_best"),
        (RouterSpec("bias_balanced", rate=-1), "rate"),
        (RouterSpec("expert_choice", factor=9), "factor"),
        (RouterSpec("hash", by="colour"), "by"),
        (RouterSpec("hash", size=7), "size"),
        (RouterSpec("multi", routers=()), "routers"),
        (RouterSpec("multi", routers="top_k"), "routers"),
        (RouterSpec("multi", router_index=1), "router_index"),
        (RouterSpec("custom", module=3), "module"),
    ],
    ids=repr,
)
def test_bad_options(spec: RouterSpec, option: str) -> None:
    with pytest.raises(ConfigError, match=option) as caught:
        make_router(spec, D, E, K)
    assert caught.value.option == option


def test_bad_switch_options() -> None:
    for options in ({"jitter": 1.0}, {"noise": "loud"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            make_router(RouterSpec("switch", **options), D, E, 1)
    with pytest.raises(ConfigError, match="top_k"):
        make_router("switch", D, E, 1)(torch.randn(3, D), top_k=2)
    with pytest.raises(UnknownOption, match="did you mean 'jitter'"):
        make_router(RouterSpec("switch", jiter=0.1), D, E, 1)


def test_an_unknown_name_is_answered_by_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'expert_choice'"):
        make_router("expertchoice", D, E, K)
