"""Passes of the stages "joint" and "post_grad" as hooks of Inductor.

Contract: there is a hook for a stage only when a pass of it is registered and not disabled, so that Inductor's caches
see no difference otherwise. A hook's uuid is made of its passes'. Inductor calls a hook once per graph: the joint one
once, the post-grad one for the forward and for the backward.

    >>> stage_hooks((), "0/0")                     # no pass of these stages is registered
    {}
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from moefy.passes.base import Pass, Stage
from moefy.passes.pipeline import passes_of, run_pipeline

HOOKS: dict[Stage, str] = {
    "joint": "joint_custom_post_pass",
    "post_grad": "post_grad_custom_post_pass",
}


class StageHook(CustomGraphPass):
    """The passes of one stage, for one of ``torch._inductor.config``'s hooks.

    Args:
        passes: in the order in which they run.
        graph: the name under which the history keeps what they did.
    """

    def __init__(self, passes: Sequence[Pass], graph: str) -> None:
        self.passes, self.graph = passes, graph

    def __call__(self, graph: fx.Graph) -> None:
        """Run the passes over Inductor's graph, in place."""
        gm = graph.owning_module
        assert gm is not None, "Inductor hands over the graph of a module"
        run_pipeline(gm, self.passes, graph=self.graph)

    def uuid(self) -> str:
        """Changes with any of the passes."""
        return hashlib.sha256("".join(p.uuid() for p in self.passes).encode()).hexdigest()


def stage_hooks(disable: Sequence[str], graph: str) -> dict[str, Any]:
    """Patches of ``torch._inductor.config`` for the registered passes.

    Args:
        disable: names of passes to leave out.
        graph: Dynamo's id of the graph.
    """
    passes = {name: passes_of(stage, disable) for stage, name in HOOKS.items()}
    return {name: StageHook(found, graph) for name, found in passes.items() if found}
