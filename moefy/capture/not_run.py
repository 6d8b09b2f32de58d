"""The modules that no traced forward ran. An FFN in them would go unnoticed, so reports name them.

Contract: the topmost modules whose parameters no trace reads, in model order, if they hold at least two matrices (an
FFN needs two). A vision tower is among them when the model was traced on text alone, and an expert that no token chose.

    >>> modules_not_run(llava, [trace_on_text])                # doctest: +SKIP
    ['model.vision_tower', 'model.multi_modal_projector']
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from moefy.model.paths import join
from moefy.passes.trace import Trace


def modules_not_run(model: nn.Module, traces: Iterable[Trace]) -> list[str]:
    """FQNs of the topmost modules of ``model`` that none of ``traces`` ran."""
    names = {str(n.target) for trace in traces for n in trace.graph.nodes if n.op == "get_attr"}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {id(parameters[name]) for name in names if name in parameters}
    return list(_topmost(model, "", read))


def may_hold_ffn(module: nn.Module) -> bool:
    """Whether there are two matrices, which an FFN needs."""
    return sum(p.dim() >= 2 for p in module.parameters()) >= 2


def _topmost(module: nn.Module, fqn: str, read: set[int]) -> Iterator[str]:
    if not any(id(p) in read for p in module.parameters()):
        if may_hold_ffn(module):
            yield fqn
        return
    for name, child in module.named_children():
        yield from _topmost(child, join(fqn, name), read)
