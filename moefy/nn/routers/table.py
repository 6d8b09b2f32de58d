"""``router_table``: what every registered router computes, where the formula is from, and the router's options.

Contract: the text is made of the classes alone: ``formula``, ``source`` and the constructor's keywords.

    >>> print("\\n".join(router_table().splitlines()[-2:]))
    zero           c = 0 for all K slots;  w = 1 / K                      FastMoE
                   options: those of top_k
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from moefy.nn.routers.base import ROUTERS, Router


def router_table() -> str:
    """Two lines per router, in the order of their names: name, formula and source; then the options."""
    width = max(len(cls.formula) for cls in ROUTERS.values())
    lines = []
    for name, cls in sorted(ROUTERS.items()):
        lines.append(f"{name:<13}  {cls.formula:<{width}}  {cls.source}")
        lines.append(f"{'':<13}  options: {_options(cls)}")
    return "\n".join(lines)


def _options(cls: type[Router]) -> str:
    """The keywords of ``cls`` with their defaults, and the router whose options it takes too."""
    own = ", ".join(_keywords(cls))
    base = next((f"those of {name}" for name, known in ROUTERS.items() if known in cls.__bases__), "")
    return f"{own}, and {base}" if own and base else own or base


def _keywords(cls: type[Router]) -> Iterator[str]:
    if "__init__" not in vars(cls):
        return
    for parameter in inspect.signature(cls.__init__).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("fqn", "device", "dtype"):
            yield f"{parameter.name}={parameter.default!r}"
