"""The registry of passes, the runner, and the history of what ran.

    >>> records = run_pipeline(gm)            # every registered pass of the stage "pre_grad", in order of registration
    >>> records = run_pipeline(gm, disable=("drop_noop_dropout",))

The runner owns what is the same for every pass of every stage: time, lint, recompilation, the record. ``recording`` is
that record for work that is no ``Pass``, as when the modules behind a graph are swapped. ``TORCH_LOGS="+moefy"`` shows
one line per pass; ``TORCH_TRACE`` gets the graph before and after each pass that matched; ``history()`` holds what ran
in this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import fx

from moefy.errors import ConfigError, UnknownOption
from moefy.passes.base import BACKEND_STAGES, Pass, Stage
from moefy.passes.graphs import graph_modules, node_count, op_counts
from moefy.records import PassRecord

log = logging.getLogger(__name__)

HISTORY_LENGTH = 1000  # graphs; an older run is forgotten

PassClass = TypeVar("PassClass", bound=type[Pass])
_registry: dict[str, type[Pass]] = {}


# -- the registry ------------------------------------------------------------------------------------------------------
def register_pass(cls: PassClass) -> PassClass:
    """Class decorator: add ``cls`` to the backend's passes of its stage, after those that are there.

    Raises:
        ConfigError: when the class has no name, another pass has the name, or there is no such stage. Defining the same
            class again (a re-run notebook cell) replaces it.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError("Pass.name", got=name, expected=f"an identifier on {cls.__name__}")
    if cls.stage not in BACKEND_STAGES:
        raise ConfigError(
            "Pass.stage", got=cls.stage, expected=f"one of {BACKEND_STAGES} for a registered pass"
        )
    known = _registry.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError("Pass.name", got=name, expected=f"a name that {known!r} does not have")
    _registry[name] = cls
    return cls


def unregister_pass(name: str) -> None:
    """Take a pass out of the registry."""
    check_names((name,))
    del _registry[name]


def registered_passes(stage: Stage | None = None) -> tuple[str, ...]:
    """The names of the passes of a stage, or of all, in the order in which they run."""
    return tuple(name for name, cls in _registry.items() if stage in (None, cls.stage))


def check_names(names: Iterable[str]) -> None:
    """Raise ``UnknownOption`` for a name that no pass has."""
    for name in names:
        if name not in _registry:
            raise UnknownOption(name, registered_passes(), where="moefy.passes")


def passes_of(stage: Stage, disable: Sequence[str] = ()) -> list[Pass]:
    """One of each registered class of the stage, without the disabled ones.

    Raises:
        UnknownOption: when ``disable`` names no pass.
    """
    check_names(disable)
    return [_registry[name]() for name in registered_passes(stage) if name not in disable]


# -- the runner --------------------------------------------------------------------------------------------------------
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
        passes: which ones; by default the registered ones of the stage "pre_grad".
        disable: names to leave out.
        graph: the name under which ``history()`` keeps the records.

    Raises:
        UnknownOption: when ``disable`` names no pass.
    """
    if passes is None:
        passes = passes_of("pre_grad", disable)
    records = tuple(run_pass(p, gm) for p in passes if p.name not in disable)
    add_run(graph, records)
    return records


def run_pass(a_pass: Pass, gm: fx.GraphModule) -> PassRecord:
    """Rewrite, lint, recompile, log, and say what was done. The history is the caller's (``add_run``)."""
    before = op_counts(gm)
    readable = gm.print_readable(print_output=False) if _tracing_to_disk() else ""
    a_pass.note = ""
    with recording(a_pass.name, lambda: node_count(gm), preserving=a_pass.preserving) as run:
        run.matched = a_pass.rewrite(gm)
        run.note = a_pass.note
        for module in graph_modules(gm):
            module.graph.lint()
            module.recompile()
    _log_record(run.record, before, op_counts(gm))
    if run.matched and readable:
        _trace_artifact(a_pass.name, readable, gm.print_readable(print_output=False))
    return run.record


@dataclasses.dataclass
class Recording:
    """What a block under ``recording`` fills in; ``record`` is there when it has ended."""

    matched: int = 0
    note: str = ""
    record: PassRecord = dataclasses.field(init=False)


@contextlib.contextmanager
def recording(name: str, nodes: Callable[[], int], *, preserving: bool = True) -> Iterator[Recording]:
    """Time a block that edits a graph, and make its ``PassRecord``.

    Args:
        name: what the record calls it.
        nodes: counts the graph's nodes; asked before and after.
        preserving: whether the block changes rounding at most.
    """
    run, before, start = Recording(), nodes(), time.perf_counter()
    yield run
    run.record = PassRecord(
        name=name,
        matched=run.matched,
        nodes_before=before,
        nodes_after=nodes(),
        ms=(time.perf_counter() - start) * 1e3,
        preserving=preserving,
        note=run.note,
    )


# -- the history -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """What the passes did to one graph; ``graph`` is Dynamo's compile id or the caller's name."""

    graph: str
    records: tuple[PassRecord, ...]


_history: deque[PipelineRun] = deque(maxlen=HISTORY_LENGTH)


def add_run(graph: str, records: tuple[PassRecord, ...]) -> None:
    """Append to the history."""
    _history.append(PipelineRun(graph=graph, records=records))


def history() -> tuple[PipelineRun, ...]:
    """What ran since the last ``clear_history()``, oldest first: the last 1000 graphs."""
    return tuple(_history)


def clear_history() -> None:
    """Forget what ran. ``torch._dynamo.reset()`` does so too."""
    _history.clear()


# -- logs --------------------------------------------------------------------------------------------------------------
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
