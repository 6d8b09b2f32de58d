"""What a graph pass is, the registry of passes, and the runner.

A pass is a class with a name and one method: ``rewrite(gm)`` edits an ``fx.GraphModule`` in place
and returns how often it matched. Zero matches is an answer, not an error; a pass never prints.
Calling a pass does the rest: it times the rewrite, lints and recompiles the graph and returns a
``PassRecord``.

    >>> @register_pass
    ... class DropNoOpDropout(Pass):
    ...     name = "drop_noop_dropout"
    ...     def rewrite(self, gm):
    ...         nodes = [n for n in gm.graph.nodes if n.target is F.dropout and n.args[1] == 0.0]
    ...         for node in nodes:
    ...             node.replace_all_uses_with(node.args[0])
    ...             gm.graph.erase_node(node)
    ...         return len(nodes)
    >>> records = run_pipeline(gm)            # every registered pass, in order of registration
    >>> records = run_pipeline(gm, disable=("drop_noop_dropout",))

``TORCH_LOGS="+moefy"`` shows one line per pass; ``TORCH_TRACE`` gets the graph before and after
each pass that matched; ``history()`` holds what ran in this process.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import inspect
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import fx

from moefy.errors import ConfigError, UnknownOption
from moefy.records import PassRecord

log = logging.getLogger(__name__)

HISTORY_LENGTH = 1000


class Pass(abc.ABC):
    """Base of all passes. A subclass sets ``name`` and writes ``rewrite``.

    Attributes:
        name: unique; what ``disable=`` and the report call the pass.
        preserving: whether the pass changes rounding at most; one that changes more says ``False``.
        note: set by ``rewrite`` for the report, when there is something to say.
    """

    name: ClassVar[str]
    preserving: ClassVar[bool] = True
    note: str = ""

    @abc.abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> int:
        """Edit ``gm.graph`` in place; return the number of matches."""

    def uuid(self) -> str:
        """Changes when the pass's source or settings change, as Inductor's caches need."""
        cls = type(self)
        try:
            source = inspect.getsource(inspect.getmodule(cls) or cls)
        except (OSError, TypeError):  # defined at a prompt
            source = repr(sorted(vars(cls)))
        settings = repr(sorted(vars(self).items()))
        return hashlib.sha256(f"{cls.__qualname__}{settings}{source}".encode()).hexdigest()

    def __call__(self, gm: fx.GraphModule) -> PassRecord:
        """Rewrite, lint, recompile, and say what was done."""
        before, nodes_before = op_counts(gm), node_count(gm)
        readable = gm.print_readable(print_output=False) if _tracing_to_disk() else ""
        self.note = ""
        start = time.perf_counter()
        matched = self.rewrite(gm)
        for module in graph_modules(gm):
            module.graph.lint()
            module.recompile()
        record = PassRecord(
            name=self.name,
            matched=matched,
            nodes_before=nodes_before,
            nodes_after=node_count(gm),
            ms=(time.perf_counter() - start) * 1e3,
            preserving=self.preserving,
            note=self.note,
        )
        _log_record(record, before, op_counts(gm))
        if matched and readable:
            _trace_artifact(self.name, readable, gm.print_readable(print_output=False))
        return record


PassClass = TypeVar("PassClass", bound=type[Pass])
_registry: dict[str, type[Pass]] = {}


def register_pass(cls: PassClass) -> PassClass:
    """Class decorator: add ``cls`` to the pipeline of the backend, after the passes already there.

    Raises:
        ConfigError: when the class has no name or another pass has it already. Defining the same
            class again (a re-run notebook cell) replaces it.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError("Pass.name", got=name, expected=f"an identifier on {cls.__name__}")
    known = _registry.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (
        cls.__module__,
        cls.__qualname__,
    ):
        raise ConfigError("Pass.name", got=name, expected=f"a name that {known!r} does not have")
    _registry[name] = cls
    return cls


def unregister_pass(name: str) -> None:
    """Take a pass out of the pipeline."""
    check_names((name,))
    del _registry[name]


def registered_passes() -> tuple[str, ...]:
    """The names of the pipeline's passes, in the order in which they run."""
    return tuple(_registry)


def check_names(names: Iterable[str]) -> None:
    """Raise ``UnknownOption`` for a name that no pass has."""
    for name in names:
        if name not in _registry:
            raise UnknownOption(name, registered_passes(), where="moefy.passes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """What the passes did to one graph; ``graph`` is Dynamo's compile id or the caller's name."""

    graph: str
    records: tuple[PassRecord, ...]


_history: deque[PipelineRun] = deque(maxlen=HISTORY_LENGTH)


def run_pipeline(
    gm: fx.GraphModule,
    passes: Sequence[Pass] | None = None,
    *,
    disable: Sequence[str] = (),
    graph: str = "",
) -> tuple[PassRecord, ...]:
    """Run passes over ``gm``, in place.

    Args:
        gm: the graph.
        passes: which ones; default: one of each registered class.
        disable: names to leave out.
        graph: the name under which ``history()`` keeps the records.

    Raises:
        UnknownOption: when ``disable`` names no pass.
    """
    if passes is None:
        check_names(disable)
        passes = [cls() for cls in _registry.values()]
    records = tuple(p(gm) for p in passes if p.name not in disable)
    add_run(graph, records)
    return records


def add_run(graph: str, records: tuple[PassRecord, ...]) -> None:
    """Append to the history."""
    _history.append(PipelineRun(graph=graph, records=records))


def history() -> tuple[PipelineRun, ...]:
    """What ran since the last ``clear_history()``, oldest first: the last 1000 graphs."""
    return tuple(_history)


def clear_history() -> None:
    """Forget what ran. ``torch._dynamo.reset()`` does so too."""
    _history.clear()


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator occurs in the graph: ``{"linear": 2, "moefy.expert_ffn": 1}``."""
    nodes = (n for module in graph_modules(gm) for n in module.graph.nodes)
    return Counter(op_name(n) for n in nodes if n.op.startswith("call_"))


def node_count(gm: fx.GraphModule) -> int:
    """Nodes of the graph and of the graphs inside it."""
    return sum(len(module.graph.nodes) for module in graph_modules(gm))


def graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """``gm`` and the graphs inside it: the bodies of checkpoints and other higher-order ops."""
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


def op_name(node: fx.Node) -> str:
    """A short readable name of what a call node calls."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _log_record(record: PassRecord, before: Counter[str], after: Counter[str]) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    gone, new = before - after, after - before
    log.debug(
        "%s: %d matched, %d -> %d nodes, %.2f ms%s%s",
        record.name,
        record.matched,
        record.nodes_before,
        record.nodes_after,
        record.ms,
        f"; {record.note}" if record.note else "",
        f"; gone {dict(gone)}, new {dict(new)}" if gone or new else "",
    )


def _tracing_to_disk() -> bool:
    return bool(os.environ.get("TORCH_TRACE"))


def _trace_artifact(name: str, before: str, after: str) -> None:
    for suffix, text in (("before", before), ("after", after)):
        torch._logging.trace_structured(  # pyright: ignore[reportPrivateImportUsage]
            "artifact",
            metadata_fn=lambda s=suffix: {"name": f"moefy_{name}_{s}", "encoding": "string"},
            payload_fn=lambda t=text: t,
        )
