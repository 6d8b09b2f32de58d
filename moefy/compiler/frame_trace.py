"""A ``Trace`` from Dynamo's graph, for frames that are no module's forward: functions, and the rest of a
frame after a graph break.

Dynamo hands parameters in as placeholders. Their sources lead to the modules that own them, and each
node knows from which module call it came; so the graph is interpreted on fake tensors and the calls of
the linears are put back.

    >>> @torch.compile(backend="moefy", options={"num_experts": 8})
    ... def step(x): return model(x).sum()
    >>> [root] = roots_of(gm)                  # inside the backend
    >>> root is model, trace_below(gm, root).source
    (True, 'dynamo graph')
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._subclasses.fake_tensor import FakeTensorMode

from moefy.passes.trace import ROOT_CALL, ModuleCall, Trace, trace_graph

SOURCE = "dynamo graph"


def roots_of(gm: fx.GraphModule) -> list[nn.Module]:
    """The outermost modules whose parameters the graph reads."""
    output = InstructionTranslator.current_tx().output
    scope = {"L": output.local_scope, "G": output.global_scope}
    found: dict[int, nn.Module] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(_example(node), nn.Parameter):
            root = _outermost_module(node.meta["grapharg"].source, scope)
            if root is not None:
                found[id(root)] = root
    return list(found.values())


def _outermost_module(source: Any, scope: dict[str, Any]) -> nn.Module | None:
    chain = [source]
    while getattr(chain[-1], "base", None) is not None:
        chain.append(chain[-1].base)
    for link in reversed(chain):
        name: Any = link.name() if callable(link.name) else link.name
        try:
            value = eval(name, scope)  # Dynamo's own name of the object, as its guards evaluate it
        except Exception:  # a source that only guards can evaluate
            continue
        if isinstance(value, nn.Module):
            return value
    return None


def trace_below(gm: fx.GraphModule, root: nn.Module) -> Trace:
    """The graph as a trace that names the parameters of ``root``. Static shapes, fake tensors."""
    names = {id(p): fqn for fqn, p in root.named_parameters(remove_duplicate=False)}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs, fake_names = [], {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = _example(node)
        if isinstance(value, Tensor) and node.users and all(u.target == "item" for u in node.users):
            value = _Number(value.item())
        elif isinstance(value, Tensor):
            real, value = value, mode.from_tensor(value, static_shapes=True)
            if id(real) in names:
                fake_names[id(value)] = names[id(real)]
        inputs.append(value)
    with mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fx: parameters that the graph does not own
        trace = trace_graph(gm, tuple(inputs), fake_names)
    trace.source, trace.outputs = SOURCE, None
    trace.calls[ROOT_CALL].has_other_inputs = True  # the frame is not a module that could be replaced
    _restore_calls(trace)
    return trace


class _Number:
    """A Python float that Dynamo passes as a tensor and reads with ``.item()`` (dynamic=True)."""

    def __init__(self, value: float) -> None:
        self.item = lambda: value


def _example(node: fx.Node) -> Any:
    grapharg = node.meta.get("grapharg")
    return getattr(grapharg, "example", None)


def _restore_calls(trace: Trace) -> None:
    """Add a ``ModuleCall`` for every call of a module that owns parameters of its own."""
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node in trace.graph.nodes:
        origin = node.meta.get("origin")
        stack = origin.meta.get("nn_module_stack") if origin is not None else None
        if node.op == "call_function" and stack:
            groups[next(reversed(stack))].append(node)
    for nodes in groups.values():
        call = _call(nodes)
        if call is not None:
            trace.calls.append(call)
            for node in nodes:
                node.meta["call"] = len(trace.calls) - 1


def _call(nodes: list[fx.Node]) -> ModuleCall | None:
    inside = set(nodes)
    outer = [n for node in nodes for n in node.all_input_nodes if n not in inside]
    owners = {str(n.target).rpartition(".")[0] for n in outer if n.op == "get_attr"}
    ends = [n for n in nodes if not set(n.users) <= inside]
    if len(owners) != 1 or len(ends) != 1:
        return None
    inputs = list(dict.fromkeys(n for n in outer if n.op != "get_attr"))
    return ModuleCall(
        fqn=owners.pop(),
        kind="",
        parent=ROOT_CALL,
        start=nodes[0].meta["seq"],
        end=nodes[-1].meta["seq"] + 1,
        inputs=list(inputs),
        has_other_inputs=False,
        output=ends[0],
    )
