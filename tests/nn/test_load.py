"""The load counters: what counts, what does not, and that nobody else sees them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import moefy
from moefy.config import AuxLoss, Capacity
from moefy.nn import MoE, Router
from moefy.nn.counters import LoadCounter

D, E, K = 8, 4, 2


def layer(**options: Any) -> MoE:
    return MoE(D, 16, E, router=Router(D, E, K, std=1.0), **options).double()


def tally(moe: MoE, *batches: Tensor, mask: Tensor | None = None) -> list[int]:
    """Slots per expert by a loop over tokens, from the router's logits."""
    counts = [0] * E
    for x in batches:
        for token, row in enumerate((x.reshape(-1, D) @ moe.router.weight.t()).tolist()):
            if mask is None or mask.flatten()[token]:
                for e in sorted(range(E), key=lambda e: -row[e])[:K]:
                    counts[e] += 1
    return counts


def counted(module: nn.Module) -> list[int]:
    (router,) = (m for m in module.modules() if isinstance(m, Router))
    return router.load_counter.tokens_per_expert().tolist()


def test_training_forwards_are_counted_and_evaluation_is_not() -> None:
    moe = layer()
    batches = [torch.randn(2, 5, D, dtype=torch.float64) for _ in range(3)]
    for x in batches:
        moe(x)
    with torch.no_grad():
        moe(batches[0])
    expected = tally(moe, *batches, batches[0])
    assert counted(moe) == expected
    moe.eval()(batches[1])
    moe(torch.zeros(0, D, dtype=torch.float64))
    assert counted(moe) == expected
    moe.router.load_counter.reset()
    assert counted(moe) == [0] * E


def test_padding_is_not_counted() -> None:
    moe, x = layer(), torch.randn(2, 5, D, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    moe(x, mask=mask)
    assert counted(moe) == tally(moe, x, mask=mask)
    assert moe.router.load_counter.dropped == 0


def test_dropped_slots_are_counted_apart() -> None:
    moe, x = layer(), torch.randn(20, D, dtype=torch.float64)
    moe.router.capacity = Capacity(factor=0.5)
    moe(x)
    seats = 20 * K // E // 2
    wanted = tally(moe, x)
    assert counted(moe) == [min(n, seats) for n in wanted]
    assert moe.router.load_counter.dropped == sum(max(n - seats, 0) for n in wanted) > 0


def test_losses_are_summed() -> None:
    moe = layer()
    moe.router.aux_loss = AuxLoss(weight=0.5)
    for _ in range(3):
        moe(torch.randn(6, D, dtype=torch.float64))
        assert moe.router.l_aux is not None
    l_aux, balance, z_loss, own, forwards = moe.router.load_counter.losses.tolist()
    assert forwards == 3 and z_loss == own == 0
    assert l_aux == pytest.approx(0.5 * balance, rel=1e-6) and 3 <= balance <= 3 * E


def test_nobody_else_sees_the_counters() -> None:
    moe = layer()
    moe(torch.randn(3, D, dtype=torch.float64))
    assert not list(moe.buffers())
    assert set(moe.state_dict()) == {f"{n}_proj.{p}" for n in ("up", "down") for p in ("weight", "bias")} | {
        "router.weight"
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_count_for_themselves(copied: Any) -> None:
    moe, x = layer(), torch.randn(3, D, dtype=torch.float64)
    moe(x)
    other = copied(moe)
    other(x)
    assert counted(moe) == tally(moe, x)
    assert counted(other) == tally(moe, x, x)


def test_they_follow_the_device_and_keep_their_dtypes() -> None:
    moe = layer().half()
    counter = moe.router.load_counter
    assert (counter.ends.dtype, counter.losses.dtype) == (torch.int64, torch.float32)
    meta = MoE(D, 16, E, device="meta")
    assert meta.router.load_counter.ends.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    meta(torch.randn(3, D))
    assert sum(counted(meta)) == 3 * K
    assert moe.to("meta").router.load_counter.ends.is_meta


def test_weights_that_come_by_assignment() -> None:
    meta = MoE(D, 16, E, device="meta")
    meta.load_state_dict(MoE(D, 16, E).state_dict(), assign=True)
    meta(torch.randn(3, D))
    assert sum(counted(meta)) == 3 * K


def test_traces_count_nothing() -> None:
    moe, x = layer(), torch.randn(3, D, dtype=torch.float64)
    graph = make_fx(moe)(x)
    torch.export.export(moe, (x,))
    assert counted(moe) == [0] * E
    torch.testing.assert_close(graph(x), moe.eval()(x))


def test_vmap_counts_nothing() -> None:
    moe, x = layer(), torch.randn(2, 3, D, dtype=torch.float64)
    torch.func.vmap(moe)(x)
    assert counted(moe) == [0] * E


def test_two_routers_of_one_layer_count_together() -> None:
    spec = moefy.RouterSpec("multi", routers=("top_k", "sigmoid"))
    moe = MoE(D, 16, E, top_k=K, router=spec)
    for index in (0, 1):
        moe(torch.randn(3, D), router_index=index)
    (layer_load,) = moefy.expert_load(moe).layers
    assert layer_load.total == 2 * 3 * K


def test_counters_are_no_inference_tensors() -> None:
    with torch.inference_mode():
        counter = LoadCounter(E)
    counter.ends.add_(1)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_lengths_even_the_number_of_experts() -> None:
    """A counter is as long as some batch will be; Dynamo must not take the two for one."""
    moe = layer()
    frames = CompileCounter()
    fast = torch.compile(moe, backend=frames, fullgraph=True, dynamic=True)
    batches = [torch.randn(n, D, dtype=torch.float64) for n in (E, 5, 7)]
    seen = []
    for x in batches:
        fast(x)
        seen.append(frames.frame_count)
    assert len(set(seen)) == 1
    assert counted(moe) == tally(moe, *batches)
