"""The routing kernels against plain torch: ids and rows bit for bit, weights to rounding, nothing written outside."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from moefy.ops import reference
from moefy.ops import sort as sort_op
from moefy.ops import top_k as top_k_op
from moefy.ops.cuda.routing import sort_cuda, top_k_backward_cuda, top_k_cuda
from moefy.triton_ops import sort, top_k

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SORTS = (sort.sort_pairs, sort.sort_tiles)
# What the ops run on CUDA.
TOP_K = top_k_cuda(top_k_op._kernel)
TOP_K_BACKWARD = top_k_backward_cuda(top_k_op._backward_kernel)
SORT = sort_cuda(sort_op._kernel, sort_op._slot_ids)
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def scores(tokens, experts, dtype=torch.float32):
    """Few different values: many ties, zeros of both signs."""
    return (torch.randint(-3, 4, (tokens, experts)).to(dtype) / 4) * -1


def same_as_reference(logits_TE, k, guard_bands):
    with guard_bands():
        weights_TK, index_TK = top_k.top_k_softmax(logits_TE, k)
    want_weights, want_index = reference.top_k_softmax(logits_TE, k)
    assert torch.equal(index_TK, want_index)
    assert weights_TK.dtype is logits_TE.dtype and index_TK.dtype is torch.int64
    unit = UNIT[logits_TE.dtype]
    assert_close(weights_TK, want_weights, rtol=4 * unit, atol=4 * unit, equal_nan=True)
    again = top_k.top_k_softmax(logits_TE, k)
    assert torch.equal(again[0].isnan(), weights_TK.isnan()) and torch.equal(again[1], index_TK)
    assert torch.equal(again[0].nan_to_num(), weights_TK.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(5, 4, 2), (1, 1, 1), (3, 1, 1), (7, 5, 5), (130, 8, 2), (17, 64, 8), (3, 100, 3), (2, 300, 64)],
)
def test_top_k(tokens, experts, k, dtype, device, guard_bands):
    same_as_reference(scores(tokens, experts, dtype).to(device), k, guard_bands)
    same_as_reference(torch.randn(tokens, experts, device=device).to(dtype), k, guard_bands)


def test_top_k_of_4096_experts(device, guard_bands):
    same_as_reference(torch.randn(2, 4096, device=device), 3, guard_bands)
    same_as_reference(torch.zeros(1, 4096, device=device), 5, guard_bands)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_nan_sorts_first_and_stays_in_its_row(k, device, guard_bands):
    rows = [
        [1.0, NAN, 2.0, NAN],
        [NAN, INF, -INF, 0.0],
        [NAN] * 4,
        [INF, 1.0, INF, -INF],
        [-INF] * 4,
        [-0.0, 0.0, -0.0, 0.0],
        [3e38, -3e38, 1e-45, -1e-45],
        [1.0, 2.0, 3.0, 4.0],
    ]
    logits_TE = torch.tensor(rows, device=device)
    same_as_reference(logits_TE, k, guard_bands)
    same_as_reference(-logits_TE, k, guard_bands)
    same_as_reference(logits_TE.half(), k, guard_bands)
    weights_TK, _ = top_k.top_k_softmax(logits_TE, k)
    assert weights_TK[:3].isnan().all() and not weights_TK[5:].isnan().any()


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:, None].expand(-1, 2, -1)[:, 1],
        lambda x: x[:1].expand(9, -1),
        lambda x: torch.full((18, 30), NAN, device=x.device)[::2, 3:23:2].copy_(x),
        lambda x: x[:, 1:],
    ],
    ids=["transposed", "row stride", "one row", "gaps of NaN", "no alignment"],
)
def test_any_strides(layout, device, guard_bands):
    same_as_reference(layout(torch.randn(9, 10, device=device)), 3, guard_bands)


def test_no_tokens(device):
    weights_TK, index_TK = top_k.top_k_softmax(torch.zeros(0, 4, device=device), 2)
    assert weights_TK.shape == index_TK.shape == (0, 2)
    assert top_k.top_k_softmax_backward(weights_TK, weights_TK, index_TK, 4).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(5, 4, 2), (1, 1, 1), (7, 5, 5), (130, 8, 2), (17, 64, 8), (2, 3000, 3)]
)
def test_backward(tokens, experts, k, dtype, device, guard_bands):
    logits_TE = scores(tokens, experts).to(device)
    weights_TK, index_TK = top_k.top_k_softmax(logits_TE, k)
    weights_TK = weights_TK.to(dtype)
    grad_TK = torch.randn(k, tokens, device=device).to(dtype).t()
    with guard_bands():
        got = top_k.top_k_softmax_backward(grad_TK, weights_TK, index_TK, experts)
    w, g = weights_TK.double(), grad_TK.double()
    chosen = w * (g - (w * g).sum(1, keepdim=True))
    want = torch.zeros(tokens, experts, dtype=torch.float64, device=device).scatter(1, index_TK, chosen)
    assert got.dtype is dtype
    assert_close(got.double(), want, rtol=4 * UNIT[dtype], atol=1e-6)
    assert torch.equal(got, top_k.top_k_softmax_backward(grad_TK, weights_TK, index_TK, experts))


def test_backward_of_one_gradient_for_all(device):
    """Stride 0, as ``sum()`` makes it: a softmax does not change with it."""
    weights_TK, index_TK = top_k.top_k_softmax(torch.randn(5, 6, device=device), 3)
    one = torch.ones((), device=device).expand(5, 3)
    assert_close(top_k.top_k_softmax_backward(one, weights_TK, index_TK, 6), torch.zeros(5, 6, device=device))


@pytest.mark.parametrize(
    ("logits", "k"),
    [(torch.randn(3, 5, dtype=torch.float64), 2), (torch.randn(2, 70), 65), (torch.randn(1, 4097), 2)],
    ids=["fp64", "many choices", "many experts"],
)
def test_the_op_leaves_the_rest_to_torch(logits, k, device, monkeypatch):
    monkeypatch.delattr(top_k, "top_k_softmax")
    monkeypatch.delattr(top_k, "top_k_softmax_backward")
    logits_TE = logits.to(device)
    weights_TK, index_TK = TOP_K(logits_TE, k)
    assert torch.equal(index_TK, reference.top_k_softmax(logits_TE, k)[1])
    TOP_K_BACKWARD(weights_TK, weights_TK, index_TK, logits_TE.shape[1])


def test_the_op_is_the_kernel(device):
    logits_TE = torch.randn(9, 10, device=device)
    got, want = TOP_K(logits_TE, 3), top_k_op._kernel(logits_TE, 3)
    assert torch.equal(got[1], want[1])
    assert_close(got[0], want[0])
    got, want = (f(got[0] + 1, *got, 10) for f in (TOP_K_BACKWARD, top_k_op._backward_kernel))
    assert_close(got, want)


# ---- sorting ------------------------------------------------------------------------------------


def sorted_as_reference(ids_N, experts, sorts, guard_bands):
    order_N, offsets_E = reference.sort_by_expert(ids_N[:, None], experts)
    slots_N = torch.arange(ids_N.shape[0], dtype=torch.int32, device=ids_N.device)
    for function in sorts:
        with guard_bands():
            order = torch.empty(ids_N.shape, dtype=torch.int64, device=ids_N.device)
            offsets = torch.empty((experts,), dtype=torch.int32, device=ids_N.device)
            row = torch.empty(ids_N.shape, dtype=torch.int32, device=ids_N.device)
            function(ids_N, order, offsets, row)
        assert torch.equal(order, order_N)
        assert torch.equal(offsets, offsets_E)
        assert torch.equal(row[order], slots_N)


def patterns(slots, experts):
    """Ids by name: everything a router, or a mistaken one, may give."""
    uniform = torch.randint(0, experts, (slots,))
    return {
        "uniform": uniform,
        "all to the first": torch.zeros(slots, dtype=torch.int64),
        "all to the last": torch.full((slots,), experts - 1),
        "even only": uniform // 2 * 2,
        "some dropped": torch.randint(-3, experts + 3, (slots,)),
        "all dropped": torch.tensor([-1, experts, 2**31 - 1, -(2**31)]).repeat(slots // 4 + 1)[:slots],
        "descending": torch.arange(slots).flip(0) % experts,
    }


@pytest.mark.parametrize("pattern", patterns(1, 1))
@pytest.mark.parametrize(
    ("slots", "experts", "dtype"),
    [
        (1, 1, torch.int64),
        (10, 3, torch.int32),
        (300, 1, torch.int32),
        (257, 8, torch.int64),
        (520, 33, torch.int64),
    ],
)
def test_sort(slots, experts, dtype, pattern, device, guard_bands):
    ids_N = patterns(slots, experts)[pattern].to(device, dtype)
    sorted_as_reference(ids_N, experts, SORTS, guard_bands)


def test_sort_nothing(device, guard_bands):
    ids_N = torch.zeros(0, dtype=torch.int64, device=device)
    for function in SORTS:
        offsets_E = torch.full((5,), 7, dtype=torch.int32, device=device)
        function(ids_N, ids_N.clone(), offsets_E, None)
        assert not offsets_E.any()
    assert sort.sort_by_expert(ids_N, 2)[0].shape == (0,)


def test_sort_with_4096_experts(device, guard_bands):
    ids_N = torch.randint(-9, 4105, (40,), device=device)
    sorted_as_reference(ids_N, 4096, [sort.sort_pairs], guard_bands)
    ids_N[:2] = torch.tensor([4095, 0])
    sorted_as_reference(ids_N.int(), 4096, [sort.sort_pairs], guard_bands)


def test_running_sum_in_several_steps(device, guard_bands, monkeypatch):
    monkeypatch.setattr(sort, "scan_blocks", lambda tiles: {"BLOCK_C": 2, "STEPS": 4, "num_warps": 4})
    sorted_as_reference(torch.randint(-1, 4, (256 * 4 + 9,), device=device), 3, SORTS[1:], guard_bands)


@pytest.mark.parametrize("high", [2**32, 2**40, -(2**32), -(2**63)])
def test_an_id_beyond_int32_is_dropped_and_not_cut(high, device, guard_bands):
    """The lower half of each is a valid id."""
    ids_N = torch.tensor([1, high + 1, 0, high, high + 2, 2], device=device)
    sorted_as_reference(ids_N, 3, SORTS, guard_bands)


@pytest.mark.parametrize("slots", [sort.MAX_PAIRS_SLOTS, sort.MAX_PAIRS_SLOTS + 1])
def test_the_launcher_chooses_by_the_number_of_slots(slots, device, monkeypatch):
    called = []
    for function in SORTS:
        name = function.__name__
        monkeypatch.setattr(sort, name, lambda *tensors, name=name: called.append((name, len(tensors))))
    ids_N = torch.zeros(slots, dtype=torch.int64, device=device)
    assert sort.sort_by_expert(ids_N, 2)[2] is None
    assert sort.sort_by_expert(ids_N, 2, with_rows=True)[2].shape == (slots,)
    assert called == [("sort_pairs" if slots <= sort.MAX_PAIRS_SLOTS else "sort_tiles", 4)] * 2


@pytest.mark.parametrize("experts", [3, 5000])
def test_the_sort_op_is_the_kernel(experts, device):
    """Any strides; more experts than the kernels take are left to torch."""
    ids_TK = torch.randint(-1, experts + 1, (2, 9), device=device).t()
    for got, want in zip(SORT(ids_TK, experts), sort_op._kernel(ids_TK, experts), strict=True):
        assert torch.equal(got, want) and got.dtype is want.dtype and got.is_contiguous()


def test_guard_bands_see_a_write_beside_the_output(guard_bands):
    with pytest.raises(AssertionError, match="outside its output"), guard_bands():
        torch.empty(4).as_strided((1,), (1,), 64 + 4).zero_()


def test_blocks_fit_every_size():
    for experts in (1, 2, 3, 8, 60, 64, 257, 4096):
        blocks = top_k.blocks(experts)
        assert experts <= blocks["BLOCK_E"] < 2 * experts and blocks["BLOCK_T"] >= 1
        place = sort.place_blocks(experts)
        assert place["BLOCK"] == sort.tile_blocks(experts)["BLOCK"] and place["BLOCK"] % place["OTHERS"] == 0
    for tiles in (1, 31, 2048, 2049, 5000, 2**23):
        scan = sort.scan_blocks(tiles)
        assert scan["BLOCK_C"] * scan["STEPS"] >= tiles
    for slots in (0, 1, 129, sort.MAX_PAIRS_SLOTS):
        assert slots <= sort.pairs_blocks(slots)["MAX_SLOTS"] <= sort.MAX_PAIRS_SLOTS
