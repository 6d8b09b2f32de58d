"""``log_load``: the load of the experts and the auxiliary loss in the logs of Hugging Face's Trainer.

Contract: each time the Trainer logs its training loss, one more record goes through ``Trainer.log`` to all reporters,
about the forwards since the one before. The main process alone reads its counters; nobody else waits.

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
        metrics: what is logged of each layer, of ``METRICS``.

    Raises:
        ConfigError: for a metric that does not exist.
    """
    from transformers import TrainerCallback

    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                "metrics", got=name, expected=f"one of {list(METRICS)}{suggest(str(name), METRICS)}"
            )

    class LoadCallback(TrainerCallback):
        """After the Trainer's own record of the training loss, one about the load."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            """Log, but not about the record itself."""
            if state.is_world_process_zero and logs is not None and "loss" in logs:
                trainer.log(load_record(trainer.model, metrics))

    trainer.add_callback(LoadCallback())


def load_record(model: nn.Module, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The numbers since the last record, by name; counting starts again."""
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
