"""``MoE``: a feed-forward network as E experts behind a router, one ``nn.Module`` from tokens to tokens.

Contract: ``y[t] = sum_k w[t, k] * expert[e[t, k]](x[t])`` over each token's K experts; any leading
shape, T = 0 included. With equal experts it equals the dense FFN, since the weights of a token sum to 1.
Two ways to make one:

    MoE(512, 2048, num_experts=8)                 the layer by itself: gate_proj, up_proj, down_proj, router
    MoE.from_parts(entries=[WeightRef("fc1.weight", "fc1.bias")], exit=..., body=..., router=...)
                                                  in the place of a user's FFN, its parameters under their old names
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from moefy import ops
from moefy.config import RouterSpec
from moefy.errors import ConfigError
from moefy.nn import functional
from moefy.nn.body import Body, KnownBody, resolve
from moefy.nn.expert_linear import ExpertLinear
from moefy.nn.routers import Router, make_router
from moefy.nn.routing import Routing


@dataclasses.dataclass(frozen=True)
class WeightRef:
    """Where a stacked linear's parameters are: attribute paths relative to the MoE.

    ``weight`` is ``[E, out, in]``, ``bias`` ``[E, out]`` or ``None``.
    """

    weight: str
    bias: str | None = None

    def of(self, owner: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(weight, bias)`` as they are on ``owner`` now."""
        return resolve(owner, self.weight), None if self.bias is None else resolve(owner, self.bias)


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer.

    Each token goes to the ``top_k`` experts with the largest router logits; their outputs are summed
    with a softmax over these logits (Mixtral: Jiang et al. 2024, section 2.1; the layer is that of
    Shazeer et al. 2017). No token is dropped. The router computes in fp32 (fp64 for fp64 inputs), also
    under autocast.

    Args:
        d_model: D, the width of a token.
        d_hidden: H, the hidden width of one expert.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        activation: a key of ``moefy.ops.ACTIVATIONS``: "gelu", "gelu_tanh", "relu", "silu", ...
        glu: gated experts, ``down(act(gate(x)) * up(x))`` (Shazeer 2020) instead of ``down(act(up(x)))``.
        bias: whether the experts have biases; by default ``not glu``.
        router: a name, a ``moefy.RouterSpec`` (a name with options), or a ``moefy.nn.Router`` of these sizes.
        seed: seeds the router alone, which every rank draws alike; give each layer its own. The experts draw from the
            global generator as ``nn.Linear`` does.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``forward(x)``: ``[..., D] -> [..., D]`` in ``x``'s dtype (the autocast dtype under autocast).

    Parameters:
        ``up_proj.weight [E, H, D]``, ``down_proj.weight [E, D, H]``, with ``glu`` also
        ``gate_proj.weight [E, H, D]``, biases ``[E, out]``, ``router.weight [E, D]``.

    Raises:
        ConfigError: for sizes outside their domain and names that do not exist.
        ShapeError: from ``forward``, when ``x`` is not D wide.

    >>> MoE(16, 64, num_experts=4)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    router: Router

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        top_k: int = 2,
        activation: str = "gelu",
        glu: bool = False,
        bias: bool | None = None,
        router: str | RouterSpec | Router = "top_k",
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_hidden=d_hidden, num_experts=num_experts)
        body = Body.of(activation, "separate" if glu else "none")
        bias = not glu if bias is None else bias
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        entries = ("gate_proj", "up_proj") if glu else ("up_proj",)
        for name in entries:
            self.add_module(name, ExpertLinear(d_model, d_hidden, num_experts, bias, **like))
        self.down_proj = ExpertLinear(d_hidden, d_model, num_experts, bias, **like)
        self.router = make_router(router, d_model, num_experts, top_k, seed=seed, **like)
        refs = [WeightRef(f"{n}.weight", f"{n}.bias" if bias else None) for n in (*entries, "down_proj")]
        self._assemble(refs[:-1], refs[-1], body, num_experts)

    @classmethod
    def from_parts(
        cls,
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
    ) -> MoE:
        """An MoE in the place of a user's FFN module. The caller mounts the parameters and the children of the body.

        Args:
            entries: the entry linears, in the order of the body's inputs.
            exit: the exit linear.
            body: what lies between.
            router: becomes ``self.router``.
            num_experts: E.
            feature_dim: the feature axis of the input: -1, or -3 for 1x1 ``nn.Conv2d``.
            returns: "tuple" answers ``(y, None)``, as Megatron's MLP does (its second value is a bias to be added).
            input_name: the forward's parameter, for callers that pass it by keyword.
            tail: what the module did to the exit's output (dropout), on tokens.
        """
        if body.num_inputs != len(entries):
            raise ConfigError("entries", got=len(entries), expected=f"{body.num_inputs}, one per body input")
        moe = cls.__new__(cls)
        nn.Module.__init__(moe)
        moe.router = router
        moe._assemble(entries, exit, body, num_experts, feature_dim, returns, input_name, tail)
        return moe

    def _assemble(
        self,
        entries: Sequence[WeightRef],
        exit: WeightRef,
        body: Body,
        num_experts: int,
        feature_dim: int = -1,
        returns: Literal["tensor", "tuple"] = "tensor",
        input_name: str = "x",
        tail: Body | None = None,
    ) -> None:
        """Set everything but the parameters."""
        self.entries, self.exit, self.body = tuple(entries), exit, body
        self.num_experts, self.feature_dim = num_experts, feature_dim
        self.returns, self.input_name = returns, input_name
        self.tail = tail

    @property
    def top_k(self) -> int:
        """K, experts per token."""
        return self.router.top_k

    def reset_parameters(self) -> None:
        """Initialise every parameter again, say after ``to_empty``."""
        for child in self.modules():
            if isinstance(child, ExpertLinear | Router):
                child.reset_parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``[..., D] -> [..., D]``; a pair ``(y, None)`` in the place of a module that returned one."""
        x = self._bind(args, kwargs)
        routing = self.router(x, self.feature_dim)
        known = self.body.fused(self)
        y = self._run_body(x, routing) if known is None else self._run_fused(x, routing, known)
        y = y if self.tail is None else self.tail(self, y)
        y = functional.add_residual(y, routing)
        return (y, None) if self.returns == "tuple" else y

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The one input; anything else that is not ``None`` has no meaning here."""
        rest = [*args, *(value for name, value in kwargs.items() if name != self.input_name)]
        x = kwargs[self.input_name] if self.input_name in kwargs else rest.pop(0) if args else None
        if not isinstance(x, torch.Tensor) or any(value is not None for value in rest):
            raise TypeError(f"MoE.forward takes one tensor, {self.input_name!r}")
        return x

    def _run_body(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Entry, the body as it is written, exit."""
        linears = [entry.of(self) for entry in self.entries]
        axis = self.feature_dim
        rows = functional.expert_entries(
            x, linears, routing.order, routing.offsets, routing.top_k, feature_dim=axis
        )
        weight, bias = self.exit.of(self)
        return functional.expert_exit(
            self.body(self, *rows),
            weight,
            bias,
            routing.top_k_weights,
            routing.order,
            routing.offsets,
            routing.leading,
            feature_dim=axis,
        )

    def _run_fused(self, x: torch.Tensor, routing: Routing, known: KnownBody) -> torch.Tensor:
        """The whole FFN as one op."""
        linears = [entry.of(self) for entry in self.entries]
        gate = linears[known.gate] if known.glu == "separate" else (None, None)
        up = linears[1 - known.gate] if known.glu == "separate" else linears[0]
        y_TD = ops.expert_ffn(
            functional.as_tokens(x, self.feature_dim),
            routing.top_k_weights,
            routing.order,
            routing.offsets,
            *up,
            *self.exit.of(self),
            w_gate=gate[0],
            b_gate=gate[1],
            activation=known.activation,
            glu=known.glu,
        )
        return functional.from_tokens(y_TD, routing.leading, self.feature_dim)

    def extra_repr(self) -> str:
        """Experts, top-k and body."""
        known = self.body.known
        gated = "" if known is None or known.glu == "none" else f", glu={known.glu!r}"
        body = repr(known.activation) if known else "custom"
        return f"experts={self.num_experts}, top_k={self.top_k}, body={body}{gated}"


def check_sizes(**sizes: int) -> None:
    """Raise ``ConfigError`` for a size that is no positive int."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(name, got=size, expected="an int >= 1")
