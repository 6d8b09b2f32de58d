"""Custom: any module or function from tokens to logits, or to a ``Choice``, as a router.

T tokens, D width, E experts.

    logits [..., E]  ->  the K largest and a softmax over them        Choice  ->  as it is

    >>> moefy.MoE(16, 64, 8, router=torch.nn.Linear(16, 8))
    >>> moefy.transform(model, 8, router=lambda d_model, num_experts, top_k: MyGate(d_model, num_experts))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moefy.errors import ConfigError, ShapeError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routing.layout import TokenLayout, as_tokens
from moefy.nn.routing.routing import Choice


@register_router("custom")
class CustomRouter(Router):
    """A router around a module of the user's.

    Args:
        top_k: K, for a module that gives logits.
        module: called with the tokens, features last; returns ``[..., E]`` logits or a ``Choice``.
        sums_to_one: whether the weights of its choices sum to 1; ``None`` takes the module's own attribute of that
            name. If unset: logits sum to one, a ``Choice`` does not. Which one the module returns is found by calling
            it once on a zero token.
        options: of ``Router``; they initialise nothing here.

    Raises:
        ConfigError: when ``module`` is not callable.
        ShapeError: from ``forward``, for logits or a choice of another shape.
    """

    formula: ClassVar[str] = "any module: logits as top_k, a Choice as it is"
    source: ClassVar[str] = "yours"

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        *,
        module: Callable[[Tensor], Tensor | Choice] | None = None,
        sums_to_one: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        if not callable(module):
            raise ConfigError("module", got=module, expected="a module or function from tokens to logits")
        self.module = module
        self._sums_to_one = getattr(module, "sums_to_one", None) if sums_to_one is None else sums_to_one

    def make_parameters(self, bias: bool, **like: Any) -> None:
        """Create no parameters beside the module's."""
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Reset the module and its children, where they have such a method."""
        module = self.__dict__.get("module") or self._modules.get("module")
        for child in module.modules() if isinstance(module, nn.Module) else ():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()

    @property
    def sums_to_one(self) -> bool:
        """The option or the module's attribute; without both, whether the module returns logits."""
        return self._gives_logits() if self._sums_to_one is None else self._sums_to_one

    @torch.no_grad()
    def _gives_logits(self) -> bool:
        like = next(self.parameters(), torch.empty(0))
        token = torch.zeros((1, self.d_model), dtype=like.dtype, device=like.device)
        with torch.random.fork_rng():
            try:
                return isinstance(self.module(token), Tensor)
            except Exception:  # the user's code, on a token that it may not expect: then nothing is known
                return False

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The choice of the module, or the K largest of its logits."""
        layout = TokenLayout.of(x, call.feature_dim)
        answer = self.module(x if layout.feature_dim == -1 else x.movedim(layout.feature_dim, -1))
        tokens = layout.num_tokens
        if isinstance(answer, Choice):
            if answer.index.shape != answer.weights.shape or answer.index.shape[0] != tokens:
                got = (tuple(answer.index.shape), tuple(answer.weights.shape))
                raise ShapeError(f"{self._name()}: index and weights of shapes {got}; expected [{tokens}, K]")
            return answer
        logits_TE = as_tokens(answer)
        if logits_TE.shape != (tokens, self.num_experts):
            raise ShapeError(
                f"{self._name()}: logits {tuple(answer.shape)} for tokens {tuple(x.shape)}; expected "
                f"{self.num_experts} per token"
            )
        return self.choose(logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)), call.top_k)

    def _name(self) -> str:
        return f"{self.fqn or 'router'} ({type(self.module).__name__})"
