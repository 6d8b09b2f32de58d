"""One buffer per expert: rows sorted by expert as ``[E, C, ...]`` and back, for experts that take a batch.

Contract: buffer e holds the first C rows of expert e in their order and zeros behind them. The capacity C is an int, so
the shapes do not depend on the data. ``to_buffers`` and ``from_buffers`` stand between any dispatcher's dispatch and
combine; ``encode`` and ``decode`` are both steps at once where all experts are in this process (Tutel's ``fast_encode``
and ``fast_decode``). GShard writes them as einsums with a ``[T, E, C]`` mask; here T*K rows move.

    decode(encode(x))[t] = sum_k w[t, k] * x[t], where a slot without a place counts zero

Worked example, three tokens to experts 1, 0, 1, K=1, C=2:

    encode(x_TD, routing, 2) = [[x[1], 0], [x[0], x[2]]]

Shape letters: T tokens, D width, E experts, C capacity, K top-k, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy.errors import ShapeError
from moefy.nn.dispatch import LOCAL
from moefy.nn.routing.routing import Routing


def encode(x_TD: Tensor, routing: Routing, capacity: int) -> Tensor:
    """The tokens of ``x_TD`` in the buffers of their experts.

    Args:
        x_TD: ``[T, D]``.
        routing: the router's.
        capacity: C >= 0, the places of each expert; ``routing.capacity`` where that is an int. Later slots of an expert
            are left out, by their order in ``routing``: token by token.

    Returns:
        ``[E, C, D]``, differentiable in ``x_TD``.

    Raises:
        ShapeError: for another number of tokens than were routed, or a negative capacity.
    """
    if capacity < 0:
        raise ShapeError(f"encode: got capacity {capacity}; expected an int >= 0")
    rows_RD, offsets_E, _ = LOCAL.dispatch(x_TD, routing)
    return to_buffers(rows_RD, offsets_E, capacity)


def decode(y_ECD: Tensor, routing: Routing) -> Tensor:
    """Each token's weighted sum over its experts' buffers.

    Args:
        y_ECD: ``[E, C, D]`` what the experts made of ``encode``'s result, of any width D.
        routing: the same.

    Returns:
        ``[T, D]`` in ``y_ECD``'s dtype, differentiable in it and in ``routing.top_k_weights``.

    Raises:
        ShapeError: for another number of experts.
    """
    if y_ECD.shape[0] != routing.num_experts:
        raise ShapeError(f"decode: got buffers of {y_ECD.shape[0]} experts; routed to {routing.num_experts}")
    handle = LOCAL.plan(routing)
    return LOCAL.combine(from_buffers(y_ECD, handle.offsets, handle.num_rows), handle)


def to_buffers(rows_RD: Tensor, offsets_E: Tensor, capacity: int) -> Tensor:
    """``[E, C, D]`` of rows sorted by expert; an expert's rows behind the first C are left out."""
    num_experts, width = offsets_E.shape[0], rows_RD.shape[1]
    place_R = places(offsets_E, rows_RD.shape[0], capacity)
    # One place more, for the rows that have none. index_copy's gradient is a gather: no atomics.
    buffer_XD = rows_RD.new_zeros(num_experts * capacity + 1, width)
    return buffer_XD.index_copy(0, place_R, rows_RD)[:-1].view(num_experts, capacity, width)


def from_buffers(y_ECD: Tensor, offsets_E: Tensor, num_rows: int) -> Tensor:
    """``[R, D]``, sorted by expert; zeros for the rows that have no place."""
    num_experts, capacity, width = y_ECD.shape
    y_XD = pad(y_ECD.reshape(num_experts * capacity, width), (0, 0, 0, 1))
    return y_XD.index_select(0, places(offsets_E, num_rows, capacity))


def places(offsets_E: Tensor, num_rows: int, capacity: int) -> Tensor:
    """``[R]`` int64: ``e * C`` plus the place in expert e's buffer; ``E * C`` for a row without a place."""
    end_E = offsets_E.to(torch.int64)
    num_experts = end_E.shape[0]
    row_R = torch.arange(num_rows, device=end_E.device)
    expert_R = torch.searchsorted(end_E, row_R, right=True)
    start_X = torch.cat([end_E.new_zeros(1), end_E])
    place_R = row_R - start_X.index_select(0, expert_R)
    has_place_R = (expert_R < num_experts) & (place_R < capacity)
    return torch.where(has_place_R, expert_R * capacity + place_R, num_experts * capacity)
