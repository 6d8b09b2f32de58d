"""What forbids a change of a model, told alike to ``transform`` and to the backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moefy
from moefy.errors import AlreadyTransformed, ConfigError
from moefy.model.guards import bare_module, sharded_parameters, wrapped_modules
from moefy.model.shells import attach_shell, find_shells, is_transformed, refuse_transformed


def test_the_bare_module() -> None:
    model = nn.Linear(2, 2)
    assert bare_module(model) is model and bare_module(torch.compile(model)) is model
    for wrong in (3, nn.DataParallel(model), torch.jit.script(model)):
        with pytest.raises(ConfigError, match="model"):
            bare_module(wrong)  # type: ignore[arg-type]


def test_wrapped_modules_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)))
    assert [fqn for fqn, _ in wrapped_modules(model)] == ["1"]
    assert list(sharded_parameters(model)) == []


def test_a_parameter_on_a_mesh_is_sharded() -> None:
    model = nn.Linear(2, 2)
    model.weight.device_mesh = "mesh"  # type: ignore[assignment]
    assert list(sharded_parameters(model)) == ["weight"]


def test_shells_are_found_and_hidden() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    keys = list(model.state_dict())
    refuse_transformed(model)
    attach_shell(model[1], "shell")
    assert [(fqn, shell) for fqn, _, shell in find_shells(model)] == [("1", "shell")]
    assert is_transformed(model) and not is_transformed(model[0]) and list(model.state_dict()) == keys
    with pytest.raises(AlreadyTransformed, match="1"):
        refuse_transformed(model)
    with pytest.raises(AlreadyTransformed):
        moefy.transform(model, 2)
