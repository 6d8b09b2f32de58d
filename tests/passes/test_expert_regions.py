"""Expert regions of a graph: what belongs to one, and every reason why one must stay as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moefy.passes.moe.expert_regions import (
    COMBINE,
    GROUPED_LINEAR,
    PERMUTE,
    ExpertRegion,
    find_expert_regions,
    same_value,
)

INPUTS = ("x", "other", "order", "offsets", "weights", "w_up", "w_gate", "w_down")


class Builder:
    """A graph with the nodes of one layer by name; ``body`` is what a test puts between the linears."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.of = {name: self.graph.placeholder(name) for name in INPUTS}

    def call(self, target: Callable, *args: object, **kwargs: object) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]

    def permuted(self, x: str = "x", order: str = "order") -> fx.Node:
        return self.call(PERMUTE, self.of[x], self.of[order])

    def linear(self, rows: fx.Node, weight: str, offsets: str = "offsets") -> fx.Node:
        return self.call(GROUPED_LINEAR, rows, self.of[weight], None, self.of[offsets])

    def combine(self, rows: fx.Node) -> fx.Node:
        return self.call(COMBINE, rows, self.of["weights"], self.of["order"])


def one(build: Callable[[Builder], object]) -> ExpertRegion:
    b = Builder()
    result = build(b)
    b.graph.output(result)
    (region,) = find_expert_regions(b.graph)
    return region


def plain(b: Builder) -> fx.Node:
    hidden = b.call(F.gelu, b.linear(b.permuted(), "w_up"))
    return b.combine(b.linear(hidden, "w_down"))


def gated(b: Builder) -> fx.Node:
    up, gate = b.linear(b.permuted(), "w_up"), b.linear(b.permuted(), "w_gate")
    hidden = b.call(torch.mul, b.call(F.silu, gate), up)
    return b.combine(b.linear(hidden, "w_down"))


def test_a_region_is_all_its_nodes_in_graph_order() -> None:
    region = one(plain)
    assert region.reason == ""
    assert [n.target for n in region.body] == [F.gelu]
    assert [n.args[1] for n in (*region.entries, region.exit)] == [
        n for n in region.exit.graph.nodes if n.name in ("w_up", "w_down")
    ]
    assert len(region.nodes) == 5 == len({region.combine, region.exit, *region.entries}) + 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.reason = "another"  # type: ignore[misc]


def test_two_entries_with_a_permute_each() -> None:
    region = one(gated)
    assert region.reason == ""
    assert [n.args[1].name for n in region.entries] == ["w_up", "w_gate"]  # type: ignore[union-attr]
    assert len(region.permutes) == 2 and [n.target for n in region.body] == [F.silu, torch.mul]


def reads_an_input(b: Builder) -> fx.Node:
    hidden = b.call(torch.mul, b.linear(b.permuted(), "w_up"), b.of["other"])
    return b.combine(b.linear(hidden, "w_down"))


def reads_other_rows(b: Builder) -> fx.Node:
    hidden = b.call(torch.mul, b.linear(b.permuted(), "w_up"), b.permuted("other"))
    return b.combine(b.linear(hidden, "w_down"))


def not_permuted(b: Builder) -> fx.Node:
    return b.combine(b.linear(b.call(F.gelu, b.linear(b.of["x"], "w_up")), "w_down"))


def no_entry(b: Builder) -> fx.Node:
    return b.combine(b.linear(b.call(torch.ones, 3, 4), "w_down"))


def other_offsets(b: Builder) -> fx.Node:
    return b.combine(b.linear(b.call(F.gelu, b.linear(b.permuted(), "w_up", "weights")), "w_down"))


def other_routing(b: Builder) -> fx.Node:
    return b.combine(b.linear(b.call(F.gelu, b.linear(b.permuted(order="weights"), "w_up")), "w_down"))


def other_source(b: Builder) -> fx.Node:
    up, gate = b.linear(b.permuted(), "w_up"), b.linear(b.permuted("other"), "w_gate")
    return b.combine(b.linear(b.call(torch.mul, up, gate), "w_down"))


def used_outside(b: Builder) -> object:
    hidden = b.call(F.gelu, b.linear(b.permuted(), "w_up"))
    return b.combine(b.linear(hidden, "w_down")), hidden


def autocast_inside(b: Builder) -> fx.Node:
    up = b.linear(b.permuted(), "w_up")
    enter = b.call(torch.amp.autocast_mode._enter_autocast, "cpu", torch.bfloat16, True, None)
    hidden = b.call(F.gelu, up)
    b.call(torch.amp.autocast_mode._exit_autocast, enter)
    return b.combine(b.linear(hidden, "w_down"))


def written_meanwhile(b: Builder) -> fx.Node:
    up = b.linear(b.permuted(), "w_up")
    b.call(torch.relu_, b.of["x"])
    return b.combine(b.linear(b.call(F.gelu, up), "w_down"))


REASONS: list[tuple[Callable[[Builder], object], str]] = [
    (reads_an_input, "the body reads other"),
    (reads_other_rows, "another routing"),
    (not_permuted, "does not read permuted"),
    (no_entry, "no entry"),
    (other_offsets, "different offsets"),
    (other_routing, "different routings"),
    (other_source, "different tensors"),
    (used_outside, "used outside"),
    (autocast_inside, "autocast changes"),
    (written_meanwhile, "writes in place"),
]


@pytest.mark.parametrize(("build", "reason"), REASONS, ids=lambda v: getattr(v, "__name__", ""))
def test_reasons_to_keep_a_region(build: Callable[[Builder], object], reason: str) -> None:
    assert reason in one(build).reason


def test_a_combine_without_an_exit_linear_is_no_region() -> None:
    b = Builder()
    b.graph.output(b.combine(b.permuted()))
    assert find_expert_regions(b.graph) == []


def test_the_same_computation_is_the_same_value() -> None:
    b = Builder()
    x, other = b.of["x"], b.of["other"]
    views = [b.graph.call_method("view", (x, -1, 8)) for _ in range(2)]
    assert same_value(*views) and same_value([views[0], 1], [views[1], 1])
    assert not same_value(views[0], b.graph.call_method("view", (other, -1, 8)))
    assert not same_value(views[0], b.graph.call_method("view", (x, -1, 4)))
    assert not same_value(x, other) and not same_value(1, True)
