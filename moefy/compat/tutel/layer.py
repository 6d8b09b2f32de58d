"""Tutel's ``moe_layer``: gates, routing, experts on buffers of equal size, all under Tutel's argument names.

    >>> experts = {"type": "ffn", "count_per_node": 4, "hidden_size_per_expert": 32}
    >>> layer = moe_layer(gate_type={"type": "top", "k": 2}, model_dim=16, experts=experts)
    >>> y = layer(torch.randn(2, 5, 16))
    >>> y.shape, y.l_aux.shape
    (torch.Size([2, 5, 16]), torch.Size([]))

Shape letters: T tokens, D width, E experts, C capacity.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moefy.compat.single_process import group_size, refuse_ranks
from moefy.compat.tutel.experts import EXPERTS
from moefy.compat.tutel.gates import GATES
from moefy.compat.tutel.routing import (
    TRAPS,
    Critical,
    checked_traps,
    extract_critical,
    fast_decode,
    fast_encode,
    get_dispatch_count,
    gshard_loss,
    load_importance_loss,
)
from moefy.errors import ConfigError, ShapeError, UnknownOption
from moefy.nn import losses
from moefy.nn.routing.layout import numel
from moefy.ops.library import autocast_off

MEGABLOCKS_ROUNDING = 128


class MOELayer(nn.Module):
    """Tutel's layer. The class of ``moe_layer``.

    Args:
        gate_type: ``{"type": "top" or "cosine_top", "k": ..., "fp32_gate", "capacity_factor", "gate_noise", ...}``;
            ``{"type": "custom", "module": cls, ...}``, a class called with ``model_dim``, ``num_global_experts`` and
            the rest of the dict, with a ``top_k``; a list of these, picked by ``gate_index``; or the old
            "Top1Gate", "Top2Gate", ...
        model_dim: D, even.
        experts: ``{"type": "ffn" or "llama_ffn", "hidden_size_per_expert": ..., "num_experts_per_device": E, ...}``
            (or ``count_per_node``); ``{"type": "custom", "module": cls, ...}``, a class called with ``model_dim``,
            ``num_experts_per_device``, ``sharded_count`` and the rest of the dict.
        scan_expert_func: called with the name and value of every expert parameter, say to tag it.
        result_func: called with the output; its value is returned.
        group: of one process.
        seeds: ``(shared, local, after)`` for ``torch.manual_seed``: before each gate (plus its index), before the
            experts, at the end. ``None`` anywhere leaves the generator alone.
        a2a_ffn_overlap_degree: the capacity becomes a multiple of it. There is no all-to-all to overlap.
        is_postscore: whether the weight multiplies an expert's output, else its input.
        batch_prioritized_routing: whether tokens are seated by falling best score; also by env ``BATCH_PRIO``.
        normalize_gate: whether the weights of K > 1 experts are divided by their sum.
        is_gshard_loss: GShard's loss, else load and importance, which needs ``gate_noise``.
        parallel_type: "adaptive:r", "data", "model" or "auto"; the same in one process.
        use_2dh: no difference in one process.
        traps: see ``moefy.compat.tutel``.
        kwargs: ``pad_samples`` is ignored with a warning; others raise.

    Attributes:
        l_aux: the balance loss of the last forward, which the output carries too.

    Raises:
        ConfigError, UnknownOption: for values that do not exist.
        ParallelismNeeded: where the original would use several processes.
    """

    def __init__(
        self,
        gate_type: str | dict[str, Any] | Sequence[dict[str, Any]],
        model_dim: int,
        experts: dict[str, Any] | None = None,
        scan_expert_func: Callable[[str, nn.Parameter], Any] | None = None,
        result_func: Callable[[Tensor], Any] | None = None,
        group: Any = None,
        seeds: Sequence[int | None] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool = False,
        normalize_gate: bool = True,
        is_gshard_loss: bool = True,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        *,
        traps: Collection[str] = TRAPS,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if model_dim % 2:
            raise ConfigError("model_dim", got=model_dim, expected="an even number")
        _check_kwargs(kwargs)
        refuse_ranks("tutel.moe_layer: group", group_size(group))
        self.traps = checked_traps(traps, TRAPS)
        self.model_dim, self.group, self.result_func = model_dim, group, result_func
        self.a2a_ffn_overlap_degree, self.use_2dh = a2a_ffn_overlap_degree, use_2dh
        self.is_postscore, self.normalize_gate = is_postscore, normalize_gate
        self.batch_prioritized_routing = batch_prioritized_routing or os.environ.get("BATCH_PRIO", "0") != "0"
        self.is_gshard_loss = is_gshard_loss
        self.skip_moe = os.environ.get("SKIP_MOE", "0") != "0"
        self.sharded_count, self.megablocks_size = 1, 0
        self.adaptive_degree = _adaptive_degree(parallel_type)
        self.l_aux: Tensor | None = None
        self._make_experts(dict(experts or {}), seeds, scan_expert_func)
        self._make_gates(gate_type, seeds)
        _seed(seeds, 2)

    @staticmethod
    def global_expert_count(num_local_experts: int, group: Any = None) -> int:
        """E for a number per device; a negative one, -m, spreads an expert over m devices."""
        if num_local_experts == 0:
            raise ConfigError("num_experts_per_device", got=0, expected="an int other than 0")
        if num_local_experts > 0:
            return num_local_experts * group_size(group)
        refuse_ranks("tutel.moe_layer: an expert over several devices", -num_local_experts)
        return 1

    def _make_experts(
        self,
        experts: dict[str, Any],
        seeds: Sequence[int | None] | None,
        scan: Callable[[str, nn.Parameter], Any] | None,
    ) -> None:
        given = experts.pop("num_experts_per_device", 1)
        local = experts.pop("count_per_node", given)
        total = self.global_expert_count(local, self.group)
        self.num_local_experts = max(local, 1)
        self.register_buffer("_num_global_experts", torch.tensor(total))
        self.num_global_experts = total
        _seed(seeds, 1)
        module = _lookup(EXPERTS, experts.pop("type", None), experts, "experts['type']")
        sizes = {"num_experts_per_device": self.num_local_experts, "sharded_count": self.sharded_count}
        self.experts = module(model_dim=self.model_dim, **sizes, **experts)
        for name, parameter in self.experts.named_parameters():
            if scan is not None:
                scan(name, parameter)
            parameter._tutel_expert = True  # pyright: ignore[reportAttributeAccessIssue]

    def _make_gates(self, gate_type: Any, seeds: Sequence[int | None] | None) -> None:
        if isinstance(gate_type, str):
            gate_type = _old_gate(gate_type)
        kinds = [gate_type] if isinstance(gate_type, dict) else list(gate_type)
        self.gates = nn.ModuleList()
        for i, kind in enumerate(kinds):
            options = dict(kind)
            _seed(seeds, 0, i)
            module = _lookup(GATES, options.pop("type", None), options, "gate_type['type']")
            gate = module(model_dim=self.model_dim, num_global_experts=self.num_global_experts, **options)
            default = float(os.environ.get("CAP_FACTOR", "1.0"))
            for name, value in (("gate_noise", 0.0), ("capacity_factor", default)):
                if not hasattr(gate, name):
                    setattr(gate, name, options.get(name, value))
            self.gates.append(gate)

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of "gate" or "local_experts"."""
        modules = {"gate": self.gates, "local_experts": self.experts}
        if param_type not in modules:
            raise ConfigError("param_type", got=param_type, expected=f"one of {list(modules)}")
        return modules[param_type].named_parameters()

    def forward(
        self,
        input: Tensor,
        gate_index: int = 0,
        capacity_factor: float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
    ) -> Any:
        """``[..., D] -> [..., D_out]``, a tensor with the balance loss as ``.l_aux``.

        Args:
            input: the tokens, at least two axes.
            gate_index: which of several gates.
            capacity_factor: another factor for this call; see the trap "zero_capacity_factor".
            top_k: another K for this call.
            a2a_ffn_overlap_degree: for this call and all later ones.
            reserve_dims: how many trailing axes form one token.
            inequivalent_tokens: no difference in one process.
            adaptive_r: for this call and all later ones; 0 or 1.
            megablocks_size: in inference, part of the alignment of the capacity.
        """
        if self.skip_moe:
            return self._finish(input, None)
        if a2a_ffn_overlap_degree is not None:
            self.a2a_ffn_overlap_degree = a2a_ffn_overlap_degree
        if adaptive_r is not None:
            self.adaptive_degree = _valid_degree(adaptive_r)
        self.megablocks_size = (
            megablocks_size if self.num_local_experts > 1 and not torch.is_grad_enabled() else 0
        )
        x = self._as_tokens(input, reserve_dims)
        with autocast_off(x.device.type):
            dtype, (crit, l_aux) = self._route(x, self.gates[gate_index], capacity_factor, top_k)
        self.dispatch_count = get_dispatch_count(crit)
        buffers = fast_encode(x.to(dtype), crit, self.is_postscore).to(x.dtype)
        y = self.experts(buffers.view(*buffers.shape[:2], *input.shape[-reserve_dims:]), self)
        y_TD = fast_decode(y.reshape(*y.shape[:2], numel(y.shape[2:])).to(dtype), crit, self.is_postscore)
        shape = (*input.shape[:-reserve_dims], *y.shape[-reserve_dims:])
        return self._finish(y_TD.view(shape).to(input.dtype), l_aux)

    def _finish(self, y: Tensor, l_aux: Tensor | None) -> Any:
        self.l_aux = y.l_aux = l_aux  # pyright: ignore[reportAttributeAccessIssue]
        return y if self.result_func is None else self.result_func(y)

    def _as_tokens(self, x: Tensor, reserve_dims: int) -> Tensor:
        """``[T, D]`` in the experts' dtype, in autocast's where it is on."""
        width = numel(x.shape[-reserve_dims:])
        if x.dim() < 2 or width != self.model_dim:
            raise ShapeError(
                f"tutel.moe_layer: got {tuple(x.shape)}; expected at least two axes, the last {reserve_dims} holding "
                f"model_dim = {self.model_dim} features"
            )
        x = x.reshape(numel(x.shape[:-reserve_dims]), width)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        like = next(self.experts.parameters(), x)
        return x.to(like.dtype)

    def _route(
        self, x: Tensor, gate: nn.Module, capacity_factor: float | None, top_k: int | None
    ) -> tuple[torch.dtype, tuple[Critical, Tensor | None]]:
        """The logits' dtype, and the routing with its loss."""
        logits = gate(x)
        noise: Any = gate.gate_noise
        noisy = logits
        if self.training and noise > 0:
            noisy = logits + noise * torch.randn_like(logits) / self.num_global_experts
        own = capacity_factor is None or (not capacity_factor and "zero_capacity_factor" in self.traps)
        factor: Any = gate.capacity_factor if own else capacity_factor
        k: Any = top_k or gate.top_k
        return logits.dtype, extract_critical(
            torch.softmax(noisy, dim=1),
            top_k=k,
            loss_fn=gshard_loss if self.is_gshard_loss else self._load_loss(logits, noisy, noise),
            capacity_factor=factor,
            batch_prioritized_routing=self.batch_prioritized_routing,
            normalize_gate=self.normalize_gate,
            alignment=self._alignment(),
            group=self.group,
            traps=self.traps,
        )

    def _load_loss(self, logits: Tensor, noisy: Tensor, noise: float) -> Callable[[Tensor, Tensor], Tensor]:
        experts = self.num_global_experts
        if "load_loss_units" in self.traps:
            clean = torch.softmax(logits, dim=1)
            return lambda _, ids: load_importance_loss(clean, noisy.gather(1, ids), experts, noise)
        return lambda _, ids: losses.load_importance(logits, noisy, ids, noise / experts)

    def _alignment(self) -> int:
        """The number that the capacity is rounded up to a multiple of."""
        block = max(self.megablocks_size, 1)
        size = -(-self.sharded_count * self.a2a_ffn_overlap_degree // block) * block
        return (
            size if size <= 2 * MEGABLOCKS_ROUNDING else -(-size // MEGABLOCKS_ROUNDING) * MEGABLOCKS_ROUNDING
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load also checkpoints of other versions, without the number of experts or with other shapes."""
        state_dict.setdefault(f"{prefix}_num_global_experts", self._num_global_experts)
        saved = int(state_dict[f"{prefix}_num_global_experts"])
        if saved != self.num_global_experts:
            raise ConfigError(
                "num_global_experts", got=saved, expected=f"{self.num_global_experts}, the layer's"
            )
        for name, parameter in self.experts.named_parameters():
            key = f"{prefix}experts.{name}"
            if key in state_dict and state_dict[key].numel() == parameter.numel():
                state_dict[key] = state_dict[key].view(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the last forward's loss, whose graph no copy or pickle can hold."""
        return {**self.__dict__, "l_aux": None, "dispatch_count": None}

    def extra_repr(self) -> str:
        """K and noise of each gate, and E."""
        gates = [f"k={gate.top_k}, noise={gate.gate_noise}" for gate in self.gates]
        return f"Top-K(s) = {gates}, Total-Experts = {self.num_global_experts}"


moe_layer = MOELayer


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    if kwargs.pop("pad_samples", None) is not None:
        warnings.warn("tutel.moe_layer: pad_samples has no effect", stacklevel=3)
    for name in kwargs:
        raise UnknownOption(
            name, ("gate_type", "model_dim", "experts", "group", "seeds"), where="tutel.moe_layer"
        )


def _seed(seeds: Sequence[int | None] | None, place: int, add: int = 0) -> None:
    seed = seeds[place] if seeds is not None and len(seeds) > place else None
    if seed is not None:
        torch.manual_seed(seed + add)


def _lookup(table: dict[str, type[nn.Module]], name: Any, options: dict[str, Any], what: str) -> Any:
    """The class of that type; for "custom" the one that the dict brings as ``module``."""
    if name == "custom":
        return options.pop("module")
    if name not in table:
        raise ConfigError(what, got=name, expected=f"one of {[*table, 'custom']}")
    return table[name]


def _old_gate(name: str) -> dict[str, Any]:
    found = re.fullmatch(r"Top(\d+)Gate", name)
    if found is None:
        raise ConfigError(
            "gate_type", got=name, expected="a dict, a list of dicts, or 'Top1Gate', 'Top2Gate', ..."
        )
    return {"type": "top", "k": int(found[1])}


def _adaptive_degree(parallel_type: str) -> int:
    """r of "adaptive:r", as far as one process allows: 0 or 1."""
    if parallel_type.startswith("adaptive:"):
        return min(max(int(parallel_type.partition(":")[2]), 0), 1)
    return 1


def _valid_degree(adaptive_r: int) -> int:
    if adaptive_r not in (0, 1):
        raise ConfigError("adaptive_r", got=adaptive_r, expected="0 or 1: each expert is on one device")
    return adaptive_r
