"""An ``fx.GraphModule`` with the graphs inside it (bodies of checkpoints and other higher-order ops): find, count, ask.

>>> op_counts(gm)
Counter({'linear': 2, 'moefy.expert_ffn': 1})
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from moefy.passes.trace.vocabulary import qualified_op_name


def graph_modules(gm: fx.GraphModule) -> list[fx.GraphModule]:
    """``gm`` and the graphs inside it."""
    return [m for m in gm.modules() if isinstance(m, fx.GraphModule)]


def node_count(gm: fx.GraphModule) -> int:
    """The number of nodes in all of them."""
    return sum(len(module.graph.nodes) for module in graph_modules(gm))


def op_counts(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator is called in all of them."""
    nodes = (n for module in graph_modules(gm) for n in module.graph.nodes)
    return Counter(qualified_op_name(n) for n in nodes if n.op.startswith("call_"))


def example_value(node: fx.Node) -> Any:
    """The (fake) value that the compiler noted for the node: Dynamo before autograd, AOTAutograd after it."""
    return node.meta.get("example_value", node.meta.get("val"))
