"""Trace by execution: run a model once and record what it computes as an ``fx.Graph``.

A ``TorchFunctionMode`` sees every torch call of one real forward, whatever Python surrounds it, so nothing has to be
symbolically traceable. Under ``FakeTensorMode`` the run costs no memory and no arithmetic.

The graph holds ``placeholder`` (tensor inputs), ``get_attr`` (parameters and buffers, target = FQN; tensors of
unknown origin have ``meta["unknown"]``) and ``call_function`` nodes (the torch functions as called). Each node has
``meta``: ``shape``, ``dtype``, ``seq`` (position), ``call`` (index of the innermost module call), and ``origin`` (the
node of the caller's graph, when a graph was traced). ``Trace.calls`` lists the module calls in order.

    >>> trace = trace_module(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.ones(2, 4),))
    >>> [n.target.__name__ for n in trace.graph.nodes if n.op == "call_function"]
    ['linear', 'relu']
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from moefy.passes.trace.vocabulary import CASTS

ROOT_CALL = 0


@dataclasses.dataclass
class ModuleCall:
    """One call of a registered module: nodes with ``start <= seq < end`` ran inside it."""

    fqn: str
    parent: int | None
    start: int
    inputs: list[fx.Node | None]
    has_other_inputs: bool
    kind: str
    end: int = -1
    output: Any = None


@dataclasses.dataclass
class Trace:
    """What one forward did. ``outputs`` are its real results, or None when it ran on fake tensors."""

    graph: fx.Graph
    calls: list[ModuleCall]
    source: str
    outputs: Any = None
    aliases: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def ancestors(self, call: int) -> Iterator[int]:
        """``call`` and the calls around it, innermost first."""
        current: int | None = call
        while current is not None:
            yield current
            current = self.calls[current].parent


class Recorder(TorchFunctionMode):
    """Appends one node per torch call that returns tensors."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.calls: list[ModuleCall] = []
        self.current: int | None = None
        self.origin: fx.Node | None = None
        self.aliases: dict[str, tuple[str, ...]] = {}
        self._seq = 0
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        self._names = _tensor_names(root, self.aliases)
        self._modules: dict[int, str] = {}
        for fqn, module in root.named_modules():
            self._modules.setdefault(id(module), fqn)

    # -- nodes ---------------------------------------------------------------------------------------------------
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` and record it."""
        kwargs = kwargs or {}
        mutated = _mutated_argument(func, args)
        before = self.arguments((args, kwargs)) if mutated is not None else None
        out = func(*args, **kwargs)
        if mutated is None and (not _has_tensor(out) or _is_noop(func, args, out)):
            return out
        node_args, node_kwargs = before or self.arguments((args, kwargs))
        self.record(func, node_args, node_kwargs, out, mutated)
        return out

    def record(self, func: Any, args: Any, kwargs: Any, out: Any, mutated: Tensor | None = None) -> fx.Node:
        """Append a node for ``func`` and bind its results (and the tensor it changed) to it."""
        node = self.append("call_function", callable_of(func), tuple(args), dict(kwargs), out)
        self._bind_results(node, out)
        if mutated is not None:
            self.bind(mutated, node)
            self._bind_base(mutated, node)
        return node

    def append(self, op: str, target: Any, args: Any = (), kwargs: Any = None, value: Any = None) -> fx.Node:
        """A new node with its ``meta``."""
        node = self.graph.create_node(
            op, target, args, kwargs or {}, name=None if op != "get_attr" else "attr"
        )
        node.meta.update(seq=self._seq, call=self.current, origin=self.origin)
        if isinstance(value, Tensor):
            describe(node, value)
        self._seq += 1
        return node

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        """From now on ``tensor`` is the value of ``node``."""
        self._nodes[id(tensor)] = (weakref.ref(tensor), node)

    def lookup(self, tensor: Tensor) -> fx.Node | None:
        """The node whose value ``tensor`` is."""
        entry = self._nodes.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node of ``tensor``; a parameter, a buffer or a tensor of unknown origin gets one on first sight."""
        node = self.lookup(tensor)
        if node is None:
            fqn = self._names.get(id(tensor))
            node = self.append("get_attr", fqn if fqn is not None else f"_unknown_{self._seq}", value=tensor)
            node.meta["unknown"] = fqn is None
            node.meta["parameter"] = isinstance(tensor, nn.Parameter)
            node.meta["subclass"] = _subclass_name(tensor)
            self.bind(tensor, node)
        return node

    def arguments(self, tree: Any) -> Any:
        """``tree`` with nodes for its tensors."""
        return _map_tensors(tree, self.node_of)

    def _bind_results(self, node: fx.Node, out: Any) -> None:
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, tuple | list):
            for index, item in enumerate(out):
                if _has_tensor(item):
                    value = item if isinstance(item, Tensor) else None
                    child = self.append("call_function", operator.getitem, (node, index), value=value)
                    self._bind_results(child, item)

    def _bind_base(self, view: Tensor, node: fx.Node) -> None:
        """A write to a view changes its base: the base's value is no longer that of its old node."""
        with torch._C.DisableTorchFunction():
            base = view._base if view._is_view() else None
        if base is not None and self.lookup(base) is not None:
            changed = self.append("call_function", mutated_by_view, (self.node_of(base), node), value=base)
            self.bind(base, changed)

    # -- module calls --------------------------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> int | None:
        """Open a call of ``module``; modules that are not registered in the root belong to their caller."""
        fqn = self._modules.get(id(module))
        if fqn is None:
            return None
        values = [*args, *kwargs.values()]
        nodes = [self.lookup(v) if isinstance(v, Tensor) else None for v in values]
        others = any(v is not None and not isinstance(v, Tensor) for v in values)
        self.calls.append(ModuleCall(fqn, self.current, self._seq, nodes, others, _qualified_class(module)))
        self.current = len(self.calls) - 1
        return self.current

    def leave(self, call: int | None, out: Any) -> None:
        """Close the call that ``enter`` returned."""
        if call is None:
            return
        record = self.calls[call]
        self._bind_opaque(record, out)
        record.end = self._seq
        record.output = _map_tensors(out, lambda t: self.lookup(t) or self._parameter_name(t))
        self.current = record.parent

    def _bind_opaque(self, record: ModuleCall, out: Any) -> None:
        """A result that no torch call made (quantised and scripted modules): one node for the whole call."""
        inputs = [n for n in record.inputs if n is not None]
        for tensor in _tensors(out) if inputs else ():
            if self.lookup(tensor) is None and id(tensor) not in self._names:
                self.record(_opaque_call(record.kind), tuple(inputs), {}, tensor)

    def _parameter_name(self, tensor: Tensor) -> str | None:
        return self._names.get(id(tensor))


@functools.cache
def _opaque_call(kind: str) -> Callable[..., Any]:
    def opaque(*args: Any) -> Any:
        raise RuntimeError(f"a call of {kind} cannot be replayed")

    opaque.__name__ = opaque.__qualname__ = f"opaque_{kind}"
    return opaque


def _qualified_class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}".replace(".", "_")


def mutated_by_view(base: Tensor, view: Tensor) -> Tensor:
    """Marks a value that was changed through a view of it."""
    return base


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
        for tensor in _tensors((args, kwargs or {})):
            if recorder.lookup(tensor) is None:
                recorder.bind(tensor, recorder.append("placeholder", f"input_{recorder._seq}", value=tensor))
        stack.enter_context(recording_calls(recorder))
        stack.enter_context(recorder)
        outputs = (run or model)(*args, **(kwargs or {}))
    _finish(recorder, outputs)
    source = "fake run" if fake else "real run"
    return Trace(recorder.graph, recorder.calls, source, None if fake else outputs, recorder.aliases)


class GraphTracer(fx.Interpreter):
    """Runs a caller's ``GraphModule`` and records it in the same representation, each node with its ``origin``."""

    def __init__(self, gm: fx.GraphModule, recorder: Recorder) -> None:
        super().__init__(gm)
        self.recorder = recorder

    def run_node(self, n: fx.Node) -> Any:
        """Run one node of the caller's graph; what it records carries ``n`` as origin."""
        self.recorder.origin = n
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor | tuple | list) and _has_tensor(result):
            tensors = list(_tensors(result))
            if n.target is not operator.getitem and any(self.recorder.lookup(t) is None for t in tensors):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                # ops that torch-function modes do not see, such as aten overloads
                args, kwargs = self.recorder.arguments((args, kwargs))
                self.recorder.record(n.target, args, kwargs, result)
        return result


def trace_graph(gm: fx.GraphModule, inputs: tuple[Any, ...], names: dict[int, str] | None = None) -> Trace:
    """Record a caller's graph by interpreting it on ``inputs`` (real or fake, one per placeholder).

    ``names`` adds tensors that are parameters although they come in as inputs, by identity (Dynamo graphs).
    """
    recorder = Recorder(gm)
    recorder._names.update(names or {})
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for tensor, origin in zip(inputs, placeholders, strict=True):
        if (
            isinstance(tensor, Tensor)
            and recorder.lookup(tensor) is None
            and id(tensor) not in recorder._names
        ):
            recorder.origin = origin
            recorder.bind(tensor, recorder.append("placeholder", origin.name, value=tensor))
    root = recorder.enter(gm, inputs, {})
    with recording_calls(recorder), recorder:
        outputs = GraphTracer(gm, recorder).run(*inputs)
    recorder.origin = None
    recorder.leave(root, outputs)
    _finish(recorder, outputs)
    return Trace(recorder.graph, recorder.calls, "fx graph", outputs, recorder.aliases)


@contextmanager
def recording_calls(recorder: Recorder) -> Iterator[None]:
    """Within the block ``recorder`` is told of every module call (``nn.Module.__call__`` is wrapped, as FX does)."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        index = recorder.enter(module, args, kwargs)
        try:
            out = original(module, *args, **kwargs)
        except BaseException:
            recorder.leave(index, None)
            raise
        recorder.leave(index, out)
        return out

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextmanager
def fake_inputs(model: nn.Module, tree: Any) -> Iterator[Any]:
    """Enter the fake mode of the model (a new one for a real model) and yield ``tree`` with fake tensors."""
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    states = [*model.parameters(), *model.buffers()]
    mode = detect_fake_mode([t for t in states if isinstance(t, FakeTensor)])
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    else:
        mode.allow_non_fake_inputs = True

    def convert(value: Tensor) -> Tensor:
        return value if isinstance(value, FakeTensor) else mode.from_tensor(value, static_shapes=True)

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(
        logging.CRITICAL
    )  # a model that cannot run on fake tensors is expected: the caller falls back
    try:
        with mode:
            yield _map_tensors(tree, convert)
    finally:
        log.setLevel(level)


def describe(node: fx.Node, value: Tensor) -> None:
    """Note shape and dtype of the node's value."""
    with torch._C.DisableTorchFunction():
        node.meta["shape"] = tuple(value.shape)
        node.meta["dtype"] = value.dtype


def callable_of(func: Any) -> Any:
    """``func``, or for the getter of a tensor property (``x.T``) a function that bears the property's name."""
    return _property_getter(func.__self__.__name__) if getattr(func, "__name__", "") == "__get__" else func


@functools.cache
def _property_getter(name: str) -> Callable[[Tensor], Any]:
    def getter(tensor: Tensor) -> Any:
        return getattr(tensor, name)

    getter.__name__ = getter.__qualname__ = name
    return getter


def _finish(recorder: Recorder, outputs: Any) -> None:
    recorder.graph.output(_map_tensors(list(_tensors(outputs)), recorder.node_of))


def _tensor_names(root: nn.Module, aliases: dict[str, tuple[str, ...]]) -> dict[int, str]:
    names: dict[int, list[str]] = {}
    for iterator in (root.named_parameters, root.named_buffers):
        for fqn, tensor in iterator(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(fqn)
    aliases.update({fqns[0]: tuple(fqns) for fqns in names.values() if len(fqns) > 1})
    return {key: fqns[0] for key, fqns in names.items()}


def _subclass_name(tensor: Tensor) -> str | None:
    """The class of a tensor that is not a plain one (quantised and distributed tensors)."""
    from torch._subclasses.fake_tensor import FakeTensor

    plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer, FakeTensor)
    return None if plain else type(tensor).__name__


def _mutated_argument(func: Any, args: tuple[Any, ...]) -> Tensor | None:
    name = getattr(func, "__name__", "")
    inplace = name == "__setitem__" or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    inplace = inplace or (name.endswith("_") and not name.endswith("__"))
    return args[0] if inplace and args and isinstance(args[0], Tensor) else None


def _is_noop(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether the call handed its own argument back, as a cast to the same dtype does."""
    return bool(args) and out is args[0] and getattr(func, "__name__", "") in CASTS


def _map_tensors(tree: Any, fn: Callable[[Tensor], Any]) -> Any:
    """``tree_map`` over tensors, with the plain containers, which are nearly all there are, done here."""
    if isinstance(tree, Tensor):
        return fn(tree)
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind(_map_tensors(item, fn) for item in tree)
    if kind is dict:
        return {key: _map_tensors(item, fn) for key, item in tree.items()}
    if tree is None or kind in (int, float, bool, str, torch.dtype, torch.device):
        return tree
    return tree_map(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, tuple | list) and any(_has_tensor(v) for v in value)
