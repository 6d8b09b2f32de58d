"""``TokenLayout``: where tokens and features lie in a tensor, and the way to ``[T, D]`` and back.

Contract: one axis of a tensor holds the features, the other axes together are its T tokens. Rows that a user's body
reads keep the RANK and the feature axis of the dense activation, so that code written for that activation
(``chunk(2, dim=-1)``, ``b, t, c = h.shape``, a per-channel scale) keeps its meaning on rows:

    x [B, S, D]      tokens [B*S, D]      rows [1, N, H]
    x [T, D]         tokens [T, D]        rows [N, H]
    x [D]            tokens [1, D]        rows [N, H]
    x [B, D, Y, X]   tokens [B*Y*X, D]    rows [N, H, 1, 1]        feature_dim=1, a 1x1 convolution

    >>> layout = TokenLayout.of(torch.zeros(2, 16, 3, 3), feature_dim=1)
    >>> layout
    TokenLayout(leading=(2, 3, 3), feature_dim=-3)
    >>> layout.rows_like(torch.zeros(36, 64)).shape
    torch.Size([36, 64, 1, 1])

Shape letters: T tokens, D model width, H expert hidden width, N rows, O any out width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moefy.errors import RoutingError, ShapeError


class TokenLayout(NamedTuple):
    """The layout of T tokens in a tensor.

    Attributes:
        leading: the tensor's shape without its feature axis; the product is T.
        feature_dim: the feature axis, counted from the back. Rows of a single token ``[D]`` have one axis more, so a
            count from the front would mean another axis there.
    """

    leading: tuple[int, ...]
    feature_dim: int = -1

    @classmethod
    def of(cls, x: Tensor, feature_dim: int = -1) -> TokenLayout:
        """The layout of ``x``, whose features are on axis ``feature_dim``.

        Raises:
            ShapeError: when ``x`` has no such axis.
        """
        if feature_dim == -1 and x.dim() > 1:
            return cls(tuple(x.shape[:-1]))
        axis = feature_axis(x.dim(), feature_dim)
        return cls((*x.shape[:axis], *x.shape[axis + 1 :]), axis - x.dim())

    @property
    def num_tokens(self) -> int:
        """T, the product of ``leading``."""
        return numel(self.leading)

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[T, D]`` of a tensor in this layout; a view where the strides allow one."""
        return as_tokens(x, self.feature_dim)

    def from_tokens(self, y_TO: Tensor) -> Tensor:
        """``[T, O]`` in this layout; contiguous."""
        y = y_TO if len(self.leading) == 1 else y_TO.reshape(*self.leading, y_TO.shape[-1])
        return y if self.feature_dim == -1 else y.movedim(-1, self.feature_dim).contiguous()

    def rows_like(self, rows_NO: Tensor) -> Tensor:
        """``[N, O]`` in the rank of this layout, with the features on its feature axis; a view.

        The rows lie where a batch of tokens would: on the axis in front of the features when these are last, else on
        axis 0. All other axes are 1.
        """
        rank, (num_rows, width) = len(self.leading) + 1, rows_NO.shape
        axis = rank + self.feature_dim
        if rank <= 2 and axis == rank - 1:
            return rows_NO
        if axis == rank - 1:
            return rows_NO.view(*[1] * (rank - 2), num_rows, width)
        if axis == 0:
            return rows_NO.t().reshape(width, num_rows, *[1] * (rank - 2))
        return rows_NO.view(num_rows, *[1] * (axis - 1), width, *[1] * (rank - axis - 1))

    def is_flat(self, rows: Tensor) -> bool:
        """Whether a body flattened rows of this layout to ``[N, H]``."""
        return rows.dim() == 2 and len(self.leading) > 1

    def rows_to_matrix(self, rows: Tensor, num_rows: int) -> Tensor:
        """``[N, H]`` of what a body made of ``rows_like``'s rows, also where the body flattened them.

        Raises:
            RoutingError: when the body changed the number or the rank of its rows.
        """
        rank = max(len(self.leading) + 1, 2)
        if self.is_flat(rows):
            rows_NH = rows
        elif rows.dim() == rank:
            rows_NH = as_tokens(rows, self.feature_dim)
        else:
            raise RoutingError(
                f"the body changed the rank of its rows from {rank} to {rows.dim()} (shape {tuple(rows.shape)}); the "
                "exit expects the entry's rank, or rows flattened to [N, H]"
            )
        if rows_NH.shape[0] != num_rows:
            raise RoutingError(
                f"the exit got {rows_NH.shape[0]} rows (shape {tuple(rows.shape)}), the entry sent {num_rows}; the "
                "body between them must be token-wise"
            )
        return rows_NH


def feature_axis(rank: int, feature_dim: int) -> int:
    """``feature_dim`` counted from the front.

    Raises:
        ShapeError: when a tensor of that rank has no such axis.
    """
    if not -rank <= feature_dim < rank:
        raise ShapeError(f"a tensor of rank {rank} has no feature axis {feature_dim}")
    return feature_dim % rank


def as_tokens(x: Tensor, feature_dim: int = -1) -> Tensor:
    """``[T, D]`` of any tensor with its features on ``feature_dim``; a view where the strides allow one."""
    if feature_dim != -1 and (axis := feature_axis(x.dim(), feature_dim)) != x.dim() - 1:
        x = x.movedim(axis, -1)
    return x if x.dim() == 2 else x.reshape(numel(x.shape[:-1]), x.shape[-1])


def numel(shape: Sequence[int]) -> int:
    """The product of ``shape``. A ``-1`` in a reshape is ambiguous for empty tensors."""
    total = 1
    for size in shape:
        total = total * size
    return total


def as_matrix(x: Tensor) -> Tensor:
    """``[T, ...]`` as ``[T, F]``; a view where the strides allow one."""
    return x if x.dim() == 2 else x.reshape(x.shape[0], numel(x.shape[1:]))
