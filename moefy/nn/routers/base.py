"""``Router``: scores every token against E experts and keeps the best K; the base of every other router.

Contract: ``weight [E, D]`` is drawn from a generator of its own, seeded by the seed and the layer's name, so that every
rank draws the same matrix and the global random state is untouched. The maths is in fp32 (fp64 for fp64 inputs).

    >>> router = Router(d_model=16, num_experts=4, top_k=2, fqn="layers.0.mlp")
    >>> router(torch.randn(2, 5, 16)).top_k_index.shape
    torch.Size([10, 2])

A forward has three steps: ``logits`` scores the tokens, ``choose`` picks experts, and the slots are sorted. A router of
another kind overrides ``choose``, or ``logits`` where only the scores differ.
"""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import torch
from torch import nn

from moefy.errors import ConfigError, ShapeError
from moefy.nn import functional
from moefy.nn.routing import Choice, Routing


class Router(nn.Module):
    """A linear scorer without bias, top-k of its logits and a softmax over the chosen K (Mixtral's order).

    Args:
        d_model: D, the width of a token.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        std: standard deviation of the normal initialisation.
        seed: seeds the initialisation together with ``fqn``.
        fqn: the layer's name, so that layers differ.
        device: where ``weight`` lives.
        dtype: its dtype.

    A subclass may override ``logits`` (say, to add noise) or ``choose``: everything behind them is shared.

    Raises:
        ConfigError: for sizes outside their domain.
    """

    sums_to_one: ClassVar[bool] = True
    """Whether each token's weights sum to 1, so that equal experts give the dense output."""

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        std: float = 0.02,
        seed: int = 0,
        fqn: str = "",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ConfigError("d_model", got=d_model, expected="an int >= 1")
        if num_experts < 1:
            raise ConfigError("num_experts", got=num_experts, expected="an int >= 1")
        if not 1 <= top_k <= num_experts:
            raise ConfigError("top_k", got=top_k, expected=f"1 <= top_k <= num_experts = {num_experts}")
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.std, self.seed, self.fqn = std, seed, fqn
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``weight`` again; the same values every time and on every rank."""
        router_init_(self.weight, self.seed, self.fqn, self.std)

    def logits(self, x: torch.Tensor, feature_dim: int = -1) -> torch.Tensor:
        """``[T, E]`` scores of the tokens of ``x``."""
        return functional.router_logits(x, self.weight, feature_dim)

    def choose(self, logits_TE: torch.Tensor, top_k: int) -> Choice:
        """The experts that ``logits_TE`` pick."""
        weights_TK, index_TK = functional.top_k_softmax(logits_TE, top_k)
        return Choice(index=index_TK, weights=weights_TK, logits=logits_TE)

    def forward(self, x: torch.Tensor, feature_dim: int = -1, *, top_k: int | None = None) -> Routing:
        """The routing of ``x``: any shape with D features on ``feature_dim``.

        Args:
            x: the tokens.
            feature_dim: their feature axis.
            top_k: another K for this call.

        Raises:
            ShapeError: when ``x`` has another width.
            ConfigError: for a K outside 1 to E.
        """
        axis = functional.feature_axis(x.dim(), feature_dim)
        if x.shape[axis] != self.d_model:
            raise ShapeError(
                f"the router expects {self.d_model} features on axis {feature_dim}; got {tuple(x.shape)}"
            )
        top_k = self.top_k if top_k is None else top_k
        if not 1 <= top_k <= self.num_experts:
            raise ConfigError("top_k", got=top_k, expected=f"1 <= top_k <= num_experts = {self.num_experts}")
        choice = self.choose(self.logits(x, feature_dim), top_k)
        return functional.make_routing(x, choice, self.num_experts, feature_dim)

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
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    draw = torch.randn(weight_ED.shape, generator=generator, dtype=torch.float32, device="cpu")
    return weight_ED.copy_(draw * std)
