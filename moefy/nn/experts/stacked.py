"""Experts as stacked weights: entry linears, a body, an exit linear, run on routed tokens.

Contract: a module ("owner") holds the stacked parameters under names of its choice; ``WeightRef`` says which. Where all
experts are in this process, a body that ``ops.expert_ffn`` knows runs as that one op. Any other body, and any other
dispatcher, runs as dispatch, entries, body, exit and combine.

    owner.entries = (WeightRef("up.weight", "up.bias"),)
    owner.exit = WeightRef("down.weight", "down.bias")
    owner.body = Body.of("gelu")
    y = run_stacked(owner, x, router(x), owner.dispatcher)

Shape letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn

from moefy.nn.dispatch import Dispatcher, Exchange, LocalDispatcher, expert_entries, expert_exit
from moefy.nn.experts.body import Body, resolve
from moefy.nn.routing.routing import Routing
from moefy.records import KnownBody


@dataclasses.dataclass(frozen=True)
class WeightRef:
    """Where a stacked linear's parameters are: attribute paths relative to the owner.

    ``weight`` is ``[E, out, in]``, ``bias`` ``[E, out]`` or ``None``.
    """

    weight: str
    bias: str | None = None

    def of(self, owner: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(weight, bias)`` as they are on ``owner`` now."""
        return resolve(owner, self.weight), None if self.bias is None else resolve(owner, self.bias)


class Owner(Protocol):
    """A module with experts as stacked weights."""

    entries: tuple[WeightRef, ...]
    exit: WeightRef
    body: Body


def run_stacked(owner: Owner, x: torch.Tensor, routing: Routing, dispatcher: Dispatcher[Any]) -> torch.Tensor:
    """The weighted sum of the experts' outputs for ``x``.

    Args:
        owner: of the weights of this rank's experts.
        x: in the layout that was routed.
        routing: that of ``x``.
        dispatcher: moves the rows.

    Returns:
        The routed layout, with the exit's width. Tokens that lost all their slots are zeros.
    """
    known = owner.body.fused(cast(nn.Module, owner))
    if known is not None and isinstance(dispatcher, LocalDispatcher):
        return _run_fused(owner, x, routing, dispatcher, known)
    return _run_composed(owner, x, Exchange(dispatcher, dispatcher.plan(routing), routing.layout))


def stacked_parameters(owner: Owner) -> Iterator[torch.Tensor]:
    """The parameters with an axis of experts, in the order of the linears."""
    for ref in (*owner.entries, owner.exit):
        yield from (value for value in ref.of(cast(nn.Module, owner)) if value is not None)


def _run_composed(owner: Owner, x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Dispatch and entries, the body as it is written, exit and combine."""
    module = cast(nn.Module, owner)
    rows = expert_entries(x, [entry.of(module) for entry in owner.entries], exchange)
    return expert_exit(owner.body(module, *rows), *owner.exit.of(module), exchange)


def _run_fused(
    owner: Owner, x: torch.Tensor, routing: Routing, dispatcher: LocalDispatcher, known: KnownBody
) -> torch.Tensor:
    """Dispatch, the whole FFN and combine as one op."""
    module, layout = cast(nn.Module, owner), routing.layout
    linears = [entry.of(module) for entry in owner.entries]
    w_gate, b_gate = linears[known.gate] if known.glu == "separate" else (None, None)
    w_up, b_up = linears[1 - known.gate] if known.glu == "separate" else linears[0]
    w_down, b_down = owner.exit.of(module)
    y_TD = dispatcher.expert_ffn(
        layout.to_tokens(x),
        routing,
        w_up=w_up,
        b_up=b_up,
        w_down=w_down,
        b_down=b_down,
        w_gate=w_gate,
        b_gate=b_gate,
        activation=known.activation,
        glu=known.glu,
    )
    return layout.from_tokens(y_TD)
