"""``Router``: scores every token against E experts and keeps the best K; the base of every other router.

Contract: ``weight [E, D]`` is drawn from a generator of its own, seeded by the seed and the layer's name, so that every
rank draws the same matrix and the global random state is untouched. The maths is in fp32 (fp64 for fp64 inputs).

    >>> router = Router(d_model=16, num_experts=4, top_k=2, fqn="layers.0.mlp")
    >>> router(torch.randn(2, 5, 16)).top_k_index.shape
    torch.Size([10, 2])

A router decides: ``logits`` scores the tokens, ``choose`` picks experts by the scores, ``decide`` is both. A router of
another kind overrides ``logits`` where only the scores differ, ``choose`` where only the choice does, and ``decide``
when it needs the tokens themselves or the mask. What follows a choice (capacity, sorting, counting, the auxiliary loss)
is the same for every router and lies in ``moefy.nn.route``.

Shape letters: T tokens, D model width, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from moefy import ops
from moefy.config import USUAL_TOP_K, AuxLoss, Capacity
from moefy.config.declared import DEFAULT_TOP_K
from moefy.config.fields import is_finite, is_int, positive_int
from moefy.errors import ConfigError, ShapeError
from moefy.nn.checked import check_scores
from moefy.nn.counters import LoadCounter
from moefy.nn.dispatch import LOCAL, Dispatcher
from moefy.nn.losses.layer import AuxState
from moefy.nn.route import route
from moefy.nn.routing.layout import TokenLayout, as_tokens
from moefy.nn.routing.routing import Choice, Routing
from moefy.nn.seeding import seeded_generator
from moefy.ops.library import autocast_off


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


ROUTERS: dict[str, type[Router]] = {}
"""The routers by name. Importing ``moefy.nn.routers`` fills it."""

RouterClass = TypeVar("RouterClass", bound="type[Router]")


def register_router(name: str, *, default_top_k: int | None = None) -> Callable[[RouterClass], RouterClass]:
    """Class decorator: ``router=name`` makes a router of this class.

    Args:
        name: the router's name.
        default_top_k: K for layers that name none; by default ``only_top_k``, else 2.

    Raises:
        ConfigError: when another class has the name already. Defining the same class again replaces it.
    """

    def register(cls: RouterClass) -> RouterClass:
        known = ROUTERS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError("router", got=name, expected=f"a name that {known.__qualname__} does not have")
        ROUTERS[name] = cls
        DEFAULT_TOP_K[name] = default_top_k or cls.only_top_k or USUAL_TOP_K
        return cls

    return register


@register_router("top_k")
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

    Attributes:
        capacity: how many tokens an expert takes; ``None``: any number.
        aux_loss: what a training forward adds up; ``None``: nothing.
        load_counter: the tokens that each expert got in training.
        aux_state: the auxiliary loss between a forward and its delivery.
        dispatcher: moves the rows of a rewritten graph, where no layer is left that has one.

    Every router takes these arguments. A subclass lists its own, and ``options`` for the rest.

    Raises:
        ConfigError: for sizes outside their domain.
    """

    formula: ClassVar[str] = "c = top K of l;  w = softmax(l[c])"
    """What the router computes, in the letters of ``moefy.nn.routers``."""
    source: ClassVar[str] = "FastMoE's naive gate, Mixtral"
    """Where the formula is from."""
    only_top_k: ClassVar[int | None] = None
    """K, for a router that is defined for a single one."""
    dispatcher: Dispatcher[Any] = LOCAL

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
        if not (is_finite(std) and std >= 0):
            raise ConfigError("std", got=std, expected="a finite number >= 0")
        self.d_model = positive_int("d_model", d_model)
        self.num_experts = positive_int("num_experts", num_experts)
        self.top_k = top_k
        self.check_top_k(top_k)
        self.std, self.seed, self.fqn = std, seed, fqn
        self.capacity: Capacity | None = None
        self.aux_loss: AuxLoss | None = None
        self.aux_state = AuxState()
        self.load_counter = LoadCounter(num_experts, device)
        self.make_parameters(bias, device=device, dtype=dtype)
        self.reset_parameters()

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create the parameters that ``reset_parameters`` fills; none for a router without a linear scorer."""
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
        logits_TE = router_logits(x, self.weight, feature_dim)
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)

    def choose(self, logits_TE: torch.Tensor, top_k: int) -> Choice:
        """The experts that ``logits_TE`` pick.

        The formula is Mixtral's (Jiang et al. 2024, section 2.1): a softmax over the K largest logits. Ties go to the
        lowest id. NaN sorts first, so that a NaN score gives NaN weights for its own token and still a valid id.
        """
        weights_TK, index_TK = ops.top_k_softmax(logits_TE, top_k)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE)

    def decide(self, x: torch.Tensor, call: Call) -> Choice:
        """The experts of the tokens of ``x``, and their weights."""
        return self.choose(self.logits(x, call.feature_dim), call.top_k)

    @property
    def sums_to_one(self) -> bool:
        """Whether each token's weights sum to 1 in training and evaluation, so that equal experts are the dense FFN."""
        return True

    @property
    def self_contained(self) -> bool:
        """Whether a forward needs nothing but the tokens: no token ids, no trace."""
        return True

    def top_k_of(self, router_index: int | None) -> int:
        """K of the router of that index, for a call that names no K."""
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
            router_index: which router of a ``MultiRouter``; every other router is its own only one.
            token_ids: int64 in the leading shape of ``x``, for a ``HashRouter``; other routers do not read it.

        Raises:
            ShapeError: when ``x`` has another width.
            ConfigError: for a K outside 1 to E, a router index that does not exist, or a factor that is not finite.
            NonFiniteScores: for NaN scores, in ``moefy.checked_mode()`` alone.
        """
        layout = TokenLayout.of(x, feature_dim)
        if x.shape[layout.feature_dim] != self.d_model:
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
        return route(self, choice, layout, top_k=top_k, capacity_factor=capacity_factor)

    @property
    def l_aux(self) -> torch.Tensor | None:
        """The weighted auxiliary loss of the last training forward; see ``moefy.nn.losses.layer``."""
        return self.aux_state.l_aux

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.load_counter.move(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The sizes that every router has."""
        return f"d_model={self.d_model}, num_experts={self.num_experts}, top_k={self.top_k}"


def router_logits(x: torch.Tensor, weight_ED: torch.Tensor, feature_dim: int = -1) -> torch.Tensor:
    """``[T, E]`` scores ``x_TD @ weight_ED.T``, in fp32 (fp64 for fp64 inputs), autocast or not."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with autocast_off(x.device.type):
        return torch.mm(as_tokens(x, feature_dim).to(dtype), weight_ED.to(dtype).t())


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
