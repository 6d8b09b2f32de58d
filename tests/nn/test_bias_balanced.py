"""The bias that balances: moved once per optimizer step by all slots since the last one, whatever the loop."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moefy
from moefy.nn.routers import make_router
from moefy.nn.routers.bias_balanced import BiasBalancedRouter

D, E, K, RATE = 6, 4, 2, 0.25


def make(**options: Any) -> BiasBalancedRouter:
    router = make_router(moefy.RouterSpec("bias_balanced", rate=RATE, std=1.0, **options), D, E, K)
    assert isinstance(router, BiasBalancedRouter)
    return router


def counts(index: Tensor) -> list[int]:
    return [int((index == e).sum()) for e in range(E)]


def step_by_hand(n: list[int]) -> list[float]:
    mean = sum(n) / E
    return [RATE * ((mean > c) - (mean < c)) for c in n]


def test_one_step_by_hand() -> None:
    router = make()
    x = torch.randn(9, D)
    n = counts(router(x).top_k_index)
    assert router.counts.tolist() == n and len(set(n)) > 1
    assert not router.expert_bias.any()
    router.update_bias()
    assert router.expert_bias.tolist() == step_by_hand(n)
    assert not router.counts.any()
    router.update_bias()  # nothing was counted: nothing moves
    assert router.expert_bias.tolist() == step_by_hand(n)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    router, x = make().eval(), torch.randn(50, D)
    router.expert_bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    routing = router(x)
    assert (routing.top_k_index[:, 0] == 0).all()
    scores = routing.router_logits.sigmoid()
    chosen = scores.gather(1, routing.top_k_index)
    assert torch.allclose(routing.top_k_weights, chosen / chosen.sum(1, keepdim=True), rtol=1e-5)
    assert not router.counts.any(), "evaluation counts nothing"


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_unchanged_loop_updates_once_per_step(micro_batches: int) -> None:
    model = nn.Sequential(
        nn.Linear(D, D), moefy.MoE(D, 8, E, router=moefy.RouterSpec("bias_balanced", rate=RATE))
    )
    router: Any = model[1].router  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = torch.zeros(E)
    for _ in range(3):
        total = torch.zeros(E)
        for x in torch.randn(8, D).chunk(micro_batches):
            total += torch.tensor(counts(router.eval()(model[0](x)).top_k_index))
            model.train()
            model(x).square().mean().backward()
        assert router.counts.tolist() == total.tolist()
        optimizer.step()
        optimizer.zero_grad()
        expected += torch.tensor(step_by_hand(total.int().tolist()))
        assert torch.equal(router.expert_bias, expected)


def test_another_optimizer_and_a_skipped_step_leave_it() -> None:
    router, other = make(), nn.Linear(2, 2)
    router(torch.randn(9, D)).top_k_weights.sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore
    router.weight.grad = torch.full_like(router.weight, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert router.counts.sum() == 18 and not router.expert_bias.any()
    router.weight.grad = torch.zeros_like(router.weight)
    optimizer.step()
    assert router.counts.sum() == 0 and router.expert_bias.any()
    by_hand = make(auto_update=False)
    by_hand(torch.randn(9, D))
    torch.optim.SGD(by_hand.parameters(), lr=0.0).step()
    assert by_hand.counts.sum() == 18


# Whether the block inside the checkpoint is compiled, or what is around it, and by which backend.
@pytest.mark.parametrize(
    ("reentrant", "compiled"),
    [
        (True, "no"),
        (False, "no"),
        (True, "inside"),
        (False, "inside"),
        (True, "eager"),
        (False, "eager"),
        (False, "aot_eager"),
    ],
)
def test_recomputation_is_counted_once(reentrant: bool, compiled: str, fresh_dynamo: None) -> None:
    moe = moefy.MoE(D, 8, E, router=moefy.RouterSpec("bias_balanced", rate=RATE))
    router: Any = moe.router
    block: Any = torch.compile(moe, backend="aot_eager", fullgraph=True) if compiled == "inside" else moe

    def run(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)  # pyright: ignore

    if compiled in ("eager", "aot_eager"):
        run = torch.compile(run, backend=compiled, fullgraph=True)
    x = torch.randn(9, D, requires_grad=True)
    n = counts(moe.eval().router(x).top_k_index)
    moe.train()
    for times in (1, 2):
        run(x).sum().backward()
        assert router.counts.tolist() == [times * c for c in n]


def test_padding_is_not_counted() -> None:
    router, x = make(), torch.randn(9, D)
    mask = torch.arange(9) < 4
    router(x, mask=mask)
    assert router.counts.sum() == 8


def test_it_balances() -> None:
    torch.manual_seed(0)
    router = make_router(moefy.RouterSpec("bias_balanced", rate=0.01, std=1.0), D, E, K)
    x = torch.randn(4000, D) + 0.7
    first = router(x).tokens_per_expert.float()
    router.update_bias()  # pyright: ignore
    for _ in range(150):
        router(x)
        router.update_bias()  # pyright: ignore
    last = router(x).tokens_per_expert.float()
    assert first.max() / first.mean() > 1.25 and last.max() / last.mean() < 1.03


def test_it_stays_in_fp32_and_moves_with_the_module() -> None:
    router = make().to(torch.bfloat16)
    router.update_bias()
    assert router.weight.dtype == torch.bfloat16 and router.expert_bias.dtype == torch.float32
    router.expert_bias.fill_(1.001)
    assert torch.equal(router.half().expert_bias, torch.full((E,), 1.001))
    assert router.double().expert_bias.dtype == torch.float64
    assert router.to("meta").counts.is_meta
    made = router.to_empty(device="cpu")
    made.reset_parameters()
    assert not made.expert_bias.any() and not made.counts.any()


def test_copies_are_updated_too() -> None:
    router = make()
    router(torch.randn(9, D))
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(twin.counts, router.counts)
        torch.optim.SGD(twin.parameters(), lr=0.0).step()
        assert twin.expert_bias.any() and not router.expert_bias.any()
    assert list(router.state_dict()) == ["weight", "expert_bias"]
