"""Entries and exits in eager mode: exactness, one routing per call, copies, and every way to misuse them."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefy.errors import RoutingError, ShapeError
from moefy.nn import EntryLinear, FFNLink, RoutedRows, Router
from moefy.nn.inline import SOURCE_ATTRIBUTE
from nn.blocks import (
    BLOCKS,
    BareGlu,
    D,
    Glu,
    H,
    Mlp,
    NoisyRouter,
    assert_same,
    inputs,
    reference,
    results,
    rewrite,
)

ALL = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
GLUS = pytest.mark.parametrize("make", [Glu, BareGlu])


@ALL
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_copies_equal_the_dense_block(
    make: Callable[[], nn.Module], dtype: torch.dtype, tolerance: float
) -> None:
    dense = make().to(dtype)
    x = inputs(dense, dtype)
    assert_same([rewrite(dense, distinct=False)(x)], [dense(x)], tolerance)


@ALL
def test_distinct_experts_equal_the_reference_with_every_gradient(make: Callable[[], nn.Module]) -> None:
    dense = make().double()
    block, x = rewrite(dense), inputs(dense, torch.float64)
    got = results(block, block, x)
    assert_same(got, results(lambda x: reference(dense, block, x), block, x), 1e-11)
    assert all(g.abs().max() > 1e-6 for g in got)


@GLUS
def test_a_noisy_router_routes_once_per_call(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make()
    block, x, calls = rewrite(dense, router=NoisyRouter), inputs(dense), []
    forward = NoisyRouter.forward
    monkeypatch.setattr(NoisyRouter, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    with torch.no_grad():
        for weight in (block.w1.weight, block.w3.weight, block.w2.weight):
            weight.copy_(weight[:1].expand_as(weight))
    expected = torch.func.functional_call(
        dense, {f"{n}.weight": getattr(block, n).weight[0] for n in ("w1", "w3", "w2")}, (x,)
    )
    for _ in range(3):
        assert_same([block(x)], [expected])
    assert len(calls) == 3


@GLUS
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_on_the_same_source(make: Callable[[], nn.Module], reentrant: bool) -> None:
    dense = make()
    block, x = rewrite(dense, router=NoisyRouter), inputs(dense)
    expected = results(block, block, x)
    assert_same(results(lambda x: checkpoint(block, x, use_reentrant=reentrant), block, x), expected, 0.0)


def test_routing_leaves_the_source_when_the_last_entry_has_it() -> None:
    block, x = rewrite(BareGlu()), torch.randn(2, 5, D)
    block.w1(x)
    assert getattr(x, SOURCE_ATTRIBUTE) is not None
    block.w3(x)
    assert getattr(x, SOURCE_ATTRIBUTE) is None


def test_an_abandoned_call_does_not_reach_the_next() -> None:
    dense = BareGlu()
    block, x = rewrite(dense), torch.randn(2, 5, D)
    expected = block(x)
    block.w1(torch.randn(2, 5, D))
    block.w1(x)  # a body that raised, or a checkpoint that stopped early
    assert_same([block(x)], [expected], 0.0)


def test_two_ffns_may_read_one_tensor_interleaved() -> None:
    first, second, x = rewrite(BareGlu()), rewrite(BareGlu()), torch.randn(2, 5, D)
    expected = [first(x), second(x)]
    a1, a3 = first.w1(x), first.w3(x)
    b1, b3 = second.w1(x), second.w3(x)
    got = [x + first.w2(F.silu(a1) * a3), x + second.w2(F.silu(b1) * b3)]
    assert_same(got, expected, 0.0)


def test_one_ffn_may_hold_two_open_calls() -> None:
    block = rewrite(Mlp())
    x, y = torch.randn(2, 5, D), torch.randn(3, 4, D)
    expected = [block.fc2(F.gelu(block.fc1(t))) for t in (x, y)]
    rows = [F.gelu(block.fc1(t)) for t in (x, y)]
    assert_same([block.fc2(r) for r in rows], expected, 0.0)


def test_a_shared_layer_is_called_many_times() -> None:
    dense = Glu()
    block, x = rewrite(dense), inputs(dense)
    got = results(lambda x: block(block(block(x))), block, x)
    thrice = lambda x: reference(dense, block, reference(dense, block, reference(dense, block, x)))  # noqa: E731
    assert_same(got, results(thrice, block, x), 1e-4)


@ALL
def test_deepcopy_and_pickle_keep_the_ffn_together(make: Callable[[], nn.Module]) -> None:
    dense = make()
    block, x = rewrite(dense), inputs(dense)
    expected = block(x)
    stored = io.BytesIO()
    torch.save(block, stored)
    stored.seek(0)
    for copied in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(stored, weights_only=False),
    ):
        assert_same([copied(x)], [expected], 0.0)
        link = getattr(copied, dense.EXIT).link
        assert link is not getattr(block, dense.EXIT).link
        assert all(getattr(copied, name).link is link for name in dense.ENTRIES)


def test_state_dict_round_trip_and_names() -> None:
    block = rewrite(Glu())
    assert set(block.state_dict()) == {
        "norm.weight", "norm.bias", "w1.weight", "w1.router.weight", "w3.weight", "w2.weight"
    }  # fmt: skip
    other, x = rewrite(Glu()), torch.randn(1, 3, D)
    other.load_state_dict(block.state_dict())
    assert_same([other(x)], [block(x)], 0.0)


def test_linear_attributes_stay_readable() -> None:
    block = rewrite(Mlp().to(torch.bfloat16))
    assert (block.fc1.in_features, block.fc1.out_features, block.fc1.weight.dtype) == (D, H, torch.bfloat16)
    assert block.fc1.bias.shape == (4, H) and block.fc2.weight.device.type == "cpu"
    assert "num_experts=4" in repr(block.fc1)


@pytest.mark.parametrize("shape", [(D,), (5, D), (1, 1, D), (2, 3, 4, D), (0, D), (2, 0, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    dense = Mlp()
    x = torch.randn(shape)
    assert_same([rewrite(dense, distinct=False)(x)], [dense(x)])


def test_half_and_autocast_keep_the_router_in_fp32() -> None:
    dense = Mlp()
    block, x, seen = rewrite(dense, distinct=False), inputs(dense), []
    block.fc1.router.register_forward_hook(lambda m, a, routing: seen.append(routing.router_logits.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rows = block.fc1(block.norm(x))
        y = block.fc2(F.gelu(rows))
    assert rows.dtype == y.dtype == torch.bfloat16
    assert block.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.float32, torch.float32]
    assert (y.float() + x - dense(x)).norm() / dense(x).norm() < 2e-2


def test_rows_of_two_routings_do_not_mix() -> None:
    block = rewrite(Glu())
    with pytest.raises(RoutingError, match="two different routings"):
        block.w1(torch.randn(2, 5, D)) * block.w1(torch.randn(2, 5, D))
    with pytest.raises(RoutingError, match="two different routings"):
        torch.cat([block.w1(torch.randn(2, 5, D)), block.w1(torch.randn(2, 5, D))], dim=-1)


def test_a_follower_needs_its_leader() -> None:
    block, x = rewrite(BareGlu()), torch.randn(2, 5, D)
    with pytest.raises(RoutingError, match="the same tensor object"):
        block.w3(x)
    block.w1(x)
    with pytest.raises(RoutingError, match="the same tensor object"):
        block.w3(x.clone())


def test_the_exit_refuses_rows_that_are_not_the_entrys() -> None:
    block, x = rewrite(Mlp()), torch.randn(2, 5, D)
    with pytest.raises(RoutingError, match="without a routing"):
        block.fc2(torch.randn(1, 20, H))
    rows = block.fc1(x)
    with pytest.raises(RoutingError, match="19 rows"):
        block.fc2(rows[:, 1:])
    with pytest.raises(RoutingError, match="rank"):
        block.fc2(rows[None])


def test_an_entry_refuses_another_width() -> None:
    with pytest.raises(ShapeError, match="block: expected 8 features"):
        rewrite(Mlp()).fc1(torch.randn(2, 5, D + 1))


def test_exactly_the_leader_has_a_router() -> None:
    link, router = FFNLink("block"), Router(D, 4, 2)
    with pytest.raises(RoutingError):
        EntryLinear(D, H, 4, bias=True, link=link, index=0, count=2, router=None)
    with pytest.raises(RoutingError):
        EntryLinear(D, H, 4, bias=True, link=link, index=1, count=2, router=router)


def test_the_output_is_a_plain_tensor_and_the_rows_are_not() -> None:
    block, x = rewrite(Mlp()), torch.randn(2, 5, D)
    assert type(block(x)) is Tensor
    assert type(block.fc1(x)) is RoutedRows and block.fc1(x).shape == (1, 20, H)


def test_threads_share_a_link_without_mixing() -> None:
    """``nn.DataParallel`` runs replicas in threads that share the link."""
    block = rewrite(BareGlu())
    batches = [torch.randn(3, 5, D) for _ in range(4)]
    expected = [block(x) for x in batches]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(20):
            got[i] = block(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([got[i] for i in range(4)], expected, 0.0)
