"""The body between an expert's linears, from the name of an activation, a function or a module.

Contract: ``body_of(activation, glu)`` is the ``Body`` and the module that it calls, to be mounted as ``activation`` on
the owner. The module is ``None`` when ``ops.expert_ffn`` has the activation fused. ``nn.GELU()``, ``F.relu`` and the
like count as their names. A module is shared by all experts and trained with them.

    >>> body_of(torch.nn.functional.silu, glu=True)[0].known
    KnownBody(activation='silu', glu='separate', gate=0)
    >>> body_of(nn.PReLU(), glu=False)
    (Body('def forward(self, h0): ...'), PReLU(num_parameters=1))
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import Tensor, fx, nn

from moefy import ops
from moefy.errors import ConfigError
from moefy.nn.experts.body import Body

Activation = str | nn.Module | Callable[[Tensor], Tensor]


class FunctionModule(nn.Module):
    """A function as a module, so that a body can call it by path."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """``function(x)``."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", repr(self.function))


def body_of(activation: Activation, glu: bool) -> tuple[Body, nn.Module | None]:
    """The body ``act(h0)``, or ``act(h0) * h1`` with ``glu``, and the module it calls.

    Raises:
        ConfigError: for a name that does not exist, or a value that is neither name, function nor module.
    """
    name = known_name(activation)
    if name is not None:
        return Body.of(name, "separate" if glu else "none"), None
    if not callable(activation):
        raise ConfigError("activation", got=activation, expected="a name, a function or an nn.Module")
    graph = fx.Graph()
    rows = [graph.placeholder(f"h{i}") for i in range(2 if glu else 1)]
    hidden = graph.call_module("activation", (rows[0],))
    graph.output(graph.call_function(operator.mul, (hidden, rows[1])) if glu else hidden)
    module = activation if isinstance(activation, nn.Module) else FunctionModule(activation)
    return Body.from_graph(graph), module


def known_name(activation: Activation) -> str | None:
    """The fused op's name for ``activation``; ``None`` when the op does not have it. A string is its own name."""
    if isinstance(activation, str):
        return activation
    for name, known in ops.ACTIVATIONS.items():
        if isinstance(activation, nn.Module):
            found = known.module(activation)
        else:
            found = any(function is activation for function in known.functions)
        if found:
            return name
    return None
