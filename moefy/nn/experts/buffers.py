"""``encode`` and ``decode``: tokens into one buffer per expert, ``[E, C, D]``, and back.

Contract: ``encode(x)[e, c]`` is the token at place c of expert e's queue, zero where the queue is shorter;
``decode(y)[t] = sum_k w[t, k] * y[e(t, k), place(t, k)]``, where a slot without a place counts zero. The capacity C is
an int, so the shapes do not depend on the data: for expert modules that take a batch. GShard writes both as einsums
with a ``[T, E, C]`` mask; here they move T*K rows. Tutel's ``fast_encode`` and ``fast_decode``.

Worked example, three tokens to experts 1, 0, 1, K=1, C=2:

    encode(x_TD, routing, 2) = [[x[1], 0], [x[0], x[2]]]

Shape letters: T tokens, D width, E experts, C capacity, K top-k, N = T*K rows sorted by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy import ops
from moefy.errors import ShapeError
from moefy.nn.routing.routing import Routing


def encode(x_TD: Tensor, routing: Routing, capacity: int) -> Tensor:
    """The tokens of ``x_TD`` in the buffers of their experts.

    Args:
        x_TD: ``[T, D]``.
        routing: the router's.
        capacity: C >= 0, the places of each expert; ``routing.capacity`` where that is an int. Slots behind it are left
            out, by their order in ``routing``: token by token.

    Returns:
        ``[E, C, D]``, differentiable in ``x_TD``.

    Raises:
        ShapeError: for another number of tokens than were routed, or a negative capacity.
    """
    if capacity < 0:
        raise ShapeError(f"encode: got capacity {capacity}; expected an int >= 0")
    num_experts, width = routing.offsets.shape[0], x_TD.shape[1]
    rows_ND = ops.permute(x_TD, routing.order, routing.top_k)
    place_N = _places(routing, capacity)
    # One place more, for the rows that have none. index_copy's gradient is a gather: no atomics.
    buffer_XD = rows_ND.new_zeros(num_experts * capacity + 1, width)
    return buffer_XD.index_copy(0, place_N, rows_ND)[:-1].view(num_experts, capacity, width)


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
    num_experts, capacity, width = y_ECD.shape
    if num_experts != routing.offsets.shape[0]:
        raise ShapeError(
            f"decode: got buffers of {num_experts} experts; routed to {routing.offsets.shape[0]}"
        )
    rows_XD = pad(y_ECD.reshape(num_experts * capacity, width), (0, 0, 0, 1))
    rows_ND = rows_XD.index_select(0, _places(routing, capacity))
    return ops.combine(rows_ND, routing.top_k_weights, routing.order)


def _places(routing: Routing, capacity: int) -> Tensor:
    """``[N]`` int64: ``e * C`` plus the place in expert e's queue; ``E * C`` for rows without a place."""
    end_E = routing.offsets.to(torch.int64)
    num_experts = end_E.shape[0]
    row_N = torch.arange(routing.order.shape[0], device=end_E.device)
    expert_N = torch.searchsorted(end_E, row_N, right=True)
    start_X = torch.cat([end_E.new_zeros(1), end_E])
    place_N = row_N - start_X.index_select(0, expert_N)
    has_place_N = (expert_N < num_experts) & (place_N < capacity)
    return torch.where(has_place_N, expert_N * capacity + place_N, num_experts * capacity)
