"""``Recorder``: the ``TorchFunctionMode`` that appends one node for every torch call that returns tensors.

Tensors are known by identity: ``bind`` says whose value a tensor is, ``lookup`` asks. A parameter or buffer gets its
``get_attr`` node on first sight, a tensor of unknown origin too. In-place calls and writes to views rebind.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from moefy.passes.trace.module_calls import ModuleCall, opaque_call, qualified_class
from moefy.passes.trace.trees import has_tensor, map_tensors, tensors_in
from moefy.passes.trace.vocabulary import CASTS


class Recorder(TorchFunctionMode):
    """Appends one node per torch call that returns tensors.

    Args:
        root: the module that gives modules, parameters and buffers their FQNs.
        names: FQNs of further tensors that are parameters although ``root`` does not hold them, by identity.
    """

    def __init__(self, root: nn.Module, names: dict[int, str] | None = None) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.calls: list[ModuleCall] = []
        self.current: int | None = None
        self.origin: fx.Node | None = None
        self._seq = 0
        self._nodes: dict[int, tuple[weakref.ref[Tensor], fx.Node]] = {}
        fqns = _tensor_names(root)
        self.aliases = {names[0]: names for names in fqns.values() if len(names) > 1}
        self._names = {**{key: names[0] for key, names in fqns.items()}, **(names or {})}
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
        if mutated is None and (not has_tensor(out) or _is_noop(func, args, out)):
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

    def add_input(self, tensor: Tensor, name: str | None = None) -> None:
        """Give a tensor that comes from outside its placeholder, unless it has a node."""
        if self.lookup(tensor) is None:
            self.bind(tensor, self.append("placeholder", name or f"input_{self._seq}", value=tensor))

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
            fqn = self.name_of(tensor)
            node = self.append("get_attr", fqn if fqn is not None else f"_unknown_{self._seq}", value=tensor)
            node.meta["unknown"] = fqn is None
            node.meta["parameter"] = isinstance(tensor, nn.Parameter)
            node.meta["subclass"] = _subclass_name(tensor)
            self.bind(tensor, node)
        return node

    def arguments(self, tree: Any) -> Any:
        """``tree`` with nodes for its tensors."""
        return map_tensors(tree, self.node_of)

    def _bind_results(self, node: fx.Node, out: Any) -> None:
        if isinstance(out, Tensor):
            self.bind(out, node)
        elif isinstance(out, tuple | list):
            for index, item in enumerate(out):
                if has_tensor(item):
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
        self.calls.append(ModuleCall(fqn, self.current, self._seq, nodes, others, qualified_class(module)))
        self.current = len(self.calls) - 1
        return self.current

    def leave(self, call: int | None, out: Any) -> None:
        """Close the call that ``enter`` returned."""
        if call is None:
            return
        record = self.calls[call]
        self._bind_opaque(record, out)
        record.end = self._seq
        record.output = map_tensors(out, lambda t: self.lookup(t) or self.name_of(t))
        self.current = record.parent

    def _bind_opaque(self, record: ModuleCall, out: Any) -> None:
        """A result that no torch call made (quantised and scripted modules): one node for the whole call."""
        inputs = [n for n in record.inputs if n is not None]
        for tensor in tensors_in(out) if inputs else ():
            if self.lookup(tensor) is None and self.name_of(tensor) is None:
                self.record(opaque_call(record.kind), tuple(inputs), {}, tensor)

    def finish(self, outputs: Any) -> None:
        """Close the graph with the tensors of ``outputs``."""
        self.graph.output(map_tensors(list(tensors_in(outputs)), self.node_of))

    def name_of(self, tensor: Tensor) -> str | None:
        """FQN of a parameter or buffer; ``None`` for any other tensor."""
        return self._names.get(id(tensor))


def mutated_by_view(base: Tensor, view: Tensor) -> Tensor:
    """Marks a value that was changed through a view of it."""
    return base


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


def _tensor_names(root: nn.Module) -> dict[int, tuple[str, ...]]:
    """Every FQN of every parameter and buffer, by identity."""
    names: dict[int, list[str]] = {}
    for iterator in (root.named_parameters, root.named_buffers):
        for fqn, tensor in iterator(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(fqn)
    return {key: tuple(fqns) for key, fqns in names.items()}


def _subclass_name(tensor: Tensor) -> str | None:
    """The class of a quantised or distributed tensor; ``None`` for a plain one."""
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
