"""Hash: the expert is a fixed random function of the token's vocabulary id, or of its position (Roller et al. 2021).

T tokens, E experts, K top-k, V table size.

    index_k = (table[id mod V] + k) mod E     w = 1 / K     table = a random permutation of 0..V-1, mod E

Contract: balanced over ids (every expert gets V/E of them, up to one), deterministic by seed and layer name, no
parameters, nothing to learn. Ids come with the call (``token_ids=``), from the attribute ``token_ids``, or from a
model's own argument: ``route_by_token_ids(model)``. With ``by="position"`` the router needs no ids.

    >>> router = HashRouter(16, 8, 1, by="token", size=50_000)
    >>> router(x, token_ids=input_ids)
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moefy.config.fields import is_int
from moefy.errors import ConfigError, DtypeError, RoutingError, ShapeError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routing.layout import TokenLayout, numel
from moefy.nn.routing.routing import Choice
from moefy.nn.seeding import seeded_generator

By = Literal["position", "token"]


def hash_table(size: int, num_experts: int, seed: int, fqn: str) -> Tensor:
    """``[V]`` int64 on the CPU: a balanced random map from ids to experts."""
    return torch.randperm(size, generator=seeded_generator(seed, f"{fqn}:hash")) % num_experts


def positions(leading: tuple[int, ...], device: torch.device) -> Tensor:
    """``[T]`` int64: the place of each token within its row, the first of two or more leading axes being the batch."""
    if len(leading) < 2:
        return torch.arange(numel(leading), device=device)
    own = numel(leading[1:])
    return torch.arange(own, device=device).expand(leading[0], own).reshape(-1)


@register_router("hash")
class HashRouter(Router):
    """Random hash routing.

    Args:
        top_k: K; the paper has 1.
        by: "token" hashes vocabulary ids, "position" the place in the sequence.
        size: V, the vocabulary or the longest sequence; larger ids wrap around.
        options: of ``Router``.

    Buffers:
        ``table [V]`` int64, saved with the model.

    Raises:
        ConfigError: for values outside their domain.
        RoutingError: from ``forward``, by token and without ids.
        ShapeError: from ``forward``, for ids that are not one per token.
        DtypeError: from ``forward``, for ids that are no integers.
    """

    formula: ClassVar[str] = "c = table[id or position] + k;  w = 1 / K"
    source: ClassVar[str] = "Roller et al. 2021"
    table: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int = 1,
        *,
        by: By = "position",
        size: int = 65536,
        **options: Any,
    ) -> None:
        if by not in get_args(By):
            raise ConfigError("by", got=by, expected=f"one of {get_args(By)}")
        if not is_int(size, num_experts):
            raise ConfigError("size", got=size, expected=f"size >= num_experts = {num_experts}")
        self.by, self.size = by, size
        super().__init__(d_model, num_experts, top_k, **options)
        self.token_ids: Tensor | None = None

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create the table of experts."""
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.register_buffer("table", torch.empty(self.size, dtype=torch.int64, device=like.get("device")))

    def reset_parameters(self) -> None:
        """Fill the table; the same values every time and on every rank."""
        if not self.table.is_meta:
            self.table.copy_(hash_table(self.size, self.num_experts, self.seed, self.fqn))

    @property
    def self_contained(self) -> bool:
        """Whether the router hashes positions, which need no ids."""
        return self.by == "position"

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The experts of the table; the scores are 1 / K for these."""
        layout = TokenLayout.of(x, call.feature_dim)
        tokens = layout.num_tokens
        ids_T = positions(layout.leading, x.device) if self.by == "position" else self._ids(call, tokens)
        first_T = self.table[ids_T.remainder(self.size)]
        slots_K = torch.arange(call.top_k, device=x.device)
        index_TK = (first_T.unsqueeze(1) + slots_K) % self.num_experts
        dtype = torch.promote_types(x.dtype, torch.float32)
        chosen_TE = torch.zeros((tokens, self.num_experts), dtype=dtype, device=x.device)
        scores_TE = chosen_TE.scatter(1, index_TK, 1 / call.top_k)
        weights_TK = torch.full_like(index_TK, 1 / call.top_k, dtype=dtype)
        return Choice(index=index_TK, weights=weights_TK, logits=scores_TE.log(), scores=scores_TE)

    def _ids(self, call: Call, tokens: int) -> Tensor:
        ids = self.token_ids if call.token_ids is None else call.token_ids
        if ids is None:
            raise RoutingError(
                f"{self.fqn or 'the hash router'}: no token ids; pass token_ids=, set router.token_ids, or call "
                "moefy.nn.routers.route_by_token_ids(model)"
            )
        if ids.numel() != tokens:
            raise ShapeError(f"{self.fqn or 'the hash router'}: {ids.numel()} token ids for {tokens} tokens")
        if ids.is_floating_point() or ids.is_complex():
            raise DtypeError(f"{self.fqn or 'the hash router'}: token ids are integers; got {ids.dtype}")
        return ids.reshape(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token_ids": None}


def route_by_token_ids(model: nn.Module, argument: str = "input_ids") -> RemovableHandle:
    """Give every ``HashRouter`` in ``model`` the ids that ``model`` is called with.

    The routers hold the ids of the last call. A checkpointed block that is run again in a backward reads them there: do
    each backward before the next forward, or pass ``token_ids`` through the checkpointed call.

    Args:
        model: whatever is called with the ids.
        argument: the name of that argument of its forward.

    Returns:
        A handle; ``.remove()`` ends it.

    Raises:
        ConfigError: when the forward has no such argument.
    """
    names = list(inspect.signature(model.forward).parameters)
    if argument not in names:
        raise ConfigError("argument", got=argument, expected=f"one of {names}")
    give = functools.partial(_give_token_ids, argument=argument, place=names.index(argument))
    return model.register_forward_pre_hook(give, with_kwargs=True)


def _give_token_ids(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, argument: str, place: int
) -> None:
    """The hook. It asks ``module`` for its routers at every call, since a copy or a replica has its own."""
    ids = kwargs[argument] if argument in kwargs else args[place] if place < len(args) else None
    for router in module.modules():
        if isinstance(router, HashRouter):
            router.token_ids = ids
