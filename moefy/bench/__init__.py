"""``moefy bench``: one module per benchmark, each with its options and a result for people and programs.

To add one: a module with a ``Benchmark`` whose ``run`` returns a ``Result``, and its name in ``BENCHES``.

    >>> [bench.name for bench in BENCHES]
    ['transform', 'layer', 'routing']
"""

from __future__ import annotations

from moefy.bench.base import Benchmark, Result
from moefy.bench.layer.run import LAYER
from moefy.bench.routing_cost import ROUTING_COST
from moefy.bench.transform_cost import TRANSFORM_COST

__all__ = ["BENCHES", "Benchmark", "Result"]

BENCHES: tuple[Benchmark, ...] = (TRANSFORM_COST, LAYER, ROUTING_COST)
