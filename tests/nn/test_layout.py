"""``TokenLayout``: to tokens and back for every rank and axis, rows of a body, and what a body must not do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefy.errors import RoutingError, ShapeError
from moefy.nn.routing.layout import TokenLayout, as_matrix, numel

# shape of x, its feature axis, shape of 7 rows of 5 features
CASES = [
    ((3,), -1, (7, 5)),
    ((4, 3), 1, (7, 5)),
    ((2, 4, 3), -1, (1, 7, 5)),
    ((2, 3, 4), 1, (7, 5, 1)),
    ((3, 4, 2), 0, (5, 7, 1)),
    ((2, 3, 4, 6), -3, (7, 5, 1, 1)),
    ((2, 0, 3), -1, (1, 7, 5)),
]


def tokens(x: Tensor, feature_dim: int) -> Tensor:
    """``[T, D]``, one token after the other."""
    moved = x.movedim(feature_dim, -1)
    rows = [
        moved[tuple(i)]
        for i in torch.cartesian_prod(*map(torch.arange, moved.shape[:-1])).view(-1, x.dim() - 1)
    ]
    return torch.stack(rows) if rows else x.new_zeros(0, moved.shape[-1])


@pytest.mark.parametrize(("shape", "feature_dim", "rows"), CASES)
def test_to_tokens_and_back(shape: tuple[int, ...], feature_dim: int, rows: tuple[int, ...]) -> None:
    x = torch.arange(float(numel(shape))).view(shape)
    layout = TokenLayout.of(x, feature_dim)
    x_TD = layout.to_tokens(x)
    assert x_TD.shape == (layout.num_tokens, 3)
    if x.dim() > 1:
        assert torch.equal(x_TD, tokens(x, feature_dim))
    back = layout.from_tokens(x_TD)
    assert torch.equal(back, x) and back.is_contiguous()
    assert layout == TokenLayout.of(x, feature_dim % x.dim()), "the same axis from either end"


@pytest.mark.parametrize(("shape", "feature_dim", "rows"), CASES)
def test_rows_of_a_body(shape: tuple[int, ...], feature_dim: int, rows: tuple[int, ...]) -> None:
    layout = TokenLayout.of(torch.zeros(shape), feature_dim)
    rows_NO = torch.randn(7, 5)
    laid = layout.rows_like(rows_NO)
    assert laid.shape == rows
    assert torch.equal(layout.rows_to_matrix(laid, 7), rows_NO)
    assert torch.equal(layout.rows_to_matrix(rows_NO, 7), rows_NO), "a body may flatten its rows"
    assert layout.is_flat(rows_NO) == (len(shape) > 2)


def test_a_body_that_changes_its_rows() -> None:
    layout = TokenLayout.of(torch.zeros(2, 4, 3))
    with pytest.raises(RoutingError, match="6 rows"):
        layout.rows_to_matrix(torch.zeros(1, 6, 5), 7)
    with pytest.raises(RoutingError, match="rank of its rows from 3 to 4"):
        layout.rows_to_matrix(torch.zeros(1, 1, 7, 5), 7)


def test_an_axis_that_is_not_there() -> None:
    for rank, feature_dim in ((1, 1), (3, 3), (3, -4), (0, -1)):
        with pytest.raises(ShapeError, match=f"no feature axis {feature_dim}"):
            TokenLayout.of(torch.zeros([1] * rank), feature_dim)


def test_as_matrix() -> None:
    assert as_matrix(torch.zeros(4)).shape == (4, 1)
    assert as_matrix(torch.zeros(4, 3, 2)).shape == (4, 6)
    assert as_matrix(torch.zeros(0, 3, 2)).shape == (0, 6)
