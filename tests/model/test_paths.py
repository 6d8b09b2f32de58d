"""Dotted paths: the root, nested names, and swaps that leave the order of names alone."""

from __future__ import annotations

import pytest
from torch import nn

from moefy.model import paths


def test_relations() -> None:
    assert paths.split("a.b.c") == ("a.b", "c") and paths.split("c") == ("", "c")
    assert paths.join("", "a") == "a" and paths.join("a", "") == "a" and paths.join("a", "b.c") == "a.b.c"
    assert paths.below("a.b", "a") and paths.below("a", "a") and paths.below("x", "")
    assert not paths.below("ab", "a") and not paths.below("a", "a.b")
    assert paths.relative("a.b.c", "a") == "b.c" and paths.relative("a.b", "") == "a.b"


def test_swaps_keep_the_order_of_names() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    names = [name for name, _ in model.named_modules()]
    paths.put_module(model, "0.0", nn.Linear(2, 2, bias=False))
    assert [name for name, _ in model.named_modules()] == names
    new = nn.Parameter(model[1].weight.detach().clone())
    paths.put_parameter(model, "1.weight", new)
    assert model[1].weight is new and list(model.state_dict()) == ["0.0.weight", "1.weight", "1.bias"]
    paths.drop_module(model, "0.1")
    assert [name for name, _ in model.named_modules()] == ["", "0", "0.0", "1"]
    with pytest.raises(KeyError):
        paths.drop_module(model, "0.1")


def test_what_is_not_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert paths.find_module(model, "0") is model[0] and paths.find_module(model, "1") is None
    assert paths.find_parameter(model, "0.bias") is model[0].bias
    assert paths.find_parameter(model, "0.nope") is None and paths.find_parameter(model, "0") is None


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    assert paths.count_parameters(model) == 10
    model[1].weight = model[0].weight
    assert paths.count_parameters(model) == 6
