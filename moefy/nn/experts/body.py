"""``Body``: the code between the entries and the exit of an FFN, as a function of the rows.

Contract: ``body(owner, *rows)`` takes the entry outputs in order and returns the exit's input. It is
made from an ``fx.Graph`` whose ``get_attr`` and ``call_module`` targets are relative to ``owner`` (the
MoE; ``training`` is ``owner.training``), so a learnable activation or a dropout keeps living on the
module. It pickles as source text, like a ``GraphModule``. Equal bodies share one function, so that
Dynamo compiles layers that differ in weights alone only once.

    >>> body = Body.of("silu", "separate")
    >>> print(body.code)
    def forward(self, h0, h1):
        activate = moefy_nn_body_activate(h0, 'silu');  h0 = None
        mul = activate * h1;  activate = h1 = None
        return mul
"""

from __future__ import annotations

import dataclasses
import itertools
import linecache
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from moefy import ops
from moefy.errors import ConfigError, suggest
from moefy.records import KnownBody

RANDOM_FUNCTIONS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout
}  # fmt: skip
RANDOM_MODULES = (nn.modules.dropout._DropoutNd,)


class Body:
    """A callable, picklable body. Make it with ``from_graph`` or ``of``.

    Attributes:
        code: its Python source.
        num_inputs: how many entry outputs it takes.
        known: the fused op's name for it, or ``None``.
    """

    def __init__(
        self,
        code: str,
        imports: str,
        num_inputs: int,
        known: KnownBody | None,
        dropouts: tuple[tuple[Any, Any], ...],
        modules: tuple[str, ...],
    ) -> None:
        self.code, self.imports, self.num_inputs, self.known = code, imports, num_inputs, known
        self.dropouts, self.modules = dropouts, modules
        self.function = compiled(code, imports)

    @classmethod
    def from_graph(cls, graph: fx.Graph, known: KnownBody | None = None) -> Body:
        """The body that ``graph`` computes.

        Args:
            graph: placeholders are the entry outputs in order; attribute and module targets are relative to the owner.
            known: the fused op's name for it, when the op has it.

        Raises:
            ConfigError: for a known body whose activation or GLU form does not exist.
        """
        if known is not None:
            _check_known(known)
        python = graph.python_code(root_module="self")
        imports = _format_import_block(python.globals, sys_importer)
        return cls(
            python.src.strip() + "\n",
            imports,
            sum(node.op == "placeholder" for node in graph.nodes),
            known,
            tuple(find_dropouts(graph)),
            tuple(node.target for node in graph.nodes if node.op == "call_module"),
        )

    @classmethod
    def of(cls, activation: str, glu: ops.GLU = "none", gate: int = 0) -> Body:
        """The known body ``activation`` in GLU form ``glu``.

        Raises:
            ConfigError: for a name that does not exist.
        """
        known = KnownBody(activation, glu, gate)
        _check_known(known)
        return cls.from_graph(known_graph(known), known)

    def __call__(self, owner: nn.Module, *rows: torch.Tensor) -> torch.Tensor:
        """The exit's input, made of the entries' rows in the order of the entries."""
        return self.function(owner, *rows)

    def is_random(self, owner: nn.Module) -> bool:
        """Whether a dropout in the body is active, in which case the fused op would be wrong."""
        for path in self.modules:
            module = resolve(owner, path)
            if isinstance(module, RANDOM_MODULES) and module.training and module.p > 0:
                return True
        return any(read(owner, training) and read(owner, p) > 0 for p, training in self.dropouts)

    def fused(self, owner: nn.Module) -> KnownBody | None:
        """The fused op's name for this body now; ``None`` when the body must run as it is written."""
        return None if self.known is None or self.is_random(owner) else self.known

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.function = compiled(self.code, self.imports)

    def __repr__(self) -> str:
        return f"Body({self.known or self.code!r})"


def _check_known(known: KnownBody) -> None:
    """Raise ``ConfigError`` for an activation or a GLU form that does not exist."""
    names = sorted(ops.ACTIVATIONS)
    if known.activation not in names:
        expected = f"one of {names}{suggest(known.activation, names)}"
        raise ConfigError("activation", got=known.activation, expected=expected)
    if known.glu not in ops.GLU_FORMS:
        raise ConfigError("glu", got=known.glu, expected=f"one of {ops.GLU_FORMS}")


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A value that lives on the owner, by path."""

    path: str


def find_dropouts(graph: fx.Graph) -> Iterator[tuple[Any, Any]]:
    """``(p, training)`` of each functional dropout: a constant, or an ``Attribute`` of the owner."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in RANDOM_FUNCTIONS:
            defaults = (0.5, True)
            given = (*node.args[1:3], *defaults[len(node.args[1:3]) :])
            yield (
                constant(node.kwargs.get("p", given[0]), fallback=1.0),
                constant(node.kwargs.get("training", node.kwargs.get("train", given[1])), fallback=True),
            )
        elif node.op == "call_function" and node.target in (F.rrelu, torch.rrelu):
            yield 1.0, constant(node.kwargs.get("training", (*node.args, False)[3:4] or False), fallback=True)


def constant(value: Any, *, fallback: Any) -> Any:
    """``value`` as a constant or an ``Attribute``; a computed value counts as ``fallback``, an active dropout."""
    if isinstance(value, fx.Node):
        return Attribute(str(value.target)) if value.op == "get_attr" else fallback
    return value


def read(owner: nn.Module, value: Any) -> Any:
    """``value``, looked up on ``owner`` when it is an ``Attribute``."""
    return resolve(owner, value.path) if isinstance(value, Attribute) else value


def resolve(owner: Any, path: str) -> Any:
    """``owner.a.b.c`` for ``"a.b.c"``; the owner itself for ``""``."""
    for name in path.split(".") if path else ():
        owner = getattr(owner, name)
    return owner


def known_graph(known: KnownBody) -> fx.Graph:
    """The graph that computes a known body, with one placeholder per entry."""
    graph = fx.Graph()
    if known.glu == "none":
        graph.output(graph.call_function(activate, (graph.placeholder("h0"), known.activation)))
        return graph
    if known.glu == "separate":
        rows = [graph.placeholder("h0"), graph.placeholder("h1")]
        gate_at = known.gate
    else:
        halves = graph.call_function(torch.chunk, (graph.placeholder("h0"), 2), {"dim": -1})
        rows = [graph.call_function(operator.getitem, (halves, i)) for i in range(2)]
        gate_at = 0 if known.glu == "merged_gate_first" else 1
    gate = graph.call_function(activate, (rows[gate_at], known.activation))
    graph.output(graph.call_function(operator.mul, (gate, rows[1 - gate_at])))
    return graph


def activate(rows: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name, as the fused op computes it."""
    return ops.ACTIVATIONS[activation].forward(rows)


_FUNCTIONS: dict[tuple[str, str], Callable[..., torch.Tensor]] = {}
_SERIAL = itertools.count()


def compiled(code: str, imports: str) -> Callable[..., torch.Tensor]:
    """The function that ``code`` defines; one per text, with its lines visible in tracebacks."""
    key = (code, imports)
    if key not in _FUNCTIONS:
        filename = f"<moefy body {next(_SERIAL)}>"
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        namespace: dict[str, Any] = {}
        exec(imports, namespace)
        exec(compile(code, filename, "exec"), namespace)
        _FUNCTIONS[key] = namespace["forward"]
    return _FUNCTIONS[key]
