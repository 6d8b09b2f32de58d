"""``PassRecord``: what one graph pass did to one graph."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What one pass did to one graph. ``preserving`` passes change rounding at most."""

    name: str
    matched: int
    nodes_before: int
    nodes_after: int
    ms: float
    preserving: bool = True
    note: str = ""
