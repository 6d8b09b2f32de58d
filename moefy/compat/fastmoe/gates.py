"""FastMoE's gates: modules from tokens ``[S, D]`` to ``(expert ids, scores)``, with their balance loss.

Contract: ids are ``[S, K]`` or flat, -1 for a dropped slot; scores have S * K values. The loss of the last forward
waits in the gate: ``get_loss()`` takes it. ``num_expert`` is that of one worker, of ``world_size``; a gate scores them
all, and those whose capacity is enforced over workers refuse more than one.

    >>> ids, scores = GShardGate(16, 4, 1)(torch.randn(5, 16))
    >>> ids.shape, scores.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))

Shape letters: S tokens, D width, E experts of all workers, K top-k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefy.compat.single_process import refuse_ranks
from moefy.config import CAPACITY_RULES
from moefy.errors import ConfigError, UnknownOption
from moefy.nn import losses
from moefy.nn.routers.scored import top_k_index
from moefy.nn.routers.topology import topology_index
from moefy.nn.routing.capacity import queue_ranks

TRAPS = frozenset({"gshard_loss_scale", "switch_additive_noise"})
"""FastMoE's surprises that can be switched off; ``moefy.compat.fastmoe`` explains them."""
NOISE_EPSILON = 1e-2
GateOutput = tuple[Tensor, Tensor]


class BaseGate(nn.Module):
    """A gate with a place for its loss. Subclass it for a gate of one's own.

    Args:
        num_expert: experts of one worker.
        world_size: workers.
    """

    def __init__(self, num_expert: int, world_size: int) -> None:
        super().__init__()
        self.num_expert, self.world_size = num_expert, world_size
        self.tot_expert = num_expert * world_size
        self.loss: Tensor | None = None

    def set_loss(self, loss: Tensor | None) -> None:
        """Keep the loss of this forward."""
        self.loss = loss

    def get_loss(self, clear: bool = True) -> Tensor | None:
        """The loss of the last forward; the gate forgets it unless ``clear`` is False."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        """Whether the gate holds a loss."""
        return self.loss is not None

    def __getstate__(self) -> dict[str, Any]:
        """The state without the loss, whose graph no copy or pickle can hold."""
        return {**self.__dict__, "loss": None}


class NaiveGate(BaseGate):
    """The K largest logits of a linear and a softmax over them.

    Args:
        d_model: D.
        num_expert: experts of one worker.
        world_size: workers.
        top_k: K.
        gate_bias: whether the linear has a bias.
    """

    def __init__(
        self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True
    ) -> None:
        super().__init__(num_expert, world_size)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
        self.top_k = top_k

    def forward(self, inp: Tensor, return_all_scores: bool = False) -> Any:
        """Ids and scores ``[S, K]``, and the logits ``[S, E]`` on request."""
        logits = self.gate(inp)
        index, scores = best(logits, self.top_k)
        self.set_loss(torch.zeros(1, requires_grad=True, device=inp.device))
        return (index, scores, logits) if return_all_scores else (index, scores)


class NoisyGate(BaseGate):
    """Noisy top-k with the losses of load and importance (Shazeer et al. 2017).

    In evaluation the load is counted, where the original divides by a noise of zero.

    Args:
        d_model: D.
        num_expert: experts of one worker.
        world_size: workers.
        top_k: K.
    """

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.top_k = top_k
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's uniform on ``[D, E]``, whose fan-in is E."""
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, inp: Tensor) -> GateOutput:
        """Flat ids ``[S * K]`` and scores ``[S, 1, K]``."""
        clean = inp @ self.w_gate
        noisy = clean
        std = F.softplus(inp @ self.w_noise) + NOISE_EPSILON
        if self.training:
            noisy = clean + torch.randn_like(clean) * std
        index, scores = best(noisy, self.top_k)
        if self.training:
            load = losses.smooth_load(clean, noisy, std, self.top_k)
        else:  # without noise the probability of being chosen is 0 or 1
            load = losses.cv_squared(losses.assignment_totals(index, self.tot_expert)[:-1].to(scores.dtype))
        self.set_loss(losses.sparse_importance(scores, index, self.tot_expert) + load)
        return index.reshape(-1), scores.unsqueeze(1)


class _SecondAtRandomGate(NaiveGate):
    """Two experts, a balance loss, a capacity, and a second expert that may be dropped at random."""

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = True,
        gate_bias: bool = True,
        *,
        traps: Collection[str] = TRAPS,
    ) -> None:
        if topk != 2:
            raise ConfigError("topk", got=topk, expected=f"2, as {type(self).__name__} has it")
        super().__init__(d_model, num_expert, world_size, top_k=2, gate_bias=gate_bias)
        self.capacity, self.random_routing, self.traps = capacity, random_routing, checked(traps)

    def seats(self, tokens: int) -> int:
        """The capacity of each expert."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> GateOutput:
        """Ids, -1 where dropped, and scores ``[S, 2]``."""
        index, scores, logits = super().forward(x, return_all_scores=True)
        self.set_loss(gshard_loss(logits, index, self))
        index = prune(index, self.tot_expert, self.seats(x.shape[0]))
        if self.random_routing:
            drop = 2 * scores[:, 1].detach() < torch.rand(x.shape[0], device=x.device)
            index = torch.stack([index[:, 0], index[:, 1].masked_fill(drop, -1)], 1)
        return index, scores


class GShardGate(_SecondAtRandomGate):
    """GShard's gate (Lepikhin et al. 2020), each worker pruning alone.

    Args:
        d_model: D.
        num_expert: experts of one worker.
        world_size: workers.
        topk: 2.
        capacity: rates in training and evaluation; an expert takes ``ceil(rate * S) * 2 // E`` slots.
        random_routing: the second expert is dropped where ``2 * score < U(0, 1)``.
        gate_bias: whether the linear has a bias.
        traps: see ``moefy.compat.fastmoe``.
    """

    def seats(self, tokens: int) -> int:
        """The slots that one expert takes from one source worker."""
        rate = self.capacity[0 if self.training else 1]
        return CAPACITY_RULES["fastmoe_gshard"].formula(
            rate, tokens, self.top_k, self.tot_expert, self.num_expert
        )


class DCGate(_SecondAtRandomGate):
    """``GShardGate`` with ``ceil(rate * S)`` slots for each expert, over all workers; arguments as there."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, *args: Any, **options: Any) -> None:
        refuse_ranks("DCGate: world_size", world_size)
        super().__init__(d_model, num_expert, world_size, *args, **options)

    def seats(self, tokens: int) -> int:
        """The slots that one expert takes from all workers."""
        rate = self.capacity[0 if self.training else 1]
        return CAPACITY_RULES["fastmoe_dc"].formula(
            rate, tokens, self.top_k, self.tot_expert, self.num_expert
        )


class SwitchGate(NaiveGate):
    """Switch Transformer's gate (Fedus et al. 2022): one expert, weighted by its share of the softmax over all.

    Args:
        d_model: D.
        num_expert: experts of one worker.
        world_size: 1.
        topk: 1.
        switch_eps: half the width of the noise in training.
        capacity: rates in training and evaluation; an expert takes ``ceil(rate * S / num_expert)`` tokens.
        gate_bias: whether the linear has a bias.
        traps: see ``moefy.compat.fastmoe``.
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
        *,
        traps: Collection[str] = TRAPS,
    ) -> None:
        if topk != 1:
            raise ConfigError("topk", got=topk, expected="1, as SwitchGate has it")
        refuse_ranks("SwitchGate: world_size", world_size)
        super().__init__(d_model, num_expert, world_size, top_k=1, gate_bias=gate_bias)
        self.switch_eps, self.capacity, self.traps = switch_eps, capacity, checked(traps)

    def forward(self, inp: Tensor) -> GateOutput:
        """Ids, -1 where dropped, and scores ``[S, 1]``."""
        logits = self._logits(inp)
        scores_SE = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        index = top_k_index(scores_SE, 1)
        rate = self.capacity[0 if self.training else 1]
        seats = CAPACITY_RULES["fastmoe_switch"].formula(
            rate, inp.shape[0], 1, self.tot_expert, self.num_expert
        )
        top1 = scores_SE.gather(1, index).to(inp.dtype)
        index = prune(index, self.tot_expert, seats)
        self.set_loss(losses.fastmoe_switch(scores_SE, index, self.tot_expert))
        return index, top1

    def _logits(self, inp: Tensor) -> Tensor:
        low, high = 1 - self.switch_eps, 1 + self.switch_eps
        if not self.training:
            return self.gate(inp)
        if "switch_additive_noise" not in self.traps:
            return self.gate(inp * (torch.rand_like(inp) * (high - low) + low))
        logits = self.gate(inp)
        return logits + (torch.rand_like(logits) * (high - low) + low)


class SwipeGate(NaiveGate):
    """BaGuaLu's gate, which balances workers: with one worker its top-k is plain. Arguments as ``NaiveGate``."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, *args: Any, **options: Any) -> None:
        refuse_ranks("SwipeGate: world_size", world_size)
        super().__init__(d_model, num_expert, world_size, *args, **options)

    def forward(self, inp: Tensor) -> GateOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Ids and scores ``[S, K]``; no loss."""
        return best(self.gate(inp), self.top_k)


class FasterGate(NaiveGate):
    """FasterMoE's topology-aware gate: few tokens leave their node (He et al. 2022).

    Args:
        d_model: D.
        n_expert: experts of one worker.
        world_size: workers.
        node_rank: which node this is. Its workers are by env ``FMOE_TOPO_GPUS_PER_NODE`` (8); the share of tokens that
            may leave is ``FMOE_TOPO_OUTGOING_FRACTION`` (0.14).
        gate_bias: whether the linear has a bias.
        traps: see ``moefy.compat.fastmoe``.
    """

    mask: Tensor

    def __init__(
        self,
        d_model: int,
        n_expert: int,
        world_size: int,
        node_rank: int = 0,
        gate_bias: bool = True,
        *,
        traps: Collection[str] = TRAPS,
    ) -> None:
        super().__init__(d_model, n_expert, world_size, top_k=2, gate_bias=gate_bias)
        self.traps, self.node_rank = checked(traps), node_rank
        self.ogn_ratio = float(os.environ.get("FMOE_TOPO_OUTGOING_FRACTION", "0.14"))
        self.ne_per_node = _workers_per_node() * n_expert
        far_E = torch.arange(self.tot_expert) // self.ne_per_node != node_rank
        self.register_buffer("mask", far_E, persistent=False)

    def forward(self, inp: Tensor) -> GateOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Ids and scores ``[S, 2]``."""
        logits = self.gate(inp)
        outgoing = int(inp.shape[0] * self.ogn_ratio)
        index = topology_index(logits, 2, ~self.mask, outgoing)
        self.set_loss(gshard_loss(logits, top_k_index(logits, 2), self))
        return index, torch.softmax(logits.gather(1, index), dim=-1)


class ZeroGate(BaseGate):
    """Everything to expert 0 with the weight 1/K: the worst load there is. Arguments as ``NaiveGate``, no bias."""

    def __init__(self, _1: int, num_expert: int, world_size: int, top_k: int = 2) -> None:
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, inp: Tensor) -> GateOutput:
        """Flat ids ``[S * K]`` and scores ``[S, 1, K]``."""
        slots = inp.shape[0] * self.top_k
        scores = torch.full((inp.shape[0], 1, self.top_k), 1 / self.top_k, device=inp.device)
        return torch.zeros(slots, dtype=torch.int64, device=inp.device), scores


def gen_faster_gate(rank: int) -> Callable[..., FasterGate]:
    """A factory of ``FasterGate`` for that rank, as a layer's ``gate``."""

    def generate(d_model: int, n_expert: int, world_size: int, top_k: int = 2) -> FasterGate:
        if top_k != 2:
            raise ConfigError("top_k", got=top_k, expected="2, as FasterGate has it")
        return FasterGate(d_model, n_expert, world_size, rank // _workers_per_node())

    return generate


def best(logits: Tensor, top_k: int) -> GateOutput:
    """The K best experts and the softmax over their logits."""
    index = top_k_index(logits, top_k)
    return index, torch.softmax(logits.gather(1, index), dim=-1)


def prune(index: Tensor, num_experts: int, seats: int) -> Tensor:
    """``index`` with -1 for slots beyond the seats of their expert; earlier tokens sit first."""
    return index.masked_fill(queue_ranks(index, num_experts) >= seats, -1)


def gshard_loss(logits: Tensor, index: Tensor, gate: Any) -> Tensor:
    """The balance loss of first choices, in the scale that the gate's ``traps`` choose."""
    per_worker = gate.num_expert if "gshard_loss_scale" in gate.traps else gate.tot_expert
    scores = torch.softmax(logits, dim=1)
    return losses.fastmoe_gshard(scores, index, gate.tot_expert, experts_per_worker=per_worker)


def checked(traps: Collection[str]) -> frozenset[str]:
    """``traps`` as a set; an unknown name raises ``UnknownOption``."""
    for name in traps:
        if name not in TRAPS:
            raise UnknownOption(name, sorted(TRAPS), where="traps")
    return frozenset(traps)


def _workers_per_node() -> int:
    return int(os.environ.get("FMOE_TOPO_GPUS_PER_NODE", "8"))
