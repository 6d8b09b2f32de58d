"""``moefy report``: from a TARGET to a ``RewriteReport``, on request with the records of the passes.

Contract: the user's model is only looked at. The passes are observed on a transformed copy of it,
compiled with ``torch.compile(backend="moefy")`` and run once on the same kind of inputs.

    >>> print(report_on("mypackage.models:make_gpt", num_experts=8))      # doctest: +SKIP
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

import moefy
from moefy.capture import accepted_inputs
from moefy.capture.inputs.tensors import ExampleInputs
from moefy.cli.targets import Target, load_target
from moefy.errors import UsageError
from moefy.passes.pipeline import PipelineRun, clear_history, history
from moefy.records import PassRecord
from moefy.reports.rewrite import RewriteReport


def report_on(target: str, *, passes: bool = False, **options: Any) -> RewriteReport:
    """The report of the model that ``target`` names.

    Args:
        target: ``MODULE:FACTORY`` or a Hugging Face config file or folder.
        passes: also compile a transformed copy, to record what the graph passes do.
        options: ``num_experts``, ``top_k``, ``include``, ``exclude`` as ``moefy.report`` takes them.
    """
    loaded = load_target(target)
    report = moefy.report(
        loaded.model,
        example_args=loaded.example_args,
        example_kwargs=loaded.example_kwargs,
        **options,
    )
    if not passes or not report.rewritten:
        return report
    return dataclasses.replace(report, passes=pass_records(loaded, options))


def pass_records(target: Target, options: dict[str, Any]) -> tuple[PassRecord, ...]:
    """What the passes do to the graphs of the transformed model, one record per pass."""
    fake = any(isinstance(parameter, FakeTensor) for parameter in target.model.parameters())
    if not fake:
        return _compiled_records(copy.deepcopy(target.model), example_inputs(target), options)
    from moefy.cli.hf_config import to_meta

    inputs = example_inputs(target)
    to_meta(target.model)
    if hasattr(target.model, "config"):
        target.model.config.use_cache = False  # type: ignore[union-attr]  # makes real tensors of its own
    args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (inputs.args, inputs.kwargs))
    try:
        on_meta = ExampleInputs(args, kwargs, inputs.description)
        return _compiled_records(target.model, on_meta, options)
    except Exception as error:  # a model that reads values cannot run on meta tensors
        raise UsageError(
            "--passes runs the compiled model, and this one does not run without memory "
            f"({type(error).__name__}); name a MODULE:FACTORY"
        ) from error


def _compiled_records(
    model: nn.Module, inputs: ExampleInputs, options: dict[str, Any]
) -> tuple[PassRecord, ...]:
    """Transform ``model``, compile it, run it once, and read the history of the passes."""
    from moefy.compiler.backend import backend  # on demand: brings the compiler

    moefy.transform(model, example_args=inputs.args, example_kwargs=inputs.kwargs, check=False, **options)
    torch._dynamo.reset()
    clear_history()
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"})
    with torch.no_grad():
        compiled(*inputs.args, **inputs.kwargs)
    return merge_records(history())


def merge_records(runs: Iterable[PipelineRun]) -> tuple[PassRecord, ...]:
    """One record per pass: matches, nodes and milliseconds summed over all graphs."""
    by_name: dict[str, list[PassRecord]] = {}
    for run in runs:
        for record in run.records:
            by_name.setdefault(record.name, []).append(record)
    return tuple(_sum(records) for records in by_name.values())


def _sum(records: Sequence[PassRecord]) -> PassRecord:
    notes = list(dict.fromkeys(record.note for record in records if record.note))
    if len(records) > 1:
        notes.insert(0, f"{len(records)} graphs")
    return dataclasses.replace(
        records[0],
        matched=sum(record.matched for record in records),
        nodes_before=sum(record.nodes_before for record in records),
        nodes_after=sum(record.nodes_after for record in records),
        ms=sum(record.ms for record in records),
        note="; ".join(notes),
    )


def example_inputs(target: Target) -> ExampleInputs:
    """The factory's inputs, else the first derived ones that the dense model accepts."""
    if target.example_args or target.example_kwargs:
        return ExampleInputs(target.example_args, target.example_kwargs, "the factory's")
    return accepted_inputs(target.model)
