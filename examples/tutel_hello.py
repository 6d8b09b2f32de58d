"""Tutel's hello world on ``moefy.compat.tutel``, the same layer as a ``moefy.MoE`` beside it, and the switch sweep.

The first table trains both layers from the same weights: their losses agree at each step. The second is Tutel's
``helloworld_switch``, a sweep over settings that one layer takes per call. Tutel also sweeps adaptive r and the overlap
degree, which lay experts out over ranks. One process leaves top-k, the capacity factor, the router and batch priority.
A factor of 0 gives every expert the seats that it needs; a negative factor caps these seats.

    python examples/tutel_hello.py
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefy
from moefy.compat import tutel as tutel_moe

BATCH, TOKENS, WIDTH, HIDDEN, EXPERTS = 8, 64, 128, 256, 4
L_AUX, LR = 0.01, 0.002


class TutelHello(nn.Module):
    """The layer as a Tutel script writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = tutel_moe.moe_layer(
            gate_type={"type": "top", "k": 2, "capacity_factor": 1.25},
            model_dim=WIDTH,
            experts={"type": "ffn", "count_per_node": EXPERTS, "hidden_size_per_expert": HIDDEN},
            seeds=(1, 1, 1),
        )

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y = self.moe(x)
        return token_loss(y, label) + L_AUX * y.l_aux


class MoefyHello(nn.Module):
    """The same layer with moefy's names. The forward returns a loss, to which moefy adds the auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = moefy.MoE(
            WIDTH,
            HIDDEN,
            EXPERTS,
            top_k=2,
            activation="relu",
            router="tutel_top",
            capacity=moefy.Capacity(factor=1.25, rule="tutel"),
            aux_loss=moefy.AuxLoss(weight=L_AUX, balance="tutel_gshard"),
        )
        moefy.deliver_aux_loss(self)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return token_loss(self.moe(x), label)


def token_loss(y: Tensor, label: Tensor) -> Tensor:
    """The loss of Tutel's hello world: a token's logit, within its sequence, is the sum of its features."""
    return F.cross_entropy(y.sum(dim=2), label)


def ported(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Tutel layer's ``state_dict`` under moefy's names. Tutel's second matrix is ``[E, H, D]``."""
    return {
        "router.weight": state["gates.0.wg.weight"],
        "up_proj.weight": state["experts.batched_fc1_w"],
        "up_proj.bias": state["experts.batched_fc1_bias"],
        "down_proj.weight": state["experts.batched_fc2_w"].transpose(1, 2),
        "down_proj.bias": state["experts.batched_fc2_bias"],
    }


def hello(steps: int) -> None:
    """Train both layers from the same weights on the same data."""
    tutel, native = TutelHello(), MoefyHello()
    native.moe.load_state_dict(ported(tutel.moe.state_dict()))
    x, label = torch.randn(BATCH, TOKENS, WIDTH), torch.randint(TOKENS, (BATCH,))
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in (tutel, native)]
    print("step  moefy.compat.tutel  moefy.MoE   l_aux  ms/step")
    for step in range(steps):
        began, losses = time.perf_counter(), []
        for model, optimizer in zip((tutel, native), optimizers, strict=True):
            loss = model(x, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        took = 500 * (time.perf_counter() - began)
        print(f"{step:4d}  {losses[0]:18.5f}  {losses[1]:9.5f}  {tutel.moe.l_aux:.4f}  {took:7.1f}")
        if abs(losses[0] - losses[1]) > 1e-3:
            raise SystemExit("the two layers disagree")


def measure(layer: moefy.MoE, x: Tensor, label: Tensor, steps: int, **options: Any) -> tuple[float, float]:
    """``(loss of the last step, milliseconds per step)``."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    began, loss = time.perf_counter(), x.new_zeros(())
    for _ in range(steps):
        loss = token_loss(layer(x, **options), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), 1000 * (time.perf_counter() - began) / steps


def switch(steps: int) -> None:
    """Train every setting from the same weights. All settings but batch priority are arguments of the call."""
    routers = ["tutel_top", "cosine"]
    x, label = torch.randn(BATCH, TOKENS, WIDTH), torch.randint(TOKENS, (BATCH,))
    print("\nadaptive r and the overlap degree belong to expert parallelism; in one process there are:")
    print("router     top-k  capacity factor  drop                  loss  dropped  ms/step")
    for drop in ("position", "batch_prioritized"):
        capacity = moefy.Capacity(rule="tutel", drop=drop)
        layer = moefy.MoE(WIDTH, HIDDEN, EXPERTS, router=routers, capacity=capacity, expert_seed=0)
        start = copy.deepcopy(layer.state_dict())
        for index, top_k, factor in itertools.product(range(len(routers)), (1, 2), (1.0, 0.0, -0.5)):
            layer.load_state_dict(start)
            options = {"router_index": index, "top_k": top_k, "capacity_factor": factor}
            loss, ms = measure(layer, x, label, steps, **options)
            (load,) = moefy.expert_load(layer, reset=True).layers
            row = f"{routers[index]:9}  {top_k:5d}  {factor:15g}  {drop:17}"
            print(f"{row}  {loss:7.4f}  {load.dropped_share:7.1%}  {ms:7.1f}")
            if factor == 0 and load.dropped:
                raise SystemExit("a capacity factor of 0 dropped tokens")


def main() -> None:
    """Run hello world, then the sweep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    hello(3 if quick else 20)
    switch(2 if quick else 10)


if __name__ == "__main__":
    main()
