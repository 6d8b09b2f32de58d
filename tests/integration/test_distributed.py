"""DDP, FSDP2 and ZeroRedundancyOptimizer on two gloo ranks give the numbers of one process.

The reference is one process that minimises the mean of the ranks' losses; experts are distinct, and each rank routes
its own tokens. All scenarios run in one start of the ranks (``ranks``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from integration import ranks
from integration.aux_models import closed_form, pair
from integration.models import (
    SAME,
    assert_close,
    assert_same,
    backward,
    batch,
    call,
    gradients,
    moe,
    routers,
    scalar,
)

SIZE = 2
pytestmark = pytest.mark.multiprocess
Results = dict[str, list[Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return ranks.run_ranks(SIZE, Path(tmp_path_factory.mktemp("ranks")))


def of(results: Results, scenario: str) -> list[Any]:
    """What each rank found; a rank's traceback fails the test."""
    for rank, found in enumerate(results[scenario]):
        assert not isinstance(found, str), f"rank {rank}: {found}"
    return results[scenario]


@pytest.mark.parametrize(
    "scenario",
    [
        *(f"{kind}-{name}" for kind in ("ddp", "fsdp2", "zero") for name in ranks.NAMES),
        *(
            f"{kind}-{name}"
            for kind in ("ddp-compiled", "fsdp2-compiled", "fsdp2-checkpoint")
            for name in ("aligned", "inline", "glu")
        ),
    ],
)
def test_training_equals_one_process(results: Results, scenario: str) -> None:
    """Gradients of the first step, both clip norms, and the weights after two AdamW steps."""
    expected = ranks.single_process(scenario.rpartition("-")[2], SIZE)
    for found in of(results, scenario):
        assert_same(found["grads"], expected["grads"], SAME[torch.float64], floor=1e-13)
        assert_close(found["norms"], expected["norms"], SAME[torch.float64], "clip norm")
        assert_same(found["end"], expected["end"], SAME[torch.float64], floor=1e-12)


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_gradient_accumulation_without_sync(results: Results, name: str) -> None:
    model = moe(name)
    losses = [scalar(call(model, batch(name, seed=seed))) for seed in range(2 * SIZE)]
    torch.stack(losses).mean().backward()
    for found in of(results, f"accumulate-{name}"):
        assert_same(found["grads"], gradients(model), SAME[torch.float64])


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_a_rank_without_tokens_contributes_zero(results: Results, name: str) -> None:
    model = moe(name)
    (call(model, batch(name)).square().sum() / SIZE).backward()
    for found in of(results, f"idle-rank-{name}"):
        assert_same(found["grads"], gradients(model), SAME[torch.float64])


def test_expert_modules_without_tokens_contribute_zero(results: Results) -> None:
    model = ranks.expert_modules()
    (model(ranks.expert_modules_batch(0)).square().sum() / SIZE).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    assert (
        sum(bool(g.any()) for g in expected.values()) == 9
    )  # two experts of four parameters, and the router
    for found in of(results, "idle-expert-modules"):
        assert_same(found["grads"], expected, SAME[torch.float64])


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("step", [0, 1])
def test_balance_of_the_global_batch(results: Results, mode: str, step: int) -> None:
    """The share of slots over all ranks and micro-batches so far; the scores of the own ones."""
    seen = [ranks.balance_sample(rank, s)[1] for rank in range(SIZE) for s in range(step + 1)]
    slots = torch.cat([index.flatten() for index in seen]).tolist()
    share = torch.tensor([slots.count(e) / len(slots) for e in range(4)], dtype=torch.float64)
    for rank, found in enumerate(of(results, "global-balance")):
        scores, _ = ranks.balance_sample(rank, step)
        value, grad, totals = found[f"{mode} {step}"]
        torch.testing.assert_close(value, 4 * (share * scores.detach().mean(0)).sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, (4 * share / 6).expand(6, 4), rtol=1e-12, atol=0)
        assert totals.tolist() == [*(slots.count(e) for e in range(4)), len(slots) // 2]


def test_ranks_draw_the_same_routers_and_noise(results: Results) -> None:
    first, second = of(results, "router-init")
    assert any("router" in key for key in first)
    assert_same(second, first, 0.0)


def test_full_state_dict_of_a_sharded_model(results: Results) -> None:
    state, _ = of(results, "full-state-dict")
    assert_same(state, moe("glu").state_dict(), 0.0)


def test_full_state_dict_into_a_sharded_model(results: Results) -> None:
    with torch.no_grad():
        expected = call(moe("inline"), batch("inline"))
    for found in of(results, "load-sharded"):
        assert_close(found["output"], expected, SAME[torch.float64])


@pytest.mark.parametrize("optimizer", ["", "-zero"])
def test_the_balancing_bias_counts_all_ranks(results: Results, optimizer: str) -> None:
    """Four micro-batches per rank: the bias is that of one process with all of them, on every rank."""
    expected = ranks.biased(None, SIZE)
    assert expected.any()
    for found in of(results, f"bias-balanced{optimizer}"):
        assert torch.equal(found["bias"], expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_wrapped_models_are_refused_by_name(results: Results, kind: str) -> None:
    for found in of(results, "refusals"):
        assert found[kind].startswith("ConfigError: model: got"), found[kind]
        assert "transform it before" in found[kind], found[kind]
        assert found[f"{kind} unchanged"]


@pytest.mark.parametrize("name", ["aligned", "glu"])
def test_mixed_precision_of_fsdp2(results: Results, name: str) -> None:
    """bf16 compute on the ranks against fp32: the same direction for every parameter."""
    _, expected = backward(moe(name, torch.float32), batch(name, dtype=torch.float32))
    for found in of(results, "mixed-precision"):
        assert found[f"{name} dtype"] == "torch.bfloat16"
        assert found[f"{name} routers"] == 2
        assert found[f"{name} grads"].keys() == expected.keys()
        assert all(
            g.dtype == torch.float32 and bool(g.isfinite().all()) for g in found[f"{name} grads"].values()
        )


@pytest.mark.parametrize("kind", ranks.AUX_KINDS)
def test_auxiliary_losses(results: Results, kind: str) -> None:
    """The mean over the ranks of the loss written by hand; each rank counts its own load."""
    plain, routings = pair("inline")[0], []
    for rank in range(SIZE):
        seen: list[Any] = []
        handles = [
            r.register_forward_hook(lambda r, args, routing, seen=seen: seen.append(routing))
            for r in routers(plain).values()
        ]
        loss = scalar(call(plain, batch("inline", seed=rank)))
        for handle in handles:
            handle.remove()
        routings.append((loss, seen))
    counts = [[torch.bincount(r.choice.index.flatten(), minlength=4) for r in seen] for _, seen in routings]
    total = torch.zeros((), dtype=torch.float64)
    for loss, seen in routings:
        total = total + loss / SIZE
        for layer, routing in enumerate(seen):
            shared = sum(c[layer] for c in counts) if kind == "global" else None
            total = total + closed_form(routing, counts_E=shared) / SIZE
    total.backward()
    for rank, found in enumerate(of(results, f"aux-{kind}")):
        assert_same(found["grads"], gradients(plain), SAME[torch.float64], floor=1e-13)
        assert found["mine"] == [c.tolist() for c in counts[rank]]
        assert found["all"] == [(a + b).tolist() for a, b in zip(*counts, strict=True)]
