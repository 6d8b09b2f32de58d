"""``moefy report --load``: how a transformed target spreads its tokens in a few training forwards.

Contract: the target is built, transformed and run in training mode without gradients on its example inputs, or on the
first derived ones that it accepts; then its counters are read. Nothing is trained.

    >>> print(load_on("mypackage.models:make_gpt", num_experts=8))        # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

import moefy
from moefy.cli.report import example_inputs
from moefy.cli.targets import load_target
from moefy.errors import UsageError
from moefy.reports.expert_load import LoadReport

FORWARDS = 4


def load_on(target: str, *, forwards: int = FORWARDS, **options: Any) -> LoadReport:
    """The load of the model that ``target`` names.

    Args:
        target: ``MODULE:FACTORY``.
        forwards: how many training forwards are counted.
        options: ``num_experts``, ``top_k``, ``include``, ``exclude``, ... as ``moefy.transform`` takes them.

    Raises:
        UsageError: for a Hugging Face config, which is built without memory and cannot run.
    """
    loaded = load_target(target)
    if any(isinstance(parameter, FakeTensor) for parameter in loaded.model.parameters()):
        raise UsageError("--load runs the model, and a config is built without memory; name a MODULE:FACTORY")
    inputs = example_inputs(loaded)
    model = moefy.transform(
        loaded.model, example_args=inputs.args, example_kwargs=inputs.kwargs, check=False, **options
    ).train()
    with torch.no_grad():
        for _ in range(forwards):
            model(*inputs.args, **inputs.kwargs)
    return moefy.expert_load(model)
