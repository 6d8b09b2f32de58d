"""``Trace``: what one forward did, as a graph and its module calls.

The graph holds ``placeholder`` (tensor inputs), ``get_attr`` (parameters and buffers, target = FQN; tensors of
unknown origin have ``meta["unknown"]``) and ``call_function`` nodes (the torch functions as called). Each node has
``meta``: ``shape``, ``dtype``, ``seq`` (position), ``call`` (index of the innermost module call), and ``origin`` (the
node of the caller's graph, when a graph was traced). ``Trace.calls`` lists the module calls in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from moefy.passes.trace.module_calls import ModuleCall


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
