"""``log_load``: the load of the experts and the auxiliary loss in the logs of Hugging Face's Trainer.

Contract: each time the Trainer logs its training loss, ``Trainer.log`` sends one more record to all reporters, about
the forwards since the record before. Only the main process reads its counters, so no rank waits for another.

    >>> trainer = Trainer(model, args, train_dataset=data)                # doctest: +SKIP
    >>> log_load(trainer)
    {'moe/l_aux': 0.0112, 'moe/max_over_mean': 1.31, 'moe/dead_experts': 0.0, 'moe/layers.0.mlp/entropy': 0.98, ...}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from moefy.errors import ConfigError, suggest
from moefy.reports.expert_load import LayerLoad, expert_load

METRICS = tuple(LayerLoad(fqn="", tokens_per_expert=(0,)).metrics())


def log_load(trainer: Any, metrics: Sequence[str] = ("max_over_mean", "entropy", "dropped_share")) -> None:
    """Add a callback to ``trainer`` that logs the load.

    Args:
        trainer: a ``transformers.Trainer`` of a transformed model.
        metrics: the measures to log for each layer, a selection of ``METRICS``.

    Raises:
        ConfigError: a metric does not exist.
    """
    from transformers import TrainerCallback

    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                "metrics", got=name, expected=f"one of {list(METRICS)}{suggest(str(name), METRICS)}"
            )

    class LoadCallback(TrainerCallback):
        """Logs the load after each record of the training loss."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            """Log the load, unless the record is the load's own."""
            if state.is_world_process_zero and logs is not None and "loss" in logs:
                trainer.log(load_record(trainer.model, metrics))

    trainer.add_callback(LoadCallback())


def load_record(model: nn.Module, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Read and reset the counters: load and auxiliary loss since the last call, by name."""
    report = expert_load(model, reset=True)
    busy = [layer for layer in report.layers if layer.total]
    values = {
        "l_aux": report.l_aux,
        "max_over_mean": max((layer.max_over_mean for layer in busy), default=0.0),
        "dead_experts": float(sum(len(layer.dead) for layer in busy)),
    }
    for layer in report.layers:
        values |= {f"{layer.fqn or 'model'}/{name}": layer.metrics()[name] for name in metrics}
    return {f"moe/{name}": value for name, value in values.items()}
