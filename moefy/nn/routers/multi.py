"""Several routers over the same experts, one of them chosen per call (Tutel's list of gates and ``gate_index``).

>>> spec = moefy.RouterSpec("multi", routers=("top_k", moefy.RouterSpec("cosine", top_k=1)))
>>> moe = moefy.MoE(512, 2048, 8, router=spec)
>>> moe.router.router_index = 1          # from now on; router_index=1 for one call
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moefy.config import RouterSpec
from moefy.config.fields import is_int
from moefy.errors import ConfigError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.make import make_router
from moefy.nn.routing.routing import Choice


@register_router("multi")
class MultiRouter(Router):
    """Several routers; ``router_index`` says which decides.

    Args:
        top_k: K of the routers whose spec has no ``top_k`` of its own.
        routers: at least one, each what ``router=`` takes; a spec may have ``top_k`` among its options.
        router_index: which decides when a call does not say.
        options: of ``Router``, for each of them.

    Parameters:
        those of ``routers.0``, ``routers.1``, ...

    Raises:
        ConfigError: for no router, or an index that does not exist.
    """

    formula: ClassVar[str] = "one of several routers, by router_index"
    source: ClassVar[str] = "Tutel"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        routers: tuple[Any, ...] = ("top_k",),
        router_index: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not isinstance(routers, tuple | list) or len(routers) == 0:
            raise ConfigError("routers", got=routers, expected="a tuple of at least one router")
        self.routers = nn.ModuleList(
            self._make(router, f"{self.fqn}.routers.{i}", options) for i, router in enumerate(routers)
        )
        if not (is_int(router_index, 0) and router_index < len(self.routers)):
            raise ConfigError("router_index", got=router_index, expected=f"0 <= index < {len(self.routers)}")
        self.router_index = router_index

    def _make(self, router: Any, fqn: str, options: dict[str, Any]) -> Router:
        top_k = self.top_k
        if isinstance(router, RouterSpec) and "top_k" in router.options:
            own = router.options
            top_k = own.pop("top_k")
            router = RouterSpec(router.name, **own)
        elif isinstance(router, Router):
            top_k = router.top_k
        return make_router(router, self.d_model, self.num_experts, top_k, **{**options, "fqn": fqn})

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create no parameters beside those of the routers."""
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Reset every router. While this one is made it has none yet, and each draws its parameters itself."""
        if "routers" in self._modules:
            for router in self.routers:
                self._cast(router).reset_parameters()

    @property
    def num_routers(self) -> int:
        """The number of routers, which ``router_index`` is below."""
        return len(self.routers)

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of all routers sum to 1."""
        return all(self._cast(router).sums_to_one for router in self.routers)

    @property
    def self_contained(self) -> bool:
        """Whether no router needs more than the tokens."""
        return all(self._cast(router).self_contained for router in self.routers)

    def top_k_of(self, router_index: int | None) -> int:
        """K of the router of that index."""
        return self.chosen(router_index).top_k

    def chosen(self, router_index: int | None = None) -> Router:
        """The router of that index; the default one for ``None``."""
        return self._cast(self.routers[self.router_index if router_index is None else router_index])

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The choice of the router that the call or ``router_index`` picks."""
        router = self.chosen(call.router_index)
        router.check_top_k(call.top_k)
        return router.decide(x, call)

    @staticmethod
    def _cast(module: nn.Module | torch.Tensor) -> Router:
        assert isinstance(module, Router)
        return module
