"""deepcopy, pickle, ``torch.save`` and ``state_dict`` of a transformed model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import moefy
from integration.models import (
    ALL_CASES,
    assert_same,
    backward,
    batch,
    call,
    dense,
    moe,
    randomize,
    transformed,
)
from moefy.nn import EntryLinear, ExitLinear


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_file}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", ALL_CASES)
def test_a_copy_computes_the_same_and_shares_nothing(name: str, way: str) -> None:
    model, inputs = moe(name), batch(name)
    output, found = backward(model, inputs)
    twin = COPIES[way](model)
    twin_output, twin_found = backward(twin, inputs)
    assert torch.equal(twin_output, output)
    assert_same(twin_found, found, 0.0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(call(model, inputs), output)
    assert not torch.equal(call(twin, inputs), output)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert str(moefy.report(twin)) == str(moefy.report(model))


@pytest.mark.parametrize("name", ["inline", "glu", "bert"])
def test_the_link_of_a_copy_is_its_own(name: str) -> None:
    """Entry and exit of the copy still belong together, and not to the original."""
    model = moe(name)
    twin = copy.deepcopy(model)

    def links(m: nn.Module) -> list[object]:
        return [child.link for child in m.modules() if isinstance(child, EntryLinear | ExitLinear)]

    mine, theirs = links(model), links(twin)
    assert len(set(map(id, mine))) == len(set(map(id, theirs))) == len(moefy.report(model).rewritten)
    assert not set(map(id, mine)) & set(map(id, theirs))


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_state_dict_round_trip(name: str, assign: bool) -> None:
    """Through a ``weights_only`` file into a model transformed elsewhere, strictly."""
    model, inputs = moe(name), batch(name)
    output, found = backward(model, inputs)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = transformed(dense(name), name, check=False)
    randomize(other, seed=7)
    assert not torch.equal(call(other, inputs), output)
    result = other.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    if assign and hasattr(other, "tie_weights"):
        other.tie_weights()  # assigning unties, in any model
    other_output, other_found = backward(other, inputs)
    assert torch.equal(other_output, output)
    assert_same(other_found, found, 0.0)


@pytest.mark.parametrize("name", ALL_CASES)
def test_state_dict_has_the_dense_names_and_one_router_per_ffn(name: str) -> None:
    before, after = dense(name).state_dict(), moe(name).state_dict()
    added = after.keys() - before.keys()
    assert not before.keys() - after.keys()
    assert all(key.endswith("router.weight") for key in added)
    assert len(added) == len(moefy.report(moe(name)).rewritten)
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert after[key].shape == value.shape or after[key].shape == (4, *value.shape), key


@pytest.mark.parametrize("name", ["aligned", "inline"])
def test_to_moves_and_casts_the_experts(name: str) -> None:
    model, inputs = moe(name), batch(name, dtype=torch.float32)
    expected = call(moe(name).float(), inputs)
    model.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(call(model, inputs), expected)
