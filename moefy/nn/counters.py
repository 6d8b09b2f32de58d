"""``LoadCounter``: how many tokens each expert of a router got, counted on the device in training forwards.

Contract: one in-place add per forward, no sync. Evaluation, padding and recomputation (both checkpoint kinds, compiled
or not) count nothing. The counters are no buffers: no ``state_dict`` holds them and DistributedDataParallel, which
broadcasts buffers, leaves each rank its own. ``moefy.expert_load`` reads them.

    >>> counter = LoadCounter(num_experts=3)
    >>> counter.count(routing)                 # offsets_E = [2, 2, 5]
    >>> counter.tokens_per_expert()
    tensor([2, 0, 3])

To look at single forwards (FastMoE's ``gate_hook``), hang an ordinary forward hook on the router; its output is the
``Routing``. Inside ``torch.compile`` a hook is compiled along.

    router.register_forward_hook(lambda router, args, routing: print(routing.top_k_index, routing.top_k_weights))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy.nn.execution import accumulate, is_forward, static_counter
from moefy.nn.routing.routing import Routing

LOSSES = ("l_aux", "balance", "z_loss", "router")
"""What ``LoadCounter.losses`` sums: the weighted auxiliary loss, then its terms without their weights."""


class LoadCounter:
    """Sums over the training forwards since the last ``reset``.

    Attributes:
        ends: ``[E]`` int64, the sum of the routings' offsets, so that the differences are tokens per expert.
        dropped: 0-dim int64, slots that capacity dropped.
        losses: ``[5]`` fp32, ``LOSSES`` and, last, the number of forwards that had an auxiliary loss.
    """

    def __init__(self, num_experts: int, device: Any = None) -> None:
        self.num_experts = num_experts
        self._make(device)

    def _make(self, device: Any) -> None:
        with torch.inference_mode(False):
            self.ends = static_counter(torch.zeros(self.num_experts, dtype=torch.int64, device=device))
            self.dropped = static_counter(torch.zeros((), dtype=torch.int64, device=device))
            self.losses = static_counter(torch.zeros(len(LOSSES) + 1, dtype=torch.float32, device=device))

    def reset(self) -> None:
        """Set all counters to zero."""
        for counter in (self.ends, self.dropped, self.losses):
            counter.zero_()

    def count(self, routing: Routing) -> None:
        """Add one forward. A recomputation and a trace add nothing."""
        if not is_forward():
            return
        _add(self, "ends", routing.offsets)
        asked_TK = routing.choice.index
        if asked_TK is not routing.top_k_index:
            asked = ((asked_TK >= 0) & (asked_TK < self.num_experts)).sum()
            _add(self, "dropped", asked - routing.offsets[-1])

    def add_losses(self, values: list[Tensor | None], like: Tensor) -> None:
        """Add one forward's ``LOSSES``; ``None`` is 0."""
        if is_forward():
            zero, one = like.new_zeros((), dtype=torch.float32), like.new_ones((), dtype=torch.float32)
            parts = [zero if value is None else value.detach().float() for value in values]
            _add(self, "losses", torch.stack([*parts, one]))

    def tokens_per_expert(self) -> Tensor:
        """``[E]`` int64: the slots that each expert got, without dropped ones."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the counters to the device that ``fn`` moves tensors to; their dtype stays."""
        device = fn(torch.empty(0, dtype=torch.int64, device=self.ends.device)).device
        if device == self.ends.device:
            return
        if device.type == "meta" or self.ends.is_meta:
            self._make(device)
        else:
            for name in ("ends", "dropped", "losses"):
                setattr(self, name, static_counter(getattr(self, name).to(device)))


def _add(counter: LoadCounter, name: str, value: Tensor) -> None:
    total = getattr(counter, name)
    if not torch.compiler.is_dynamo_compiling() and total.is_meta and not value.is_meta:
        counter._make(value.device)  # the weights came by assignment, which moves nothing
    accumulate(getattr(counter, name), value)
