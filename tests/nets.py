"""Small models for the matcher's tests, and their traces: a forward given as a function, with parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from moefy.passes.match.linears import LinearSite, find_linears
from moefy.passes.match.regions import Region, find_regions
from moefy.passes.trace import Trace, trace_module
from moefy.passes.trace.vocabulary import op_name

D, H = 8, 12


class Net(nn.Module):
    """``forward(self, x)`` is the function; the parts are attributes."""

    def __init__(self, forward: Callable[..., object], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def parts(bias: bool = True) -> dict[str, nn.Module]:
    """``a`` and ``c`` go in, ``b`` goes out."""
    return {"a": nn.Linear(D, H, bias), "b": nn.Linear(H, D, bias), "c": nn.Linear(D, H, bias)}


def trace(forward: Callable[..., object], *shape: int, **given: nn.Module | nn.Parameter) -> Trace:
    """One eval forward on ``shape`` (default ``[2, 5, D]``), with ``parts()`` where none are given."""
    model = Net(forward, **(given or parts())).eval()
    with torch.no_grad():
        return trace_module(model, (torch.randn(*(shape or (2, 5, D))),))


def sites_of(found: Trace) -> list[LinearSite]:
    """The linears of a trace, each once, in execution order."""
    return list(dict.fromkeys(find_linears(found).values()))


def regions_of(found: Trace) -> list[Region]:
    """The regions of a trace."""
    return find_regions(found, find_linears(found))


def node(found: Trace, name: str, index: int = 0) -> fx.Node:
    """The ``index``-th node of that operation."""
    return [n for n in found.graph.nodes if op_name(n) == name][index]
