"""``LoadHistory``: the load of a model's experts over training, recorded without a sync and drawn as a heat map.

Contract: call ``step()`` once per training step. Every ``every`` steps it keeps a copy of the counters on their device;
only ``shares`` and ``plot`` bring them to the host. It resets nothing, so ``moefy.load`` goes on as before.

    >>> history = moefy.LoadHistory(model, every=10)          # doctest: +SKIP
    >>> for batch in loader:
    ...     train_step(batch); history.step()
    >>> history.plot("load.png")                              # experts by layer over training
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from moefy.errors import ConfigError
from moefy.reports.expert_load import layer_name, outer_routers


class LoadHistory:
    """Records the load of every layer.

    Args:
        model: as for ``moefy.load``.
        every: how many steps make one column of the plot.

    Attributes:
        steps: the step at the end of each recorded interval.

    Raises:
        NoMoELayer: the model has no router.
        ConfigError: for an ``every`` below 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError("every", got=every, expected="an int >= 1")
        self._routers = {layer_name(name): router for name, router in outer_routers(model).items()}
        self.every, self.steps = every, [0]
        self._taken = 0
        self._snapshots = {name: [self._now(name)] for name in self._routers}

    def step(self) -> None:
        """A training step is over."""
        self._taken += 1
        if self._taken % self.every == 0:
            self.steps.append(self._taken)
            for name, snapshots in self._snapshots.items():
                snapshots.append(self._now(name))

    def _now(self, name: str) -> Tensor:
        return self._routers[name].load_counter.tokens_per_expert().clone()

    def shares(self) -> dict[str, Tensor]:
        """``[intervals, E]`` fp64 on the CPU by layer: each expert's share of the interval's slots, 0 without any."""
        return {name: _shares(torch.stack(taken).cpu()) for name, taken in self._snapshots.items()}

    def plot(self, path: str | Path) -> None:
        """Draw a heat map, experts by layer over training, into an image file. Needs matplotlib (extra ``plot``)."""
        from moefy.reports.load_plot import plot_history

        plot_history(self.shares(), self.steps, path)


def _shares(totals_SE: Tensor) -> Tensor:
    slots_IE = torch.diff(totals_SE, dim=0)
    # Counters that were reset in between start again from nothing.
    slots_IE = torch.where((slots_IE < 0).any(1, keepdim=True), totals_SE[1:], slots_IE).double()
    return slots_IE / slots_IE.sum(1, keepdim=True).clamp(min=1)
