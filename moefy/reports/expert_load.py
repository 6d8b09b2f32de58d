"""``expert_load``: tokens per expert, layer by layer, as plain data that draws itself.

Contract: ``expert_load(model)`` reads the counters of all routers with two copies to the host. Between two calls
nothing waits for the device. ``str(report)`` is a table with a bar per expert, ``report.to_dict()`` is for programs. A
slot is one expert choice of one token: T tokens with top-k routing ask for T * K slots.

    >>> print(moefy.expert_load(model, reset=True))           # doctest: +SKIP
    layer         slots  experts     CV  max/mean  (max+1)/(min+1)  entropy  dead  dropped  l_aux
    ─────────────────────────────────────────────────────────────────────────────────────────────
    layers.0.mlp  98.3K  ▅▇▃▅█▁▄▆  0.41      1.62             5.02    0.958     0        -      -
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moefy.errors import NoMoELayer
from moefy.nn import Router
from moefy.nn.counters import LOSSES
from moefy.reports.base import SCHEMA_VERSION, Report
from moefy.reports.text import tables

MAX_BARS = 64
_BARS = "▁▂▃▄▅▆▇█"
_WRAPPERS = ("module.", "_orig_mod.")
_ROUTER = "router"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """The load of one layer since its counters were last reset. Every measure of a layer without tokens is 0.

    Attributes:
        fqn: name of the module that holds the router.
        tokens_per_expert: slots that each expert computed. They sum to K per token, less the dropped ones.
        dropped: slots that capacity dropped.
        losses: mean per forward of "l_aux" (the weighted sum) and of each term of it before its weight. Empty for a
            layer without an auxiliary loss.
    """

    fqn: str
    tokens_per_expert: tuple[int, ...]
    dropped: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Slots that all experts together computed."""
        return sum(self.tokens_per_expert)

    @property
    def mean(self) -> float:
        """Slots per expert if the load were even."""
        return self.total / len(self.tokens_per_expert)

    @property
    def cv(self) -> float:
        """Coefficient of variation: population standard deviation over the mean. 0 is balanced."""
        if not self.total:
            return 0.0
        square = sum((n - self.mean) ** 2 for n in self.tokens_per_expert) / len(self.tokens_per_expert)
        return math.sqrt(square) / self.mean

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest expert over the mean. 1 is balanced, E means that one expert gets everything."""
        return max(self.tokens_per_expert) / self.mean if self.total else 0.0

    @property
    def max_over_min(self) -> float:
        """``(max + 1) / (min + 1)``, the measure of FastMoE (``fmoe.balance``). 1 is balanced."""
        return (max(self.tokens_per_expert) + 1) / (min(self.tokens_per_expert) + 1) if self.total else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the load over log E. 1 is balanced, 0 means that one expert gets everything."""
        shares = [n / self.total for n in self.tokens_per_expert if n] if self.total else []
        if len(self.tokens_per_expert) == 1:
            return 1.0 if shares else 0.0
        return abs(sum(p * math.log(p) for p in shares)) / math.log(len(self.tokens_per_expert))

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts without a slot. Empty while the layer has seen no token."""
        return tuple(e for e, n in enumerate(self.tokens_per_expert) if n == 0) if self.total else ()

    @property
    def dropped_share(self) -> float:
        """Dropped slots over requested slots."""
        asked = self.total + self.dropped
        return self.dropped / asked if asked else 0.0

    def metrics(self) -> dict[str, float]:
        """The measures to plot over training, by name."""
        return {
            "cv": self.cv,
            "max_over_mean": self.max_over_mean,
            "max_over_min": self.max_over_min,
            "entropy": self.entropy,
            "dead_experts": float(len(self.dead)),
            "dropped_share": self.dropped_share,
        }

    def to_dict(self) -> dict[str, Any]:
        """Counts and measures, as JSON types."""
        own = {
            "fqn": self.fqn,
            "tokens_per_expert": list(self.tokens_per_expert),
            "dropped": self.dropped,
            "total": self.total,
        }
        return {**own, **self.metrics(), "dead": list(self.dead), "losses": dict(self.losses)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport(Report):
    """The load of a model's layers, in model order.

    Args:
        model_class: class name of the model.
        layers: one record per router.
        ranks: number of ranks whose counts were added up.
    """

    model_class: str
    layers: tuple[LayerLoad, ...]
    ranks: int = 1

    @property
    def l_aux(self) -> float:
        """The auxiliary loss per forward, summed over the layers."""
        return sum(layer.losses.get("l_aux", 0.0) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The counts and measures of every layer, as JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model_class": self.model_class,
            "ranks": self.ranks,
            "l_aux": self.l_aux,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def render(self, width: int | None = None) -> str:
        """A table with a line per layer, in ``width`` columns (by default the terminal's)."""
        width = tables.stream_width() if width is None else width
        rows = [_row(layer) for layer in self.layers]
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        heading = f"moefy load: {self.model_class}{ranks}, {_worst(self.layers)}"
        return f"{heading}\n\n{tables.draw(_COLUMNS, rows, width)}"

    def plot(self, path: str | Path) -> None:
        """Draw a heat map (layers by experts) into an image file. Needs matplotlib, the extra ``plot``."""
        from moefy.reports.load_plot import plot_layers

        plot_layers({layer.fqn: layer.tokens_per_expert for layer in self.layers}, path)


def expert_load(model: nn.Module, *, reset: bool = False, group: Any = None) -> LoadReport:
    """Count how many tokens each expert of ``model`` got in the training forwards since the last reset.

    Args:
        model: a model that ``transform`` changed, a model with ``moefy.MoE`` layers, or a wrapper of either.
        reset: set the counters to zero afterwards.
        group: process group whose ranks are added up. All of its ranks must call this function. By default this rank
            counts alone.

    Raises:
        NoMoELayer: the model has no router.
    """
    routers = outer_routers(model)
    layers = tuple(
        LayerLoad(
            fqn=layer_name(name),
            tokens_per_expert=tuple(b - a for a, b in itertools.pairwise([0, *ends])),
            dropped=dropped,
            losses=_losses(sums, router),
        )
        for (name, router), ((*ends, dropped), sums) in zip(
            routers.items(), _read(list(routers.values()), group), strict=True
        )
    )
    if reset:
        for router in routers.values():
            router.load_counter.reset()
    ranks = dist.get_world_size(group) if group is not None else 1
    return LoadReport(model_class=type(_bare(model)).__name__, layers=layers, ranks=ranks)


def outer_routers(model: nn.Module) -> dict[str, Router]:
    """The routers by name. A router inside another one (``router=[...]``) is left out.

    Raises:
        NoMoELayer: the model has no router.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if not outer:
        raise NoMoELayer(type(model).__name__)
    return outer


def layer_name(router: str) -> str:
    """The name of the module that holds the named router, without prefixes of wrappers (``module.``)."""
    name = router.removesuffix(_ROUTER).rstrip(".")
    while name.startswith(_WRAPPERS):
        name = name.removeprefix(_WRAPPERS[0]).removeprefix(_WRAPPERS[1])
    return name


def bars(tokens_per_expert: Sequence[int]) -> str:
    """One bar per expert: full for the busiest, a dot for none. Beyond 64 experts neighbours share a bar."""
    width = -(-len(tokens_per_expert) // MAX_BARS)
    heights = [sum(tokens_per_expert[i : i + width]) for i in range(0, len(tokens_per_expert), width)]
    top = max(heights)
    return "".join(_BARS[math.ceil(8 * n / top) - 1] if n else "·" for n in heights)


def _read(routers: list[Router], group: Any) -> Iterator[tuple[list[int], list[float]]]:
    """``([*ends, dropped], losses)`` of each router, on the host: ``ends[e]`` counts the slots of experts 0 to e."""
    counters = [router.load_counter for router in routers]
    home = counters[0].ends.device
    counts = torch.cat([t.to(home) for c in counters for t in (c.ends, c.dropped.reshape(1))])
    sums = torch.stack([c.losses.to(home) for c in counters])
    if group is not None:
        dist.all_reduce(counts, group=group)
        dist.all_reduce(sums, group=group)
    pieces = counts.cpu().split([c.num_experts + 1 for c in counters])
    return zip((piece.tolist() for piece in pieces), sums.tolist(), strict=True)


def _losses(sums: Sequence[float], router: Router) -> dict[str, float]:
    """Mean per forward of the loss terms that have a weight."""
    aux, forwards = router.aux_loss, sums[-1]
    if aux is None or not forwards:
        return {}
    weights = dict(zip(LOSSES, (1.0, aux.weight, aux.z_weight, aux.router_weight), strict=True))
    return {n: total / forwards for n, total in zip(LOSSES, sums, strict=False) if weights[n]}


def _bare(model: nn.Module) -> nn.Module:
    """The model inside wrappers that keep it as ``module`` or ``_orig_mod``."""
    for name in _WRAPPERS:
        inner = model._modules.get(name.rstrip("."))
        if inner is not None and len(model._modules) == 1:
            return _bare(inner)
    return model


def _worst(layers: Sequence[LayerLoad]) -> str:
    """The most uneven layer and the number of dead experts, in words."""
    busy = [layer for layer in layers if layer.total]
    if not busy:
        return "no training forward was counted"
    layer = max(busy, key=lambda layer: layer.max_over_mean)
    dead = sum(len(layer.dead) for layer in busy)
    return f"max/mean at most {layer.max_over_mean:.2f} ({layer.fqn or '(root)'}), dead experts {dead}"


_COLUMNS = (
    tables.Column(title="layer"),
    tables.Column(title="slots", align="right", drop=1),
    tables.Column(title="experts"),
    tables.Column(title="CV", align="right"),
    tables.Column(title="max/mean", align="right"),
    tables.Column(title="(max+1)/(min+1)", align="right", drop=4),
    tables.Column(title="entropy", align="right", drop=3),
    tables.Column(title="dead", align="right"),
    tables.Column(title="dropped", align="right", drop=2),
    tables.Column(title="l_aux", align="right", drop=5),
)


def _row(layer: LayerLoad) -> list[str]:
    """The table's cells for one layer. "-" stands for a number that the layer does not have."""
    name = layer.fqn or "(root)"
    if not layer.total:
        return [name, "0", "-", "-", "-", "-", "-", "-", "-", "-"]
    return [
        name,
        tables.count(layer.total),
        bars(layer.tokens_per_expert),
        f"{layer.cv:.2f}",
        f"{layer.max_over_mean:.2f}",
        f"{layer.max_over_min:.2f}",
        f"{layer.entropy:.3f}",
        str(len(layer.dead)),
        f"{layer.dropped_share:.1%}" if layer.dropped else "-",
        f"{layer.losses['l_aux']:.4g}" if layer.losses else "-",
    ]
