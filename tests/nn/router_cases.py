"""Every router of the table at small sizes, and what each must compute, token by token in float64.

Contract: ``make(name)`` is a router with decisive random parameters; ``expected(router, x)`` is what it chooses for the
tokens ``x [T, D]`` without noise, as a list of ``{expert: weight}`` per token, written from the formulas alone: Python
loops over floats. ``CASES`` has the names and options.

    >>> router = make("sigmoid, scaled").eval()
    >>> chosen(router(x)) == expected["sigmoid"](router, x)         # to rounding
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moefy.config import RouterSpec
from moefy.nn import Choice, Router, Routing
from moefy.nn.routers import make_router

T, D, E, K = 12, 6, 8, 2
Chosen = list[dict[int, float]]


class ChoiceGate(nn.Module):
    """Somebody's gate that returns a choice: the two best, half and a quarter."""

    sums_to_one = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E)

    def forward(self, x: Tensor) -> Choice:
        logits = self.gate(x).reshape(-1, E)
        index = logits.topk(2, -1).indices
        weights = torch.tensor([0.5, 0.25], dtype=logits.dtype).expand(index.shape)
        return Choice(index=index, weights=weights, logits=logits)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k": ("top_k", {}),
    "top_k, bias": ("top_k", {"bias": True}),
    "softmax_top_k": ("softmax_top_k", {}),
    "softmax_top_k, renormalised": ("softmax_top_k", {"renormalize": True, "scale": 1.5}),
    "sigmoid": ("sigmoid", {"scale": 2.5}),
    "sigmoid, as they are": ("sigmoid", {"renormalize": False}),
    "switch": ("switch", {}),
    "switch, fastmoe": ("switch", {"noise": "fastmoe", "jitter": 0.1}),
    "gshard": ("gshard", {}),
    "noisy_top_k": ("noisy_top_k", {}),
    "tutel_top": ("tutel_top", {"gate_noise": 1.0}),
    "tutel_top, not normalised": ("tutel_top", {"normalize_gate": False}),
    "cosine": ("cosine", {"proj_dim": 5, "gate_noise": 1.0}),
    "dc": ("dc", {"rates": (0.2, 0.2)}),
    "swipe": ("swipe", {"num_workers": 4}),
    "zero": ("zero", {}),
    "topology": ("topology", {"experts_per_node": 4, "node": 1, "outgoing_fraction": 0.26}),
    "group_limited": ("group_limited", {"n_groups": 4, "topk_groups": 2}),
    "group_limited, best two": ("group_limited", {"n_groups": 2, "topk_groups": 1, "group_best": 2}),
    "bias_balanced": ("bias_balanced", {"n_groups": 4, "topk_groups": 2}),
    "expert_choice": ("expert_choice", {"factor": 1.5}),
    "hash": ("hash", {"size": 16}),
    "replay": ("replay", {}),
    "multi": ("multi", {"routers": ("top_k", RouterSpec("sigmoid", top_k=3))}),
    "custom": ("custom", {"module": nn.Linear(D, E)}),
    "custom, choice": ("custom", {"module": ChoiceGate()}),
}
NOISY = (
    "switch", "switch, fastmoe", "gshard", "noisy_top_k", "tutel_top", "cosine", "dc"
)  # fmt: skip


def make(case: str, dtype: torch.dtype = torch.float64, **place: Any) -> Router:
    """The router of that case with standard normal parameters; a "replay" one with a trace of T tokens."""
    name, options = CASES[case]
    only = {"switch": 1}.get(name, K)
    router = make_router(RouterSpec(name, **options), D, E, only, dtype=dtype, fqn="layer", **place)
    router.to(dtype)
    with torch.no_grad():
        for parameter in router.parameters():
            nn.init.normal_(parameter)
        for bias in (b for n, b in router.named_buffers() if n.endswith("expert_bias")):
            nn.init.normal_(bias)
    if name == "replay":
        router.set_trace(trace(T))  # pyright: ignore[reportCallIssue]
    return router


def trace(tokens: int) -> Tensor:
    """[T, K] ids, different ones per token, one of them dropped."""
    index = torch.stack([torch.arange(tokens) % E, (torch.arange(tokens) + 3) % E], 1)
    index[min(2, tokens - 1) :, 1][:1] = -1
    return index


def chosen(routing: Routing | Choice) -> Chosen:
    """``{expert: weight}`` of each token, dropped slots left out, equal experts of a token added up."""
    index, weights = (routing.index, routing.weights) if isinstance(routing, Choice) else (
        routing.top_k_index, routing.top_k_weights
    )  # fmt: skip
    result: Chosen = []
    for ids, values in zip(index.tolist(), weights.tolist(), strict=True):
        token: dict[int, float] = {}
        for e, w in zip(ids, values, strict=True):
            if 0 <= e < E:
                token[e] = token.get(e, 0.0) + w
            else:
                assert w == 0, "a dropped slot has a weight"
        result.append(token)
    return result


def assert_chosen(got: Chosen, want: Chosen, tolerance: float = 1e-12) -> None:
    """The same experts and weights for every token."""
    assert len(got) == len(want)
    for t, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.keys() == b.keys(), f"token {t}: {a} for {b}"
        for e in b:
            assert abs(a[e] - b[e]) <= tolerance * max(1.0, abs(b[e])), f"token {t}: {a} for {b}"


# -- the formulas ------------------------------------------------------------------------------------------------------
def best(values: list[float], count: int) -> list[int]:
    """The ids of the largest values, best first, ties by id."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / math.fsum(powers) for p in powers]


def sigmoid(values: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-v)) for v in values]


def linear(router: Any, x: Tensor) -> list[list[float]]:
    bias = router.bias.tolist() if router.bias is not None else [0.0] * E
    rows = [[dot(w, t) for w in router.weight.tolist()] for t in x.tolist()]
    return [[v + b for v, b in zip(row, bias, strict=True)] for row in rows]


def over_chosen(row: list[float], ids: list[int]) -> dict[int, float]:
    return dict(zip(ids, softmax([row[i] for i in ids]), strict=True))


def top_k(router: Any, x: Tensor) -> Chosen:
    return [over_chosen(row, best(row, router.top_k)) for row in linear(router, x)]


def of_scores(router: Any, x: Tensor, renormalize: bool, scale: float = 1.0, score: Any = softmax) -> Chosen:
    result: Chosen = []
    for row in linear(router, x):
        s, ids = score(row), best(row, router.top_k)
        total = math.fsum(s[i] for i in ids) if renormalize else 1.0
        result.append({i: scale * s[i] / total for i in ids})
    return result


def cosine(router: Any, x: Tensor) -> Chosen:
    def unit(v: list[float]) -> list[float]:
        return [a / math.sqrt(dot(v, v)) for a in v]

    result: Chosen = []
    for t in x.tolist():
        weights, bias = router.projection_weight.tolist(), router.projection_bias.tolist()
        p = unit([dot(w, t) + b for w, b in zip(weights, bias, strict=True)])
        scale = math.exp(min(router.tau.item(), math.log(100)))
        row = [dot(p, unit(w)) * scale for w in router.weight.tolist()]
        s, ids = softmax(row), best(row, K)
        total = math.fsum(s[i] for i in ids)
        result.append({i: s[i] / total for i in ids})
    return result


def dc(router: Any, x: Tensor) -> Chosen:
    rows = linear(router, x)
    left = [math.ceil(0.2 * len(rows))] * E
    result: Chosen = []
    for row in rows:
        kept = {}
        for e, w in over_chosen(row, best(row, 2)).items():
            left[e] -= 1
            if left[e] >= 0:
                kept[e] = w
        result.append(kept)
    return result


def topology(router: Any, x: Tensor) -> Chosen:
    rows, near = linear(router, x), [4, 5, 6, 7]
    allowed = int(len(rows) * 0.26)
    remote = [t for t, row in enumerate(rows) if best(row, 1)[0] not in near]
    if len(remote) < allowed:
        return top_k(router, x)
    sent = sorted(remote, key=lambda t: -max(rows[t]))[:allowed]
    result: Chosen = []
    for t, row in enumerate(rows):
        ids = [near[i] for i in best([row[e] for e in near], K)]
        result.append(over_chosen(row, [*ids[:-1], best(row, 1)[0]] if t in sent else ids))
    return result


def grouped(router: Any, x: Tensor, groups: int, kept: int, count: int, bias: list[float]) -> Chosen:
    size, result = E // groups, []
    for row in linear(router, x):
        s = sigmoid(row)
        b = [v + w for v, w in zip(s, bias, strict=True)]
        of_group = [math.fsum(sorted(b[g * size : (g + 1) * size])[-count:]) for g in range(groups)]
        inside = best(of_group, kept)
        ids = [e for e in best(b, E) if e // size in inside][:K]
        total = math.fsum(s[i] for i in ids)
        result.append({i: s[i] / total for i in ids})
    return result


def expert_choice(router: Any, x: Tensor) -> Chosen:
    scores = [softmax(row) for row in linear(router, x)]
    seats = math.ceil(len(scores) * 1.5 / E)
    result: Chosen = [{} for _ in scores]
    for e in range(E):
        for t in best([s[e] for s in scores], seats):
            result[t][e] = scores[t][e]
    return result


def replay(router: Any, x: Tensor) -> Chosen:
    result: Chosen = []
    for row, ids in zip(linear(router, x), router.trace[0].tolist(), strict=True):
        if -1 in ids:  # the weight is that of a full token, its place held by expert 0
            weight = softmax([row[ids[0]], row[0]])[0]
            result.append({ids[0]: weight})
        else:
            result.append(over_chosen(row, ids))
    return result


def custom(router: Any, x: Tensor) -> Chosen:
    return top_k_of(router.module, x)


def top_k_of(gate: nn.Linear, x: Tensor) -> Chosen:
    rows = [
        [dot(w, t) + b for w, b in zip(gate.weight.tolist(), gate.bias.tolist(), strict=True)]
        for t in x.tolist()
    ]
    return [over_chosen(row, best(row, K)) for row in rows]


EXPECTED: dict[str, Callable[[Any, Tensor], Chosen]] = {
    "top_k": top_k,
    "top_k, bias": top_k,
    "softmax_top_k": lambda r, x: of_scores(r, x, False),
    "softmax_top_k, renormalised": lambda r, x: of_scores(r, x, True, 1.5),
    "sigmoid": lambda r, x: of_scores(r, x, True, 2.5, sigmoid),
    "sigmoid, as they are": lambda r, x: of_scores(r, x, False, 1.0, sigmoid),
    "switch": lambda r, x: of_scores(r, x, False),
    "switch, fastmoe": lambda r, x: of_scores(r, x, False),
    "gshard": top_k,
    "noisy_top_k": top_k,
    "tutel_top": lambda r, x: of_scores(r, x, True),
    "tutel_top, not normalised": lambda r, x: of_scores(r, x, False),
    "cosine": cosine,
    "dc": dc,
    "swipe": top_k,
    "zero": lambda r, x: [{0: 1.0} for _ in x],
    "topology": topology,
    "group_limited": lambda r, x: grouped(r, x, 4, 2, 1, [0.0] * E),
    "group_limited, best two": lambda r, x: grouped(r, x, 2, 1, 2, [0.0] * E),
    "bias_balanced": lambda r, x: grouped(r, x, 4, 2, 1, r.expert_bias.tolist()),
    "expert_choice": expert_choice,
    "hash": lambda r, x: [{(e + k) % E: 0.5 for k in range(K)} for e in r.table[: len(x)].tolist()],
    "replay": replay,
    "multi": lambda r, x: top_k(r.routers[0], x),
    "custom": custom,
    "custom, choice": lambda r, x: [
        dict(zip(top, (0.5, 0.25), strict=True)) for top in map(list, top_k_of(r.module.gate, x))
    ],
}
