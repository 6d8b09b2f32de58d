"""Experts as stacked weights: entry linears, a body, an exit linear, run on routed tokens.

Contract: a module ("owner") holds the stacked parameters under names of its choice; ``WeightRef`` says which. A body
that ``ops.expert_ffn`` knows runs as that one op, any other as entry, body and exit.

    owner.entries = (WeightRef("up.weight", "up.bias"),)
    owner.exit = WeightRef("down.weight", "down.bias")
    owner.body = Body.of("gelu")
    y = run_stacked(owner, x, router(x))

Shape letters: T tokens, D model width, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import nn

from moefy import ops
from moefy.nn import functional
from moefy.nn.experts.body import Body, KnownBody, resolve
from moefy.nn.routing.routing import Routing


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


def run_stacked(owner: Owner, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """The weighted sum of the experts' outputs for ``x``, which ``routing`` was made for, in its layout."""
    known = owner.body.fused(cast(nn.Module, owner))
    return _run_body(owner, x, routing) if known is None else _run_fused(owner, x, routing, known)


def stacked_parameters(owner: Owner) -> Iterator[torch.Tensor]:
    """The parameters with an axis of experts, in the order of the linears."""
    for ref in (*owner.entries, owner.exit):
        yield from (value for value in ref.of(cast(nn.Module, owner)) if value is not None)


def _run_body(owner: Owner, x: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Entry, the body as it is written, exit."""
    module, axis = cast(nn.Module, owner), routing.feature_dim
    linears = [entry.of(module) for entry in owner.entries]
    rows = functional.expert_entries(x, linears, routing.order, routing.offsets, routing.top_k, axis)
    weight, bias = owner.exit.of(module)
    return functional.expert_exit(
        owner.body(module, *rows),
        weight,
        bias,
        routing.top_k_weights,
        routing.order,
        routing.offsets,
        routing.leading,
        feature_dim=axis,
    )


def _run_fused(owner: Owner, x: torch.Tensor, routing: Routing, known: KnownBody) -> torch.Tensor:
    """The whole FFN as one op."""
    module, axis = cast(nn.Module, owner), routing.feature_dim
    linears = [entry.of(module) for entry in owner.entries]
    gate = linears[known.gate] if known.glu == "separate" else (None, None)
    up = linears[1 - known.gate] if known.glu == "separate" else linears[0]
    y_TD = ops.expert_ffn(
        functional.as_tokens(x, axis),
        routing.top_k_weights,
        routing.order,
        routing.offsets,
        *up,
        *owner.exit.of(module),
        w_gate=gate[0],
        b_gate=gate[1],
        activation=known.activation,
        glu=known.glu,
    )
    return functional.from_tokens(y_TD, routing.leading, axis)
