"""Graph passes: graph in, graph and record out. Imported as ``moefy.passes``, never as ``passes``.

The pipeline that the backend runs is the registry, in order: ``fuse_experts``, then what users add.

    >>> import moefy.passes
    >>> moefy.passes.registered_passes()
    ('fuse_experts',)
    >>> [run.graph for run in moefy.passes.history()]      # after a compiled call
    ['0/0']
"""

from __future__ import annotations

if __name__ != "moefy.passes":
    raise ImportError("import moefy.passes, not passes: a second copy would register things twice")

from moefy.passes.base import (
    Pass,
    PipelineRun,
    clear_history,
    history,
    register_pass,
    registered_passes,
    run_pipeline,
    unregister_pass,
)
from moefy.passes.moe import fuse_experts as _fuse_experts  # noqa: F401  registers the pass

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
