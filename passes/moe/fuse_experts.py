"""Replace permute, entry GEMMs, body, exit GEMM and combine by one ``moefy::expert_ffn``.

Matches in Dynamo's pre-grad graph of a transformed model, also inside checkpointed blocks. The pass
recognises a body by its numbers (``classify_body``), so hand-written activations fuse too. Rounding may
change and nothing else: a body with an active dropout, with parameters of its own or with outside
readers stays as it is, and the record's note says why.

    before   permute, grouped_linear, view, gelu, reshape, grouped_linear, combine
    after    expert_ffn(x, top_k_weights, order, offsets, w_up, b_up, w_down, b_down,
                        activation="gelu", glu="none")
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from moefy import ops
from moefy.passes.base import Pass
from moefy.passes.graphs import example_value, graph_modules
from moefy.passes.match.classify_body import classify_body
from moefy.passes.moe.expert_regions import ExpertRegion, find_expert_regions
from moefy.passes.pipeline import register_pass
from moefy.passes.trace.vocabulary import qualified_op_name
from moefy.records import KnownBody

# Bodies are probed with the graph's own number of rows while that is at most this many values (8 MB in
# float64); above, shape arguments that equal it are scaled down.
PROBE_VALUES = 2**20
SHAPE_OPS = ("view", "reshape", "expand", "unflatten", "broadcast_to")


@register_pass
class FuseExperts(Pass):
    """The pass ``fuse_experts``."""

    name = "fuse_experts"

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Fuse every region whose body is a known one."""
        matched, refused = 0, Counter[str]()
        for module in graph_modules(gm):
            for region in find_expert_regions(module.graph):
                known = region.reason or classify_region(region)
                if isinstance(known, KnownBody):
                    _fuse(module.graph, region, known)
                    matched += 1
                else:
                    refused[known] += 1
        self.note = "; ".join(f"{n} kept: {reason}" for reason, n in refused.items())
        return matched


def classify_region(region: ExpertRegion) -> KnownBody | str:
    """The region's body by name, or the reason why it has none."""
    if any(_random(n) for n in region.body):
        return "active dropout"
    values = [example_value(e) for e in region.entries]
    rows = _hint(values[0].shape[0]) if values[0] is not None else None
    if any(v is None for v in values) or not rows:
        return "unknown number of rows"
    widths = [_hint(v.shape[1]) for v in values]  # type: ignore[union-attr]
    dtype = values[0].dtype  # type: ignore[union-attr]
    known = classify_body(_Body(region, rows, widths), widths, rank=2, dtype=dtype)  # type: ignore[arg-type]
    return known or "no known body"


class _Body:
    """The region's body as a function of its entries' ``[n, width]`` rows, for any ``n``.

    The graph has its own number of rows baked into view and reshape arguments. Probes are cut into
    blocks of that many rows; when it is large, the arguments are replaced instead.
    """

    def __init__(self, region: ExpertRegion, rows: int, widths: list[Any]) -> None:
        self.region, self.rows = region, rows
        self.scaled = rows * max(widths) > PROBE_VALUES and rows not in widths

    def __call__(self, *probes: Tensor) -> Tensor:
        count = probes[0].shape[0]
        if self.scaled:
            return self._run(probes, count)
        blocks = -(-count // self.rows)
        padded = [p.repeat(-(-blocks * self.rows // count), 1)[: blocks * self.rows] for p in probes]
        split = zip(*(p.split(self.rows) for p in padded), strict=True)
        return torch.cat([self._run(part, self.rows) for part in split])[:count]

    def _run(self, rows: tuple[Tensor, ...], count: int) -> Tensor:
        env: dict[fx.Node, Any] = dict(zip(self.region.entries, rows, strict=True))
        for node in self.region.body:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(n, env))
            if node.op == "call_method":
                self_arg, *args = args
                function: Any = getattr(self_arg, str(node.target))
            else:
                function = node.target
            if getattr(function, "__name__", "") in SHAPE_OPS:
                args, kwargs = self._scale((tuple(args), kwargs), count)
            env[node] = function(*args, **kwargs)
        return env[self.region.exit.args[0]]  # type: ignore[index]

    def _value(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        return env[node] if node in env else _hints(example_value(node))

    def _scale(self, value: Any, count: int) -> Any:
        if isinstance(value, tuple | list):
            return tuple(self._scale(v, count) for v in value)
        if isinstance(value, dict):
            return {k: self._scale(v, count) for k, v in value.items()}
        return count if type(value) is int and value == self.rows else value


def _fuse(graph: fx.Graph, region: ExpertRegion, known: KnownBody) -> None:
    """Put one call in the region's place."""
    up = region.entries[1 - known.gate if len(region.entries) == 2 else 0]
    kwargs: dict[str, Any] = {"activation": known.activation, "glu": known.glu}
    if known.glu == "separate":
        gate = region.entries[known.gate]
        kwargs.update(w_gate=gate.args[1], b_gate=gate.args[2])
    _, top_k_weights, order = region.combine.args
    (_, w_up, b_up, offsets), (_, w_down, b_down, _) = up.args, region.exit.args
    args = (region.permutes[0].args[0], top_k_weights, order, offsets, w_up, b_up, w_down, b_down)
    with graph.inserting_before(region.combine):
        fused = graph.call_function(ops.expert_ffn, args, kwargs)  # type: ignore[arg-type]
    fused.meta.update(region.combine.meta)
    region.combine.replace_all_uses_with(fused)
    for node in (region.combine, region.exit, *reversed(region.body)):
        graph.erase_node(node)
    for node in (*region.entries, *region.permutes):
        graph.erase_node(node)


def _random(node: fx.Node) -> bool:
    """Whether the call is a dropout that drops; torch's signatures are ``(input, p, training, ...)``."""
    if "dropout" not in qualified_op_name(node):
        return False
    p, training = (
        node.args[i] if len(node.args) > i else node.kwargs.get(key, default)
        for i, key, default in ((1, "p", 0.5), (2, "training", True))
    )
    return bool(p != 0 and training is not False)


def _hint(size: Any) -> int | None:
    """A size as a plain int; ``None`` when it is only known at run time."""
    return size if isinstance(size, int) else size.node.hint


def _hints(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_hints(v) for v in value)
    return _hint(value) if isinstance(value, torch.SymInt) else value
