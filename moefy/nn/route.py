"""``route``: the step between a router's choice and a dispatcher: seats, order, observation.

    choice                      which experts, with which weights        moefy.nn.routers
    -> seats                    capacity drops slots                     moefy.nn.routing.capacity
    -> order, offsets           slots sorted by expert: a ``Routing``    here
    -> load, auxiliary loss     kept in training forwards                here
    -> rows                     moved to the experts                     moefy.nn.dispatch

Contract: the step does not depend on how a router scores or chooses, so no router defines any of it.
``Router.forward`` calls it last, and a layer gets it by calling its router. The layer does not call it itself for one
reason: ``router(x)`` is public. A forward hook on a router sees the ``Routing`` as the experts get it, a router alone
counts its load and has its loss, and ``torch.compile``, ``torch.export``, checkpoints and DistributedDataParallel see
one module with one output. For the same reason ``capacity``, ``aux_loss``, ``aux_state`` and ``load_counter`` live on
the router: reports, the delivery of losses and DataParallel's replicas find them there.

Shape letters: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from moefy import ops
from moefy.config import AuxLoss, Capacity
from moefy.nn.counters import LoadCounter
from moefy.nn.execution import exporting, in_backward
from moefy.nn.losses.layer import AuxState, Injected, layer_loss
from moefy.nn.routing.capacity import DEFAULT_CAPACITY, Seats, seat
from moefy.nn.routing.layout import TokenLayout
from moefy.nn.routing.routing import Choice, Routing


class RoutesTokens(Protocol):
    """What the step reads of a router, and where it keeps the load and the loss."""

    num_experts: int
    training: bool
    capacity: Capacity | None
    aux_loss: AuxLoss | None
    aux_state: AuxState
    load_counter: LoadCounter


def route(
    router: RoutesTokens,
    choice: Choice,
    layout: TokenLayout,
    *,
    top_k: int,
    capacity_factor: float | None = None,
) -> Routing:
    """The routing of a choice, observed.

    Args:
        router: whose capacity holds, and which keeps the load and the loss.
        choice: what it decided, padding dropped.
        layout: of the tokens.
        top_k: K of the capacity formulas; a choice may have more slots than that.
        capacity_factor: a factor for this call, in the place of the capacity's own.

    Raises:
        ConfigError: for a factor that is not finite.
    """
    seats = None
    if router.capacity is not None or capacity_factor is not None:
        capacity = DEFAULT_CAPACITY if router.capacity is None else router.capacity
        seats = seat(
            choice,
            capacity,
            router.num_experts,
            top_k,
            training=router.training,
            factor=capacity_factor,
        )
    return observe(router, make_routing(choice, router.num_experts, layout, seats))


def make_routing(
    choice: Choice, num_experts: int, layout: TokenLayout, seats: Seats | None = None
) -> Routing:
    """The slots of ``choice``, or those that kept their ``seats``, sorted by expert."""
    kept = choice if seats is None else seats
    order_N, offsets_E = ops.sort_by_expert(kept.index, num_experts)
    return Routing(
        top_k_index=kept.index,
        top_k_weights=kept.weights,
        order=order_N,
        offsets=offsets_E,
        choice=choice,
        layout=layout,
        capacity=None if seats is None else seats.capacity,
        stranded=None if seats is None else seats.stranded,
    )


def observe(router: RoutesTokens, routing: Routing) -> Routing:
    """Count the load and keep the auxiliary loss of a training forward; returns the routing to go on with.

    That is another one only where a reentrant checkpoint recomputes: there the auxiliary loss enters the graph.
    """
    state = router.aux_state
    if not router.training or exporting():
        state.clear()
        return routing
    router.load_counter.count(routing)
    if router.aux_loss is None:
        return routing
    l_aux = layer_loss(router.aux_loss, routing, router.num_experts, router.load_counter, state.group)
    recomputes = None if torch.compiler.is_dynamo_compiling() else in_backward()
    if state.scale is not None and recomputes is not False and l_aux.requires_grad:
        (weights_TK,) = Injected.apply(l_aux, state.scale, routing.top_k_weights)
        return dataclasses.replace(routing, top_k_weights=weights_TK)
    if not recomputes:
        state.note(l_aux)
    return routing
