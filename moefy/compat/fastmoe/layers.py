"""``FMoE`` and ``FMoETransformerMLP``: FastMoE's layers.

Contract: tokens ``[S, D]``, or a tree of tensors of S rows, go to their experts' slices and come back weighted. An
expert is called as ``expert(rows, count)`` with its number of rows in a tensor; a fused one, set as ``self.experts`` by
a subclass, as ``experts(rows, counts)``.

    >>> layer = FMoE(num_expert=4, d_model=16, expert=lambda d_model: MyExpert(d_model))
    >>> layer(torch.randn(10, 16)).shape
    torch.Size([10, 16])

Shape letters: S tokens, D width, E experts, K top-k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moefy.compat.fastmoe.gates import NaiveGate
from moefy.compat.fastmoe.linear import FMoELinear
from moefy.compat.single_process import group_size, refuse_ranks
from moefy.errors import ConfigError
from moefy.nn.dispatch import LOCAL
from moefy.nn.experts.replacement import replace_rows
from moefy.nn.route import make_routing
from moefy.nn.routing import token_tree
from moefy.nn.routing.layout import TokenLayout, numel
from moefy.nn.routing.routing import Choice
from moefy.nn.routing.token_tree import Tree

Gate = Callable[..., nn.Module]
ExpertFactory = Callable[[int], nn.Module]


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Tag every parameter with the group its gradient is reduced in: ``parameter.dp_comm = comm``."""
    for parameter in module.parameters():
        parameter.dp_comm = comm  # pyright: ignore[reportAttributeAccessIssue]


class FMoE(nn.Module):
    """FastMoE's general layer.

    Args:
        num_expert: experts of this worker.
        d_model: D.
        world_size: 1.
        mp_group: old name of ``slice_group``.
        slice_group: a group of one process, or ``None``.
        moe_group: a group of one process, or ``None``.
        top_k: K.
        gate: a class or factory called with ``(d_model, num_expert, world_size, top_k)``, and with ``gate_bias`` when
            it is a ``NaiveGate``.
        expert: a class or factory called with ``d_model`` for every expert; a list of such, which sets ``num_expert``;
            or ``None``, when a subclass sets ``self.experts``, one module for all.
        gate_hook: called with ``(ids, scores, None)`` at every forward.
        mask: integers ``[S]`` or of that many: tokens where it is not 0 skip the experts. Only with ``mask_dict``.
        mask_dict: what such tokens become, by the value of ``mask``.
        gate_bias: whether a ``NaiveGate`` has a bias.

    Raises:
        ParallelismNeeded: for several workers.
    """

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: Any = None,
        slice_group: Any = None,
        moe_group: Any = None,
        top_k: int = 2,
        gate: Gate = NaiveGate,
        expert: ExpertFactory | list[ExpertFactory] | None = None,
        gate_hook: Callable[[Tensor, Tensor, Any], Any] | None = None,
        mask: Tensor | None = None,
        mask_dict: Mapping[int, Any] | None = None,
        gate_bias: bool = True,
    ) -> None:
        super().__init__()
        if mp_group is not None:
            warnings.warn("FMoE: mp_group is the old name of slice_group", DeprecationWarning, stacklevel=2)
            slice_group = mp_group
        refuse_ranks("FMoE: world_size", world_size)
        for name, group in (("slice_group", slice_group), ("moe_group", moe_group)):
            refuse_ranks(f"FMoE: {name}", 1 if group is None else group_size(group))
        self.d_model, self.world_size, self.top_k = d_model, world_size, top_k
        self.slice_group, self.moe_group = slice_group, moe_group
        self.num_expert = self._make_experts(expert, num_expert)
        options = {"gate_bias": gate_bias} if isinstance(gate, type) and issubclass(gate, NaiveGate) else {}
        self.gate: Any = gate(d_model, self.num_expert, world_size, top_k, **options)
        self.gate_hook, self.mask, self.mask_dict = gate_hook, mask, mask_dict

    def _make_experts(self, expert: ExpertFactory | list[ExpertFactory] | None, num_expert: int) -> int:
        """Make the experts' modules; returns E."""
        self.experts_fused = expert is None
        if expert is None:
            return num_expert
        factories = expert if isinstance(expert, list) else [expert] * num_expert
        self.experts = nn.ModuleList(make(self.d_model) for make in factories)
        return len(factories)

    def expert_fn(self, inp: Tree, fwd_expert_count: Tensor) -> Tree:
        """All experts on rows sorted by expert.

        Args:
            inp: ``[N, ...]`` rows, the first ones expert 0's.
            fwd_expert_count: ``[E]`` how many each has.
        """
        if self.experts_fused:
            return self.experts(inp, fwd_expert_count)
        outputs, start = [], 0
        for i, size in enumerate(fwd_expert_count.tolist()):
            rows = token_tree.map_leaves(lambda row, s=start, n=size: row[s : s + n], inp)
            outputs.append(self.expert_fn_single(rows, fwd_expert_count[i : i + 1], i))
            start += size
        return token_tree.concatenate(outputs, 0)

    def expert_fn_single(self, inp: Tree, fwd_expert_count: Tensor, idx: int) -> Tree:
        """One expert on its rows."""
        if self.experts_fused:
            raise ConfigError("experts", got="one fused module", expected="a module per expert")
        return self.experts[idx](inp, fwd_expert_count)

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Tag the experts' parameters with ``expert_dp_comm`` and the gate's with "gate"."""
        if "experts" in self._modules:
            mark_module_parallel_comm(self.experts, expert_dp_comm)
        mark_module_parallel_comm(self.gate, "gate")

    def forward(self, moe_inp: Tree) -> Tree:
        """``[S, D] -> [S, D_out]``, or a tree of such."""
        tokens = token_tree.leaves(moe_inp)[0].shape[0]
        rows = token_tree.flatten(moe_inp, (tokens,))
        index, score = self.gate(moe_inp)
        if self.gate_hook is not None:
            self.gate_hook(index, score, None)
        weights_SK = score.reshape(tokens, self.top_k)
        index_SK = index.reshape(tokens, self.top_k)
        ids_S = None if self.mask is None or self.mask_dict is None else self.mask.reshape(-1)
        if ids_S is not None:
            index_SK = index_SK.masked_fill(ids_S.ne(0).unsqueeze(1), -1)
        y = self._dispatch(rows, index_SK, weights_SK)
        if ids_S is None or self.mask_dict is None:
            return y
        scale_S = weights_SK.sum(1)
        return token_tree.map_leaves(lambda leaf: _masked(leaf, ids_S, scale_S, self.mask_dict or {}), y)

    @torch.compiler.disable(
        recursive=True
    )  # sizes that differ at every call would compile it again each time
    def _dispatch(self, rows: Tree, index_SK: Tensor, weights_SK: Tensor) -> Tree:
        """Send the rows to their experts and combine the outputs."""
        choice = Choice(index=index_SK, weights=weights_SK, logits=weights_SK)
        routing = make_routing(choice, self.num_expert, TokenLayout((index_SK.shape[0],)))
        sorted_rows, _, handle = LOCAL.dispatch(rows, routing)
        counts_E = routing.tokens_per_expert.long().cpu()
        kept = int(counts_E.sum())
        total = index_SK.numel()
        y = self.expert_fn(token_tree.map_leaves(lambda row: row[:kept], sorted_rows), counts_E)
        return LOCAL.combine(token_tree.concatenate([y], total - kept), handle)


class FMoETransformerMLP(FMoE):
    """Experts of two linears, on any leading shape.

    Args:
        num_expert: experts of this worker.
        d_model: D.
        d_hidden: hidden width of one expert.
        activation: one module, or function, that all experts share.
        expert_dp_comm: the tag of the experts' parameters.
        expert_rank: kept, without effect.
        kwargs: of ``FMoE``.

    Parameters:
        ``experts.<e>.htoh4``, ``experts.<e>.h4toh``: ``FMoELinear`` of one expert.
    """

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: Callable[[Tensor], Tensor] | None = None,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        act = nn.GELU() if activation is None else activation
        super().__init__(
            num_expert=num_expert, d_model=d_model, expert=lambda d: Expert(1, d, d_hidden, act), **kwargs
        )
        self.mark_parallel_comm(expert_dp_comm)

    def forward(self, inp: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return super().forward(inp.reshape(numel(inp.shape[:-1]), self.d_model)).reshape(inp.shape)


class Expert(nn.Module):
    """Two ``FMoELinear`` with an activation between them, for one or more experts."""

    def __init__(
        self,
        num_expert: int,
        d_model: int,
        d_hidden: int,
        activation: Callable[[Tensor], Tensor],
        rank: int = 0,
    ) -> None:
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp: Tensor, fwd_expert_count: Tensor) -> Tensor:
        """``[N, D] -> [N, D]``."""
        return self.h4toh(self.activation(self.htoh4(inp, fwd_expert_count)), fwd_expert_count)


def _masked(y: Tensor, ids_S: Tensor, scale_S: Tensor, rows: Mapping[int, Any]) -> Tensor:
    """``y`` with masked rows replaced, each replacement times the sum of its scores."""
    scale = scale_S.to(y.dtype).view(-1, *[1] * (y.dim() - 1))
    return torch.where((ids_S == 0).view_as(scale), y, replace_rows(y, ids_S, rows) * scale)
