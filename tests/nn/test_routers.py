"""Every router against its formula and its gradient, and what holds for all: ties, NaN, no tokens, silence in eval."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefy.config import RouterSpec
from moefy.errors import ConfigError, RoutingError, ShapeError
from moefy.nn import Router
from moefy.nn.routers import ROUTERS, make_router, register_router, route_by_token_ids, router_table
from nn.router_cases import (
    CASES,
    EXPECTED,
    NOISY,
    D,
    E,
    K,
    T,
    assert_chosen,
    best,
    chosen,
    make,
    softmax,
)

each = pytest.mark.parametrize("case", CASES)


def tokens(count: int = T, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, D, dtype=dtype)


def test_every_name_has_a_case() -> None:
    assert {name for name, _ in CASES.values()} == set(ROUTERS)


def test_the_table_is_made_of_the_classes() -> None:
    lines = router_table().splitlines()
    for name, cls in ROUTERS.items():
        assert {"formula", "source"} <= vars(cls).keys(), f"{name} has another router's formula"
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert line.split()[0] == name and cls.formula in line and line.endswith(cls.source)
    assert "options: jitter=0.01, noise='input', and those of softmax_top_k" in router_table()
    assert all(len(line) <= 120 for line in lines)


def test_a_registered_class_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Router):
        pass

    monkeypatch.setitem(ROUTERS, "mine", Mine)
    assert register_router("mine")(Mine) is Mine
    assert type(make_router("mine", D, E, K)) is Mine
    with pytest.raises(ConfigError, match="a name that Router does not have"):
        register_router("top_k")(Mine)
    assert ROUTERS["top_k"] is Router


@each
def test_the_formula(case: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        router, x = make(case).eval(), tokens()
        assert_chosen(chosen(router(x)), EXPECTED[case](router, x))


@each
def test_weights_sum_to_one_where_it_says_so(case: str) -> None:
    router, x = make(case), tokens()
    sums = torch.stack([mode(x).top_k_weights.sum(1) for mode in (router.train(), router.eval())])
    # A router that may depart from 1 does so here, but for gshard's and dc's chance and capacity.
    assert router.sums_to_one == bool((sums - 1).abs().max() < 1e-12) or case in ("gshard", "dc")


@each
def test_evaluation_draws_nothing(case: str) -> None:
    router, x = make(case).eval(), tokens()
    state = torch.get_rng_state()
    first, second = router(x), router(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert chosen(first) == chosen(second) and not first.choice.losses


@pytest.mark.parametrize("case", NOISY)
def test_training_draws_from_the_global_generator(case: str) -> None:
    router, x = make(case).train(), tokens(64)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(chosen(router(x)))
    assert found[0] == found[1] != found[2]


@each
def test_gradient(case: str) -> None:
    router = make(case).train()
    names = [n for n, p in router.named_parameters() if p.requires_grad]

    def weights(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)
        with torch.random.fork_rng():
            parameters = dict(zip(names, values, strict=True))
            return torch.func.functional_call(router, parameters, (x,)).top_k_weights

    values = [p.detach().clone().requires_grad_() for p in router.parameters()]
    assert torch.autograd.gradcheck(weights, (tokens().requires_grad_(), *values), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("hash", "replay", "custom, choice")])
def test_ties_go_to_the_lowest_id(case: str) -> None:
    """All scores are equal: the first experts, the first tokens and the first groups win."""
    router, x = make(case).eval(), tokens()
    with torch.no_grad():
        for value in [*router.parameters(), *(b for n, b in router.named_buffers() if "bias" in n)]:
            value.zero_()
    even = [{0: 0.5, 1: 0.5} for _ in x]
    assert_chosen(chosen(router(x)), even if case == "cosine" else EXPECTED[case](router, x))


@each
@pytest.mark.parametrize("training", [True, False])
def test_nan_gives_valid_ids(case: str, training: bool) -> None:
    router, x = make(case).train(training), tokens()
    x[3] = float("nan")
    torch.manual_seed(1)
    index = router(x).choice.index
    assert ((index >= -1) & (index <= E)).all()
    if case in ("top_k", "sigmoid", "group_limited", "bias_balanced", "topology"):
        assert index[3].unique().numel() == K


@each
def test_no_tokens(case: str) -> None:
    if case == "replay":
        router = make_router("replay", D, E, K)
        router.set_trace(torch.zeros(0, K, dtype=torch.int64))  # pyright: ignore[reportCallIssue]
    else:
        router = make(case)
    x = torch.zeros(0, D, dtype=next(router.parameters(), torch.zeros(0)).dtype)
    for mode in (router.train(), router.eval()):
        routing = mode(x)
        assert routing.top_k_index.shape[0] == 0 and not routing.tokens_per_expert.any()


@each
def test_padding_is_not_there(case: str) -> None:
    """The real tokens are routed as if the others were not in the batch."""
    router, x = make(case).eval(), tokens()
    mask = torch.arange(T) % 3 > 0
    if case in ("hash", "replay"):  # by place
        return
    routing = router(x, mask=mask)
    got = chosen(routing)
    assert all(got[t] == {} for t in range(T) if not mask[t])
    if case in ("dc", "topology", "expert_choice"):
        return
    assert_chosen([got[t] for t in range(T) if mask[t]], chosen(router(x[mask])))


def test_padding_takes_no_seat_with_an_expert() -> None:
    router, x = make("expert_choice").eval(), tokens()
    mask = torch.arange(T) % 3 > 0
    got = chosen(router(x, mask=mask))
    assert_chosen([got[t] for t in range(T) if mask[t]], chosen(router(x[mask])))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maths_is_in_fp32(case: str, dtype: torch.dtype) -> None:
    router, x = make(case, dtype), tokens(dtype=dtype)
    routing = router(x)
    if case != "custom, choice":
        assert routing.top_k_weights.dtype == torch.promote_types(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(4)
        inside = router.eval()(x)
    torch.manual_seed(4)
    if not case.startswith("custom"):  # that is the module's own affair
        assert torch.equal(inside.top_k_weights, router(x).top_k_weights)


@each
def test_copies(case: str) -> None:
    router, x = make(case), tokens()
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert chosen(twin.eval()(x)) == chosen(router.eval()(x))
    other = make(case)
    other.load_state_dict(router.state_dict())
    assert chosen(other.eval()(x)) == chosen(router.eval()(x))


@each
def test_to_empty_and_back(case: str) -> None:
    if case.startswith("custom"):
        return
    name, options = CASES[case]
    place: Any = {"fqn": "layer", "seed": 3}
    made = make_router(
        RouterSpec(name, **options), D, E, 1 if name == "switch" else K, device="meta", **place
    )
    made.to_empty(device="cpu").reset_parameters()
    same = make_router(RouterSpec(name, **options), D, E, 1 if name == "switch" else K, **place)
    if name != "replay":
        assert all(
            torch.equal(a, b)
            for a, b in zip(made.state_dict().values(), same.state_dict().values(), strict=True)
        )


# -- noise and chance --------------------------------------------------------------------------------------------------
def test_switch_jitter_multiplies_the_input() -> None:
    router, x = make("switch").train(), tokens(4)
    torch.manual_seed(7)
    got = router(x).router_logits
    torch.manual_seed(7)
    noise = torch.rand(4, D, dtype=torch.float64) * 0.02 + 0.99
    assert torch.allclose(got, (x * noise) @ router.weight.t(), rtol=1e-12)


def test_fastmoe_switch_noise_is_added_to_the_logits() -> None:
    router, x = make("switch, fastmoe").train(), tokens(4)
    torch.manual_seed(7)
    got = router(x).router_logits
    torch.manual_seed(7)
    noise = torch.rand(4, E, dtype=torch.float64) * 0.2 + 0.9
    assert torch.allclose(got, x @ router.weight.t() + noise, rtol=1e-12)


def test_gshard_drops_the_second_expert_with_its_probability() -> None:
    router = make("gshard").train()
    x = tokens(1).expand(20000, D)
    second = router.eval()(x).top_k_weights[0, 1].item()
    routing = router.train()(x)
    share = (routing.top_k_index[:, 1] == E).double().mean().item()
    assert 0.02 < second < 0.49 and abs(share - (1 - 2 * second)) < 0.02
    assert (routing.top_k_index[:, 0] < E).all()
    assert (
        make_router(RouterSpec("gshard", random_routing=False), D, E, 2)(tokens(64).float()).top_k_index < E
    ).all()


def test_noisy_top_k() -> None:
    router, x = make("noisy_top_k").train(), tokens()
    torch.manual_seed(7)
    choice = router(x).choice
    torch.manual_seed(7)
    clean = x @ router.weight.t()
    std = torch.nn.functional.softplus(x @ router.noise_weight.t()) + 0.01
    noisy = (clean + torch.randn(T, E, dtype=torch.float64) * std).tolist()
    gates = torch.zeros(T, E, dtype=torch.float64)
    load = torch.zeros(E, dtype=torch.float64)
    for t, row in enumerate(noisy):
        ids = best(row, K)
        gates[t, ids] = torch.tensor(softmax([row[i] for i in ids]), dtype=torch.float64)
        for e in range(E):
            threshold = row[best([v if i != e else float("-inf") for i, v in enumerate(row)], K)[-1]]
            z = (clean[t, e].item() - threshold) / std[t, e].item()
            load[e] += 0.5 * (1 + torch.erf(torch.tensor(z / 2**0.5, dtype=torch.float64)))
        assert choice.index[t].tolist() == ids

    def cv2(v: Tensor) -> Tensor:
        return v.var() / v.mean() ** 2

    assert torch.allclose(choice.losses["importance"], cv2(gates.sum(0)), rtol=1e-8)
    assert torch.allclose(choice.losses["load"], cv2(load), rtol=1e-8)
    assert router.noise_weight.grad is None
    sum(choice.losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert router.noise_weight.grad.abs().sum() > 0


def test_tutel_noise_has_deviation_one_in_e() -> None:
    router, x = make("tutel_top").train(), tokens(4000)
    noise = router(x).router_logits - x @ router.weight.t()
    assert abs(noise.std().item() * E - 1) < 0.02


def test_tutel_s_own_units_are_another_loss() -> None:
    """One loss at a time, since all that a router gives are added up."""
    x, found = tokens(), []
    for mixed in (False, True):
        torch.manual_seed(0)
        router = make("tutel_top", mixed_units=mixed).train()
        (loss,) = router(x).choice.losses.values()
        found.append(loss.item())
    assert all(math.isfinite(v) for v in found) and found[0] != found[1]


def test_the_temperature_is_clamped() -> None:
    router, x = make("cosine"), tokens()
    with torch.no_grad():
        router.tau.fill_(50.0)
    assert router.logits(x).abs().max() <= 100
    assert make_router("cosine", D, E, K).tau.exp().item() == pytest.approx(2.0)


# -- swipe -------------------------------------------------------------------------------------------------------------
def swipe_by_hand(index: list[list[int]], workers: int) -> list[list[int]]:
    """FastMoE's algorithm as it runs: rank by rank, with counts, quotas and two pointers."""
    count, own = len(index), E // workers
    sizes = [count // workers + (w < count % workers) for w in range(workers)]
    source = [w for w, size in enumerate(sizes) for _ in range(size)]
    quota = [size * K for size in sizes]
    result = [list(row) for row in index]
    for k in range(K):
        asked = [row[k] // own for row in index]
        accept = [[0] * workers for _ in range(workers)]  # [source][target]
        rejected = [0] * workers
        for target in range(workers):
            for s in range(workers):
                wanted = sum(a == target and source[t] == s for t, a in enumerate(asked))
                accept[s][target] = min(wanted, quota[target])
                quota[target] -= accept[s][target]
                rejected[s] += wanted - accept[s][target]
        extra = [[0] * workers for _ in range(workers)]
        j = 0
        for s in range(workers):
            while rejected[s] > 0:
                moved = min(rejected[s], quota[j])
                extra[s][j] += moved
                quota[j] -= moved
                rejected[s] -= moved
                j += quota[j] == 0 and rejected[s] > 0
        for t in range(count):
            s = source[t]
            if accept[s][asked[t]] > 0:
                accept[s][asked[t]] -= 1
            else:
                target = next(w for w in range(workers) if extra[s][w] > 0)
                extra[s][target] -= 1
                result[t][k] = target * own + k % own
    return result


@pytest.mark.parametrize("count", [12, 16, 13, 1])
def test_swipe_balances_the_workers(count: int) -> None:
    router, x = make("swipe").train(), tokens(count)
    with torch.no_grad():
        router.weight[3] *= 3  # a popular expert
    plain = [best(row, K) for row in (x @ router.weight.t()).tolist()]
    index = router(x).top_k_index
    assert index.tolist() == swipe_by_hand(plain, 4)
    per_worker = torch.bincount(index.flatten() // 2, minlength=4)
    assert per_worker.tolist() == [K * (count // 4 + (w < count % 4)) for w in range(4)]
    assert index.tolist() != plain or count == 1


# -- hash --------------------------------------------------------------------------------------------------------------
def test_hash_is_balanced_and_depends_on_seed_and_name() -> None:
    def table(**place: Any) -> Tensor:
        return make_router(RouterSpec("hash", size=1000), D, E, 1, **place).table  # pyright: ignore

    counts = torch.bincount(table(), minlength=E)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(table(seed=1, fqn="a"), table(seed=1, fqn="a"))
    assert not torch.equal(table(seed=1, fqn="a"), table(seed=2, fqn="a"))
    assert not torch.equal(table(seed=1, fqn="a"), table(seed=1, fqn="b"))


def test_hash_by_token() -> None:
    router = make_router(RouterSpec("hash", by="token", size=50), D, E, 2)
    ids = torch.tensor([[3, 49, 3], [50, -1, 7]])
    x = torch.randn(2, 3, D)
    first = router.table[torch.tensor([3, 49, 3, 0, 49, 7])]  # pyright: ignore
    want = torch.stack([first, (first + 1) % E], 1)
    assert torch.equal(router(x, token_ids=ids).top_k_index, want)
    with pytest.raises(RoutingError, match="token ids"):
        router(x)
    with pytest.raises(ShapeError, match="5 token ids for 6 tokens"):
        router(x, token_ids=ids.flatten()[:5])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.embed = router, nn.Embedding(60, D)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.router(self.embed(input_ids.abs())).top_k_index

    model = Model()
    handle = route_by_token_ids(model)
    twin = copy.deepcopy(model)
    assert torch.equal(model(ids), want) and torch.equal(model(input_ids=ids), want)
    assert torch.equal(twin(ids), want)
    assert len(pickle.loads(pickle.dumps(twin._forward_pre_hooks))) == 1
    assert pickle.loads(pickle.dumps(router)).token_ids is None
    handle.remove()
    with pytest.raises(ConfigError, match="argument"):
        route_by_token_ids(model, "ids")


def test_hash_by_position_is_the_same_in_every_row() -> None:
    router = make("hash")
    index = router(torch.randn(3, 5, D, dtype=torch.float64)).top_k_index.view(3, 5, K)
    assert torch.equal(index[0], index[1]) and torch.equal(index[0], index[2])
    channels = router(torch.randn(3, D, 5, 1, dtype=torch.float64), 1).top_k_index.view(3, 5, K)
    assert torch.equal(index, channels)


# -- several routers, anybody's module ---------------------------------------------------------------------------------
def test_several_routers() -> None:
    router, x = make("multi").eval(), tokens()
    children = list(router.routers)  # pyright: ignore
    assert chosen(router(x, router_index=1)) == chosen(children[1](x))
    assert router(x, router_index=1).top_k == 3 and router(x).top_k == 2
    assert router(x, router_index=1, top_k=1).top_k == 1
    router.router_index = 1
    assert chosen(router(x)) == chosen(children[1](x))
    with pytest.raises(ConfigError, match="router_index"):
        router(x, router_index=2)
    with pytest.raises(ConfigError, match="router_index"):
        make("top_k")(x, router_index=1)
    assert sorted(router.state_dict()) == ["routers.0.weight", "routers.1.weight"]


def test_a_module_gets_the_features_last() -> None:
    seen = []

    def gate(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x @ torch.eye(D, E)

    router = make_router(RouterSpec("custom", module=gate), D, E, K)
    x = torch.randn(2, 5, D)
    last = router(x)
    first = router(x.movedim(-1, 1), 1)
    assert seen == [(2, 5, D), (2, 5, D)] and chosen(last) == chosen(first)
    with pytest.raises(ShapeError, match="expected 8 per token"):
        make_router(nn.Linear(D, E + 1), D, E, K)(x)


def test_whether_a_module_sums_to_one_is_asked_or_tried() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return make("custom, choice", torch.float32)(x).choice

    sums = {
        "logits": make_router(nn.Linear(D, E), D, E, K).sums_to_one,
        "choice": make_router(Silent(), D, E, K).sums_to_one,
        "told": make_router(RouterSpec("custom", module=Silent(), sums_to_one=True), D, E, K).sums_to_one,
        "fails": make_router(RouterSpec("custom", module=lambda x: 1 / 0), D, E, K).sums_to_one,
    }
    assert sums == {"logits": True, "choice": False, "told": True, "fails": False}


def test_classes_and_factories() -> None:
    import functools

    from moefy.nn.routers.switch import SwitchRouter

    class Gate(nn.Module):
        def __init__(self, d_model: int, num_experts: int) -> None:
            super().__init__()
            self.linear = nn.Linear(d_model, num_experts)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    place: Any = {"std": 0.5, "seed": 2, "fqn": "a"}
    by_class = make_router(SwitchRouter, D, E, 1, **place)
    assert type(by_class) is SwitchRouter and (by_class.std, by_class.fqn) == (0.5, "a")
    part = make_router(functools.partial(SwitchRouter, jitter=0.3, std=0.1), D, E, 1, **place)
    assert (part.jitter, part.std) == (0.3, 0.1)  # pyright: ignore
    state = torch.get_rng_state()
    gates = [make_router(Gate, D, E, K, **place) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gates[0].module.linear.weight, gates[1].module.linear.weight)  # pyright: ignore
    assert gates[0](torch.randn(3, D)).top_k_index.shape == (3, K)
    by_place = make_router(lambda d, e, k: nn.Linear(d, e), D, E, K, dtype=torch.float64)
    assert by_place(tokens()).top_k_weights.dtype == torch.float64
    with pytest.raises(ConfigError, match="returns a module"):
        make_router(lambda d, e, k: 3, D, E, K)  # pyright: ignore
    router = Router(D, E, K)
    assert make_router(router, D, E, K) is router
