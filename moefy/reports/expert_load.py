"""``load``: what the experts of a model got to do, layer by layer. Plain data that draws itself.

Contract: ``load(model)`` reads the counters of all routers with two copies to the host; between two calls nothing waits
for the device. ``str(report)`` is a table with a bar per expert, ``report.to_dict()`` is for programs.

    >>> print(moefy.load(model, reset=True))                  # doctest: +SKIP
    layer         slots  experts     CV  max/mean  (max+1)/(min+1)  entropy  dead  dropped  l_aux
    ─────────────────────────────────────────────────────────────────────────────────────────────
    layers.0.mlp  98.3K  ▅▇▃▅█▁▄▆  0.41      1.62             5.02    0.958     0        -      -
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moefy.errors import NoMoELayer
from moefy.nn import Router
from moefy.nn.load import LOSSES
from moefy.reports.environment import SCHEMA_VERSION
from moefy.reports.text import tables

MAX_BARS = 64
_BARS = "▁▂▃▄▅▆▇█"
_WRAPPERS = ("module.", "_orig_mod.")
_ROUTER = "router"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """The load of one layer since the counters were last reset. Every number of an idle layer is 0.

    Attributes:
        fqn: the layer's name: that of the module that holds the router.
        tokens_per_expert: slots that each expert computed, K per token unless some were dropped.
        dropped: slots that capacity dropped.
        losses: means over the forwards: "l_aux", weighted, and its terms without a weight; empty without any.
    """

    fqn: str
    tokens_per_expert: tuple[int, ...]
    dropped: int = 0
    losses: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """Slots that were computed."""
        return sum(self.tokens_per_expert)

    @property
    def mean(self) -> float:
        """Slots per expert."""
        return self.total / len(self.tokens_per_expert)

    @property
    def cv(self) -> float:
        """Coefficient of variation: standard deviation (of the population) by mean. 0 is balanced."""
        if not self.total:
            return 0.0
        square = sum((n - self.mean) ** 2 for n in self.tokens_per_expert) / len(self.tokens_per_expert)
        return math.sqrt(square) / self.mean

    @property
    def max_over_mean(self) -> float:
        """The busiest expert by the mean; 1 is balanced, E is everything to one expert."""
        return max(self.tokens_per_expert) / self.mean if self.total else 0.0

    @property
    def max_over_min(self) -> float:
        """``(max + 1) / (min + 1)``, FastMoE's measure."""
        return (max(self.tokens_per_expert) + 1) / (min(self.tokens_per_expert) + 1) if self.total else 0.0

    @property
    def entropy(self) -> float:
        """Entropy of the load by that of a balanced one, log E: 1 is balanced, 0 is everything to one expert."""
        shares = [n / self.total for n in self.tokens_per_expert if n] if self.total else []
        if len(self.tokens_per_expert) == 1:
            return 1.0 if shares else 0.0
        return abs(sum(p * math.log(p) for p in shares)) / math.log(len(self.tokens_per_expert))

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts that got nothing, if any got something."""
        return tuple(e for e, n in enumerate(self.tokens_per_expert) if n == 0) if self.total else ()

    @property
    def dropped_share(self) -> float:
        """Dropped slots by all that were asked for."""
        asked = self.total + self.dropped
        return self.dropped / asked if asked else 0.0

    def metrics(self) -> dict[str, float]:
        """The numbers that are worth a curve."""
        return {
            "cv": self.cv,
            "max_over_mean": self.max_over_mean,
            "max_over_min": self.max_over_min,
            "entropy": self.entropy,
            "dead_experts": float(len(self.dead)),
            "dropped_share": self.dropped_share,
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers, the derived ones included."""
        own = {
            "fqn": self.fqn,
            "tokens_per_expert": list(self.tokens_per_expert),
            "dropped": self.dropped,
            "total": self.total,
        }
        return {**own, **self.metrics(), "dead": list(self.dead), "losses": dict(self.losses)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The load of a model's layers, in model order.

    Args:
        model_class: class name of the model.
        layers: one record per router.
        ranks: how many ranks were summed over.
    """

    model_class: str
    layers: tuple[LayerLoad, ...]
    ranks: int = 1

    @property
    def l_aux(self) -> float:
        """The auxiliary loss per forward: the sum over the layers of their means."""
        return sum(layer.losses.get("l_aux", 0.0) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model_class": self.model_class,
            "ranks": self.ranks,
            "l_aux": self.l_aux,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    def render(self, width: int | None = None) -> str:
        """The table in ``width`` columns; by default those of the terminal, else 108."""
        width = tables.stream_width() if width is None else width
        rows = [_row(layer) for layer in self.layers]
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        heading = f"moefy load: {self.model_class}{ranks}, {_worst(self.layers)}"
        return f"{heading}\n\n{tables.draw(_COLUMNS, rows, width)}"

    def plot(self, path: str | Path) -> None:
        """Draw a heat map, experts by layers, into an image file. Needs the extra ``plot`` (matplotlib)."""
        from moefy.reports.load_plot import plot_layers

        plot_layers(self, path)

    def __str__(self) -> str:
        return tables.encodable(self.render())


def load(model: nn.Module, *, reset: bool = False, group: Any = None) -> LoadReport:
    """The load of every Mixture-of-Experts layer of ``model`` in its training forwards since the last reset.

    Args:
        model: a model that ``transform`` changed, one that holds ``moefy.MoE`` layers, or a wrapper of such a model.
        reset: start counting again from nothing.
        group: a process group whose ranks are summed; all of them must call this. By default this rank alone.

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
    """The routers by name, without those inside another one (several routers over the same experts).

    Raises:
        NoMoELayer: there is none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if not outer:
        raise NoMoELayer(type(model).__name__)
    return outer


def layer_name(router: str) -> str:
    """The name of the module that holds the router of that name, without the prefixes of wrappers."""
    name = router.removesuffix(_ROUTER).rstrip(".")
    while name.startswith(_WRAPPERS):
        name = name.removeprefix(_WRAPPERS[0]).removeprefix(_WRAPPERS[1])
    return name


def bars(tokens_per_expert: Sequence[int]) -> str:
    """A bar per expert, the busiest one full and a dot for none; neighbours share one when there are many."""
    width = -(-len(tokens_per_expert) // MAX_BARS)
    heights = [sum(tokens_per_expert[i : i + width]) for i in range(0, len(tokens_per_expert), width)]
    top = max(heights)
    return "".join(_BARS[math.ceil(8 * n / top) - 1] if n else "·" for n in heights)


def _read(routers: list[Router], group: Any) -> Iterator[tuple[list[int], list[float]]]:
    """``([*ends, dropped], losses)`` of each router on the host."""
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
    """The means of the terms that the router has."""
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
    """The cells of one layer; "-" where there is nothing to say."""
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
