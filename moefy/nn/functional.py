"""The one MoE core as plain functions over ``moefy.ops``.

Modules, rewritten graphs and ``RoutedRows`` all call these. Contract: ``expert_entry`` keeps the RANK
and the feature axis of its input, so that an element-wise body written for the dense activation
(``chunk(2, dim=-1)``, ``b, t, c = h.shape``, a per-channel scale) keeps its meaning on the rows:

    x [B, S, D]    -> rows [1, N, H]          x [T, D]      -> rows [N, H]
    x [B, D, Y, X] -> rows [N, H, 1, 1]       (feature_dim=1, a 1x1 convolution)

Worked example, a two-layer MLP as E experts:

    top_k_weights_TK, order_N, offsets_E = route(x, router_weight_ED, top_k)
    rows = expert_entry(x, w_up_EHD, b_up_EH, order_N, offsets_E, top_k)
    y = expert_exit(gelu(rows), w_down_EDH, b_down_ED, top_k_weights_TK, order_N, offsets_E, x)

Shape letters: T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K routed rows, O any out width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moefy import ops
from moefy.errors import RoutingError, ShapeError
from moefy.nn.routing.capacity import Seats
from moefy.nn.routing.routing import Choice, Routing
from moefy.ops.library import AUTOCAST_DEVICES


def route(
    x: torch.Tensor, router_weight_ED: torch.Tensor, top_k: int, *, feature_dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts per token.

    Args:
        x: any shape with D features on axis ``feature_dim``; the other axes are the T tokens.
        router_weight_ED: the router's matrix.
        top_k: K.
        feature_dim: the feature axis of ``x``.

    Returns:
        ``(top_k_weights_TK, order_N, offsets_E)``; see ``moefy.nn.routing.routing``.

    The formula is Mixtral's (Jiang et al. 2024, section 2.1): a softmax over the K largest of ``x @ W.T``. It is
    computed in fp32 (fp64 for fp64 inputs) also under autocast; ties go to the lowest expert id.
    """
    logits_TE = router_logits(x, router_weight_ED, feature_dim)
    weights_TK, index_TK = top_k_softmax(logits_TE, top_k)
    choice = Choice(index=index_TK, weights=weights_TK, logits=logits_TE)
    routing = make_routing(x, choice, router_weight_ED.shape[0], feature_dim)
    return routing.top_k_weights, routing.order, routing.offsets


def router_logits(x: torch.Tensor, weight_ED: torch.Tensor, feature_dim: int = -1) -> torch.Tensor:
    """``[T, E]`` scores ``x_TD @ weight_ED.T``, in fp32 (fp64 for fp64 inputs), autocast or not."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device.type):
        return torch.mm(as_tokens(x, feature_dim).to(dtype), weight_ED.to(dtype).t())


def make_routing(
    x: torch.Tensor, choice: Choice, num_experts: int, feature_dim: int = -1, seats: Seats | None = None
) -> Routing:
    """The ``Routing`` of ``x`` by ``choice``: its slots, or those that kept their ``seats``, sorted by expert."""
    kept = choice if seats is None else seats
    order_N, offsets_E = ops.sort_by_expert(kept.index, num_experts)
    stranded_T = None if seats is None else seats.stranded
    residual_TD = None
    if stranded_T is not None:
        residual_TD = as_tokens(x, feature_dim).masked_fill(~stranded_T.unsqueeze(1), 0.0)
    return Routing(
        top_k_index=kept.index,
        top_k_weights=kept.weights,
        order=order_N,
        offsets=offsets_E,
        choice=choice,
        leading=leading_shape(x, feature_dim),
        top_k=choice.index.shape[1],
        feature_dim=feature_dim,
        capacity=None if seats is None else seats.capacity,
        residual=residual_TD,
    )


def add_residual(y: torch.Tensor, routing: Routing) -> torch.Tensor:
    """``y``, with the tokens that pass through in the place of those that capacity left without any expert.

    Raises:
        ShapeError: when the experts changed the width, so that a token cannot pass.
    """
    if routing.residual is None:
        return y
    flat = y.dim() == 2 and len(routing.leading) > 1
    x = routing.residual if flat else from_tokens(routing.residual, routing.leading, routing.feature_dim)
    if x.shape != y.shape:
        raise ShapeError(
            f"a token without a seat cannot pass through experts that make {tuple(y.shape)} of {tuple(x.shape)}; "
            "use a Capacity with residual=False"
        )
    return y + x.to(y.dtype)


def top_k_softmax(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(weights_TK, index_TK)`` of the K largest scores: a softmax over them alone.

    Ties go to the lowest id. NaN sorts first, so that a NaN score gives NaN weights for its own token and still a valid
    id.
    """
    return ops.top_k_softmax(logits_TE, top_k)


def route_by(router: Callable[..., Routing], x: torch.Tensor, *, feature_dim: int = -1) -> Routing:
    """The routing of ``x`` by a router module: what a rewritten graph calls."""
    return router(x, feature_dim)


def routed_entry(
    x: torch.Tensor, weight_EOD: torch.Tensor, bias_EO: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """``expert_entry`` under ``routing``."""
    axis = routing.feature_dim
    return expert_entry(
        x, weight_EOD, bias_EO, routing.order, routing.offsets, routing.top_k, feature_dim=axis
    )


def routed_exit(
    rows: torch.Tensor, weight_EOH: torch.Tensor, bias_EO: torch.Tensor | None, routing: Routing
) -> torch.Tensor:
    """``expert_exit`` under ``routing``, with the tokens that pass through added."""
    y = expert_exit(
        rows,
        weight_EOH,
        bias_EO,
        routing.top_k_weights,
        routing.order,
        routing.offsets,
        routing.leading,
        feature_dim=routing.feature_dim,
    )
    return add_residual(y, routing)


def expert_entry(
    x: torch.Tensor,
    weight_EOD: torch.Tensor,
    bias_EO: torch.Tensor | None,
    order_N: torch.Tensor,
    offsets_E: torch.Tensor,
    top_k: int,
    *,
    feature_dim: int = -1,
) -> torch.Tensor:
    """The experts' first linear: tokens in, rows sorted by expert out.

    Returns:
        N = T*K rows of O features with the rank and feature axis of ``x``, all other axes being 1.
    """
    return expert_entries(x, [(weight_EOD, bias_EO)], order_N, offsets_E, top_k, feature_dim)[0]


def expert_entries(
    x: torch.Tensor,
    linears: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    order_N: torch.Tensor,
    offsets_E: torch.Tensor,
    top_k: int,
    feature_dim: int = -1,
) -> list[torch.Tensor]:
    """``expert_entry`` for several linears that read the same tokens, which are gathered once."""
    x_ND = ops.permute(as_tokens(x, feature_dim), order_N, top_k)
    rows = [ops.grouped_linear(x_ND, weight, bias, offsets_E) for weight, bias in linears]
    return [rows_like(row_NO, x.dim(), feature_dim) for row_NO in rows]


def expert_exit(
    rows: torch.Tensor,
    weight_EOH: torch.Tensor,
    bias_EO: torch.Tensor | None,
    top_k_weights_TK: torch.Tensor,
    order_N: torch.Tensor,
    offsets_E: torch.Tensor,
    like: torch.Tensor | Sequence[int],
    *,
    feature_dim: int = -1,
) -> torch.Tensor:
    """The experts' last linear and the weighted sum over each token's experts.

    Args:
        rows: what the body made of ``expert_entry``'s rows.
        weight_EOH: stacked weights, ``nn.Linear`` layout.
        bias_EO: stacked biases.
        top_k_weights_TK: from ``route``.
        order_N: from ``route``.
        offsets_E: from ``route``.
        like: the tensor that was routed, or its shape without the feature axis.
        feature_dim: the feature axis of ``like`` and ``rows``.

    Returns:
        ``like``'s shape with O features. Rows that the body flattened to ``[N, H]`` come back flat, ``[T, O]``, as the
        dense linear would have returned them.

    Raises:
        RoutingError: when ``rows`` does not hold N rows, or has another rank.
    """
    leading = tuple(like) if not isinstance(like, torch.Tensor) else leading_shape(like, feature_dim)
    flat = rows.dim() == 2 and len(leading) > 1
    rows_NH = rows if flat else as_tokens(rows, feature_dim)
    check_rows(rows, rows_NH, order_N.shape[0], len(leading) + 1, flat)
    y_NO = ops.grouped_linear(rows_NH, weight_EOH, bias_EO, offsets_E)
    y_TO = ops.combine(y_NO, top_k_weights_TK, order_N)
    return y_TO if flat else from_tokens(y_TO, leading, feature_dim)


def check_rows(rows: torch.Tensor, rows_NH: torch.Tensor, num_rows: int, rank: int, flat: bool) -> None:
    """Raise ``RoutingError`` unless the body kept the rows it was given."""
    if not flat and rows.dim() != max(rank, 2):
        raise RoutingError(
            f"the body changed the rank of its rows from {max(rank, 2)} to {rows.dim()} (shape "
            f"{tuple(rows.shape)}); the exit expects the entry's rank, or rows flattened to [N, H]"
        )
    if rows_NH.shape[0] != num_rows:
        raise RoutingError(
            f"the exit got {rows_NH.shape[0]} rows (shape {tuple(rows.shape)}), the entry sent "
            f"{num_rows}; the body between them must be token-wise"
        )


def leading_shape(x: torch.Tensor, feature_dim: int = -1) -> tuple[int, ...]:
    """``x``'s shape without its feature axis."""
    axis = feature_axis(x.dim(), feature_dim)
    return (*x.shape[:axis], *x.shape[axis + 1 :])


def feature_axis(rank: int, feature_dim: int) -> int:
    """``feature_dim`` counted from the front."""
    if not -rank <= feature_dim < rank:
        raise ShapeError(f"a tensor of rank {rank} has no feature axis {feature_dim}")
    return feature_dim % rank


def as_tokens(x: torch.Tensor, feature_dim: int = -1) -> torch.Tensor:
    """``x`` as ``[T, D]``, a view where strides allow."""
    axis = feature_axis(x.dim(), feature_dim)
    x = x if axis == x.dim() - 1 else x.movedim(axis, -1)
    return x if x.dim() == 2 else x.reshape(count(x.shape[:-1]), x.shape[-1])


def from_tokens(y_TO: torch.Tensor, leading: Sequence[int], feature_dim: int) -> torch.Tensor:
    """``[T, O]`` with the tokens laid out as ``leading`` and the features on axis ``feature_dim``; contiguous."""
    axis = feature_axis(len(leading) + 1, feature_dim)
    y = y_TO if len(leading) == 1 else y_TO.reshape(*leading, y_TO.shape[-1])
    return y if axis == len(leading) else y.movedim(-1, axis).contiguous()


def rows_like(rows_NO: torch.Tensor, rank: int, feature_dim: int) -> torch.Tensor:
    """``[N, O]`` with ``rank`` axes and the features on ``feature_dim``; a view.

    The rows go on the axis before the features when these are last, else on axis 0: where a batch of tokens would be.
    A single token ``[D]`` becomes K rows, so rank 1 gives ``[N, O]``.
    """
    num_rows, width = rows_NO.shape
    if rank <= 2 and feature_axis(rank, feature_dim) == rank - 1:
        return rows_NO
    axis = feature_axis(rank, feature_dim)
    if axis == rank - 1:
        return rows_NO.view(*[1] * (rank - 2), num_rows, width)
    if axis == 0:
        return rows_NO.t().reshape(width, num_rows, *[1] * (rank - 2))
    return rows_NO.view(num_rows, *[1] * (axis - 1), width, *[1] * (rank - axis - 1))


def count(shape: Sequence[int]) -> int:
    """The product of ``shape``; ``-1`` in a reshape is ambiguous for empty tensors."""
    total = 1
    for size in shape:
        total = total * size
    return total


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, where the device has autocast at all (``meta`` has not)."""
    if device_type in AUTOCAST_DEVICES:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
