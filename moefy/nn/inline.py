"""``EntryLinear`` and ``ExitLinear``: stand in for the linears of an FFN whose code stays the user's.

Contract: ``fc2(dropout(gelu(fc1(x))))`` inside a block becomes an MoE by swapping ``fc1`` and ``fc2`` in place.

    fc1 = EntryLinear(...)   tokens -> rows sorted by expert (``RoutedRows``), in the rank of the dense activation
    gelu, dropout, ...       the user's code, on the rows
    fc2 = ExitLinear(...)    rows -> tokens, weighted over each token's experts

The first entry, the leader, owns the router and the dispatcher. At each call it routes and begins an ``Exchange``,
which the rows carry to the exit. With several entries (``w2(silu(w1(x)) * w3(x))``) the leader also attaches the
exchange to the tensor ``x`` itself; the others read it there, the last one removes it. So all entries share one
routing, also when the router is noisy, when a checkpoint runs the block again on the same ``x``, and when the same FFN
is called several times. Each entry dispatches ``x`` itself under the shared plan, since the user's code may write to
``x`` between two entries.

``make_fx`` and non-strict ``torch.export`` lose tensor subclasses. There the exchange waits in the ``FFNLink`` that the
entries and the exit share.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from moefy.errors import RoutingError, ShapeError
from moefy.nn.dispatch import LOCAL, Dispatcher, Exchange, begin_exchange, expert_entry, expert_exit
from moefy.nn.execution import assign
from moefy.nn.experts.linear import ExpertLinear
from moefy.nn.routed_rows import Mark, Ticket, mark_of, with_mark
from moefy.nn.routers import Router
from moefy.nn.routing.layout import feature_axis

SOURCE_ATTRIBUTE = "_moefy_routing_by_ffn"
MAX_WAITING = 3  # exchanges whose exit never came (an error in the body) are dropped behind these


class FFNLink:
    """What the entries and the exit of one FFN share: its name, and the exchanges that wait for the exit.

    Rows carry their exchange themselves. The link is for two cases. Inside a compiled frame rows carry
    a ``Ticket`` and the exchange waits here: tensors that hang on the rows would become outputs of a
    higher-order op in the body, and that of ``autograd.Function`` drops their gradients. And where a
    body loses the subclass (``make_fx``, ``torch.jit.script``, functions that Dynamo does not dispatch)
    the exit takes the exchange that waits, which is that of the FFN's last call.

    Copies and pickles drop the exchanges; ``deepcopy`` of a whole FFN gives its parts one new link.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.compiled: tuple[tuple[Ticket, Exchange], ...] = ()
        self.eager = threading.local()  # DataParallel runs replicas that share the link in threads

    def put(self, exchange: Exchange) -> Mark:
        """Leave ``exchange`` for the exit and return the mark for the rows."""
        if torch.compiler.is_dynamo_compiling():
            ticket = Ticket()
            assign(self, "compiled", (*self.compiled[-MAX_WAITING:], (ticket, exchange)))
            return ticket
        self.eager.exchange = exchange
        if self.compiled:
            self.compiled = ()
        return exchange

    def take(self, mark: Mark | None) -> Exchange | None:
        """The exchange that ``mark`` stands for; without a mark that of the last call."""
        if isinstance(mark, Exchange):
            self._forget()
            return mark
        for ticket, exchange in self.compiled:
            if mark is ticket or (mark is None and len(self.compiled) == 1):
                left = tuple(pair for pair in self.compiled if pair[0] is not ticket)
                assign(self, "compiled", left)
                return exchange
        if mark is not None or torch.compiler.is_dynamo_compiling():
            return None
        exchange = getattr(self.eager, "exchange", None)
        self._forget()
        return exchange

    def _forget(self) -> None:
        """Drop the exchange that waits in eager mode."""
        if not torch.compiler.is_dynamo_compiling():
            self.eager.exchange = None

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        return f"FFNLink({self.name!r})"


class EntryLinear(ExpertLinear):
    """An FFN's first linear as E experts; the leader also holds ``router``.

    Args:
        in_features: D.
        out_features: width of its rows.
        num_experts: E.
        bias: whether the experts have biases.
        feature_dim: the feature axis of its input: -1 for linears, -3 for a 1x1 ``nn.Conv2d``.
        link: the FFN's, shared by its entries and its exit.
        index: this entry's place among the FFN's entries in the order of their calls; 0 is the leader.
        count: how many entries the FFN has.
        router: the leader's router; ``None`` for the others.
        device: where the parameters live.
        dtype: their dtype.

    The leader's ``dispatcher`` moves the rows of the whole FFN; see ``moefy.nn.dispatch``.

    Raises:
        RoutingError: from ``forward`` of a follower when its leader did not see the same tensor before.
    """

    dispatcher: Dispatcher[Any] = LOCAL

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        bias: bool,
        feature_dim: int = -1,
        link: FFNLink,
        index: int = 0,
        count: int = 1,
        router: Router | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, num_experts, bias, device=device, dtype=dtype)
        if (router is None) != (index > 0):
            raise RoutingError(f"{link.name}: exactly the first entry holds the router; got index {index}")
        self.feature_dim, self.link, self.index, self.count = feature_dim, link, index, count
        if router is not None:
            self.router = router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``x``'s rank that carry their exchange."""
        axis = feature_axis(x.dim(), self.feature_dim)
        if x.shape[axis] != self.in_features:
            raise ShapeError(
                f"{self.link.name}: expected {self.in_features} features on axis "
                f"{self.feature_dim}; got {tuple(x.shape)}"
            )
        exchange, mark = self._lead(x) if self.index == 0 else self._follow(x)
        rows = expert_entry(x, self.weight, self.bias, exchange)
        return with_mark(rows, mark) if carries_subclass(x) else rows

    @property
    def l_aux(self) -> torch.Tensor | None:
        """The FFN's weighted auxiliary loss in the last training forward, where this entry holds the router."""
        router = self._modules.get("router")
        return router.l_aux if isinstance(router, Router) else None

    def _lead(self, x: torch.Tensor) -> tuple[Exchange, Mark]:
        """Route ``x``; leave the exchange on it for the other entries and on the link for the exit."""
        exchange = begin_exchange(self.dispatcher, x, self.router(x, self.feature_dim))
        mark = self.link.put(exchange)
        if self.count > 1:
            assign(x, SOURCE_ATTRIBUTE, (self.link, exchange, mark))
        return exchange, mark

    def _follow(self, x: torch.Tensor) -> tuple[Exchange, Mark]:
        """The exchange that the leader left on ``x``, and its mark."""
        left = getattr(x, SOURCE_ATTRIBUTE, None)
        if left is None or left[0] is not self.link:
            raise RoutingError(
                f"{self.link.name}: entry {self.index} got a tensor that the FFN's first entry has "
                "not routed. All entries must read the same tensor object, the first one first"
            )
        if self.index == self.count - 1:
            assign(x, SOURCE_ATTRIBUTE, None)
        return left[1], left[2]


class ExitLinear(ExpertLinear):
    """An FFN's last linear as E experts, and the weighted sum over each token's experts.

    Args:
        in_features: width of the rows.
        out_features: D.
        num_experts: E.
        bias: whether the experts have biases.
        feature_dim: the feature axis, as for the entries.
        link: the FFN's, shared by its entries and its exit.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        RoutingError: from ``forward`` when the rows carry no routing or are not the rows that the entry sent.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        bias: bool,
        feature_dim: int = -1,
        link: FFNLink,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, num_experts, bias, device=device, dtype=dtype)
        self.feature_dim, self.link = feature_dim, link

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens in the leading shape that was routed, a plain tensor."""
        exchange = self.link.take(mark_of(rows))
        if exchange is None:
            raise RoutingError(
                f"{self.link.name}: the exit got rows without a routing. Something between the "
                "entry and the exit returned a plain tensor: a compiled region that ends there, or "
                "an extension that ignores tensor subclasses"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return expert_exit(rows, self.weight, self.bias, exchange)


def carries_subclass(x: torch.Tensor) -> bool:
    """Whether rows made from ``x`` can be ``RoutedRows``: always under Dynamo, never under a dispatch mode."""
    if torch.compiler.is_dynamo_compiling():
        return True
    tracing = _len_torch_dispatch_stack_pre_dispatch() > 0 or _get_current_dispatch_mode() is not None
    return not tracing and type(x) in PLAIN_TYPES


PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
