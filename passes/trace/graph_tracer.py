"""Trace a graph that the caller has: interpret it, and record it in the same representation as a forward.

>>> gm = torch.fx.symbolic_trace(torch.nn.ReLU())
>>> [(n.name, n.meta["origin"]) for n in trace_graph(gm, (torch.ones(2),)).graph.nodes if n.op == "call_function"]
[('relu', relu)]
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from moefy.passes.trace.module_calls import recording_calls
from moefy.passes.trace.recorder import Recorder
from moefy.passes.trace.trace import Trace
from moefy.passes.trace.trees import has_tensor, tensors_in


class GraphTracer(fx.Interpreter):
    """Runs a caller's ``GraphModule`` and records it in the same representation, each node with its ``origin``."""

    def __init__(self, gm: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the caller's graph; what it records carries ``n`` as origin."""
        self.recorder.origin = n
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor | tuple | list) and has_tensor(result):
            tensors = list(tensors_in(result))
            if n.target is not operator.getitem and any(self.recorder.lookup(t) is None for t in tensors):
                # a torch-function mode does not see aten overloads
                args, kwargs = self.recorder.arguments(self.fetch_args_kwargs_from_env(n))
                self.recorder.record(n.target, args, kwargs, result)
        return result


def trace_graph(gm: fx.GraphModule, inputs: tuple[Any, ...], names: dict[int, str] | None = None) -> Trace:
    """Record a caller's graph by interpreting it on ``inputs`` (real or fake, one per placeholder).

    ``names`` adds tensors that are parameters although they come in as inputs, by identity (Dynamo graphs).
    """
    recorder = Recorder(gm, names)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for tensor, origin in zip(inputs, placeholders, strict=True):
        if isinstance(tensor, Tensor) and recorder.name_of(tensor) is None:
            recorder.origin = origin
            recorder.add_input(tensor, origin.name)
    root = recorder.enter(gm, inputs, {})
    with recording_calls(recorder), recorder:
        outputs = GraphTracer(gm, recorder).run(*inputs)
    recorder.origin = None
    recorder.leave(root, outputs)
    recorder.finish(outputs)
    return Trace(recorder.graph, recorder.calls, "fx graph", outputs, recorder.aliases)
