"""``RewriteReport``: what ``transform`` did, or would do, to every FFN of a model. Plain data that draws itself.

Contract: every candidate is a layer of the report, the skipped ones with a reason. ``str(report)`` is for
people (identical layers folded), ``report.to_dict()`` for programs (nothing folded, units in key names). Both
come from the same objects.

    >>> print(moefy.report(model, num_experts=8))             # doctest: +SKIP
    moefy report: GPT2LMHeadModel (float32, cpu), dry run
    12 of 12 FFNs would become MoE: 8 experts, top-2
    ...
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from textwrap import wrap
from typing import Any

from moefy.config import MoEConfig, router_name
from moefy.records import NOT_EXACT, LayerRecord, PassRecord
from moefy.reports.environment import SCHEMA_VERSION, environment
from moefy.reports.rewrite_tables import layers_table, passes_table, skipped_table, totals_table
from moefy.reports.text import tables
from moefy.reports.text.folding import fold

_UNITS = {"flops_dense": "flops_per_token_dense", "flops_active": "flops_per_token_active"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteReport:
    """The FFNs of one model and what became of them.

    Args:
        model_class: class name of the model.
        layers: one record per candidate, in model order.
        config: how the FFNs are rewritten; ``None`` when they were only looked for.
        dry_run: whether the model is still dense.
        params_dense: parameters of the whole dense model.
        params_total: parameters of the whole model with all experts.
        params_active: parameters of the whole model that one token uses.
        dtype: dtype of the model's parameters, such as ``"float32"``.
        device: device of the model's parameters.
        trace_source: how the graph was obtained: ``"fake run"``, ``"real run"``, ``"fx graph"``, ...
        inputs: the example inputs in words.
        unseen: modules that the forward did not run, hence searched by nobody: FQNs, the topmost ones.
        check_error: relative norm of (MoE - dense) over the model's output; ``None`` when not checked.
        check_tolerance: the largest error that the check accepts.
        passes: what each graph pass did.
        warnings: what the user should know, one sentence each.
    """

    model_class: str
    layers: tuple[LayerRecord, ...]
    config: MoEConfig | None
    dry_run: bool
    params_dense: int
    params_total: int
    params_active: int
    dtype: str
    device: str
    trace_source: str
    inputs: str
    check_error: float | None = None
    check_tolerance: float | None = None
    passes: tuple[PassRecord, ...] = ()
    warnings: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def rewritten(self) -> tuple[LayerRecord, ...]:
        """The layers that are, or would become, a Mixture-of-Experts."""
        return tuple(layer for layer in self.layers if layer.action == "moe")

    @property
    def skipped(self) -> tuple[LayerRecord, ...]:
        """The candidates that stay as they are, each with its ``reason``."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    @property
    def flops_dense(self) -> int:
        """Forward FLOPs per token of the rewritten FFNs before."""
        return sum(layer.flops_dense for layer in self.rewritten)

    @property
    def flops_active(self) -> int:
        """Forward FLOPs per token of the rewritten FFNs after, routers included."""
        return sum(layer.flops_active for layer in self.rewritten)

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; ``schema_version`` grows when a key changes its meaning."""
        own = ("layers", "config", "passes", "warnings", "unseen", "check_error", "check_tolerance")
        plain = [f.name for f in dataclasses.fields(self) if f.name not in own]
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in plain},
            "check_error_relative_norm": self.check_error,
            "check_tolerance_relative_norm": self.check_tolerance,
            "config": None if self.config is None else self.config.to_dict(),
            "totals": self._totals(),
            "layers": [_layer_dict(layer) for layer in self.layers],
            "passes": [dataclasses.asdict(record) for record in self.passes],
            "unseen": list(self.unseen),
            "warnings": list(self.warnings),
            "environment": environment(),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    def render(self, width: int | None = None, *, passes: bool | None = None) -> str:
        """The report as text.

        Args:
            width: columns to fit in; that of the terminal, else 100.
            passes: whether to draw the table of passes; ``None`` draws it when there are any.
        """
        width = tables.stream_width() if width is None else width
        experts = self.config is not None
        blocks = [_wrapped(self._heading(), width)]
        if self.rewritten:
            blocks.append(layers_table(self.rewritten, width, experts=experts))
        if self.skipped:
            blocks.append(skipped_table(self.skipped, width))
        if self.rewritten:
            params = (self.params_dense, self.params_total, self.params_active)
            work = (self.flops_dense, self.flops_active)
            blocks.append(totals_table(params, work, self.dtype, width, experts=experts))
        if passes or (passes is None and self.passes):
            blocks.append(passes_table(self.passes, width))
        blocks.append(_wrapped(self._footer(), width))
        return "\n\n".join(block.rstrip() for block in blocks)

    def __str__(self) -> str:
        return tables.encodable(self.render())

    def _heading(self) -> list[str]:
        state = "dry run, nothing changed" if self.dry_run else "transformed"
        return [
            f"moefy report: {self.model_class} ({self.dtype}, {self.device}), {state}",
            self._verdict(),
            f"traced by {self.trace_source} on {self.inputs}",
        ]

    def _verdict(self) -> str:
        done, left = len(self.rewritten), len(self.skipped)
        skipped = f"; {left} other candidate{'s' * (left != 1)} skipped" if left else ""
        if not done:
            return f"no feed-forward network to rewrite{skipped}"
        networks = f"{done} feed-forward network{'s' * (done != 1)}"
        if self.config is None:
            return f"{networks} can become a Mixture-of-Experts{skipped}"
        verb = "would become" if self.dry_run else "became"
        experts = f"{self.config.num_experts} experts, top-{self.config.top_k}"
        name = router_name(self.config.router)
        experts += f", router {name}" if name != "top_k" else ""
        return f"{networks} {verb} a Mixture-of-Experts ({experts}){skipped}"

    def _footer(self) -> list[str]:
        """What was counted, what was measured, what to know."""
        codes = Counter(layer.code or "other" for layer in self.skipped)
        why = ", ".join(f"{code} {number}" for code, number in codes.most_common())
        counted = f"found {len(self.layers)} · rewritten {len(self.rewritten)} · skipped {len(self.skipped)}"
        lines = [f"{counted} ({why})" if why else counted]
        if self.check_error is not None:
            lines.append(self._measured(self.check_error))
        elif not self.dry_run:
            lines.append("outputs were not compared with the dense model (check=False)")
        if self.unseen:
            names = ", ".join(line.pattern for line in fold(self.unseen))
            lines.append(f"not run on these inputs, so not searched (example_args can reach it): {names}")
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]

    def _measured(self, error: float) -> str:
        tolerance = self.check_tolerance
        within = f"; tolerance {tolerance:.0e}" if tolerance is not None else ""
        verb = "match" if tolerance is None or error <= tolerance else "DIFFER from"
        aside = any(layer.exactness == NOT_EXACT for layer in self.layers)
        subject = "with even weights in the place of the router's, outputs" if aside else "outputs"
        return f"{subject} {verb} the dense model to {error:.1e} (relative norm, {self.dtype}{within})"

    def _totals(self) -> dict[str, Any]:
        return {
            "found": len(self.layers),
            "rewritten": len(self.rewritten),
            "skipped": len(self.skipped),
            "skipped_by_code": dict(Counter(layer.code or "other" for layer in self.skipped)),
            "flops_per_token_dense": self.flops_dense,
            "flops_per_token_active": self.flops_active,
        }


def _wrapped(lines: list[str], width: int) -> str:
    return "\n".join(part for line in lines for part in wrap(line, width))


def _layer_dict(layer: LayerRecord) -> dict[str, Any]:
    """The record with the unit in each key."""
    return {_UNITS.get(key, key): value for key, value in dataclasses.asdict(layer).items()}
