"""Heat maps of expert load, into image files. Needs matplotlib, which the extra ``plot`` brings.

Contract: the colour is an expert's load by the mean of its layer: 1 (white) is balanced, 0 (blue) is dead, red has
twice its share or more. No window is opened and matplotlib's global state is not touched.

    >>> plot_layers(moefy.load(model), "load.png")            # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moefy.reports.expert_load import LoadReport

COLOURS = "RdBu_r"
TOP = 2.0
LEAST_INCHES = 2.5
ROWS_PER_INCH = 12


def plot_layers(report: LoadReport, path: str | Path) -> None:
    """Experts by layers: a row per layer, a column per expert."""
    experts = max(len(layer.tokens_per_expert) for layer in report.layers)
    relative_LE = torch.full((len(report.layers), experts), float("nan"), dtype=torch.float64)
    for row, layer in zip(relative_LE, report.layers, strict=True):
        counts_E = torch.tensor(layer.tokens_per_expert, dtype=torch.float64)
        row[: counts_E.numel()] = counts_E / max(layer.mean, 1e-9)
    figure, axes = _figure(len(report.layers) * 3)
    _draw(figure, axes, relative_LE)
    axes.set_xlabel("expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(range(len(report.layers)), [layer.fqn or "(root)" for layer in report.layers])
    figure.savefig(path)


def plot_history(shares: dict[str, Tensor], steps: list[int], path: str | Path) -> None:
    """Experts by layer over training: a band per layer, in it a row per expert; training runs to the right."""
    bands = [share_IE.t() * share_IE.shape[1] for share_IE in shares.values()]
    figure, axes = _figure(sum(band.shape[0] for band in bands))
    _draw(figure, axes, torch.cat(bands), extent=(steps[0], max(steps[-1], steps[0] + 1)))
    edges = [0, *torch.tensor([band.shape[0] for band in bands]).cumsum(0).tolist()]
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="black", linewidth=0.8)
    middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
    axes.set_yticks(middles, [name or "(root)" for name in shares])
    axes.set_xlabel("step")
    figure.savefig(path)


def _figure(rows: int) -> tuple[Any, Any]:
    import_module = importlib.import_module  # an extra, which type checkers need not find
    canvas = import_module("matplotlib.backends.backend_agg").FigureCanvasAgg
    figure_class = import_module("matplotlib.figure").Figure
    figure = figure_class(
        figsize=(8, max(LEAST_INCHES, 1 + rows / ROWS_PER_INCH)), layout="constrained", dpi=120
    )
    canvas(figure)
    return figure, figure.subplots()


def _draw(figure: Any, axes: Any, relative: Tensor, extent: tuple[int, int] | None = None) -> None:
    rows = relative.shape[0]
    box = None if extent is None else (*extent, rows - 0.5, -0.5)
    image = axes.imshow(
        relative.numpy(), aspect="auto", interpolation="nearest", cmap=COLOURS, vmin=0, vmax=TOP, extent=box
    )
    figure.colorbar(image, ax=axes, extend="max", label="load / mean load")
