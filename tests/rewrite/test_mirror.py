"""``mirror``: the new module has the old one's tree, stacked weights in the place of dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moefy.errors import NameClash
from moefy.nn import ExpertLinear
from moefy.rewrite.methods.copy import copies
from moefy.rewrite.mirror import mirror

E = 3


class Owner(nn.Module):
    """Linears in a container, a raw weight, a kept activation with a parameter, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 4, bias=False))
        self.raw = nn.Parameter(torch.randn(8, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.kept = nn.Sequential(nn.Dropout(0.1))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def mirrored(owner: nn.Module, *names: str, onto: nn.Module | None = None) -> nn.Module:
    new = nn.Module() if onto is None else onto
    stacked = {
        name: copies(
            owner.get_parameter(name), E, "bias" if owner.get_parameter(name).dim() == 1 else "out_in"
        )
        for name in names
    }
    mirror(owner, new, stacked, "layer")
    return new


def test_the_tree_is_kept() -> None:
    owner = Owner()
    new = mirrored(owner, "net.0.weight", "net.0.bias", "net.2.weight", "raw")
    assert list(new.state_dict()) == list(owner.state_dict())
    shapes = {name: tuple(p.shape) for name, p in new.named_parameters()}
    assert shapes == {
        "raw": (E, 8, 4), "scale": (4,), "net.0.weight": (E, 8, 4), "net.0.bias": (E, 8), "net.1.weight": (1,),
        "net.2.weight": (E, 4, 8),
    }  # fmt: skip
    assert isinstance(new.get_submodule("net.0"), ExpertLinear)
    assert new.get_submodule("net.2").bias is None
    assert new.get_submodule("net.1") is owner.net[1] and new.get_submodule("kept") is owner.kept
    assert new.scale is owner.scale and new.steps is owner.steps and new.cache is owner.cache


def test_a_linear_with_more_than_its_weights_becomes_a_container() -> None:
    owner = nn.Sequential(nn.Linear(4, 4))
    owner[0].register_buffer("seen", torch.zeros(1))
    new = mirrored(owner, "0.weight", "0.bias")
    assert not isinstance(new.get_submodule("0"), ExpertLinear)
    assert list(new.state_dict()) == list(owner.state_dict())


def test_a_module_with_two_names_stays_one() -> None:
    owner = nn.Module()
    owner.first = owner.second = nn.Linear(4, 4)
    new = mirrored(owner, "first.weight", "first.bias")
    assert new.get_submodule("first") is new.get_submodule("second")


def test_a_taken_name_is_an_error() -> None:
    onto = nn.Module()
    onto.net = nn.Identity()
    with pytest.raises(NameClash, match="net"):
        mirrored(Owner(), "net.0.weight", "net.0.bias", onto=onto)
