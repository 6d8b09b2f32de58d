"""Dispatchers that a layer does not have by itself, in one process: an all-to-all, one rank of two, another order.

Contract: plain loops over slots and ``index_add``, nothing of ``moefy.ops``, but for ``Reversed``, which Dynamo traces.
``placed(model, order)`` puts a model's experts where ``AllToAll(order)`` looks for them.

    >>> twin = use(placed(model, (2, 0, 3, 1)), AllToAll((2, 0, 3, 1)))
    >>> torch.allclose(twin(x), model(x))
    True
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moefy import ops
from moefy.nn import Dispatcher, EntryLinear, MoE, Router, Routing
from moefy.nn.experts.modules import ExpertList
from nn.blocks import E


@dataclasses.dataclass(eq=False)
class Sent:
    """Rows by slot: ``slots[r]`` is the slot of row r, -1 for a row that pads; behind them, rows of no expert."""

    offsets: Tensor
    slots: list[int]
    weights_TK: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.slots)


class BySlot(Dispatcher[Sent]):
    """Moves rows by a list of slots, and counts its plans and the matrices that it dispatched."""

    def __init__(self) -> None:
        self.plans, self.dispatched = 0, 0

    def rows_of(self, routing: Routing, expert: int, ids: list[int]) -> list[int]:
        """The slots of ``expert`` in the order of its rows."""
        return [slot for slot, e in enumerate(ids) if e == expert]

    def experts(self, routing: Routing) -> Sequence[int]:
        """The experts of this rank."""
        return range(routing.num_experts)

    def plan(self, routing: Routing) -> Sent:
        self.plans += 1
        ids, slots, ends = routing.top_k_index.flatten().tolist(), [], []
        for expert in self.experts(routing):
            slots += self.rows_of(routing, expert, ids)
            ends.append(len(slots))
        return Sent(torch.tensor(ends, dtype=torch.int32), slots, routing.top_k_weights)

    def dispatch_rows(self, x_TF: Tensor, handle: Sent) -> Tensor:
        self.dispatched += 1
        top_k = handle.weights_TK.shape[1]
        tokens = [
            max(slot, 0) // top_k for slot in handle.slots
        ]  # rows that pad are copies of the first token
        return x_TF[tokens] if len(x_TF) else x_TF

    def combine_rows(self, y_RF: Tensor, handle: Sent) -> Tensor:
        top_k = handle.weights_TK.shape[1]
        kept = [(row, slot) for row, slot in enumerate(handle.slots) if slot >= 0]
        rows, slots = (torch.tensor(column, dtype=torch.int64) for column in zip(*kept, strict=True))
        weights = handle.weights_TK.flatten()[slots].unsqueeze(1)
        out_TF = y_RF.new_zeros(handle.weights_TK.shape[0], y_RF.shape[1])
        return out_TF.index_add(0, slots // top_k, (y_RF[rows] * weights).to(y_RF.dtype))


class AllToAll(BySlot):
    """Two ranks, each with half of the tokens, whose rows meet at the experts; these lie in another order.

    An expert's rows are those of rank 0, then those of rank 1, then copies of a token up to a multiple of 4. Dropped
    slots are not sent. Two rows of no expert come last.
    """

    ALIGN = 4

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = order

    def experts(self, routing: Routing) -> Sequence[int]:
        return self.order

    def rows_of(self, routing: Routing, expert: int, ids: list[int]) -> list[int]:
        half = routing.layout.num_tokens // 2 * routing.top_k
        mine = super().rows_of(routing, expert, ids)
        rows = [s for s in mine if s < half] + [s for s in mine if s >= half]
        return rows + [-1] * (-len(rows) % self.ALIGN)

    def plan(self, routing: Routing) -> Sent:
        sent = super().plan(routing)
        return dataclasses.replace(sent, slots=[*sent.slots, -1, -1])

    def row_limit(self, routing: Routing) -> int | None:
        return None if not isinstance(routing.capacity, int) else -(-routing.capacity // 4) * 4


class OneRank(BySlot):
    """One of several ranks that all have every token and some of the experts; their outputs are to be added."""

    def __init__(self, experts: Sequence[int]) -> None:
        super().__init__()
        self.own = experts

    def experts(self, routing: Routing) -> Sequence[int]:
        return self.own


class Reversed(Dispatcher[Routing]):
    """All rows, the last expert's first."""

    def plan(self, routing: Routing) -> Routing:
        last = routing.num_experts - 1
        order_N, offsets_E = ops.sort_by_expert(last - routing.top_k_index, routing.num_experts)
        return dataclasses.replace(routing, order=order_N, offsets=offsets_E)

    def dispatch_rows(self, x_TF: Tensor, handle: Routing) -> Tensor:
        return x_TF[handle.order // handle.top_k]

    def combine_rows(self, y_RF: Tensor, handle: Routing) -> Tensor:
        return ops.combine(y_RF, handle.top_k_weights, handle.order)


def placed(model: nn.Module, order: Sequence[int]) -> nn.Module:
    """A copy of ``model`` whose i-th expert is the one that was ``order[i]``; an order may leave experts out."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, ExpertList):
            module._modules = {str(i): module[e] for i, e in enumerate(order)}
        for name, parameter in module._parameters.items():
            if is_stacked(module, parameter):
                module._parameters[name] = nn.Parameter(parameter.detach()[list(order)])
    return model


def is_stacked(module: nn.Module, parameter: Tensor | None) -> bool:
    """Whether it is a stack of E experts' weights, which the tests tell by its first size."""
    return (
        parameter is not None
        and parameter.dim() > 1
        and parameter.shape[0] == E
        and not isinstance(module, Router)
    )


def use(model: nn.Module, dispatcher: Dispatcher[Any]) -> nn.Module:
    """``model`` with that dispatcher in every layer; in the routers of a graph, which has no layers."""
    holders = Router if isinstance(model, fx.GraphModule) else MoE | EntryLinear
    for module in model.modules():
        if isinstance(module, holders):
            module.dispatcher = dispatcher
    return model
