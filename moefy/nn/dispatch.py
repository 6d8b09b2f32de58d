"""``Dispatcher``: how tokens get to the experts that a routing picked, and how their outputs come back.

Every form of a layer goes through this one seam: stacked experts, experts that are modules, linears inside a user's
block, rewritten graphs. The layer's ``dispatcher`` attribute says which dispatcher moves its rows; by default it is
``LOCAL``, where all experts are in this process.

    rows, offsets, handle = dispatcher.dispatch(x, routing)       [T, ...] -> [R, ...], sorted by this rank's experts
    y = dispatcher.combine(experts(rows, offsets), handle)        [R, ...] -> [T, ...], weighted and summed per token

Contract, for this and every other dispatcher (an all-to-all over ranks):

- expert ``e`` of this rank owns rows ``offsets[e - 1] : offsets[e]``. Rows behind ``offsets[-1]`` belong to no expert;
  their outputs must be zeros, as ``ops.grouped_linear`` makes them. R may differ from T*K, and the experts of this rank
  may be fewer than those of the routing.
- ``handle`` has all that ``combine`` needs: the routing weights, the order, what ranks sent to each other. It also has
  ``offsets`` and ``num_rows``, so that rows inside a user's code carry the handle alone (see ``Exchange``).
- The plan of a routing is made once. Any number of tensors then move by it: the leaves of a tree, or the inputs of
  several entries.
- ``dispatch_rows`` is linear in its input and ``combine_rows`` in both its input and the weights; autograd goes through
  both.

A new dispatcher defines ``plan``, ``dispatch_rows`` and ``combine_rows`` for one matrix. Where ``LOCAL`` meets experts
whose body ``ops.expert_ffn`` knows, that one op takes the place of dispatch, experts and combine; any other dispatcher
takes the composed path.

Worked example, T=2 tokens, K=1, token 0 to expert 1 and token 1 to expert 0, both with weight 1:

    dispatch([[10.], [20.]])  ->  rows [[20.], [10.]], offsets [1, 2]
    combine(2 * rows)         ->  [[20.], [40.]]

Shape letters: T tokens, D model width, H expert hidden width, K top-k, R rows on this rank, F any width, O out width.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moefy import ops
from moefy.errors import DtypeError, ShapeError
from moefy.nn.routing.layout import TokenLayout, as_matrix
from moefy.nn.routing.routing import Routing
from moefy.nn.routing.token_tree import Tree, map_leaves


class Handle(Protocol):
    """A dispatcher's plan for one routing; what else it holds is the dispatcher's own affair."""

    @property
    def offsets(self) -> Tensor:
        """``[experts of this rank]`` int32, the end row of each."""
        ...

    @property
    def num_rows(self) -> int:
        """R, the rows that this rank's experts get."""
        ...


HandleT = TypeVar("HandleT", bound=Handle)


class Dispatcher(abc.ABC, Generic[HandleT]):
    """Moves tokens to experts and back; see the top of the file."""

    @abc.abstractmethod
    def plan(self, routing: Routing) -> HandleT:
        """Which rows go where, worked out once for any number of tensors."""

    @abc.abstractmethod
    def dispatch_rows(self, x_TF: Tensor, handle: HandleT) -> Tensor:
        """``[R, F]``: the rows that this rank's experts get of a matrix of tokens, of any dtype."""

    @abc.abstractmethod
    def combine_rows(self, y_RF: Tensor, handle: HandleT) -> Tensor:
        """``[T, F]``: each token's rows of a floating point matrix, summed by weight, in its dtype."""

    def row_limit(self, routing: Routing) -> int | None:
        """The most rows that one expert of this rank can get, where that is known without the data; else ``None``."""
        return None

    def dispatch(self, x: Tree, routing: Routing) -> tuple[Tree, Tensor, HandleT]:
        """Tokens to rows.

        Args:
            x: a tensor ``[T, ...]``, or a tree of such.
            routing: that of the T tokens.

        Returns:
            ``(rows, offsets, handle)``: ``[R, ...]`` in ``x``'s structure, sorted by expert; the end row of each
            expert; the plan that ``combine`` takes.
        """
        handle = self.plan(routing)
        rows = map_leaves(lambda leaf: _on_matrix(self.dispatch_rows, leaf, handle), x)
        return rows, handle.offsets, handle

    def combine(self, rows: Tree, handle: HandleT) -> Tree:
        """Rows to tokens: ``[R, ...] -> [T, ...]``, for a tensor or a tree of such.

        Raises:
            DtypeError: for a leaf that is not floating point.
        """
        return map_leaves(lambda leaf: self._combine_leaf(leaf, handle), rows)

    def _combine_leaf(self, leaf: Tensor, handle: HandleT) -> Tensor:
        if not leaf.is_floating_point():
            raise DtypeError(
                f"experts return floating point tensors, which are summed by weight; got {leaf.dtype}"
            )
        return _on_matrix(self.combine_rows, leaf, handle)


class LocalDispatcher(Dispatcher[Routing]):
    """All experts are in this process: R = T*K, and the routing itself is the plan."""

    def plan(self, routing: Routing) -> Routing:
        """The routing, which has order and offsets already."""
        return routing

    def dispatch_rows(self, x_TF: Tensor, handle: Routing) -> Tensor:
        """Gather each token once per slot, in the routing's order."""
        if not x_TF.is_floating_point():  # ids and masks, which have no gradient
            return x_TF.index_select(0, handle.order // handle.top_k)
        return ops.permute(x_TF, handle.order, handle.top_k)

    def combine_rows(self, y_RF: Tensor, handle: Routing) -> Tensor:
        """Sum each token's K rows by weight."""
        return ops.combine(y_RF, handle.top_k_weights, handle.order)

    def row_limit(self, routing: Routing) -> int | None:
        """The routing's capacity, where that is an int."""
        return None if isinstance(routing.capacity, Tensor) else routing.capacity

    def expert_ffn(self, x_TD: Tensor, routing: Routing, **ffn: Any) -> Tensor:
        """``[T, O]``: dispatch, a whole FFN and combine as one op; ``ffn`` are the arguments of ``ops.expert_ffn``."""
        return ops.expert_ffn(x_TD, routing.top_k_weights, routing.order, routing.offsets, **ffn)


LOCAL = LocalDispatcher()
"""The dispatcher of every layer that has no other."""


@dataclasses.dataclass(eq=False)
class Exchange:
    """What the entries and the exit of one FFN share while its rows are away; rows in a user's code carry it.

    Attributes:
        dispatcher: moves the rows.
        handle: its plan.
        layout: of the tokens that were routed.
        residual: ``[T, D]``, the tokens that lost all their slots, zeros elsewhere; ``None`` when none pass through.
    """

    dispatcher: Dispatcher[Any]
    handle: Handle
    layout: TokenLayout
    residual: Tensor | None = None


def begin_exchange(dispatcher: Dispatcher[Any], x: Tensor, routing: Routing) -> Exchange:
    """The exchange of ``x``, in the layout that was routed."""
    return Exchange(dispatcher, dispatcher.plan(routing), routing.layout, stranded_tokens(x, routing))


class GraphRouter(Protocol):
    """The router of a rewritten graph. No layer is left in such a graph, so the router holds the dispatcher."""

    dispatcher: Dispatcher[Any]

    def __call__(self, x: Tensor, feature_dim: int, /) -> Routing:
        """The routing of ``x``."""
        ...


def route_by(router: GraphRouter, x: Tensor, *, feature_dim: int = -1) -> Exchange:
    """Route ``x`` and begin its exchange: what a rewritten graph calls."""
    return begin_exchange(router.dispatcher, x, router(x, feature_dim))


def expert_entry(x: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, exchange: Exchange) -> Tensor:
    """The experts' first linear: tokens in, rows sorted by expert out.

    Args:
        x: the tokens, in the layout that was routed.
        weight_EOD: stacked weights of this rank's experts, ``nn.Linear`` layout.
        bias_EO: stacked biases.
        exchange: that of the FFN.

    Returns:
        R rows of O features in the rank of ``x``; see ``TokenLayout.rows_like``.
    """
    return expert_entries(x, [(weight_EOD, bias_EO)], exchange)[0]


def expert_entries(
    x: Tensor, linears: Sequence[tuple[Tensor, Tensor | None]], exchange: Exchange
) -> list[Tensor]:
    """``expert_entry`` of several linears that read the same tokens, which are dispatched once."""
    layout, handle = exchange.layout, exchange.handle
    rows_RD = exchange.dispatcher.dispatch_rows(layout.to_tokens(x), handle)
    return [
        layout.rows_like(ops.grouped_linear(rows_RD, weight, bias, handle.offsets))
        for weight, bias in linears
    ]


def expert_exit(rows: Tensor, weight_EOH: Tensor, bias_EO: Tensor | None, exchange: Exchange) -> Tensor:
    """The experts' last linear and the weighted sum over each token's experts.

    Args:
        rows: what the body made of ``expert_entry``'s rows.
        weight_EOH: stacked weights of this rank's experts, ``nn.Linear`` layout.
        bias_EO: stacked biases.
        exchange: that of the FFN.

    Returns:
        The routed layout with O features. Rows that the body flattened to ``[R, H]`` come back flat, ``[T, O]``, as the
        dense linear would have returned them.

    Raises:
        RoutingError: when ``rows`` are not R rows, or have another rank.
        ShapeError: when a token must pass through and O is not D.
    """
    layout, handle = exchange.layout, exchange.handle
    rows_RH = layout.rows_to_matrix(rows, handle.num_rows)
    y_RO = ops.grouped_linear(rows_RH, weight_EOH, bias_EO, handle.offsets)
    y_TO = exchange.dispatcher.combine_rows(y_RO, handle)
    y = y_TO if layout.is_flat(rows) else layout.from_tokens(y_TO)
    return add_residual(y, exchange.residual, layout)


def stranded_tokens(x: Tensor, routing: Routing) -> Tensor | None:
    """``[T, D]``: the tokens of ``x`` that capacity left without any expert, zeros elsewhere; ``None`` without such."""
    if routing.stranded is None:
        return None
    return routing.layout.to_tokens(x).masked_fill(~routing.stranded.unsqueeze(1), 0.0)


def add_residual(y: Tensor, residual_TD: Tensor | None, layout: TokenLayout) -> Tensor:
    """``y``, in ``layout`` or flat, with the tokens that pass through in the place of the stranded ones.

    Raises:
        ShapeError: when the experts changed the width, so that a token cannot pass.
    """
    if residual_TD is None:
        return y
    x = residual_TD if layout.is_flat(y) else layout.from_tokens(residual_TD)
    if x.shape != y.shape:
        raise ShapeError(
            f"a token without a seat cannot pass through experts that make {tuple(y.shape)} of {tuple(x.shape)}; "
            "use a Capacity with residual=False"
        )
    return y + x.to(y.dtype)


def _on_matrix(move: Callable[[Tensor, HandleT], Tensor], leaf: Tensor, handle: HandleT) -> Tensor:
    """``move`` of ``[n, ...]`` as a matrix, back in its trailing shape."""
    moved = move(as_matrix(leaf), handle)
    return moved if leaf.dim() == 2 else moved.reshape(moved.shape[0], *leaf.shape[1:])
