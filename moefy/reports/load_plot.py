"""Heat maps of expert load, into image files. Needs matplotlib, which the extra ``plot`` brings.

Contract: the colour is an expert's load over the mean of its layer: 1 (white) is balanced, 0 (blue) is a dead expert,
full red is twice the mean or more. No window opens, and matplotlib's global state stays as it is.

    >>> plot_layers({"layers.0.mlp": (6, 2, 0, 8)}, "load.png")               # doctest: +SKIP
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLOURS = "RdBu_r"
TOP = 2.0  # load over mean load of the fullest red
LEAST_INCHES = 2.5
ROWS_PER_INCH = 12


def plot_layers(tokens_per_expert: Mapping[str, Sequence[int]], path: str | Path) -> None:
    """Draw the counts of each layer: a row per layer, a column per expert."""
    experts = max(map(len, tokens_per_expert.values()))
    relative_LE = torch.full((len(tokens_per_expert), experts), float("nan"), dtype=torch.float64)
    for row, counts in zip(relative_LE, tokens_per_expert.values(), strict=True):
        counts_E = torch.tensor(counts, dtype=torch.float64)
        row[: len(counts)] = counts_E / counts_E.mean().clamp(min=1e-9)
    figure, axes = _figure(len(tokens_per_expert) * 3)
    _draw(figure, axes, relative_LE)
    axes.set_xlabel("expert")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_yticks(range(len(tokens_per_expert)), [name or "(root)" for name in tokens_per_expert])
    figure.savefig(path)


def plot_history(shares: Mapping[str, Tensor], steps: Sequence[int], path: str | Path) -> None:
    """Draw the shares ``[intervals, E]`` of each layer: a band per layer, a row per expert, steps to the right."""
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
