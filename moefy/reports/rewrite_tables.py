"""The tables of a rewrite report: layers, skipped candidates, totals, passes. Records in, text out.

Contract: layers whose cells all agree share one line (``layers.{0..31}.mlp`` and how many they are). The numbers on a
line are those of one layer; FLOPs are per token. Skipped candidates always show their reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moefy.records import LayerRecord, PassRecord
from moefy.reports.text.folding import fold
from moefy.reports.text.tables import Column, count, draw, flops, size

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

_NUMBER_IN_PATH = re.compile(r"(?<=[._])\d+(?=\W|_|$)")


def layers_table(layers: Sequence[LayerRecord], width: int, *, experts: bool) -> str:
    """One line per kind of layer. Without ``experts`` the line has the dense FFN's numbers only."""
    columns = _layer_columns(layers, experts)
    titles = [column.title for column in columns]
    cells = [_layer_cells(layer) for layer in layers]
    keys = [tuple(cell[title] for title in titles if title not in ("layer", "×")) for cell in cells]
    rows = []
    for line in fold([layer.fqn for layer in layers], keys):
        cell = cells[line.first] | {"layer": line.pattern or "(root)", "×": str(line.count)}
        rows.append([cell[title] for title in titles])
    return draw(columns, rows, width)


def skipped_table(layers: Sequence[LayerRecord], width: int) -> str:
    """One line per kind of skipped candidate, with its reason."""
    columns = [
        Column(title="skipped", wrap=True),
        Column(title="×", align="right"),
        Column(title="FFN"),
        Column(title="D × H", align="right", drop=1),
        Column(title="why", wrap=True),
    ]
    masked = [_NUMBER_IN_PATH.sub("*", layer.reason or "") for layer in layers]
    keys = [(_kind(layer), _shape(layer), why) for layer, why in zip(layers, masked, strict=True)]
    rows = []
    for line in fold([layer.fqn for layer in layers], keys):
        layer = layers[line.first]
        why = layer.reason if line.count == 1 else _common_reason(layers, masked, line.first)
        name = line.pattern or "(root)"
        rows.append([name, str(line.count), _kind(layer), _shape(layer), why or "no reason given"])
    return draw(columns, rows, width)


def totals_table(
    params: tuple[int, int, int],
    ffn_flops: tuple[int, int],
    dtype: str,
    width: int,
    *,
    experts: bool,
) -> str:
    """Parameters and memory of the whole model (dense, all, active) and FLOPs of its rewritten FFNs."""
    shown = params if experts else params[:1]
    rows = [["parameters, whole model", *map(count, shown)]]
    if dtype in DTYPE_BYTES:
        memory = [size(number * DTYPE_BYTES[dtype]) for number in shown]
        rows.append([f"weights in {dtype}", *memory])
    dense, active = map(flops, ffn_flops)
    rows.append(["FLOPs per token, rewritten FFNs", dense, *(["", active] if experts else [])])
    titles = ["dense", "all\nexperts", "active\nper token"][: len(shown)]
    columns = [Column(title="total", wrap=True)]
    columns += [Column(title=title, align="right") for title in titles]
    return draw(columns, rows, width)


def passes_table(records: Sequence[PassRecord], width: int) -> str:
    """One line per graph pass, in the order in which the passes ran."""
    if not records:
        return "no graph pass ran"
    columns = [
        Column(title="pass"),
        Column(title="numerics"),
        Column(title="matched", align="right"),
        Column(title="nodes"),
        Column(title="ms", align="right"),
        Column(title="note", wrap=True),
    ]
    rows = [
        [
            record.name,
            "preserving" if record.preserving else "changing",
            str(record.matched),
            f"{record.nodes_before} → {record.nodes_after}",
            f"{record.ms:.1f}",
            record.note,
        ]
        for record in records
    ]
    return draw(columns, rows, width)


def _layer_columns(layers: Sequence[LayerRecord], experts: bool) -> list[Column]:
    """The columns for these layers: calls where a layer has several, experts where layers differ."""
    columns = [
        Column(title="layer", wrap=True),
        Column(title="×", align="right"),
        Column(title="FFN"),
        Column(title="D × H", align="right"),
        Column(title="form", drop=7),
    ]
    if any(layer.calls > 1 for layer in layers):
        columns.append(Column(title="calls", align="right", drop=3))
    if not experts:
        return [
            *columns,
            *(Column(title=f"{n}\ndense", align="right") for n in ("params", "FLOPs")),
        ]
    if len({(layer.num_experts, layer.top_k) for layer in layers}) > 1:
        columns.append(Column(title="experts"))
    return [
        *columns,
        Column(title="params\ndense", align="right", drop=2),
        Column(title="params\ntotal", align="right", drop=1),
        Column(title="params\nactive", align="right", drop=4),
        Column(title="FLOPs\ndense", align="right", drop=6),
        Column(title="FLOPs\nactive", align="right", drop=5),
        Column(title="exactness"),
    ]


def _layer_cells(layer: LayerRecord) -> dict[str, str]:
    """All cells of a layer, by column title."""
    return {
        "FFN": _kind(layer),
        "D × H": _shape(layer),
        "form": layer.form,
        "calls": str(layer.calls),
        "experts": f"{layer.num_experts} top-{layer.top_k}",
        "params\ndense": count(layer.params_dense),
        "params\ntotal": count(layer.params_total),
        "params\nactive": count(layer.params_active),
        "FLOPs\ndense": flops(layer.flops_dense),
        "FLOPs\nactive": flops(layer.flops_active),
        "exactness": layer.exactness,
    }


def _kind(layer: LayerRecord) -> str:
    return f"{layer.kind}/{layer.activation}" if layer.activation else layer.kind


def _shape(layer: LayerRecord) -> str:
    return f"{layer.d_model}×{layer.d_hidden}"


def _common_reason(layers: Sequence[LayerRecord], masked: Sequence[str], first: int) -> str:
    """The reason of a folded line: verbatim if its layers agree, else with ``*`` for the layer numbers."""
    reasons = {layer.reason for layer, why in zip(layers, masked, strict=True) if why == masked[first]}
    return (layers[first].reason or "") if len(reasons) == 1 else masked[first]
