"""Routers: one small file each, a pure function under a thin module, and the table of their names.

    moefy.transform(model, num_experts=8, router="switch")
    moefy.MoE(512, 2048, 8, router=moefy.RouterSpec("sigmoid", scale=2.5))

l = logits, s = softmax over all experts, c = the K chosen, U and N = uniform and normal noise (training only).

| name          | what it computes                                      | source                        |
|---------------|-------------------------------------------------------|-------------------------------|
| top_k         | c = top K of l;  w = softmax(l[c])                    | FastMoE's naive gate, Mixtral |
| softmax_top_k | c = top K of s;  w = s[c], or divided by their sum    | V-MoE, DeepSeek-MoE, Qwen     |
| sigmoid       | w = sigmoid(l)[c] / sum * scale                       | DeepSeek-V3                   |
| switch        | l of x * U[1 - j, 1 + j];  K = 1;  w = s[c]           | Fedus et al. 2022             |
| gshard        | K = 2; the second dropped if 2 w2 < U[0, 1]           | Lepikhin et al. 2020          |
| noisy_top_k   | l + N * (softplus(x W_n) + eps);  w = softmax(l[c])   | Shazeer et al. 2017           |
| tutel_top     | s of l + noise * N / E;  w = s[c] / sum               | Tutel                         |
| cosine        | l = cos(P x, W_e) * exp(min(tau, ln 100)); tutel_top  | Tutel, X-MoE                  |
| dc            | gshard, an expert taking ceil(rate * T / W) slots     | FastMoE                       |
| swipe         | top K, moved until all workers have equally many      | FastMoE, BaGuaLu              |
| zero          | c = 0 for all K slots;  w = 1 / K                     | FastMoE                       |
| topology      | top K of the own node, a share f of tokens may leave  | FasterMoE                     |
| group_limited | top K within each token's best groups of experts      | DeepSeek-V2 and V3            |
| bias_balanced | c = top K of score + b;  b += rate * sign(mean n - n) | Wang et al. 2024, DeepSeek-V3 |
| expert_choice | each expert takes its C best tokens; not causal       | Zhou et al. 2022              |
| hash          | c = table[id or position] + k;  w = 1 / K             | Roller et al. 2021            |
| replay        | c from a recorded trace;  w = softmax(l[c])           | SmartMoE, Megatron-Core       |
| multi         | one of several routers, by ``router_index``           | Tutel                         |
| custom        | any module: logits as top_k, a ``Choice`` as it is    |                               |

| name          | options, beside ``std``, ``bias`` and ``seed`` of all with a linear scorer                      |
|---------------|-------------------------------------------------------------------------------------------------|
| softmax_top_k, sigmoid | renormalize, scale, score="softmax" or "sigmoid"                                       |
| switch        | jitter, noise="input" or "fastmoe", and those of softmax_top_k                                  |
| gshard        | random_routing                                                                                  |
| noisy_top_k   | noise_epsilon                                                                                   |
| tutel_top     | gate_noise, normalize_gate, mixed_units                                                         |
| cosine        | proj_dim, init_t, and those of tutel_top                                                        |
| dc            | rates=(training, evaluation), num_workers, random_routing                                       |
| swipe         | num_workers                                                                                     |
| topology      | experts_per_node, outgoing_fraction, node                                                       |
| group_limited | n_groups, topk_groups, group_best, and those of sigmoid                                         |
| bias_balanced | rate, auto_update, and those of group_limited                                                   |
| expert_choice | factor                                                                                          |
| hash          | by="position" or "token", size                                                                  |
| replay        | trace, and those of softmax_top_k                                                               |
| multi         | routers, router_index                                                                           |
| custom        | module, sums_to_one                                                                             |

All of them: ties go to the lowest id, NaN scores give valid ids, the maths is in fp32 (fp64 for fp64 inputs), and
evaluation has no noise, drops nothing at random and counts nothing. ``router.sums_to_one`` says whether equal experts
give the dense output.
"""

from moefy.nn.routers.base import Call, Router, router_init_
from moefy.nn.routers.make import RouterLike, check_router, configured_router, make_router, router_class
from moefy.nn.routers.replay import Trace, play, record
from moefy.nn.routers.table import ROUTERS
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
    "route_by_token_ids",
    "router_class",
    "router_init_",
]
