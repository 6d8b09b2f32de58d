"""What a benchmark is: a name, its options and a function from parsed options to a ``Result``.

>>> Benchmark(name="noop", help="nothing", add_arguments=lambda parser: None, run=run_noop)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol


class Result(Protocol):
    """What a benchmark measured: ``str()`` for people, ``to_dict()`` for programs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON types only, with ``schema_version`` and a unit in every key that has one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One ``moefy bench NAME``. ``run`` may import what it measures; the module that lists it may not."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Result]
