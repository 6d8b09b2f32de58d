"""Who keeps a seat: hand-computed tables for every rule, drop policy and order; then through router and layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import moefy
from moefy.config import CAPACITY_RULES, Capacity, CapacityRule, MoEConfig
from moefy.errors import ConfigError, UnknownOption
from moefy.nn import Router
from moefy.nn.routing.capacity import expert_capacity, queue_ranks, seat
from moefy.nn.routing.routing import Choice

D, H, E, K = 8, 12, 4, 2

# Six tokens, three experts, K=2. Token by token, expert 0 is wanted by 0a 1a 2b 3a 5b, expert 1 by 0b 2a 4a 5a,
# expert 2 by 1b 3b 4b (a: first choice, b: second).
INDEX = [[0, 1], [0, 2], [1, 0], [0, 2], [1, 2], [1, 0]]
WEIGHTS = [[0.6, 0.4], [0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.8, 0.2], [0.55, 0.45]]


def choice() -> Choice:
    """The table above; the scores are the weights at the chosen experts."""
    index, weights = torch.tensor(INDEX), torch.tensor(WEIGHTS, dtype=torch.float64)
    scores = torch.zeros(6, 3, dtype=torch.float64).scatter(1, index, weights)
    return Choice(index=index, weights=weights, logits=scores.log(), scores=scores)


def kept(seats: Any) -> list[str]:
    """The slots with a seat, as "0a" for token 0's first choice."""
    return [f"{t}{'ab'[k]}" for t, row in enumerate(seats.index.tolist()) for k, e in enumerate(row) if e < 3]


# 4 seats in all rows but where the rule says otherwise; T=6, K=2, E=3, so T*K/E = 4.
@pytest.mark.parametrize(
    ("rule", "factor", "options", "expected"),
    [
        ("megatron", 1.0, {}, 4),  # ceil(12 / 3)
        ("megatron", 0.8, {}, 4),  # ceil(3.2)
        ("megatron", 0.3, {}, 2),  # ceil(1.2)
        ("megatron", 0.3, {"min_capacity": 3}, 3),
        ("deepspeed", 0.8, {}, 4),  # ceil(6 / 3 * 1.6) = 4
        ("deepspeed", 0.3, {}, 4),  # at least 4
        ("deepspeed", 0.3, {"min_capacity": 1}, 2),  # ceil(1.2)
        ("gshard", 0.8, {}, 3),  # floor(3.2)
        ("switch", 1.3, {}, 2),  # floor(6 * 1.3 / 3 = 2.6), without K
        ("tutel", 0.8, {}, 2),  # 2 * int(0.8 * ceil(6 / 3) = 1.6)
        ("tutel", 1.6, {}, 6),  # 2 * int(3.2)
        ("fastmoe_gshard", 1.2, {}, 5),  # ceil(7.2) = 8; 8 * 2 // 3
        ("fastmoe_switch", 1.2, {}, 3),  # ceil(7.2 / 3)
        ("fastmoe_switch", 1.2, {"experts_per_worker": 1}, 8),  # ceil(7.2 / 1)
        ("fastmoe_dc", 1.2, {}, 8),  # ceil(7.2)
        ("megatron", 1.0, {"align": 8}, 8),
        ("tutel", 0.8, {"align": 4}, 4),
        ("megatron", 1.0, {"align": 4}, 4),
    ],
)
def test_rules(rule: str, factor: float, options: Any, expected: int) -> None:
    capacity = Capacity(rule=rule, factor=factor, **options)
    assert expert_capacity(torch.tensor(INDEX), 3, 2, capacity, factor) == expected


def test_an_uneven_number_of_tokens_rounds_as_tutel_does() -> None:
    # 7 tokens, 3 experts: ceil(7 / 3) = 3; 2 * int(1.25 * 3 = 3.75) = 6
    assert expert_capacity(torch.zeros(7, 2, dtype=torch.int64), 3, 2, Capacity(rule="tutel"), 1.25) == 6


@pytest.mark.parametrize("rule", CAPACITY_RULES)
def test_factors_of_zero_and_below_look_at_the_need(rule: str) -> None:
    index = torch.tensor(INDEX)  # expert 0 needs 5
    capacity = Capacity(rule=rule, min_capacity=0)
    assert expert_capacity(index, 3, 2, capacity, 0).item() == 5
    assert expert_capacity(index, 3, 2, capacity, 0.0).item() == 5
    positive = expert_capacity(index, 3, 2, capacity, 0.6)
    assert expert_capacity(index, 3, 2, capacity, -0.6).item() == min(5, positive)
    assert expert_capacity(index, 3, 2, capacity, -100.0).item() == 5
    aligned = dataclasses.replace(capacity, align=4)
    assert expert_capacity(index, 3, 2, aligned, 0).item() == 8
    assert expert_capacity(index, 3, 2, aligned, -100.0).item() == 8


ALL = ["0a", "0b", "1a", "1b", "2a", "2b", "3a", "3b", "4a", "4b", "5a", "5b"]
# Two seats per expert. "token": the first two of 0a 1a 2b 3a 5b, of 0b 2a 4a 5a, of 1b 3b 4b.
TOKEN = ["0a", "0b", "1a", "1b", "2a", "3b"]
# "choice": the first two of 0a 1a 3a | 2b 5b, of 2a 4a 5a | 0b, of 1b 3b 4b.
CHOICE = ["0a", "1a", "1b", "2a", "3b", "4a"]
# By weight: 1a .9, 3a .7; 4a .8, 5a .55; 3b .3, 4b .2.
WEIGHT = ["1a", "3a", "3b", "4a", "4b", "5a"]
# Tokens by their best score: 1 (.9), 4 (.8), 3 (.7), 0 (.6), 5 (.55), 2 (.5).
# By choice: expert 0: 1a 3a (0a); expert 1: 4a 5a (2a); expert 2: 1b 4b (3b).
BATCH_CHOICE = ["1a", "1b", "3a", "4a", "4b", "5a"]
# By token: expert 0: 1a 3a; expert 1: 4a 0b (before 5a); expert 2: 1b 4b.
BATCH_TOKEN = ["0b", "1a", "1b", "3a", "4a", "4b"]


@pytest.mark.parametrize("factor", [0.5, -0.5])
@pytest.mark.parametrize(
    ("drop", "order", "expected"),
    [
        ("position", "token", TOKEN),
        ("position", "choice", CHOICE),
        ("probability", "token", WEIGHT),
        ("probability", "choice", WEIGHT),
        ("batch_prioritized", "token", BATCH_TOKEN),
        ("batch_prioritized", "choice", BATCH_CHOICE),
    ],
)
def test_who_is_seated(drop: str, order: str, expected: list[str], factor: float) -> None:
    capacity = Capacity(factor=factor, drop=drop, order=order)  # ceil(0.5 * 4) = 2 seats
    seats = seat(choice(), capacity, 3, 2, training=True)
    assert kept(seats) == expected and int(seats.capacity) == 2
    weights = [
        [w if f"{t}{'ab'[k]}" in expected else 0.0 for k, w in enumerate(row)]
        for t, row in enumerate(WEIGHTS)
    ]
    assert seats.weights.tolist() == weights and seats.stranded is None


@pytest.mark.parametrize("drop", ["position", "probability", "batch_prioritized", "random"])
@pytest.mark.parametrize("order", ["token", "choice"])
@pytest.mark.parametrize("factor", [0.0, -1.25, -9.0, 1.25])
def test_what_fits_is_never_dropped(drop: str, order: str, factor: float) -> None:
    """The need is 5, also where the last token in line is not the one with the largest place."""
    seats = seat(choice(), Capacity(factor=factor, drop=drop, order=order), 3, 2, training=True)
    assert kept(seats) == ALL and int(seats.capacity) == 5


def test_equal_weights_are_seated_in_order() -> None:
    tied = choice()
    tied.weights = torch.full_like(tied.weights, 0.5)
    by_token = seat(tied, Capacity(factor=0.5, drop="probability", order="token"), 3, 2, training=True)
    by_choice = seat(tied, Capacity(factor=0.5, drop="probability", order="choice"), 3, 2, training=True)
    assert (kept(by_token), kept(by_choice)) == (TOKEN, CHOICE)


@pytest.mark.parametrize(
    ("rule", "order"),
    [("megatron", "token"), ("deepspeed", "choice"), ("gshard", "choice"), ("switch", "choice"), ("tutel", "choice"),
     ("fastmoe_gshard", "token"), ("fastmoe_switch", "token"), ("fastmoe_dc", "token")],
)  # fmt: skip
def test_each_rule_has_its_order(rule: str, order: str) -> None:
    own = queue_ranks(torch.tensor(INDEX), 3, CAPACITY_RULES[rule].order)
    # expert 1's queue: 0b 2a 4a 5a by token, 2a 4a 5a 0b by choice
    assert own[:, 1].tolist()[0] == (0 if order == "token" else 3)


def test_random_token_selection() -> None:
    """One expert, 64 tokens, 16 seats: each draw seats others, each token in about a quarter of them."""
    crowd = Choice(torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1), torch.zeros(64, 1))
    capacity = Capacity(factor=0.25, drop="random", rule="deepspeed")
    seated = torch.stack([seat(crowd, capacity, 1, 1, training=True).index[:, 0] == 0 for _ in range(400)])
    assert (seated.sum(1) == 16).all()
    assert (seated.double().mean(0) - 0.25).abs().max() < 0.1  # 4.6 standard deviations
    evaluated = seat(crowd, capacity, 1, 1, training=False).index[:, 0] == 0
    assert evaluated.tolist() == [True] * 16 + [False] * 48
    torch.manual_seed(3)
    one = seat(crowd, capacity, 1, 1, training=True).index
    torch.manual_seed(3)
    assert torch.equal(one, seat(crowd, capacity, 1, 1, training=True).index)


def test_training_and_evaluation_have_their_factors() -> None:
    capacity = Capacity(factor=0.5, eval_factor=1.0)
    assert seat(choice(), capacity, 3, 2, training=True).capacity == 2
    assert seat(choice(), capacity, 3, 2, training=False).capacity == 4
    assert seat(choice(), capacity, 3, 2, training=False, factor=0).capacity.item() == 5
    assert seat(choice(), dataclasses.replace(capacity, eval_factor=None), 3, 2, training=False).capacity == 2


def test_slots_that_the_router_dropped_take_no_seat() -> None:
    mine = choice()
    mine.index[0, 0], mine.index[1, 0] = 3, -1
    seats = seat(mine, Capacity(factor=0.5, residual=True), 3, 2, training=True)
    # expert 0's queue is then 2b 3a 5b
    assert kept(seats) == ["0b", "1b", "2a", "2b", "3a", "3b"]
    assert seats.stranded.tolist() == [False] * 4 + [True, True]
    mine.index[4] = 3  # no slot at all: not stranded by capacity
    assert seat(mine, Capacity(factor=0.5, residual=True), 3, 2, training=True).stranded.tolist() == [
        False
    ] * 5 + [True]


def test_renormalised_weights_keep_their_sum() -> None:
    seats = seat(choice(), Capacity(factor=0.5, renormalize=True), 3, 2, training=True)
    expected = [[0.6, 0.4], [0.9, 0.1], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(seats.weights, torch.tensor(expected, dtype=torch.float64))
    half = choice()
    half.weights = half.weights / 2
    torch.testing.assert_close(
        seat(half, Capacity(factor=0.5, renormalize=True), 3, 2, training=True).weights, seats.weights / 2
    )
    half.weights = choice().weights.requires_grad_()

    def weights(value: Tensor) -> Tensor:
        capacity = Capacity(factor=0.5, renormalize=True)
        return seat(dataclasses.replace(half, weights=value), capacity, 3, 2, training=True).weights

    assert torch.autograd.gradcheck(weights, half.weights)


def test_nan_scores_keep_ids_valid() -> None:
    mine = choice()
    mine.weights[2] = mine.logits[2] = float("nan")
    mine.scores = None
    for drop in ("probability", "batch_prioritized"):
        seats = seat(mine, Capacity(factor=0.5, drop=drop), 3, 2, training=True)
        assert ((seats.index >= 0) & (seats.index <= 3)).all() and len(kept(seats)) == 6


# -- the config --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "capacity", [None, 1.25, 0, -1.0, Capacity(rule="tutel", eval_factor=2.0, residual=True)]
)
def test_config_round_trip(capacity: Any) -> None:
    config = MoEConfig(num_experts=4, capacity=capacity)
    again = MoEConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert Capacity.of(again.capacity) == (
        Capacity(factor=capacity) if isinstance(capacity, int | float) else capacity
    )


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"factor": float("nan")}, "factor"),
        ({"factor": None}, "factor"),
        ({"eval_factor": float("inf")}, "eval_factor"),
        ({"rule": "megatro"}, "rule"),
        ({"drop": "probs"}, "drop"),
        ({"order": "k"}, "order"),
        ({"min_capacity": -1}, "min_capacity"),
        ({"align": 0}, "align"),
        ({"experts_per_worker": 0}, "experts_per_worker"),
        ({"residual": 1}, "residual"),
    ],
)
def test_bad_options(options: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        Capacity(**options)


def test_bad_capacities() -> None:
    for bad in ("1.25", True, float("inf"), [1.0]):
        with pytest.raises(ConfigError, match="capacity"):
            MoEConfig(num_experts=4, capacity=bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownOption, match="did you mean 'factor'"):
        Capacity.from_dict({"facto": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'megatron'"):
        Capacity(rule="megatro")
    router = Router(D, E, K)
    with pytest.raises(ConfigError, match="capacity_factor"):
        router(torch.randn(5, D), capacity_factor=float("nan"))


def test_what_drops_nothing() -> None:
    assert Capacity(factor=0).dropless and Capacity(factor=0, eval_factor=0).dropless
    assert not Capacity(factor=0, eval_factor=1.0).dropless and not Capacity(factor=-1).dropless


def test_a_rule_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = CapacityRule(lambda f, t, k, e, _: 2, "token")
    monkeypatch.setitem(CAPACITY_RULES, "two_seats", rule)
    capacity = Capacity(rule="two_seats")
    config = MoEConfig(num_experts=3, capacity=capacity)
    assert MoEConfig.from_json(config.to_json()) == config
    layer = moefy.MoE(4, 8, 3, top_k=1, capacity=capacity)
    seen = []
    layer.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    layer(torch.randn(50, 4))
    assert seen[0].tokens_per_expert.max() == 2 and seen[0].capacity == 2
