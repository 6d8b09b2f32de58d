"""``assign``: ``setattr`` that Dynamo also takes inside an activation checkpoint, on what was made outside of it.

Dynamo forbids such side effects there, since a recomputation would not repeat them. So use it for what a recomputation
must not repeat, or for what is undone before the checkpoint ends. A tensor that is assigned becomes one more output.

    >>> assign(state, "live", l_aux)
"""

from __future__ import annotations

from typing import Any

import torch


def assign(holder: Any, name: str, value: Any) -> None:
    """``setattr(holder, name, value)``."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(
            setattr, holder, name, value
        )
    else:
        setattr(holder, name, value)
