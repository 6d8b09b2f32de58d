"""``LoadHistory``: the load of a model's experts over training, recorded without waiting for the device.

Contract: the training loop calls ``step()`` once per step. Every ``every`` steps the history copies the counters on
their device; only ``shares`` and ``plot`` bring the copies to the host. The history resets no counter, so
``moefy.expert_load`` is independent of it.

    >>> history = moefy.LoadHistory(model, every=10)          # doctest: +SKIP
    >>> for batch in loader:
    ...     train_step(batch); history.step()
    >>> history.plot("load.png")                              # experts by layer over training
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from moefy.config.fields import is_int
from moefy.errors import ConfigError
from moefy.reports.expert_load import layer_name, outer_routers


class LoadHistory:
    """Records the load of every layer.

    Args:
        model: as for ``moefy.expert_load``.
        every: steps per recorded interval. An interval is one column of the plot.

    Attributes:
        steps: 0, then the step at the end of each recorded interval.

    Raises:
        NoMoELayer: the model has no router.
        ConfigError: ``every`` is no int or is below 1.
    """

    def __init__(self, model: nn.Module, *, every: int = 1) -> None:
        if not is_int(every, 1):
            raise ConfigError("every", got=every, expected="an int >= 1")
        self._routers = {layer_name(name): router for name, router in outer_routers(model).items()}
        self.every, self.steps = every, [0]
        self._taken = 0
        self._snapshots = {name: [self._now(name)] for name in self._routers}

    def step(self) -> None:
        """Note the end of a training step."""
        self._taken += 1
        if self._taken % self.every == 0:
            self.steps.append(self._taken)
            for name, snapshots in self._snapshots.items():
                snapshots.append(self._now(name))

    def _now(self, name: str) -> Tensor:
        return self._routers[name].load_counter.tokens_per_expert().clone()

    def shares(self) -> dict[str, Tensor]:
        """Each expert's share of an interval's slots: ``[intervals, E]`` by layer, fp64, on the CPU.

        An interval without tokens is a row of zeros.
        """
        return {name: _shares(torch.stack(taken).cpu()) for name, taken in self._snapshots.items()}

    def plot(self, path: str | Path) -> None:
        """Draw a heat map (experts by layer over training) into an image file. Needs matplotlib, the extra ``plot``."""
        from moefy.reports.load_plot import plot_history

        plot_history(self.shares(), self.steps, path)


def _shares(totals_SE: Tensor) -> Tensor:
    """Running totals ``[S, E]`` at S steps to the shares ``[S - 1, E]`` of the intervals between them."""
    slots_IE = torch.diff(totals_SE, dim=0)
    # A negative difference means that the counters were reset in between: the new total is what came since.
    slots_IE = torch.where((slots_IE < 0).any(1, keepdim=True), totals_SE[1:], slots_IE).double()
    return slots_IE / slots_IE.sum(1, keepdim=True).clamp(min=1)
