"""Products per expert: one by one, by torch's loop and in a padded batch they are the same, and so are their edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefy.ops.cpu import layout as row_layout
from moefy.ops.cpu import products as grouped_gemm
from moefy.ops.cpu.layout import Batch, Bounds, InRows, Layout, layout_for
from moefy.ops.cpu.products import outer_products, row_sums, rows_dot, rows_times

BOUNDS = [(0, 3), (3, 3), (3, 4), (4, 11)]
ROWS, ROUTED, I, O = 13, 11, 8, 16
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
PATHS = {"one by one": (0, False), "torch's loop": (0, True), "batch": (10**12, False)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every product takes this path, where the dtype allows it."""
    call, by_torch = PATHS[request.param]
    monkeypatch.setattr(row_layout, "CALL", call)
    monkeypatch.setattr(row_layout, "CALL_HALF", call)
    if not by_torch:
        monkeypatch.setattr(grouped_gemm, "_grouped_mm_takes", lambda *tensors: False)
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: Tensor, expected: Tensor) -> bool:
    return ((got.double() - expected).norm() / expected.norm()).item() <= TOLERANCE[got.dtype]


def layout_of(x_NI: Tensor, bounds: Bounds = BOUNDS) -> Layout:
    return layout_for(x_NI, bounds, x_NI.shape[0], matrices=[I * O], copied=(I, O))


def times(x_NI: Tensor, w_EOI: Tensor, b_EO: Tensor | None, bounds: Bounds = BOUNDS) -> Tensor:
    layout = layout_of(x_NI, bounds)
    return layout.collect(rows_times(layout.spread(x_NI), w_EOI, b_EO, layout))


def outer(grad_NO: Tensor, x_NI: Tensor, bounds: Bounds = BOUNDS, out_EOI: Tensor | None = None) -> Tensor:
    layout = layout_of(x_NI, bounds)
    grad_PO, x_PI = (layout.spread(t, zero=True) for t in (grad_NO, x_NI))
    return outer_products(grad_PO, x_PI, layout, out_EOI=out_EOI)


@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_times(path, dtype, with_bias):
    x_NI, w_EOI = draw(ROWS, I, dtype=dtype), draw(4, O, I, dtype=dtype)
    b_EO = draw(4, O, dtype=dtype) if with_bias else None
    got = times(x_NI, w_EOI, b_EO)
    expected = torch.zeros(ROWS, O, dtype=torch.float64)
    for e, (first, end) in enumerate(BOUNDS):
        expected[first:end] = x_NI[first:end].double() @ w_EOI[e].double().T
        if b_EO is not None:
            expected[first:end] += b_EO[e].double()
    assert close(got, expected) and not got[ROUTED:].any()
    assert torch.equal(got, times(x_NI, w_EOI, b_EO))


@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_times_to_room(path, dtype, with_bias):
    x_NI, w_EOI = draw(ROWS, I, dtype=dtype), draw(4, O, I, dtype=dtype)
    b_EO, layout = draw(4, O, dtype=dtype) if with_bias else None, layout_of(x_NI)
    room_PO = draw(layout.places, O, dtype=dtype)
    rows_times(layout.spread(x_NI), w_EOI, b_EO, layout, out_PO=room_PO)
    assert close(layout.collect(room_PO), times(x_NI, w_EOI, b_EO).double())


def test_rows_times_onto(path, dtype):
    x_NI, w_EOI, onto_NO = draw(ROWS, I, dtype=dtype), draw(4, O, I, dtype=dtype), draw(ROWS, O, dtype=dtype)
    expected, layout = onto_NO.double() + times(x_NI, w_EOI, None).double(), layout_of(x_NI)
    onto_PO = layout.spread(onto_NO)
    assert rows_times(layout.spread(x_NI), w_EOI, None, layout, onto_PO=onto_PO) is onto_PO
    assert close(layout.collect(onto_PO)[:ROUTED], expected[:ROUTED])


def test_outer_products_and_row_sums(path, dtype):
    grad_NO, x_NI = draw(ROWS, O, dtype=dtype), draw(ROWS, I, dtype=dtype)
    got, layout = outer(grad_NO, x_NI), layout_of(x_NI)
    parts = [(grad_NO[a:b].double(), x_NI[a:b].double()) for a, b in BOUNDS]
    assert close(got, torch.stack([grad.T @ x for grad, x in parts])) and not got[1].any()
    assert close(outer(grad_NO, x_NI, out_EOI=draw(4, O, I, dtype=dtype)), got.double())
    sums_EO = row_sums(layout.spread(grad_NO, zero=True), layout)
    assert close(sums_EO, torch.stack([grad.sum(0) for grad, _ in parts]))


def test_rows_dot(path, dtype):
    grad_NO, bias_EO = draw(ROWS, O, dtype=dtype), draw(4, O, dtype=dtype)
    layout, wide = layout_of(draw(ROWS, I, dtype=dtype)), torch.promote_types(dtype, torch.float32)
    got_N = layout.collect(rows_dot(layout.spread(grad_NO), bias_EO, layout, wide))
    expected = [grad_NO[a:b].double() @ bias_EO[e].double() for e, (a, b) in enumerate(BOUNDS)]
    torch.testing.assert_close(got_N[:ROUTED].double(), torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert not got_N[ROUTED:].any()


def test_transposed_weights_and_gaps_between_rows(path, dtype):
    x_NI, w_EIO = draw(ROWS, 2 * I, dtype=dtype)[:, ::2], draw(4, I, O, dtype=dtype)
    expected = times(x_NI.double(), w_EIO.double().mT.contiguous(), None)
    assert close(times(x_NI, w_EIO.mT, None), expected)


def test_nan_stays_with_its_expert(path, dtype):
    x_NI, w_EOI, grad_NO = (
        draw(ROWS, I, dtype=dtype), draw(4, O, I, dtype=dtype), draw(ROWS, O, dtype=dtype),
    )  # fmt: skip
    x_NI[3] = grad_NO[3] = x_NI[ROUTED:] = grad_NO[ROUTED:] = torch.nan  # expert 2's row; no expert's rows
    w_EOI[1] = torch.nan  # an expert without rows
    bad_N = times(x_NI, w_EOI, None).isnan().any(1)
    assert bad_N.nonzero().flatten().tolist() == [3]
    bad_E = outer(grad_NO, x_NI).isnan().flatten(1).any(1)
    assert bad_E.tolist() == [False, False, True, False]


@pytest.mark.parametrize("bounds", [[], [(0, 0), (0, 0)]])
def test_no_rows(path, dtype, bounds):
    x_NI, w_EOI = draw(0, I, dtype=dtype), draw(len(bounds), O, I, dtype=dtype)
    assert times(x_NI, w_EOI, None, bounds).shape == (0, O)
    products = outer(draw(0, O, dtype=dtype), x_NI, bounds)
    assert products.shape == w_EOI.shape and not products.any()


@pytest.mark.parametrize(
    ("sizes", "matrix", "pays"),
    [
        ([16, 14, 12, 15] * 16, (64, 128, 64), True),
        ([256, 260] * 32, (64, 128, 64), False),
        ([2, 1, 3, 0] * 16, (64, 128, 128), True),
        ([512] * 8, (8, 512, 1024), False),
        ([8, 0, 0, 0] * 16, (64, 512, 512), False),  # three of four experts would be read for nothing
        ([500] + [4] * 63, (64, 128, 128), False),  # one busy expert pads all others
        ([8], (1, 128, 128), False),
    ],
)
def test_a_batch_is_for_many_small_experts_of_like_sizes(sizes, matrix, pays):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    _, size_i, size_o = matrix
    layout = layout_for(
        torch.empty(ends[-1], size_i), bounds, ends[-1], matrices=[size_i * size_o], copied=(size_i, size_o)
    )
    assert isinstance(layout, Batch if pays else InRows)
