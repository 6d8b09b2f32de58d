"""``Router``: scores every token against E experts and keeps the best K; the base of every other router.

Contract: ``weight [E, D]`` is drawn from a generator of its own, seeded by the seed and the layer's name, so that every
rank draws the same matrix and the global random state is untouched. The maths is in fp32 (fp64 for fp64 inputs).

    >>> router = Router(d_model=16, num_experts=4, top_k=2, fqn="layers.0.mlp")
    >>> router(torch.randn(2, 5, 16)).top_k_index.shape
    torch.Size([10, 2])

A forward decides and then sorts the slots by expert. To ``decide`` is to score the tokens (``logits``) and to pick
experts by the scores (``choose``). A router of another kind overrides ``logits`` where only the scores differ,
``choose`` where only the choice does, and ``decide`` when it needs the tokens themselves or the mask.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn

from moefy.config import AuxLoss, Capacity
from moefy.config.fields import is_finite, is_int
from moefy.errors import ConfigError, ShapeError
from moefy.nn import functional
from moefy.nn.checked import check_scores
from moefy.nn.load import LoadCounter, exporting, in_backward
from moefy.nn.losses.layer import AuxState, Injected, layer_loss
from moefy.nn.routing.capacity import DEFAULT_CAPACITY, Seats, seat
from moefy.nn.routing.routing import Choice, Routing
from moefy.nn.seeding import seeded_generator


@dataclasses.dataclass(eq=False, kw_only=True)
class Call:
    """What one forward asks of a router, beside the tokens.

    Attributes:
        top_k: K for this call.
        feature_dim: the feature axis of the tokens.
        mask: ``[T]`` bool, True = a real token; ``None`` means all are. The slots of the others are dropped afterwards,
            so a router reads it only where tokens compete or are counted.
        router_index: which of several routers decides; ``None`` is the default one.
        token_ids: ``[T]`` int64, the vocabulary ids of the tokens, for routers that hash them.
    """

    top_k: int
    feature_dim: int = -1
    mask: torch.Tensor | None = None
    router_index: int | None = None
    token_ids: torch.Tensor | None = None


class Router(nn.Module):
    """A linear scorer without bias, top-k of its logits and a softmax over the chosen K (Mixtral's order).

    Args:
        d_model: D, the width of a token.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        std: standard deviation of the normal initialisation.
        bias: adds a learnable ``bias [E]`` to the logits, zero at first (FastMoE's ``gate_bias``).
        seed: seeds the initialisation together with ``fqn``.
        fqn: the layer's name, so that layers differ.
        device: where ``weight`` lives.
        dtype: its dtype.

    A subclass may override ``logits`` (say, to add noise), ``choose`` or ``decide``: everything behind them is shared.

    Raises:
        ConfigError: for sizes outside their domain.
    """

    only_top_k: ClassVar[int | None] = None
    """The one K of a router that is defined for one alone."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        std: float = 0.02,
        bias: bool = False,
        seed: int = 0,
        fqn: str = "",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_int(d_model, 1):
            raise ConfigError("d_model", got=d_model, expected="an int >= 1")
        if not is_int(num_experts, 1):
            raise ConfigError("num_experts", got=num_experts, expected="an int >= 1")
        if not (is_finite(std) and std >= 0):
            raise ConfigError("std", got=std, expected="a finite number >= 0")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.check_top_k(top_k)
        self.std, self.seed, self.fqn = std, seed, fqn
        self.capacity: Capacity | None = None
        self.aux_loss: AuxLoss | None = None
        self.aux_state = AuxState()
        self.load_counter = LoadCounter(num_experts, device)
        self.make_parameters(bias, device=device, dtype=dtype)
        self.reset_parameters()

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create what ``reset_parameters`` fills. A router without a linear scorer creates nothing here."""
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.d_model, **like))
        self.bias = nn.Parameter(torch.empty(self.num_experts, **like)) if bias else None

    def reset_parameters(self) -> None:
        """Draw ``weight`` again; the same values every time and on every rank."""
        router_init_(self.weight, self.seed, self.fqn, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def check_top_k(self, top_k: int) -> None:
        """Raise ``ConfigError`` for a K that this router does not have."""
        if not (is_int(top_k, 1) and top_k <= self.num_experts):
            raise ConfigError("top_k", got=top_k, expected=f"1 <= top_k <= num_experts = {self.num_experts}")
        if self.only_top_k is not None and top_k != self.only_top_k:
            raise ConfigError(
                "top_k", got=top_k, expected=f"{self.only_top_k}, as {type(self).__name__} has it"
            )

    def logits(self, x: torch.Tensor, feature_dim: int = -1) -> torch.Tensor:
        """``[T, E]`` scores of the tokens of ``x``."""
        logits_TE = functional.router_logits(x, self.weight, feature_dim)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)

    def choose(self, logits_TE: torch.Tensor, top_k: int) -> Choice:
        """The experts that ``logits_TE`` pick."""
        weights_TK, index_TK = functional.top_k_softmax(logits_TE, top_k)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE)

    def decide(self, x: torch.Tensor, call: Call) -> Choice:
        """The experts of the tokens of ``x``."""
        return self.choose(self.logits(x, call.feature_dim), call.top_k)

    @property
    def sums_to_one(self) -> bool:
        """Whether each token's weights sum to 1 in training and evaluation, so that equal experts are the dense FFN."""
        return True

    @property
    def self_contained(self) -> bool:
        """Whether a forward needs the tokens alone: no token ids, no trace."""
        return True

    def top_k_of(self, router_index: int | None) -> int:
        """K when a call names none."""
        return self.top_k

    @property
    def num_routers(self) -> int:
        """How many routers there are to choose from by ``router_index``."""
        return 1

    def departure(self) -> str | None:
        """Why equal experts do not give the dense output; ``None`` when they do."""
        if self.capacity is not None and not self.capacity.dropless:
            return "its capacity drops tokens"
        return None if self.sums_to_one else "its weights do not sum to 1"

    def forward(
        self,
        x: torch.Tensor,
        feature_dim: int = -1,
        *,
        top_k: int | None = None,
        capacity_factor: float | None = None,
        mask: torch.Tensor | None = None,
        router_index: int | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> Routing:
        """The routing of ``x``: any shape with D features on ``feature_dim``.

        Args:
            x: the tokens.
            feature_dim: their feature axis.
            top_k: another K for this call.
            capacity_factor: another capacity factor for this call, 0 (nothing dropped) included. In a compiled graph it
                is a constant: each value compiles once.
            mask: bool in the leading shape of ``x``, True = a real token. The others go to no expert, take no seat and
                count in no loss.
            router_index: which router of a ``MultiRouter``; the others have but one.
            token_ids: int64 in the leading shape of ``x``, for a ``HashRouter``; the others do not read it.

        Raises:
            ShapeError: when ``x`` has another width.
            ConfigError: for a K outside 1 to E, or a router index that does not exist.
            NonFiniteScores: for NaN scores, in ``moefy.checked_mode()`` alone.
        """
        axis = functional.feature_axis(x.dim(), feature_dim)
        if x.shape[axis] != self.d_model:
            raise ShapeError(
                f"the router expects {self.d_model} features on axis {feature_dim}; got {tuple(x.shape)}"
            )
        if router_index is not None and not (is_int(router_index, 0) and router_index < self.num_routers):
            expected = f"0 <= router_index < {self.num_routers}"
            raise ConfigError("router_index", got=router_index, expected=expected)
        top_k = self.top_k_of(router_index) if top_k is None else top_k
        self.check_top_k(top_k)
        call = Call(
            top_k=top_k,
            feature_dim=feature_dim,
            mask=None if mask is None else mask.reshape(-1),
            router_index=router_index,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
        )
        choice = self.decide(x, call)
        check_scores(self, choice.logits, call.mask)
        if call.mask is not None:
            choice = choice.masked(call.mask, self.num_experts)
        seats = self.seat(choice, top_k, capacity_factor)
        return self.observe(functional.make_routing(x, choice, self.num_experts, feature_dim, seats))

    def observe(self, routing: Routing) -> Routing:
        """Count the load and keep the auxiliary loss of a training forward; returns the routing to go on with.

        That is another one only where a reentrant checkpoint recomputes: there the auxiliary loss enters the graph.
        """
        state = self.aux_state
        if not self.training or exporting():
            state.clear()
            return routing
        self.load_counter.count(routing)
        if self.aux_loss is None:
            return routing
        l_aux = layer_loss(self.aux_loss, routing, self.num_experts, self.load_counter, state.group)
        recomputes = None if torch.compiler.is_dynamo_compiling() else in_backward()
        if state.scale is not None and recomputes is not False and l_aux.requires_grad:
            (weights_TK,) = Injected.apply(l_aux, state.scale, routing.top_k_weights)
            return dataclasses.replace(routing, top_k_weights=weights_TK)
        if not recomputes:
            state.note(l_aux)
        return routing

    @property
    def l_aux(self) -> torch.Tensor | None:
        """The weighted auxiliary loss of the last training forward; see ``moefy.nn.losses.layer``."""
        return self.aux_state.l_aux

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.load_counter.move(fn)
        return super()._apply(fn, recurse)

    def seat(self, choice: Choice, top_k: int, factor: float | None = None) -> Seats | None:
        """Who keeps a seat under ``capacity``, or under a ``factor`` for this call; ``None`` when nothing limits."""
        if self.capacity is None and factor is None:
            return None
        capacity = DEFAULT_CAPACITY if self.capacity is None else self.capacity
        return seat(choice, capacity, self.num_experts, top_k, training=self.training, factor=factor)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


@torch.no_grad()
def router_init_(weight_ED: torch.Tensor, seed: int, fqn: str, std: float) -> torch.Tensor:
    """Fill ``weight_ED`` with N(0, std^2) that depend on ``seed`` and ``fqn`` alone; returns it.

    Drawn in fp32 on the CPU and then cast, so that device and dtype change nothing but rounding. Meta tensors are left.
    """
    if weight_ED.is_meta:
        return weight_ED
    generator = seeded_generator(seed, fqn)
    draw = torch.randn(weight_ED.shape, generator=generator, dtype=torch.float32, device="cpu")
    return weight_ED.copy_(draw * std)
