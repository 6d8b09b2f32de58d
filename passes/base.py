"""What a graph pass is: a class with a name, a stage, and one method.

``rewrite(gm)`` edits an ``fx.GraphModule`` in place and returns how often it matched. Zero matches is an answer, not an
error; a pass never prints. ``pipeline`` runs passes: it times, lints, recompiles and records.

    >>> @register_pass
    ... class DropNoOpDropout(Pass):
    ...     name = "drop_noop_dropout"
    ...     def rewrite(self, gm):
    ...         nodes = [n for n in gm.graph.nodes if n.target is F.dropout and n.args[1] == 0.0]
    ...         for node in nodes:
    ...             node.replace_all_uses_with(node.args[0])
    ...             gm.graph.erase_node(node)
    ...         return len(nodes)
"""

from __future__ import annotations

import abc
import hashlib
import inspect
from typing import ClassVar, Literal

from torch import fx

Stage = Literal["capture", "pre_grad", "joint", "post_grad"]
"""Which graph a pass sees.

- "capture": the caller's own, in ``moefy.transform(graph_module)``. Such a pass is given the matches of that graph, so
  ``transform`` makes and runs it; it is not registered.
- "pre_grad": Dynamo's, at the level of torch functions, before autograd. Runs with every inner compiler.
- "joint": aten ops, forward and backward in one. Inductor only.
- "post_grad": aten ops, forward and backward apart, right before Inductor lowers them. Inductor only.
"""
BACKEND_STAGES: tuple[Stage, ...] = ("pre_grad", "joint", "post_grad")
"""The stages of registered passes, in the order in which a graph goes through them."""


class Pass(abc.ABC):
    """Base of all passes. A subclass sets ``name`` and writes ``rewrite``.

    Attributes:
        name: unique; what ``disable=`` and the report call the pass.
        stage: which graph it sees.
        preserving: whether the pass changes rounding at most; one that changes more says ``False``.
        note: set by ``rewrite`` for the report, when there is something to say.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "pre_grad"
    preserving: ClassVar[bool] = True
    note: str = ""

    @abc.abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> int:
        """Edit ``gm.graph`` in place; return the number of matches."""

    def uuid(self) -> str:
        """Changes when the pass's source or settings change. Inductor's caches of compiled graphs ask for it."""
        cls = type(self)
        try:
            source = inspect.getsource(inspect.getmodule(cls) or cls)
        except (OSError, TypeError):  # defined at a prompt
            source = repr(sorted(vars(cls)))
        # the note is what the last run said: the backward's key must not depend on a run over the forward
        settings = repr(sorted((key, value) for key, value in vars(self).items() if key != "note"))
        return hashlib.sha256(f"{cls.__qualname__}{settings}{source}".encode()).hexdigest()
