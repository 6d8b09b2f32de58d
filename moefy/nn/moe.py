"""``MoE``: a feed-forward network as E experts behind a router, one ``nn.Module`` from tokens to tokens.

Contract: ``y[t] = sum_k w[t, k] * expert[e[t, k]](x[t])`` over each token's K experts; any leading
shape, T = 0 included. With equal experts it equals the dense FFN, when the weights of a token sum to 1.

    MoE(512, 2048, num_experts=8)                              a layer: gate_proj, up_proj, down_proj, router
    MoE(512, num_experts=8, experts=lambda: MyExpert(512))     experts of one's own

In the place of a user's FFN it is an ``InPlaceMoE``.

Shape letters: T tokens, D model width, H expert hidden width, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moefy.config import AuxLoss, Capacity, RouterSpec, default_top_k
from moefy.config.fields import is_int, positive_int
from moefy.errors import ConfigError, ShapeError
from moefy.nn.dispatch import LOCAL, Dispatcher
from moefy.nn.experts.activation import Activation, body_of
from moefy.nn.experts.body import Body
from moefy.nn.experts.input_weighting import sum_slots, weight_inputs
from moefy.nn.experts.linear import ExpertLinear
from moefy.nn.experts.modules import ExpertList, Experts, make_experts
from moefy.nn.experts.replacement import replace_rows, routed_mask
from moefy.nn.experts.shared import DenseFFN, shared_output
from moefy.nn.experts.stacked import WeightRef, run_stacked, stacked_parameters
from moefy.nn.routers import Router, RouterLike, make_router
from moefy.nn.routing import token_tree
from moefy.nn.routing.layout import numel
from moefy.nn.routing.routing import Routing
from moefy.nn.routing.token_tree import Tree
from moefy.nn.seeding import seeded


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer.

    By default each token goes to the ``top_k`` experts with the largest router logits; their outputs are summed
    with a softmax over these logits (Mixtral: Jiang et al. 2024, section 2.1; the layer is that of
    Shazeer et al. 2017). No token is dropped. The router computes in fp32 (fp64 for fp64 inputs), also
    under autocast.

    Args:
        d_model: D, the width of a token.
        d_hidden: H, the hidden width of one expert; not needed with ``experts``.
        num_experts: E, the global number; not needed where ``experts`` is a list.
        top_k: K, experts per token, 1 to E; by default the router's own, which is 2 for most.
        activation: a key of ``moefy.ops.ACTIVATIONS`` ("gelu", "gelu_tanh", "relu", "silu", ...), a function, or an
            ``nn.Module``, which all experts share and which may have parameters.
        glu: gated experts, ``down(act(gate(x)) * up(x))`` (Shazeer 2020) instead of ``down(act(up(x)))``.
        bias: whether the experts have biases; by default ``not glu``.
        experts: experts of one's own in the place of the FFNs: a factory, called E times without arguments; a list of
            modules and factories, which may differ; or one ``nn.Module`` for all, called with ``(rows, offsets_E)``,
            the rows sorted by expert (``moefy.ops.grouped_linear`` takes just these). See ``moefy.nn.experts.modules``.
        d_out: the width of the experts' output; by default D.
        router: a name, a ``moefy.RouterSpec`` (a name with options), a ``moefy.nn.Router`` of these sizes, its class, a
            factory, or any module from tokens to logits: see ``moefy.nn.routers``. A list of such: several routers over
            the same experts, of which a call picks one by ``router_index``.
        shared_experts: how many experts every token passes beside its own (0: none), or a module of one's own.
        shared_hidden: the hidden width of one shared expert; by default H.
        shared_gate: whether a sigmoid of a linear of the token multiplies what the shared experts add (Qwen2-MoE).
        weighting: "output": the routing weight multiplies an expert's output. "input": its input (Tutel's
            ``is_postscore=False``).
        capacity: a ``moefy.Capacity`` or its factor; by default nothing is dropped.
        aux_loss: a ``moefy.AuxLoss`` or the weight of the canonical balance loss; by default there is none. Its value
            is ``l_aux``; ``moefy.deliver_aux_loss(model)`` puts it into the gradients of an unchanged training loop.
        reserve_dims: how many trailing axes of the input form one token; their product is D. Experts of one's own get
            them as they are, FFNs as one axis.
        seed: seeds the router, and the shared experts when it is given, which every rank then draws alike; give each
            layer its own. By default 0 for the router, and shared experts draw from the global generator.
        expert_seed: seeds the experts; by default they draw from the global generator as ``nn.Linear`` does.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``forward(x)``: ``[..., D] -> [..., d_out]`` in ``x``'s dtype (the autocast dtype under autocast). With
        ``experts``, ``x`` may be a tree of tensors of one leading shape, and so is then what the experts return.

    Parameters:
        ``up_proj.weight [E, H, D]``, ``down_proj.weight [E, d_out, H]``, with ``glu`` also
        ``gate_proj.weight [E, H, D]``, biases ``[E, out]``, ``router.weight [E, D]``; ``experts.<e>...`` in the place
        of the projections; ``shared_experts...`` and ``shared_gate.weight [1, D]``.

    To observe every routing, register a forward hook on ``router``: its output is a ``moefy.nn.Routing``. The attribute
    ``dispatcher`` moves tokens to the experts and back; see ``moefy.nn.dispatch``.

    ``torch.compile(fullgraph=True)`` takes FFN experts with any traceable activation, and modules as experts under a
    capacity with a factor > 0, whose static shapes need no sizes; without one such experts run eagerly, behind a graph
    break.

    Raises:
        ConfigError: for sizes outside their domain, names that do not exist and options that exclude each other.
        ShapeError: from ``forward``, when ``x`` is not D wide, or a mask has not the shape of the tokens.

    >>> MoE(16, 64, num_experts=4)(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    router: Router
    dispatcher: Dispatcher[Any] = LOCAL
    entries: tuple[WeightRef, ...]
    exit: WeightRef
    body: Body

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        num_experts: int | None = None,
        *,
        top_k: int | None = None,
        activation: Activation = "gelu",
        glu: bool = False,
        bias: bool | None = None,
        experts: Experts | None = None,
        d_out: int | None = None,
        router: RouterLike | Sequence[RouterLike] = "top_k",
        shared_experts: int | nn.Module = 0,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        weighting: Literal["output", "input"] = "output",
        capacity: float | Capacity | None = None,
        aux_loss: float | AuxLoss | None = None,
        reserve_dims: int = 1,
        seed: int | None = None,
        expert_seed: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_out = d_model if d_out is None else d_out
        for name, value in (("d_model", d_model), ("d_out", d_out), ("reserve_dims", reserve_dims)):
            positive_int(name, value)
        if weighting not in ("output", "input"):
            raise ConfigError("weighting", got=weighting, expected="'output' or 'input'")
        self.d_model, self.d_out, self.reserve_dims, self.weighting = d_model, d_out, reserve_dims, weighting
        self.seed, self.expert_seed = seed, expert_seed
        bias = not glu if bias is None else bias
        ffn: dict[str, Any] = {"activation": activation, "glu": glu, "bias": bias}
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        with seeded(expert_seed, "experts", device):
            self.num_experts = self._make_experts(experts, d_hidden, num_experts, ffn, like)
        if isinstance(router, Sequence) and not isinstance(router, str):
            router = RouterSpec("multi", routers=tuple(router))
        if top_k is None:
            top_k = router.top_k if isinstance(router, Router) else default_top_k(router, self.num_experts)
        self.router = make_router(router, d_model, self.num_experts, top_k, seed=seed or 0, **like)
        if capacity is not None:
            self.router.capacity = Capacity.of(capacity)
        if aux_loss is not None:
            self.router.aux_loss = AuxLoss.of(aux_loss)
        with seeded(seed, "shared_experts", device):
            self._make_shared(shared_experts, shared_hidden or d_hidden, shared_gate, ffn, like)

    def _make_experts(
        self,
        experts: Experts | None,
        d_hidden: int | None,
        num_experts: int | None,
        ffn: dict[str, Any],
        like: dict[str, Any],
    ) -> int:
        """The experts as stacked FFNs or as modules; returns E."""
        if experts is not None:
            self.experts, num_experts = make_experts(experts, num_experts)
            return num_experts
        hidden, num_experts = positive_int("d_hidden", d_hidden), positive_int("num_experts", num_experts)
        self.body, module = body_of(ffn["activation"], ffn["glu"])
        if module is not None:
            self.activation = module
        names = ("gate_proj", "up_proj") if ffn["glu"] else ("up_proj",)
        for name in names:
            self.add_module(name, ExpertLinear(self.d_model, hidden, num_experts, ffn["bias"], **like))
        self.down_proj = ExpertLinear(hidden, self.d_out, num_experts, ffn["bias"], **like)
        refs = [WeightRef(f"{n}.weight", f"{n}.bias" if ffn["bias"] else None) for n in (*names, "down_proj")]
        self.entries, self.exit = tuple(refs[:-1]), refs[-1]
        return num_experts

    def _make_shared(
        self,
        shared: int | nn.Module,
        d_hidden: int | None,
        gate: bool,
        ffn: dict[str, Any],
        like: dict[str, Any],
    ) -> None:
        """The shared experts and their gate, or ``None``."""
        if isinstance(shared, nn.Module):
            self.shared_experts: nn.Module | None = shared
        elif not is_int(shared, 0):
            raise ConfigError("shared_experts", got=shared, expected="an int >= 0 or an nn.Module")
        elif shared:
            hidden = shared * positive_int("shared_hidden", d_hidden)
            self.shared_experts = DenseFFN(self.d_model, hidden, self.d_out, **ffn, **like)
        else:
            self.shared_experts = None
        if gate and self.shared_experts is None:
            raise ConfigError("shared_gate", got=gate, expected="False without shared_experts")
        self.shared_gate = nn.Linear(self.d_model, 1, bias=False, **like) if gate else None

    @property
    def top_k(self) -> int:
        """K, experts per token: the router's."""
        return self.router.top_k

    @property
    def l_aux(self) -> Tensor | None:
        """The weighted auxiliary loss of the last training forward; ``None`` without ``aux_loss`` and after others."""
        return self.router.l_aux

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the router alone."""
        return self.router.parameters()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """The routed experts' parameters, which expert parallelism divides."""
        modules = self._modules.get("experts")
        values = stacked_parameters(self) if modules is None else modules.parameters()
        return (value for value in values if isinstance(value, nn.Parameter))

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """All other parameters, which every token passes: shared experts, their gate, a learnable activation."""
        others = {id(p) for p in (*self.router_parameters(), *self.expert_parameters())}
        return (p for p in self.parameters() if id(p) not in others)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, say after ``to_empty``; seeded ones get the values they had."""
        device = next((p.device for p in self.parameters()), None)
        shared = [m for m in (self.shared_experts, self.shared_gate) if m is not None]
        routed = [
            m for name, m in self.named_children() if name not in ("router", "shared_experts", "shared_gate")
        ]
        with seeded(self.expert_seed, "experts", device):
            _reset(routed)
        with seeded(self.seed, "shared_experts", device):
            _reset(shared)
        self.router.reset_parameters()

    def forward(
        self,
        x: Tree,
        *,
        top_k: int | None = None,
        capacity_factor: float | None = None,
        router_index: int | None = None,
        mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        router_input: Tensor | None = None,
        replace_ids: Tensor | None = None,
        replacements: Mapping[int, Tensor | float] | None = None,
    ) -> Tree:
        """``[..., D] -> [..., d_out]``; see the class for trees and ``reserve_dims``.

        Args:
            x: the tokens.
            top_k: another K for this call.
            capacity_factor: another capacity factor for this call.
            router_index: which of several routers over the same experts decides.
            mask: bool or integer in the leading shape, True or 1 = a real token (as Hugging Face's
                ``attention_mask``). The others go to no routed expert and count in no loss.
            token_ids: the tokens' vocabulary ids, for routers that hash them.
            router_input: ``[..., D]``, what the router reads instead of ``x``, or of a tree's first tensor.
            replace_ids: integers in the leading shape. Where one is not 0, the token skips the layer and comes out as
                ``replacements[id]``, or as zeros (FastMoE's ``mask``).
            replacements: one token's output, or a number, by id (FastMoE's ``mask_dict``).
        """
        scored = self._as_vectors(token_tree.leaves(x)[0] if router_input is None else router_input)
        leading = tuple(scored.shape[:-1])
        routing = self.router(
            scored,
            top_k=top_k,
            capacity_factor=capacity_factor,
            router_index=router_index,
            mask=routed_mask(mask, replace_ids, leading),
            token_ids=token_ids,
        )
        y = self._run_modules(x, routing) if "experts" in self._modules else self._run_ffn(x, routing)
        y = self._with_shared(x, y)
        if replace_ids is None:
            return y
        rows = replacements or {}
        return token_tree.map_leaves(lambda leaf: replace_rows(leaf, replace_ids, rows), y)

    def _with_shared(self, x: Tree, y: Tree) -> Tree:
        """``y`` plus the output of the shared experts, where there are any."""
        if self.shared_experts is None:
            return y
        return y + shared_output(self.shared_experts, self.shared_gate, self._as_vectors(x)).reshape(y.shape)

    def _as_vectors(self, x: Tensor) -> Tensor:
        """``[..., D]`` of tokens that may have several axes."""
        axes = self.reserve_dims
        if not isinstance(x, Tensor) or x.dim() < axes or numel(x.shape[-axes:]) != self.d_model:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(
                f"the last {axes} axes of the input hold {self.d_model} features; got {got}"
                if axes > 1
                else f"the input holds {self.d_model} features on its last axis; got {got}"
            )
        return x if axes == 1 else x.reshape(*x.shape[:-axes], self.d_model)

    def _run_ffn(self, x: Tree, routing: Routing) -> Tensor:
        """The output of experts that are stacked weights."""
        x, layout = self._as_vectors(x), routing.layout
        if self.weighting == "input":
            x_ND, slots = weight_inputs(layout.to_tokens(x), routing)
            y_TD = sum_slots(run_stacked(self, x_ND, slots, self.dispatcher), routing)
            y = layout.from_tokens(y_TD)
        else:
            y = run_stacked(self, x, routing, self.dispatcher)
        if routing.stranded is None:
            return y
        y_TD = token_tree.pass_through(layout.to_tokens(y), layout.to_tokens(x), routing.stranded)
        return layout.from_tokens(y_TD)

    def _run_modules(self, x: Tree, routing: Routing) -> Tree:
        """The output of experts that are modules, a tensor or a tree."""
        tokens = token_tree.flatten(x, routing.leading)
        if self.weighting == "input":
            tokens_N, slots = weight_inputs(tokens, routing)
            y = sum_slots(self._exchange_modules(tokens_N, slots), routing)
        else:
            y = self._exchange_modules(tokens, routing)
        y = y if routing.stranded is None else token_tree.pass_through(y, tokens, routing.stranded)
        return token_tree.unflatten(y, routing.leading)

    def _exchange_modules(self, tokens: Tree, routing: Routing) -> Tree:
        """Tokens to the modules that own them, and back."""
        rows, offsets_E, handle = self.dispatcher.dispatch(tokens, routing)
        if not isinstance(self.experts, ExpertList):
            return self.dispatcher.combine(self.experts(rows, offsets_E), handle)
        # On CUDA and in a graph static shapes are worth the empty seats; in eager mode on the CPU sizes cost nothing.
        static = torch.compiler.is_compiling() or offsets_E.device.type != "cpu"
        limit = self.dispatcher.row_limit(routing) if static else None
        seats = None if limit is None else max(limit, 1)
        return self.dispatcher.combine(self.experts(rows, offsets_E, seats), handle)

    def extra_repr(self) -> str:
        """Number of experts, top-k and body."""
        if "experts" in self._modules:
            return f"experts={self.num_experts}, top_k={self.top_k}"
        known = self.body.known
        gated = "" if known is None or known.glu == "none" else f", glu={known.glu!r}"
        body = repr(known.activation) if known else "custom"
        return f"experts={self.num_experts}, top_k={self.top_k}, body={body}{gated}"


def _reset(modules: Sequence[nn.Module]) -> None:
    """Draw the parameters of ``modules`` again, in the order of their making."""
    for child in (c for module in modules for c in module.modules()):
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
