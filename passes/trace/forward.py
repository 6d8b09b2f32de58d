"""Trace by execution: run a model once and record what it computes as an ``fx.Graph``.

A ``TorchFunctionMode`` sees every torch call of one real forward, whatever Python surrounds it, so nothing has to be
symbolically traceable. Under ``FakeTensorMode`` the run costs no memory and no arithmetic. ``trace.py`` says what the
graph holds.

    >>> trace = trace_module(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.ones(2, 4),))
    >>> [n.target.__name__ for n in trace.graph.nodes if n.op == "call_function"]
    ['linear', 'relu']
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn

from moefy.passes.trace.fake import fake_inputs
from moefy.passes.trace.module_calls import recording_calls
from moefy.passes.trace.recorder import Recorder
from moefy.passes.trace.trace import Trace
from moefy.passes.trace.trees import tensors_in


def trace_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    fake: bool = False,
    run: nn.Module | None = None,
) -> Trace:
    """Run ``model(*args, **kwargs)`` once in the caller's grad and train mode and record it.

    With ``fake`` the tensors are fake: no memory, no arithmetic, no outputs; a forward that reads values raises.
    ``run`` is the submodule to call instead of ``model``, which still gives the names.
    """
    recorder = Recorder(model)
    with ExitStack() as stack:
        if fake:
            args, kwargs = stack.enter_context(fake_inputs(model, (args, kwargs or {})))
        for tensor in tensors_in((args, kwargs or {})):
            recorder.add_input(tensor)
        stack.enter_context(recording_calls(recorder))
        stack.enter_context(recorder)
        outputs = (run or model)(*args, **(kwargs or {}))
    recorder.finish(outputs)
    source = "fake run" if fake else "real run"
    return Trace(recorder.graph, recorder.calls, source, None if fake else outputs, recorder.aliases)
