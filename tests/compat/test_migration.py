"""``examples/migration.md``: every argument is in it, its code runs, and the counterparts give the same numbers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moefy
from moefy import AuxLoss, Capacity, MoE, RouterSpec
from moefy.compat import fastmoe, tutel
from moefy.nn.routers import router_class

TEXT = (Path(__file__).resolve().parents[2] / "examples" / "migration.md").read_text()
D, H, E, T = 6, 5, 4, 24
# Those that the compat layers add, or that every table is about.
OWN = {"self", "traps", "kwargs", "args", "input", "options", "model", "moe_inp", "num_experts"}


@pytest.mark.parametrize(
    ("section", "callables"),
    [
        ("## Tutel", [tutel.MOELayer.__init__, tutel.MOELayer.forward]),
        ("## FastMoE", [fastmoe.FMoE.__init__, fastmoe.FMoETransformerMLP.__init__, fastmoe.fmoefy]),
    ],
)
def test_every_argument_has_its_row(section: str, callables: list[Any]) -> None:
    rows = TEXT[TEXT.index(section) :].split("\n## ")[0]
    left = " ".join(line.split("|")[1] for line in rows.splitlines() if line.startswith("| "))
    words = set(re.findall(r"\w+", left))
    names = {name for function in callables for name in inspect.signature(function).parameters} - OWN
    assert names <= words, names - words


def test_the_code_runs() -> None:
    namespace: dict[str, Any] = {"moefy": moefy}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, namespace)


def test_the_expressions_of_the_tables_exist() -> None:
    routers = re.findall(r'RouterSpec\("(\w+)"', TEXT) + re.findall(r'router="(\w+)"', TEXT)
    assert len({router_class(name) for name in routers}) > 8
    for rule in re.findall(r'rule="(\w+)"', TEXT):
        Capacity(rule=rule)
    for balance in re.findall(r'balance="(\w+)"', TEXT):
        AuxLoss(balance=balance)
    right = " ".join(line.split("|")[2] for line in TEXT.splitlines() if line.count("|") == 3)
    functions = (MoE.__init__, MoE.forward, moefy.transform)
    known = {name for function in functions for name in inspect.signature(function).parameters}
    assert set(re.findall(r"`(\w+)=", right)) <= known | {"seeds", "is_postscore"}


def native(old: tutel.MOELayer, **options: Any) -> MoE:
    """``moefy.MoE`` with the weights of a Tutel layer."""
    spec = RouterSpec("tutel_top", normalize_gate=old.normalize_gate)
    options = {"router": spec, "activation": "relu", "bias": True, "top_k": old.gates[0].top_k, **options}
    moe = MoE(D, H, E, aux_loss=AuxLoss(weight=1.0, balance="tutel_gshard", delivery="by_hand"), **options)
    with torch.no_grad():
        moe.router.weight.copy_(old.gates[0].wg.weight)
        moe.up_proj.weight.copy_(old.experts.batched_fc1_w)
        moe.down_proj.weight.copy_(old.experts.batched_fc2_w.transpose(1, 2))
        for linear in (moe.up_proj, moe.down_proj):
            linear.bias.zero_()
    return moe


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 0.0, -0.5])
@pytest.mark.parametrize(
    ("options", "counterpart"),
    [
        ({}, {}),
        ({"is_postscore": False}, {"weighting": "input"}),
        ({"batch_prioritized_routing": True}, {"drop": "batch_prioritized"}),
        ({"a2a_ffn_overlap_degree": 5}, {"align": 5}),
        ({"normalize_gate": False}, {}),
    ],
)
def test_tutel_by_moefy(top_k: int, factor: float, options: Any, counterpart: dict[str, Any]) -> None:
    gate = {"type": "top", "k": top_k, "capacity_factor": factor}
    experts = {"type": "ffn", "count_per_node": E, "hidden_size_per_expert": H}
    old = tutel.moe_layer(gate_type=gate, model_dim=D, experts=experts, traps=(), **options)
    weighting = counterpart.get("weighting", "output")
    capacity = Capacity(
        factor=factor, rule="tutel", **{k: v for k, v in counterpart.items() if k != "weighting"}
    )
    new, x = native(old, capacity=capacity, weighting=weighting), torch.randn(T, D)
    y = old(x)
    assert torch.allclose(new(x), y, atol=1e-6)
    assert torch.allclose(new.l_aux, y.l_aux, atol=1e-6)


GSHARD = Capacity(factor=1.2, eval_factor=2.4, rule="fastmoe_gshard")
SWITCH = Capacity(factor=1.2, eval_factor=2.4, rule="fastmoe_switch")


def no_lots(*args: Any, **options: Any) -> fastmoe.GShardGate:
    """Without the random second expert, which the original drops in evaluation too."""
    gate = fastmoe.GShardGate(*args, **options)
    gate.random_routing = False
    return gate


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("gate", "top_k", "router", "capacity"),
    [
        (fastmoe.NaiveGate, 2, RouterSpec("top_k", bias=True), None),
        (no_lots, 2, RouterSpec("gshard", bias=True, random_routing=False), GSHARD),
        (fastmoe.SwitchGate, 1, RouterSpec("switch", bias=True, noise="fastmoe", jitter=0.1), SWITCH),
        (fastmoe.SwipeGate, 2, RouterSpec("swipe", bias=True), None),
        (fastmoe.gen_faster_gate(0), 2, RouterSpec("topology", bias=True), None),
    ],
)
def test_fastmoe_by_moefy(
    gate: Any, top_k: int, router: RouterSpec, capacity: Capacity | None, training: bool
) -> None:
    old = fastmoe.FMoETransformerMLP(E, D, H, gate=gate, top_k=top_k).train(training)
    new = MoE(D, H, E, top_k=top_k, router=router, capacity=capacity).train(training)
    with torch.no_grad():
        new.router.weight.copy_(old.gate.gate.weight.mul_(3))
        new.router.bias.copy_(old.gate.gate.bias)
        for linear, name in ((new.up_proj, "htoh4"), (new.down_proj, "h4toh")):
            for e, expert in enumerate(old.experts):
                linear.weight[e], linear.bias[e] = (
                    getattr(expert, name).weight[0],
                    getattr(expert, name).bias[0],
                )
    assert torch.allclose(seeded(new), seeded(old), atol=1e-6)


def seeded(layer: Any) -> Tensor:
    """The output for fixed tokens and noise."""
    torch.manual_seed(0)
    x = torch.randn(T, D)
    return layer(x)
