"""``RewriteReport``: what ``transform`` did, or would do, to every FFN of a model. Plain data that draws itself.

Contract: every candidate is a layer of the report, a skipped one with its reason. ``str(report)`` folds identical
layers into one line, for people. ``report.to_dict()`` folds nothing and has the unit in each key, for programs.

    >>> print(moefy.report(model, num_experts=8))             # doctest: +SKIP
    moefy report: GPT2LMHeadModel (float32, cpu), dry run, nothing changed
    12 feed-forward networks would become a Mixture-of-Experts (8 experts, top-2)
    ...
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from textwrap import wrap
from typing import Any

from moefy.config import MoEConfig, router_name
from moefy.records import NOT_EXACT, LayerRecord, PassRecord
from moefy.reports.base import SCHEMA_VERSION, Report
from moefy.reports.environment import environment
from moefy.reports.rewrite_tables import layers_table, passes_table, skipped_table, totals_table
from moefy.reports.text import tables
from moefy.reports.text.folding import fold

_UNITS = {"flops_dense": "flops_per_token_dense", "flops_active": "flops_per_token_active"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteReport(Report):
    """The FFNs of one model and what became of them.

    Args:
        model_class: class name of the model.
        layers: one record per candidate, in model order.
        config: how the FFNs are rewritten; ``None`` when the report only lists them.
        dry_run: whether the model is still dense.
        params_dense: parameters of the whole dense model.
        params_total: parameters of the whole model with all experts.
        params_active: parameters of the whole model that one token uses.
        dtype: dtype of the model's parameters, such as ``"float32"``.
        device: device of the model's parameters.
        trace_source: how the graph was obtained: ``"fake run"``, ``"real run"``, ``"fx graph"``, ...
        inputs: the example inputs in words.
        unseen: FQNs of the topmost modules that the forward did not run. FFNs in them were not searched for.
        check_error: ``norm(MoE - dense) / norm(dense)`` over the model's output; ``None`` when not checked.
        check_tolerance: the largest error that the check accepts.
        passes: one record per graph pass that ran.
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
        """The layers that became, or would become, a Mixture-of-Experts."""
        return tuple(layer for layer in self.layers if layer.action == "moe")

    @property
    def skipped(self) -> tuple[LayerRecord, ...]:
        """The candidates that stay dense, each with its ``reason``."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    @property
    def flops_dense(self) -> int:
        """Forward FLOPs per token of the dense FFNs that are rewritten."""
        return sum(layer.flops_dense for layer in self.rewritten)

    @property
    def flops_active(self) -> int:
        """Forward FLOPs per token of the layers that replace them: K experts and the router."""
        return sum(layer.flops_active for layer in self.rewritten)

    def to_dict(self) -> dict[str, Any]:
        """Every layer unfolded, totals and the environment, as JSON types with units in the keys."""
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

    def render(self, width: int | None = None, *, passes: bool | None = None) -> str:
        """The report as text.

        Args:
            width: columns to fit in, by default the terminal's, or 108 where there is no terminal.
            passes: whether to draw the table of passes. ``None`` draws it when a pass ran.
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

    def _heading(self) -> list[str]:
        """The model, the verdict, and how the model was traced."""
        state = "dry run, nothing changed" if self.dry_run else "transformed"
        return [
            f"moefy report: {self.model_class} ({self.dtype}, {self.device}), {state}",
            self._verdict(),
            f"traced by {self.trace_source} on {self.inputs}",
        ]

    def _verdict(self) -> str:
        """How many FFNs became, would become or can become a Mixture-of-Experts."""
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
        """Counts, the measured error, modules that did not run, and warnings."""
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
        """The error of the check, against its tolerance."""
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
    """The record as JSON types, with units in the keys."""
    return {_UNITS.get(key, key): value for key, value in dataclasses.asdict(layer).items()}
