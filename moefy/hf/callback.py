"""``LoadCallback``: the load of the experts and the auxiliary loss in the logs of Hugging Face's Trainer.

Contract: each time the Trainer logs its training loss, one more record goes through ``Trainer.log`` to all reporters,
about the forwards since the one before. The main process alone reads its counters; nobody else waits.

    >>> trainer = Trainer(model, args, train_dataset=data)                # doctest: +SKIP
    >>> trainer.add_callback(LoadCallback(trainer))
    {'moe/l_aux': 0.0112, 'moe/max_over_mean': 1.31, 'moe/dead_experts': 0.0, 'moe/layers.0.mlp/entropy': 0.98, ...}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Trainer, TrainerCallback

from moefy.errors import ConfigError, suggest
from moefy.load_report import LayerLoad, load

METRICS = tuple(LayerLoad(fqn="", tokens_per_expert=(0,)).metrics())


class LoadCallback(TrainerCallback):
    """Logs the load.

    Args:
        trainer: the one that it is added to.
        metrics: what is logged of each layer, of ``METRICS``.

    Raises:
        ConfigError: for a metric that does not exist.
    """

    def __init__(
        self, trainer: Trainer, metrics: Sequence[str] = ("max_over_mean", "entropy", "dropped_share")
    ) -> None:
        for name in metrics:
            if name not in METRICS:
                expected = f"one of {list(METRICS)}{suggest(str(name), METRICS)}"
                raise ConfigError("metrics", got=name, expected=expected)
        self.trainer, self.metrics = trainer, tuple(metrics)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """After the Trainer's own record."""
        if state.is_world_process_zero and logs is not None and "loss" in logs:
            self.trainer.log(self.record())

    def record(self) -> dict[str, float]:
        """The numbers since the last record; counting starts again."""
        report = load(self.trainer.model, reset=True)  # type: ignore[arg-type]
        busy = [layer for layer in report.layers if layer.total]
        values = {
            "l_aux": report.l_aux,
            "max_over_mean": max((layer.max_over_mean for layer in busy), default=0.0),
            "dead_experts": float(sum(len(layer.dead) for layer in busy)),
        }
        for layer in report.layers:
            values |= {f"{layer.fqn or 'model'}/{name}": layer.metrics()[name] for name in self.metrics}
        return {f"moe/{name}": value for name, value in values.items()}
