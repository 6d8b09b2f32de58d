"""``moefy.compat.fastmoe`` against FastMoE's mathematics, written as GShard's einsums; its options one by one."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefy
from compat.steps import (
    assert_same_run,
    best_first,
    normal_cdf,
    pick,
    routed,
    seats_in_order,
    shares,
    squared_variation,
    train,
)
from moefy.compat import fastmoe
from moefy.compat.fastmoe import balance, gates
from moefy.compat.fastmoe.layers import Expert
from moefy.errors import ConfigError, MoefyError, ParallelismNeeded, UnknownOption

D, H, E, S = 6, 5, 4, 10


def mlp(gate: Any = fastmoe.NaiveGate, **options: Any) -> fastmoe.FMoETransformerMLP:
    torch.manual_seed(0)
    layer = fastmoe.FMoETransformerMLP(num_expert=E, d_model=D, d_hidden=H, gate=gate, **options)
    with torch.no_grad():  # so that experts matter from the start
        for expert in layer.experts:
            expert.htoh4.weight.mul_(4), expert.h4toh.weight.mul_(4)
    return layer


class Reference:
    """FastMoE's layer from its description, with the parameters of ``layer`` copied."""

    def __init__(self, layer: fastmoe.FMoETransformerMLP, kind: str, top_k: int) -> None:
        self.p = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
        self.kind, self.top_k, self.training = kind, top_k, True

    def experts(self, rows: Tensor) -> Tensor:
        outputs = []
        for e in range(E):
            part = {n.split(".", 2)[2]: v[0] for n, v in self.p.items() if n.startswith(f"experts.{e}.")}
            hidden = rows[e] @ part["htoh4.weight"].t() + part["htoh4.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            outputs.append(hidden @ part["h4toh.weight"].t() + part["h4toh.bias"])
        return torch.stack(outputs)

    def linear(self, x: Tensor) -> Tensor:
        return x @ self.p["gate.gate.weight"].t() + self.p["gate.gate.bias"]

    def naive(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        logits = self.linear(x)
        chosen = best_first(logits, self.top_k)
        return torch.softmax(pick(logits, chosen), 1), chosen, torch.zeros(())

    def noisy(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        clean = x @ self.p["gate.w_gate"]
        std = torch.log(1 + torch.exp(x @ self.p["gate.w_noise"])) + 0.01
        noisy = clean + torch.randn_like(clean) * std
        chosen = best_first(noisy, self.top_k)
        weights = torch.softmax(pick(noisy, chosen), 1)
        ranked = best_first(noisy, self.top_k + 1)
        last, first_out = noisy.gather(1, torch.tensor(ranked))[:, -2:].unbind(1)
        importance, load = [], []
        for e in range(E):
            mine = [(t, row.index(e)) for t, row in enumerate(chosen) if e in row]
            importance.append(sum((weights[t, k] for t, k in mine), torch.zeros(())))
            inside = torch.tensor([e in row for row in chosen])
            threshold = torch.where(inside, first_out, last)
            load.append(normal_cdf((clean[:, e] - threshold) / std[:, e]).sum())
        loss = squared_variation(torch.stack(importance)) + squared_variation(torch.stack(load))
        return weights, chosen, loss

    def second_at_random(self, x: Tensor, capacity: int) -> tuple[Tensor, list[list[int]], Tensor]:
        logits = self.linear(x)
        chosen = best_first(logits, 2)
        weights = torch.softmax(pick(logits, chosen), 1)
        loss = (shares(chosen, E) * torch.softmax(logits, 1).mean(0)).mean() * E**2
        places = seats_in_order(chosen, list(range(S)), by_choice=False)
        lots = torch.rand(S)
        kept = [
            [e if places[t][k] < capacity else -1 for k, e in enumerate(row)] for t, row in enumerate(chosen)
        ]
        kept = [[row[0], -1 if 2 * weights[t, 1] < lots[t] else row[1]] for t, row in enumerate(kept)]
        return weights, kept, loss

    def gshard(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        return self.second_at_random(x, math.floor(math.ceil(1.2 * S) * 2 / E))

    def dc(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        return self.second_at_random(x, math.ceil(1.2 * S))

    def switch(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        logits = self.linear(x)
        logits = logits + torch.rand_like(logits) * 0.2 + 0.9
        scores = torch.softmax(logits, 1)
        chosen = best_first(scores, 1)
        places = seats_in_order(chosen, list(range(S)), by_choice=False)
        capacity = math.ceil(1.2 * S / E)
        kept = [
            [e if p < capacity else -1 for e, p in zip(r, q, strict=True)]
            for r, q in zip(chosen, places, strict=True)
        ]
        seated = sum(row[0] >= 0 for row in kept)
        loss = E * (shares(kept, E) * S / seated * scores.sum(0) / seated).sum()
        return pick(scores, chosen), kept, loss

    def zero(self, x: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        return torch.full((S, 2), 0.5), [[0, 0]] * S, torch.zeros(())

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen, loss = getattr(self, self.kind)(x)
        free = [[max(e, 0) for e in row] for row in chosen]
        places = seats_in_order(free, list(range(S)), by_choice=True)
        return routed(x, weights, chosen, places, 2 * S, E, self.experts), loss


CASES: dict[str, tuple[Any, int]] = {
    "naive": (fastmoe.NaiveGate, 2),
    "noisy": (fastmoe.NoisyGate, 2),
    "gshard": (fastmoe.GShardGate, 2),
    "dc": (fastmoe.DCGate, 2),
    "switch": (fastmoe.SwitchGate, 1),
    "zero": (fastmoe.ZeroGate, 2),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_hundred_steps(kind: str) -> None:
    gate, top_k = CASES[kind]
    layer = mlp(gate, top_k=top_k)
    reference = Reference(layer, kind, top_k)
    torch.manual_seed(1)
    batches, target = torch.randn(3, S, D), torch.randn(S, D)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = layer(x)
        loss = layer.gate.get_loss()
        assert not layer.gate.has_loss
        return y, torch.zeros(()) if loss is None else loss.sum()

    got = train(forward, layer.parameters(), batches, target)
    expected = train(reference, reference.p.values(), batches, target)
    assert_same_run(got, expected)
    for name, value in layer.named_parameters():
        assert (value - reference.p[name]).abs().max() < 5e-4, name


@pytest.mark.parametrize("gate", [fastmoe.SwipeGate, fastmoe.gen_faster_gate(3)])
def test_gates_that_are_plain_on_one_worker(gate: Any) -> None:
    plain, layer, x = mlp(), mlp(gate), torch.randn(S, D)
    layer.load_state_dict(plain.state_dict())
    assert torch.allclose(layer(x), plain(x), atol=1e-6)
    assert torch.allclose(layer.eval()(x), plain(x), atol=1e-6)


def test_the_scale_of_the_balance_loss() -> None:
    """On W workers of E/W experts it is the usual loss over W squared, unless the trap is off."""
    x = torch.randn(S, D)
    for gate_class in (fastmoe.GShardGate, fastmoe.FasterGate):
        losses = []
        for num_expert, world_size, traps in ((8, 1, gates.TRAPS), (2, 4, gates.TRAPS), (2, 4, ())):
            torch.manual_seed(0)
            gate = gate_class(
                D, num_expert, world_size, *([2] if gate_class is fastmoe.GShardGate else [0]), traps=traps
            )
            gate(x)
            losses.append(gate.get_loss().item())
        assert losses[0] == pytest.approx(losses[2], rel=1e-5) == pytest.approx(16 * losses[1], rel=1e-5)


def test_capacity_rates() -> None:
    x = torch.ones(20, D)  # all to one pair of experts
    gate = fastmoe.GShardGate(D, E, 1, capacity=(0.5, 1.0), random_routing=False)
    assert [int((gate(x)[0][:, 0] >= 0).sum()), int((gate.eval()(x)[0][:, 0] >= 0).sum())] == [5, 10]
    dc = fastmoe.DCGate(D, E, 1, capacity=(0.5, 1.0), random_routing=False)
    assert int((dc(x)[0][:, 1] >= 0).sum()) == 10
    switch = fastmoe.SwitchGate(D, E, 1, capacity=(0.5, 1.0), switch_eps=0.0)
    assert int((switch(x)[0] >= 0).sum()) == 3


def test_noise_of_the_switch_gate() -> None:
    x = torch.randn(S, D)
    additive, product = (fastmoe.SwitchGate(D, E, 1, switch_eps=0.3, traps=t) for t in (gates.TRAPS, ()))
    product.load_state_dict(additive.state_dict())
    torch.manual_seed(4)
    got = product(x)[1]
    torch.manual_seed(4)
    scores = torch.softmax(product.gate(x * (torch.rand_like(x) * 0.6 + 0.7)), 1)
    assert torch.allclose(got[:, 0], scores.max(1).values, atol=1e-6)
    assert not torch.allclose(additive(x)[1], got, atol=1e-3)
    assert torch.equal(additive.eval()(x)[1], product.eval()(x)[1])


def test_the_noisy_gate_in_evaluation() -> None:
    gate, x = fastmoe.NoisyGate(D, E, 1).eval(), torch.randn(S, D)
    state = torch.get_rng_state()
    index, scores = gate(x)
    assert torch.equal(torch.get_rng_state(), state)
    chosen = best_first(x @ gate.w_gate, 2)
    assert index.view(S, 2).tolist() == chosen
    weights = torch.softmax(pick(x @ gate.w_gate, chosen), 1)
    assert torch.allclose(scores[:, 0], weights, atol=1e-6)
    sums, counts = torch.zeros(E), torch.zeros(E)
    for row, values in zip(chosen, weights.tolist(), strict=True):
        for e, value in zip(row, values, strict=True):
            sums[e] += value
            counts[e] += 1
    assert torch.allclose(gate.get_loss(), squared_variation(sums) + squared_variation(counts), rtol=1e-4)


def test_the_topology_gate_keeps_tokens_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMOE_TOPO_GPUS_PER_NODE", "2")
    monkeypatch.setenv("FMOE_TOPO_OUTGOING_FRACTION", "0.25")
    gate = fastmoe.gen_faster_gate(3)(D, 2, 4)  # node 1 of two: experts 4 to 7
    x = torch.randn(40, D)
    logits = gate.gate(x)
    index, scores = gate(x)
    away = [t for t, row in enumerate(index.tolist()) if min(row) < 4]
    wishes = sorted(
        (t for t in range(40) if int(logits[t].argmax()) < 4),
        key=lambda t: -logits.tolist()[t][int(logits[t].argmax())],
    )
    assert len(wishes) > 10 and sorted(away) == sorted(wishes[:10])
    assert all(int(index[t, 1]) == int(logits[t].argmax()) for t in away)
    assert torch.allclose(scores, torch.softmax(logits.gather(1, index), 1), atol=1e-6)


def test_mask_and_replacement_rows() -> None:
    layer, x = mlp(), torch.randn(2, 3, D)
    plain = layer(x)
    layer.mask = torch.tensor([[0, 1, 0], [2, 0, 3]])
    row = torch.randn(D)
    layer.mask_dict = {1: row, 2: 0.5}
    expected = plain.detach().clone()
    expected[0, 1], expected[1, 0], expected[1, 2] = row, 0.5, 0.0
    assert torch.allclose(layer(x), expected, atol=1e-6)
    # A switch gate's score is below 1, and so is a replaced row.
    switch = mlp(fastmoe.SwitchGate, top_k=1, mask=torch.tensor([1] * S), mask_dict={1: row}).eval()
    x = torch.randn(S, D)
    scores = torch.softmax(switch.gate.gate(x), 1).max(1).values
    assert torch.allclose(switch(x), scores[:, None] * row, atol=1e-6)


def test_gate_hook_bias_and_rows() -> None:
    seen: list[tuple[Any, ...]] = []
    layer, x = mlp(gate_hook=lambda *args: seen.append(args), gate_bias=False), torch.randn(2, 5, D)
    assert layer.gate.gate.bias is None and layer(x).shape == x.shape
    [(ids, scores, context)] = seen
    assert ids.shape == scores.shape == (10, 2) and context is None
    assert layer(torch.randn(0, D)).shape == (0, D)


class OwnExpert(nn.Module):
    def __init__(self, d_model: int, hidden: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d_model, hidden), nn.Linear(hidden, d_model)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        assert count.tolist() == [x.shape[0]]
        return self.down(self.up(x).relu())


def test_own_experts_single_listed_and_fused() -> None:
    listed = [OwnExpert, lambda d: OwnExpert(d, 7), lambda d: OwnExpert(d, 1)]
    layer, x = fastmoe.FMoE(num_expert=99, d_model=D, expert=listed), torch.randn(S, D)
    assert layer.num_expert == 3 and layer.gate.gate.out_features == 3
    ids, weights = layer.gate(x)
    single = lambda e, row: layer.experts[e](row[None], torch.tensor([1]))[0]  # noqa: E731
    expected = torch.stack(
        [
            sum(weights[t, k] * single(e, x[t]) for k, e in enumerate(row))
            for t, row in enumerate(ids.tolist())
        ]
    )
    assert torch.allclose(layer(x), expected, atol=1e-6)
    layer(x[:1]).sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())

    class Fused(fastmoe.FMoE):
        def __init__(self) -> None:
            super().__init__(num_expert=E, d_model=D)
            self.experts = Expert(E, D, H, nn.ReLU())
            self.mark_parallel_comm("dp")

    fused, apart = Fused(), mlp(activation=nn.ReLU())
    with torch.no_grad():
        apart.gate.load_state_dict(fused.gate.state_dict())
        for name, value in fused.experts.named_parameters():
            for e in range(E):
                apart.experts[e].get_parameter(name).copy_(value[e : e + 1])
    assert torch.allclose(fused(x), apart(x), atol=1e-6)
    assert {p.dp_comm for p in fused.experts.parameters()} == {"dp"}
    assert {p.dp_comm for p in apart.experts.parameters()} == {"none"}
    assert {p.dp_comm for p in apart.gate.parameters()} == {"gate"}


def test_trees() -> None:
    class PairGate(fastmoe.NaiveGate):
        def forward(self, inp: Any, return_all_scores: bool = False) -> Any:
            return super().forward(inp["x"], return_all_scores)

    class PairExpert(OwnExpert):
        def forward(self, tree: Any, count: Tensor) -> Any:
            return [super().forward(tree["x"], count), super().forward(tree["y"], count)]

    layer = fastmoe.FMoE(num_expert=E, d_model=D, gate=PairGate, expert=PairExpert)
    x, y = torch.randn(S, D), torch.randn(S, D)
    got = layer({"x": x, "y": y})
    ids, weights = layer.gate({"x": x})
    for values, out in ((x, got[0]), (y, got[1])):
        rows = [
            sum(
                weights[t, k] * layer.experts[e].down(layer.experts[e].up(values[t]).relu())
                for k, e in enumerate(row)
            )
            for t, row in enumerate(ids.tolist())
        ]
        assert torch.allclose(out, torch.stack(rows), atol=1e-6)


def test_linear_draws_over_the_whole_stack() -> None:
    torch.manual_seed(0)
    linear = fastmoe.FMoELinear(3, 40, 50)
    bound = 1 / math.sqrt(40 * 50)
    assert 0.99 * bound < linear.weight.abs().max() < bound and not linear.bias.any()
    rows = linear(torch.randn(5, 40), torch.tensor([2, 0, 2]))
    assert rows.shape == (5, 50) and not rows[4].any()


def test_copies_autocast_and_losses() -> None:
    layer, x = mlp(fastmoe.GShardGate), torch.randn(S, D)
    y = layer.eval()(x)
    for gate in (copy.deepcopy(layer).gate, pickle.loads(pickle.dumps(layer.gate))):
        assert not gate.has_loss and torch.equal(gate.gate.weight, layer.gate.gate.weight)
    assert layer.gate.get_loss(clear=False) is not None and layer.gate.has_loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        half = mlp()(x)
    assert half.dtype == torch.bfloat16 and (half.float() - mlp()(x)).norm() < 5e-2 * y.norm()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"world_size": 2}, ParallelismNeeded),
        ({"gate": fastmoe.GShardGate, "top_k": 1}, ConfigError),
        ({"gate": fastmoe.SwitchGate}, ConfigError),
        ({"gate": lambda *args: fastmoe.NaiveGate(*args[:2], 1, 2, nope=1)}, TypeError),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        mlp(**options)


def test_errors_of_gates() -> None:
    for gate in (fastmoe.SwitchGate, fastmoe.DCGate, fastmoe.SwipeGate):
        with pytest.raises(ParallelismNeeded, match=r"moefy\.parallelize"):
            gate(D, E, 2)
    with pytest.raises(UnknownOption):
        fastmoe.GShardGate(D, E, 1, traps=("trap_2",))
    with pytest.raises(ConfigError):
        fastmoe.FMoE(num_expert=E, d_model=D).expert_fn_single(torch.randn(1, D), torch.tensor([1]), 0)
    with pytest.warns(DeprecationWarning, match="mp_group"):
        fastmoe.FMoE(num_expert=E, d_model=D, mp_group=OneProcess())


class OneProcess:
    def size(self) -> int:
        return 1


def test_balance_profile() -> None:
    profile: dict[str, list[Any]] = {}
    balance.reset_balance_profile(profile, 2, "gshard")
    assert profile == {name: [None, None] for name in (*balance.metrics, "gshard_loss")}
    balance.update_balance_profile(profile, torch.tensor([[0, 1], [0, -1], [0, 2]]), None, None, 1, 4)
    counts = [3.0, 1.0, 1.0, 0.0]
    deviation = (sum((c - 1.25) ** 2 for c in counts) / 3) ** 0.5
    got = [float(profile[name][1]) for name in balance.metrics]
    assert got == pytest.approx([deviation / 1.25, 4.0, 3 / 1.25])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize(
    ("options", "router", "top_k", "capacity"),
    [
        ({"fmoe_num_experts": 4}, "Router", 2, None),
        ({"num_experts": 4, "top_k": 3}, "Router", 3, None),
        ({"num_experts": 4, "gate": "gshard"}, "GShardRouter", 2, "fastmoe_gshard"),
        ({"num_experts": 4, "gate": fastmoe.SwitchGate}, "SwitchRouter", 1, "fastmoe_switch"),
        ({"num_experts": 4, "gate": "noisy"}, "NoisyTopKRouter", 2, None),
        ({"num_experts": 4, "gate": moefy.RouterSpec("sigmoid")}, "SigmoidTopK", 2, None),
    ],
)
def test_fmoefy(options: Any, router: str, top_k: int, capacity: str | None) -> None:
    x, model = torch.randn(3, 8), Block()
    dense = model(x)
    assert fastmoe.fmoefy(model, example_args=(x,), **options) is model
    [made] = [m for m in model.modules() if isinstance(m, moefy.nn.Router)]
    assert type(made).__name__ == router
    assert (made.num_experts, made.top_k) == (4, top_k)
    assert (made.capacity.rule if made.capacity else None) == capacity
    if router == "Router":
        assert torch.allclose(model(x), dense, atol=1e-5)
    assert {p.dp_comm for p in made.parameters()} == {"gate"}
    assert {model.fc1.weight.dp_comm, model.fc2.bias.dp_comm} == {"none"}


def test_fmoefy_replicated_and_wrong() -> None:
    model = fastmoe.fmoefy(Block(), 4, distributed_experts=False, example_args=(torch.randn(3, 8),))
    assert model.fc1.weight.dp_comm == "dp"
    wrong: list[dict[str, Any]] = [
        {},
        {"fmoe_num_experts": 2, "num_experts": 2},
        {"num_experts": 2, "hidden_hidden_size": 9},
        {"num_experts": 2, "gate": fastmoe.ZeroGate},
    ]
    for options in wrong:
        with pytest.raises(MoefyError):
            fastmoe.fmoefy(Block(), example_args=(torch.randn(3, 8),), **options)
