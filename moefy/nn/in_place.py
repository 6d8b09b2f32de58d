"""``InPlaceMoE``: an ``MoE`` in the place of a user's FFN module, under the names of that module's parameters.

Contract: the layer takes the FFN's one input, by position or by name, in the FFN's layout, and returns what the FFN
returned, a tensor or a pair. The caller mounts the parameters and the children of the body.

    mlp = InPlaceMoE(
        entries=[WeightRef("fc1.weight", "fc1.bias")], exit=WeightRef("fc2.weight", "fc2.bias"),
        body=Body.of("gelu"), router=Router(512, 8, 2), num_experts=8,
    )
    mlp.fc1, mlp.fc2 = ExpertLinear(512, 2048, 8), ExpertLinear(2048, 512, 8)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from moefy.errors import ConfigError
from moefy.nn.dispatch import add_residual, stranded_tokens
from moefy.nn.experts.body import Body
from moefy.nn.experts.linear import ExpertLinear
from moefy.nn.experts.stacked import WeightRef, run_stacked
from moefy.nn.moe import MoE
from moefy.nn.routers import Router


class InPlaceMoE(MoE):
    """An ``MoE`` made of parts that exist already.

    Args:
        entries: the entry linears, in the order of the body's inputs.
        exit: the exit linear.
        body: the code between them.
        router: becomes ``self.router``.
        num_experts: E.
        feature_dim: the feature axis of the input: -1, or -3 for 1x1 ``nn.Conv2d``.
        returns: "tuple" answers ``(y, None)``, as Megatron's MLP does (its second value is a bias to be added).
        input_name: the forward's parameter, for callers that pass it by keyword.
        tail: the module's code behind the exit (dropout), on tokens.

    Raises:
        ConfigError: when the body does not take as many inputs as there are entries.
    """

    def __init__(
        self,
        *,
        entries: Sequence[WeightRef],
        exit: WeightRef,
        body: Body,
        router: Router,
        num_experts: int,
        feature_dim: int = -1,
        returns: Literal["tensor", "tuple"] = "tensor",
        input_name: str = "x",
        tail: Body | None = None,
    ) -> None:
        if body.num_inputs != len(entries):
            raise ConfigError("entries", got=len(entries), expected=f"{body.num_inputs}, one per body input")
        nn.Module.__init__(self)
        self.router, self.num_experts = router, num_experts
        self.entries, self.exit, self.body, self.tail = tuple(entries), exit, body, tail
        self.feature_dim, self.returns, self.input_name = feature_dim, returns, input_name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``[..., D] -> [..., D]``; a pair ``(y, None)`` in the place of a module that returned one."""
        x = self._bind(args, kwargs)
        routing = self.router(x, self.feature_dim)
        y = run_stacked(self, x, routing, self.dispatcher)
        y = y if self.tail is None else self.tail(self, y)
        y = add_residual(y, stranded_tokens(x, routing), routing.layout)
        return (y, None) if self.returns == "tuple" else y

    def reset_parameters(self) -> None:
        """Initialise every expert and the router again, say after ``to_empty``."""
        for child in self.modules():
            if isinstance(child, ExpertLinear | Router):
                child.reset_parameters()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The one input of a call; raises ``TypeError`` for any other argument that is not ``None``."""
        rest = [*args, *(value for name, value in kwargs.items() if name != self.input_name)]
        x = kwargs[self.input_name] if self.input_name in kwargs else rest.pop(0) if args else None
        if not isinstance(x, torch.Tensor) or any(value is not None for value in rest):
            raise TypeError(f"MoE.forward takes one tensor, {self.input_name!r}")
        return x

    def _get_name(self) -> str:
        return "MoE"
