"""``moefy.compat.tutel`` against Tutel's mathematics, written as GShard's einsums; its options one by one."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from moefy.compat import tutel
from moefy.errors import ConfigError, MoefyError, ParallelismNeeded, ShapeError, UnknownOption

D, H, E, T = 6, 5, 4, 10
FFN = {"type": "ffn", "num_experts_per_device": E, "hidden_size_per_expert": H}


def layer(gate: Any = None, experts: dict[str, Any] | None = None, **options: Any) -> tutel.MOELayer:
    torch.manual_seed(0)
    gate = {"type": "top", "k": 2} if gate is None else gate
    return tutel.moe_layer(gate_type=gate, model_dim=D, experts={**FFN, **(experts or {})}, **options)


class Reference:
    """Tutel's layer from its description, with the parameters of ``layer`` copied."""

    def __init__(self, layer: tutel.MOELayer, **options: Any) -> None:
        self.p = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
        self.o: dict[str, Any] = {
            "k": 2, "factor": 1.0, "align": 1, "bpr": False, "normalize": True, "post": True, "noise": 0.0,
            "gshard": True, **options,
        }  # fmt: skip

    def experts(self, rows: Tensor) -> Tensor:
        if "experts.W_fc1" in self.p:
            w1, w2 = (self.p[f"experts.W_fc{i}"].view(E, D, H) for i in (1, 2))
            w3 = self.p["experts.W_fc3"].view(E, H, D)
            gate, up = (torch.einsum("ecd,edh->ech", rows, w) for w in (w1, w2))
            return torch.einsum("ech,ehd->ecd", gate / (1 + torch.exp(-gate)) * up, w3)
        up, down = self.p["experts.batched_fc1_w"], self.p["experts.batched_fc2_w"]
        hidden = torch.einsum("ecd,ehd->ech", rows, up) + self.p["experts.batched_fc1_bias"][:, None]
        y = torch.einsum("ech,ehd->ecd", hidden.clamp(min=0), down)
        return y + self.p["experts.batched_fc2_bias"][:, None]

    def logits(self, x: Tensor) -> Tensor:
        if "gates.0.wg.weight" in self.p:
            return x @ self.p["gates.0.wg.weight"].t()
        projected = (
            x @ self.p["gates.0.cosine_projector.weight"].t() + self.p["gates.0.cosine_projector.bias"]
        )
        columns = self.p["gates.0.sim_matrix"]
        cosine = (projected / projected.norm(dim=1, keepdim=True)) @ (columns / columns.norm(dim=0))
        return cosine * torch.exp(self.p["gates.0.temperature"].clamp(max=math.log(100)))

    def capacity(self, chosen: list[list[int]], places: list[list[int]], order: list[int]) -> int:
        k, factor = self.o["k"], self.o["factor"]
        limit = k * int(abs(factor) * math.ceil(len(chosen) / E))
        if factor > 0:
            size = limit
        else:
            need = max(p for row in places for p in row) + 1
            if self.o["bpr"]:  # the last token's row of the table of places
                earlier = [sum(row[j] == e for row in chosen for j in range(k - 1)) for e in range(E)]
                last = [earlier[e] if chosen[-1][-1] != e else places[-1][-1] for e in range(E)]
                need = max(last) + 1
            size = need if factor == 0 else min(need, limit)
        return math.ceil(size / self.o["align"]) * self.o["align"]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        noise = self.o["noise"]
        noisy = logits + noise * torch.randn_like(logits) / E if noise else logits
        scores = torch.exp(noisy) / torch.exp(noisy).sum(1, keepdim=True)
        chosen = best_first(scores, self.o["k"])
        weights = pick(scores, chosen)
        if self.o["normalize"] and self.o["k"] > 1:
            weights = weights / weights.sum(1, keepdim=True)
        order = list(range(len(chosen)))
        if self.o["bpr"]:
            order.sort(key=lambda t: -max(scores.tolist()[t]))
        places = seats_in_order(chosen, order, by_choice=True)
        capacity = self.capacity(chosen, places, order)
        y = routed(x, weights, chosen, places, capacity, E, self.experts, pre_score=not self.o["post"])
        if self.o["gshard"]:
            return y, E * (shares(chosen, E) * scores.sum(0) / len(chosen)).sum()
        clean = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        threshold = pick(noisy, chosen)[:, -1:]
        load = normal_cdf((clean - threshold) / (noise / E)).sum(0)
        return y, (squared_variation(clean.sum(0)) + squared_variation(load)) / 2


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "top2": ({}, {}),
    "top1": ({"gate": {"type": "top", "k": 1}}, {"k": 1}),
    "old_name": ({"gate": "Top2Gate"}, {}),
    "unnormalised": ({"normalize_gate": False}, {"normalize": False}),
    "pre_score": ({"is_postscore": False}, {"post": False}),
    "narrow": ({"gate": {"type": "top", "k": 2, "capacity_factor": 0.9}}, {"factor": 0.9}),
    "no_drop": ({"gate": {"type": "top", "k": 2, "capacity_factor": 0.0}}, {"factor": 0}),
    "capped_need": ({"gate": {"type": "top", "k": 2, "capacity_factor": -0.5}}, {"factor": -0.5}),
    "overlap": ({"gate": {"type": "top", "capacity_factor": 0.4}, "a2a_ffn_overlap_degree": 3},
                {"k": 1, "factor": 0.4, "align": 3}),
    "priority": ({"gate": {"type": "top", "k": 2, "capacity_factor": 0.7}, "batch_prioritized_routing": True},
                 {"factor": 0.7, "bpr": True}),
    "priority_undercount": ({"gate": {"type": "top", "k": 2, "capacity_factor": 0.0},
                             "batch_prioritized_routing": True}, {"factor": 0, "bpr": True}),
    "noise": ({"gate": {"type": "top", "k": 2, "gate_noise": 1.0}}, {"noise": 1.0}),
    "load_importance": ({"gate": {"type": "top", "k": 2, "gate_noise": 1.0}, "is_gshard_loss": False},
                        {"noise": 1.0, "gshard": False}),
    "cosine": ({"gate": {"type": "cosine_top", "k": 2, "proj_dim": 5}}, {}),
    "llama": ({"experts": {"type": "llama_ffn"}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_steps(name: str) -> None:
    options, mathematics = CASES[name]
    moe = layer(**copy.deepcopy(options))
    if name == "llama":  # its initial outputs are too small to learn from
        with torch.no_grad():
            for parameter in moe.experts.parameters():
                parameter.mul_(60)
    reference = Reference(moe, **mathematics)
    torch.manual_seed(1)
    batches, target = torch.randn(3, T, D), torch.randn(T, D)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        y = moe(x)
        assert y.l_aux is moe.l_aux
        return y, y.l_aux

    got = train(forward, moe.parameters(), batches, target)
    expected = train(reference, reference.p.values(), batches, target)
    assert_same_run(got, expected)
    for name, value in moe.named_parameters():
        assert (value - reference.p[name]).abs().max() < 5e-4, name


def test_the_undercount_drops_what_the_trap_switched_off_keeps() -> None:
    gate = {"type": "top", "k": 1, "capacity_factor": 0.0}
    options: dict[str, Any] = {"gate": gate, "batch_prioritized_routing": True}
    x = torch.randn(64, D)
    trapped, sound, plain = layer(**options), layer(**options, traps=()), layer(gate)
    assert torch.allclose(sound(x), plain(x), atol=1e-6)
    dropped = (trapped(x) == 0).all(1)
    assert dropped.any() and torch.allclose(trapped(x)[~dropped], plain(x)[~dropped], atol=1e-6)


def test_zero_is_falsy_for_a_call() -> None:
    gate = {"type": "top", "k": 1, "capacity_factor": 0.25}
    x = torch.ones(8, D)  # all to one expert, which has int(0.25 * 2) = 0 seats
    trapped, sound = layer(gate), layer(gate, traps={"batch_priority_need"})
    assert not trapped(x).any() and not trapped(x, capacity_factor=0).any()
    assert sound(x, capacity_factor=0).any(1).all()
    assert trapped(x, capacity_factor=4.0).any(1).all()


def test_the_load_loss_in_one_unit() -> None:
    options: dict[str, Any] = {"gate": {"type": "top", "k": 2, "gate_noise": 1.0}, "is_gshard_loss": False}
    sound, x = layer(**options, traps=()), torch.randn(T, D)
    torch.manual_seed(3)
    loss = sound(x).l_aux
    torch.manual_seed(3)
    logits = x @ sound.gates[0].wg.weight.t()
    noisy = logits + torch.randn_like(logits) / E
    threshold = noisy.sort(dim=1, descending=True).values[:, 1:2]
    load = normal_cdf((logits - threshold) * E).sum(0)
    expected = (squared_variation(torch.softmax(logits, 1).sum(0)) + squared_variation(load)) / 2
    assert abs(float(loss - expected)) < 1e-5
    with pytest.raises(ConfigError, match="gate_noise"):
        layer(is_gshard_loss=False)(x)


def test_what_a_call_leaves_behind() -> None:
    moe, x = layer({"type": "top", "k": 1, "capacity_factor": 0.4}), torch.ones(T, D)
    assert int(moe(x).any(1).sum()) == 1
    assert int(moe(x, a2a_ffn_overlap_degree=4).any(1).sum()) == 4
    assert int(moe(x).any(1).sum()) == 4  # it stays
    moe(x, top_k=2, capacity_factor=2.0, adaptive_r=0)
    assert (moe.gates[0].top_k, moe.gates[0].capacity_factor, moe.adaptive_degree) == (1, 0.4, 0)
    with torch.no_grad():
        assert int(moe(x, a2a_ffn_overlap_degree=1, megablocks_size=3).any(1).sum()) == 3


def test_noise_is_for_training() -> None:
    moe = layer({"type": "top", "k": 1, "gate_noise": 5.0}).eval()
    x = torch.randn(T, D)
    state = torch.get_rng_state()
    assert torch.equal(moe(x), moe(x)) and torch.equal(torch.get_rng_state(), state)


def test_several_gates() -> None:
    kinds = [{"type": "top", "k": 1}, {"type": "cosine_top", "k": 2, "capacity_factor": 3.0}]
    moe, x = layer(kinds), torch.randn(T, D)
    assert kinds[0]["type"] == "top"  # left as it was
    assert [g.capacity_factor for g in moe.gates] == [1.0, 3.0]
    single = layer(kinds[1])
    single.load_state_dict(
        {n.replace("gates.1", "gates.0"): v for n, v in moe.state_dict().items() if "gates.0" not in n}
    )
    assert torch.equal(moe(x, gate_index=1), single(x))


class OwnGate(nn.Module):
    def __init__(self, model_dim: int, num_global_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k, self.wg = top_k, nn.Linear(model_dim, num_global_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.wg(x)


class OwnExperts(nn.Module):
    def __init__(self, model_dim: int, num_experts_per_device: int, sharded_count: int, power: int) -> None:
        super().__init__()
        self.power = power
        self.weight = nn.Parameter(torch.randn(num_experts_per_device, model_dim // 2, 3))

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        assert ctx.num_local_experts == E and x.shape[2:] == (2, 3)
        return torch.einsum("ecmd,eod->ecmo", x**self.power, self.weight)


def test_own_gate_and_experts_and_reserved_axes() -> None:
    gate = {"type": "custom", "module": OwnGate, "top_k": 1}
    own = {"type": "custom", "module": OwnExperts, "num_experts_per_device": E, "power": 2}
    moe = tutel.moe_layer(gate_type=gate, model_dim=D, experts=own)
    x = torch.randn(2, 5, 2, 3)
    y = moe(x, reserve_dims=2, capacity_factor=4.0)
    assert y.shape == (2, 5, 2, 3)
    flat = x.reshape(10, D)
    scores = torch.softmax(moe.gates[0].wg(flat), 1)
    best = scores.argmax(1)
    expected = torch.stack(
        [scores[t, e] * (x.view(10, 2, 3)[t] ** 2 @ moe.experts.weight[e].t()) for t, e in enumerate(best)]
    )
    assert torch.allclose(y.view(10, 2, 3), expected, atol=1e-6)


def test_ffn_options() -> None:
    class Scaled(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return 2 * h

    bare = layer(
        experts={"has_fc1_bias": False, "has_fc2_bias": False, "output_dim": 3, "activation_fn": Scaled()}
    )
    assert bare(torch.randn(T, D)).shape == (T, 3)
    assert [n for n, _ in bare.get_parameter_iterator("local_experts")] == ["batched_fc1_w", "batched_fc2_w"]
    selfish = layer(experts={"activation_fn_with_self": lambda h, own: h * own.batched_fc1_w.shape[1]})
    x = torch.randn(T, D)
    hidden = x @ selfish.experts.batched_fc1_w[0].t() * H
    only = selfish.experts(x.expand(E, T, D), selfish)[0]
    assert torch.allclose(only, hidden @ selfish.experts.batched_fc2_w[0], atol=1e-5)
    with pytest.raises(ConfigError, match="activation_fn"):
        layer(experts={"activation_fn": F.relu, "activation_fn_with_self": lambda h, own: h})


def test_seeds_tags_and_iterators() -> None:
    seen: list[str] = []
    scan = lambda name, parameter: (seen.append(name), setattr(parameter, "skip_allreduce", True))  # noqa: E731
    first, second = (layer(seeds=(1, 2, 3), scan_expert_func=scan) for _ in range(2))
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(1)
    assert torch.equal(first.gates[0].wg.weight, nn.Linear(D, E, bias=False).weight)
    torch.manual_seed(2)
    draw = torch.rand(H, D)
    assert torch.allclose(first.experts.batched_fc1_w[0], (2 * draw - 1) / D**0.5)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p._tutel_expert and p.skip_allreduce for p in first.experts.parameters())
    assert len(seen) == 8 and [n for n, _ in first.get_parameter_iterator("gate")] == ["0.wg.weight"]
    with pytest.raises(ConfigError, match="param_type"):
        first.get_parameter_iterator("all")


def test_result_func_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(T, D)
    assert layer(result_func=lambda y: (y, y.l_aux))(x)[1].dim() == 0
    monkeypatch.setenv("CAP_FACTOR", "2.5")
    monkeypatch.setenv("BATCH_PRIO", "1")
    moe = layer()
    assert moe.gates[0].capacity_factor == 2.5 and moe.batch_prioritized_routing
    monkeypatch.setenv("SKIP_MOE", "1")
    assert torch.equal(layer()(x), x)


def test_functional_pieces() -> None:
    scores, x = torch.softmax(torch.randn(T, E), 1), torch.randn(T, D, requires_grad=True)
    crit, loss = tutel.top_k_routing(scores, 2, capacity_factor=0.7, loss_fn=None)
    assert loss is None and crit[0] == E and crit[4] == 2 * int(0.7 * 3)
    chosen = best_first(scores, 2)
    places = seats_in_order(chosen, list(range(T)), by_choice=True)
    assert torch.stack(crit[1], 1).tolist() == chosen and torch.stack(crit[2], 1).tolist() == places
    ids, counts = tutel.get_topk_selection(crit)
    assert ids.tolist() == chosen
    assert counts.tolist() == [sum(row.count(e) for row in chosen) for e in range(E)]
    weights = pick(scores, chosen)
    weights = weights / weights.sum(1, keepdim=True)
    for post in (True, False):
        buffers = tutel.fast_encode(x, crit, post)
        assert buffers.shape == (E, crit[4], D)
        y = tutel.fast_decode(buffers * 3, crit, post)
        expected = routed(x, weights, chosen, places, crit[4], E, lambda r: 3 * r, pre_score=not post)
        assert torch.allclose(y, expected, atol=1e-6)
        probe = torch.randn(T, D)
        got, wanted = (torch.autograd.grad((v * probe).sum(), x, retain_graph=True)[0] for v in (y, expected))
        assert torch.allclose(got, wanted, atol=1e-6)
    assert tutel.fast_cumsum_sub_one(torch.tensor([[1, 0], [1, 1]])).tolist() == [[0, -1], [1, 0]]


def test_copies_compile_autocast_and_no_tokens() -> None:
    moe, x = layer(), torch.randn(2, 5, D)
    y = moe(x)
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert torch.equal(copied(x), y)
    compiled = torch.compile(moe, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), y, atol=1e-6) and torch.allclose(compiled(x).l_aux, y.l_aux)
    with torch.autocast("cpu", torch.bfloat16):
        half = moe(x)
    assert half.dtype == torch.float32 and (half - y).norm() < 3e-2 * y.norm()
    assert moe(torch.randn(0, D)).shape == (0, D)


def test_checkpoints() -> None:
    moe, x = layer(), torch.randn(T, D)
    other = layer({"type": "top", "k": 2}, seeds=(5, 6, 7))
    legacy = {n: v for n, v in moe.state_dict().items() if n != "_num_global_experts"}
    legacy["experts.batched_fc1_bias"] = legacy["experts.batched_fc1_bias"].view(E, 1, H)
    other.load_state_dict(legacy)
    assert torch.equal(other(x), moe(x))
    del legacy["experts.batched_fc2_w"]
    with pytest.raises(RuntimeError, match="batched_fc2_w"):
        other.load_state_dict(legacy)
    with pytest.raises(ConfigError, match="num_global_experts"):
        layer(experts={"num_experts_per_device": 2}).load_state_dict(moe.state_dict())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"unknown": 1}, UnknownOption),
        ({"traps": {"trap_6"}}, UnknownOption),
        ({"gate": {"type": "top", "temperature": 1}}, UnknownOption),
        ({"gate": {"type": "tops"}}, ConfigError),
        ({"gate": "BestGate"}, ConfigError),
        ({"experts": {"type": "mlp"}}, ConfigError),
        ({"experts": {"num_experts_per_device": -2}}, ParallelismNeeded),
        ({"experts": {"num_experts_per_device": 0}}, ConfigError),
    ],
)
def test_errors(options: dict[str, Any], error: type[MoefyError]) -> None:
    with pytest.raises(error):
        layer(**options)


def test_errors_of_shapes() -> None:
    with pytest.raises(ConfigError, match="even"):
        tutel.moe_layer(gate_type={"type": "top"}, model_dim=5, experts=FFN)
    with pytest.raises(ShapeError, match="model_dim"):
        layer()(torch.randn(T, D + 1))
    with pytest.raises(ConfigError, match="adaptive_r"):
        layer()(torch.randn(T, D), adaptive_r=2)
    with pytest.warns(UserWarning, match="pad_samples"):
        layer(pad_samples=True)
    count = tutel.moe_layer(gate_type={"type": "top"}, model_dim=D, experts={**FFN, "count_per_node": 3})
    assert count.num_global_experts == 3 == int(count.state_dict()["_num_global_experts"])
