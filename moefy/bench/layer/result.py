"""What ``moefy bench layer`` measured: rows for programs, one table per shape for people, bars for a figure.

Contract: a row that could not be measured has ``failed`` in place of figures, so nothing is left out silently. "Of
dense" is the time of the dense products over that of the layer: 1 is the ceiling.

    >>> print(result)                                                                   # doctest: +SKIP
    B: T 32768, D 2048, H 1024, E 64, K 8, SwiGLU, busiest expert 1.0x the mean
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moefy.bench.layer.shapes import Shape
from moefy.reports.text.tables import Column, draw, stream_width

SCHEMA_VERSION = 1
CEILING = "dense"
Mode = Literal["forward", "forward+backward", "decode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One provider on one shape in one mode.

    Args:
        provider: its name.
        shape: a key of ``SHAPES``.
        mode: what was timed; "decode" is a forward, in a CUDA graph on a GPU.
        ms: median milliseconds.
        tflops: 1e12 floating-point operations per second, counting those that the mathematics needs.
        errors: relative error of the output and of each gradient.
        peak_mib: peak memory of the mode beyond the inputs. A training step includes the gradients of the weights.
        failed: why there are no figures.
    """

    provider: str
    shape: str
    mode: Mode
    ms: float | None = None
    tflops: float | None = None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_mib: float | None = None
    failed: str | None = None

    @property
    def error(self) -> float | None:
        """The largest relative error of output and gradients; None without any."""
        return max(self.errors.values(), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON types, ``None`` for one that was not measured."""
        return {**dataclasses.asdict(self), "error": self.error}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """All rows, in the order of the shapes. ``missing`` are the peers that are not installed."""

    environment: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    busiest: Mapping[str, float]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Shapes, rows and the environment, as JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "layer",
            "environment": dict(self.environment),
            "shapes": {
                name: {**dataclasses.asdict(shape), "busiest_over_mean": self.busiest[name]}
                for name, shape in self.shapes.items()
            },
            "rows": [row.to_dict() for row in self.rows],
            "missing": list(self.missing),
        }

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.environment.items() if value is not None)
        parts = [f"moefy bench layer: {where}", *(self._section(name) for name in self.shapes)]
        if self.missing:
            parts.append(f"not installed: {', '.join(self.missing)}")
        return "\n\n".join(parts)

    def modes(self, shape: str) -> tuple[Mode, ...]:
        """The modes of a shape."""
        return ("decode",) if self.shapes[shape].decode else ("forward", "forward+backward")

    def find(self, shape: str, provider: str, mode: str) -> Row | None:
        """The row of a shape, provider and mode; None if it failed or does not exist."""
        wanted = (shape, provider, mode)
        found = (row for row in self.rows if (row.shape, row.provider, row.mode) == wanted)
        return next((row for row in found if row.failed is None), None)

    def _section(self, name: str) -> str:
        modes = self.modes(name)
        mine = [row for row in self.rows if row.shape == name]
        done = {row.provider for row in mine if row.failed is None}
        ranked = sorted(done, key=lambda provider: self._rank(name, provider))
        columns = [
            Column(title="provider"),
            *(Column(title=title, align="right") for mode in modes for title in _titles(mode)),
            *(Column(title=title, align="right") for title in ("peak\nMiB", "relative\nerror")),
        ]
        lines = [[provider, *self._cells(name, provider)] for provider in ranked]
        table = [draw(columns, lines, stream_width())] if lines else []
        reasons = dict.fromkeys(f"{row.provider}: {row.failed}" for row in mine if row.failed is not None)
        return "\n".join([_heading(name, self.shapes[name], self.busiest[name]), *table, *reasons])

    def _rank(self, shape: str, provider: str) -> tuple[float, ...]:
        """By the time of the last mode (the training step), then of the first."""
        rows = [self.find(shape, provider, mode) for mode in reversed(self.modes(shape))]
        return tuple(float("inf") if row is None or row.ms is None else row.ms for row in rows)

    def _cells(self, shape: str, provider: str) -> list[str]:
        cells: list[str] = []
        rows = [self.find(shape, provider, mode) for mode in self.modes(shape)]
        for mode, row in zip(self.modes(shape), rows, strict=True):
            ceiling = self.find(shape, CEILING, mode)
            cells += _figures(row, ceiling)
        known = [row for row in rows if row is not None]
        peaks = [row.peak_mib for row in known if row.peak_mib is not None]
        errors = [row.error for row in known if row.error is not None]
        return [
            *cells,
            f"{max(peaks):.0f}" if peaks else "-",
            f"{max(errors):.1e}" if errors else "-",
        ]


def _titles(mode: Mode) -> tuple[str, str, str]:
    short = "fwd+bwd" if mode == "forward+backward" else mode
    return f"{short}\nms", f"{short}\nTFLOP/s", f"{short}\nof dense"


def _figures(row: Row | None, ceiling: Row | None) -> list[str]:
    if row is None or row.ms is None or row.tflops is None:
        return ["-"] * 3
    share = "-" if ceiling is None or ceiling.ms is None else f"{ceiling.ms / row.ms:.2f}"
    return [f"{row.ms:.3f}", f"{row.tflops:.3g}", share]


def _heading(name: str, shape: Shape, busiest: float) -> str:
    sizes = f"T {shape.tokens}, D {shape.d_model}, H {shape.d_hidden}, E {shape.num_experts}, K {shape.top_k}"
    kind = "SwiGLU" if shape.gated else "gelu"
    return f"{name}: {sizes}, {kind}, busiest expert {busiest:.1f}x the mean"


def save_plot(result: LayerResult, path: Path) -> None:
    """Draw one panel per mode, with bars of TFLOP/s, or of milliseconds for decoding. Needs matplotlib."""
    modes = list(dict.fromkeys(row.mode for row in result.rows if row.failed is None))
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(11, 3.2 * max(1, len(modes))), layout="constrained"
    )
    for place, mode in enumerate(modes, start=1):
        axes = figure.add_subplot(len(modes), 1, place)
        names = [name for name in result.shapes if mode in result.modes(name)]
        _bars(axes, result, mode, names)
    if modes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path)


def _bars(axes: Any, result: LayerResult, mode: str, names: Sequence[str]) -> None:
    providers = list(dict.fromkeys(row.provider for row in result.rows))
    width = 0.8 / max(1, len(providers))
    for at, provider in enumerate(providers):
        found = [result.find(name, provider, mode) for name in names]
        heights = [
            0.0 if row is None else (row.ms if mode == "decode" else row.tflops) or 0.0 for row in found
        ]
        axes.bar([i + at * width for i in range(len(names))], heights, width, label=provider)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(names))], list(names))
    axes.set_ylabel("ms" if mode == "decode" else "TFLOP/s")
    axes.set_title(mode)
