"""``PassRecord``: what one graph pass did to one graph.

>>> PassRecord(name="fuse_experts", matched=2, nodes_before=40, nodes_after=34, ms=1.3).preserving
True
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did to one graph.

    Attributes:
        name: the name of the pass.
        matched: how often the pass matched.
        nodes_before: nodes of the graph before the pass.
        nodes_after: nodes of the graph after the pass.
        ms: milliseconds that the pass took.
        preserving: whether the pass changes rounding at most.
        note: what else the pass has to say, in words.
    """

    name: str
    matched: int
    nodes_before: int
    nodes_after: int
    ms: float
    preserving: bool = True
    note: str = ""
