"""The walk up from an exit linear: which entries and body it finds, what it notes, and when it gives up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, node, parts, regions_of, trace
from torch import Tensor, nn

from moefy.passes.match import regions as module
from moefy.passes.match.regions import Region, keeps_last_axis, look_through, splits_features
from moefy.passes.trace.vocabulary import op_name


def only(forward: Callable[..., object], *shape: int, **given: nn.Module | nn.Parameter) -> Region:
    (region,) = regions_of(trace(forward, *shape, **given))
    return region


def names(region: Region) -> list[str]:
    return [op_name(n) for n in region.body]


BODIES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str], list[str]]] = {
    "one entry": (lambda m, x: m.b(F.gelu(m.a(x))), ["a"], ["gelu"]),
    "two entries": (lambda m, x: m.b(F.silu(m.a(x)) * m.c(x)), ["a", "c"], ["silu", "mul"]),
    "in order of execution": (lambda m, x: m.b(m.c(x) * F.silu(m.a(x))), ["c", "a"], ["silu", "mul"]),
    "dropout and casts": (lambda m, x: m.b(F.dropout(F.relu(m.a(x)).double()).float()), ["a"], []),
    "scalars": (lambda m, x: m.b(F.relu(m.a(x)) * 2 + 1), ["a"], ["relu", "mul", "add"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_entries_and_body(name: str) -> None:
    forward, entries, body = BODIES[name]
    region = only(forward)
    assert [e.name for e in region.entries] == entries and region.exit.name == "b"
    assert not body or names(region) == body
    assert region.same_source and not region.issues and op_name(region.source) == "placeholder"
    assert region.sites == (*region.entries, region.exit) and region.key[1] == "b.weight"


NONE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nothing between": lambda m, x: m.b(m.a(x)),
    "scaled": lambda m, x: m.b(m.a(x) * 3),
    "a norm": lambda m, x: m.b(F.layer_norm(m.a(x), (H,))),
    "no linear above": lambda m, x: m.a(F.relu(x)),
}


@pytest.mark.parametrize("name", NONE)
def test_no_activation_is_no_candidate(name: str) -> None:
    assert regions_of(trace(NONE[name])) == []


ISSUES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "norm": (lambda m, x: m.b(F.layer_norm(F.relu(m.a(x)), (H,))), "norm-between"),
    "mean": (lambda m, x: m.b((h := F.relu(m.a(x))) - h.mean(1, keepdim=True)), "reduction-between"),
    "shift": (lambda m, x: m.b(torch.roll(F.relu(m.a(x)), 1, 1)), "concat-between"),
    "rows are taken": (lambda m, x: m.b(F.relu(m.a(x))[:, :2]), "opaque-between"),
    "tokens are flattened": (
        lambda m, x: m.b(F.relu(m.a(x)).transpose(1, 2).reshape(2, 5, H)),
        "feature-axis",
    ),
    "reads its own input": (lambda m, x: m.b(F.relu(m.a(x)) + x[..., :1]), "different-source"),
}


@pytest.mark.parametrize("name", ISSUES)
def test_what_a_body_must_not_hold_is_noted(name: str) -> None:
    forward, code = ISSUES[name]
    region = only(forward)
    assert code in region.issues, region.issues


def test_two_sources_are_told_apart() -> None:
    region = only(lambda m, x: m.b(F.silu(m.a(x)) * m.c(x * 2)))
    assert not region.same_source
    assert region.source is region.entries[0].x


def test_a_region_is_frozen_and_its_nodes_are_all_of_it() -> None:
    region = only(lambda m, x: m.b(F.relu(m.a(x)).view(-1, H)).view(2, 5, D))
    assert {op_name(n) for n in region.nodes() if n.op == "call_function"} >= {"linear", "relu", "view"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.tail = ()  # type: ignore[misc]


def test_a_convolutions_features_are_counted_from_the_back() -> None:
    convs = {"a": nn.Conv2d(D, H, 1), "b": nn.Conv2d(H, D, 1)}
    assert only(lambda m, x: m.b(F.gelu(m.a(x))), 2, D, 4, 4, **convs).feature_dim == -3
    assert only(lambda m, x: m.b(F.gelu(m.a(x)))).feature_dim == -1


def test_a_walk_ends_above_a_large_body(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        for _ in range(6):
            h = torch.sin(h)
        return m.b(h)

    assert not only(forward).issues
    monkeypatch.setattr(module, "MAX_BODY", 3)
    assert regions_of(trace(forward)) == [], "it does not reach its entry"


def deep(m: nn.Module, x: Tensor) -> Tensor:
    """Blocks of attention and an FFN, all over the same three linears."""
    for _ in range(12):
        n = F.layer_norm(x, (D,))
        x = x + m.c(torch.softmax(m.a(n), -1))
        x = x + m.b(F.gelu(m.a(F.layer_norm(x, (D,)))))
    return x


def test_pruning_changes_cost_and_not_the_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"a": nn.Linear(D, H), "b": nn.Linear(H, D), "c": nn.Linear(H, D)}
    found, visits = trace(deep, **given), [0]
    visit = module._Walk._visit

    def counted(walk: module._Walk, at: object) -> bool:
        visits[-1] += 1
        return visit(walk, at)  # type: ignore[arg-type]

    def candidates() -> list[tuple]:
        return [(r.exit.out, r.entries[0].out, r.body) for r in regions_of(found) if r.same_source]

    monkeypatch.setattr(module._Walk, "_visit", counted)
    pruned = candidates()
    monkeypatch.setattr(module, "_may_differ", lambda entries: True)
    visits.append(0)
    assert candidates() == pruned and len(pruned) == 24
    assert 2 * visits[0] < visits[1], visits


@pytest.mark.parametrize(
    ("reshape", "keeps"),
    [
        (lambda x: x.reshape(10, D), True),
        (lambda x: x.unsqueeze(0), True),
        (lambda x: x.reshape(2, 5 * D), False),
    ],
)
def test_looking_through_reshapes_that_keep_the_last_axis(reshape: Callable, keeps: bool) -> None:
    found = trace(lambda m, x: reshape(torch.relu(x)).float().relu())
    last = [n for n in found.graph.nodes if op_name(n) not in ("output",)][-1]
    behind = look_through(last.all_input_nodes[0])
    assert (behind is node(found, "relu")) == keeps
    assert keeps_last_axis(next(iter(node(found, "relu").users))) == keeps


SPLITS: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "chunk": (lambda x: x.chunk(2, -1), True),
    "chunk of rows": (lambda x: x.chunk(2, 1), False),
    "narrow": (lambda x: x.narrow(-1, 0, 2), True),
    "glu": (lambda x: F.glu(x), True),
    "slice": (lambda x: x[..., :4], True),
    "slice of rows": (lambda x: x[:, :2], False),
    "one feature": (lambda x: x[..., 0], False),
    "unbind": (lambda x: x.unbind(-1), False),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits_of_the_feature_axis(name: str) -> None:
    split, features = SPLITS[name]
    found = trace(lambda m, x: split(x), **parts())
    first = next(n for n in found.graph.nodes if n.op == "call_function")
    assert splits_features(first, 2) == features
