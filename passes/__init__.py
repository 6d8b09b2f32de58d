"""Graph passes: graph in, graph and record out. Imported as ``moefy.passes``, never as ``passes``.

    trace/   what a forward does, as a graph        match/   which regions of it are FFNs
    moe/     the passes: write MoE into a graph, fuse it

The backend runs the registered passes of each stage in order: ``fuse_experts``, then what users add. A new pass is a
file with a class under ``@register_pass``, its test, and one line below that imports the file.

    >>> import moefy.passes
    >>> moefy.passes.registered_passes()
    ('fuse_experts',)
    >>> [run.graph for run in moefy.passes.history()]      # after a compiled call
    ['0/0']
"""

from __future__ import annotations

if __name__ != "moefy.passes":
    raise ImportError("import moefy.passes, not passes: a second copy would register things twice")

from moefy.passes.base import Pass
from moefy.passes.moe import fuse_experts as _fuse_experts  # noqa: F401  registers the pass
from moefy.passes.pipeline import (
    PipelineRun,
    clear_history,
    history,
    register_pass,
    registered_passes,
    run_pipeline,
    unregister_pass,
)

__all__ = [
    "Pass",
    "PipelineRun",
    "clear_history",
    "history",
    "register_pass",
    "registered_passes",
    "run_pipeline",
    "unregister_pass",
]
