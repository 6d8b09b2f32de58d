"""``find`` and ``report`` leave no trace, ``transform`` only the FFNs; routers come from seed and name."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

import moefy
from integration.models import (
    ALL_CASES,
    AlignedBlock,
    D,
    InlineBlock,
    Stack,
    batch,
    call,
    dense,
    named,
    positional,
    routers,
    scalar,
    transformed,
)
from integration.snapshot import Snapshot
from moefy.capture import runs
from moefy.nn import ExpertLinear

X = torch.randn(2, 6, D)


class Noisy(nn.Module):
    """A forward with as many side effects as possible; all of them in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, momentum=None)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(D), persistent=False)
        self.block = AlignedBlock()
        self.cache: dict[str, Tensor] = {}
        self.nested: dict[str, list[Tensor]] = {"k": [], "v": []}
        self.history: list[Tensor] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.last: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.scratch = self.scratch + x.detach().mean((0, 1))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = self.block(x + 0.0 * random.random() * float(numpy.random.rand()) * torch.rand(()))
        if "table" not in self.cache:
            self.cache["table"] = torch.ones(D, dtype=x.dtype)
        self.nested["k"].append(x.detach())
        self.history.append(x.detach())
        self.shapes.add(tuple(x.shape))
        self.last = x.detach()
        self.made_by_forward = x.detach()
        return x * self.cache["table"]


def noisy() -> nn.Module:
    torch.manual_seed(1)
    model = Noisy()
    model(X).sum().backward()
    model.norm.eval()
    model.cache.clear()
    return model


def example(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = batch(name, dtype=dtype)
    return {"example_args": positional(inputs), "example_kwargs": named(inputs)}


@pytest.mark.parametrize("given", [True, False], ids=["inputs-given", "inputs-derived"])
@pytest.mark.parametrize("function", [moefy.find, moefy.report])
def test_looking_leaves_no_trace(function: Callable[..., Any], given: bool) -> None:
    model = noisy()
    before = Snapshot(model)
    options = {"example_args": (X,)} if given else {}
    result = function(model, 4, **options)
    before.check(model)
    layers = result if isinstance(result, list) else result.layers
    assert [layer.fqn for layer in layers] == ["block.mlp"]
    assert_no_fake_tensors(model)


@pytest.mark.parametrize("function", [moefy.find, moefy.report])
@pytest.mark.parametrize("name", ALL_CASES)
def test_looking_at_models_leaves_no_trace(name: str, function: Callable[..., Any]) -> None:
    model = dense(name, torch.float32)
    scalar(call(model, batch(name, dtype=torch.float32))).backward()
    before = Snapshot(model)
    function(model, 4, **example(name))
    function(model)
    before.check(model)
    assert_no_fake_tensors(model)


@pytest.mark.parametrize("large", [False, True], ids=["real-run", "fake-run"])
def test_caches_hold_no_fake_tensors(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models are traced on fake tensors: what the forward caches then must not stay."""
    if large:
        monkeypatch.setattr(runs, "LARGE", 0)
    model = noisy()
    before = Snapshot(model)
    report = moefy.report(model, 4, example_args=(X,))
    assert report.trace_source == ("fake run" if large else "real run") or "numpy" in report.trace_source
    before.check(model)
    assert_no_fake_tensors(model)
    expected = copy.deepcopy(model)(X)
    torch.testing.assert_close(model(X), expected)


def assert_no_fake_tensors(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            leaves = tree_flatten(list(value) if isinstance(value, set) else value)[0]
            assert not any(isinstance(leaf, FakeTensor) for leaf in leaves), (
                f"{name}.{key} holds a fake tensor"
            )


@pytest.mark.parametrize("check", [True, False])
def test_transform_touches_nothing_but_the_ffn(check: bool) -> None:
    model = noisy()
    before = Snapshot(model)
    moefy.transform(model, 4, example_args=(X,), check=check)
    before.check_random()
    kept = {name: m for name, m in model.named_modules() if "mlp" not in name}
    for name, module in kept.items():
        assert module is before.modules[name], name
        assert module.training == before.modes[name], name
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if "mlp" not in name:
            assert value is {**before.parameters, **before.buffers}[name], name
            assert torch.equal(value, before.values[name]), name
    assert model.norm.weight.grad is before.grads["norm.weight"][0]
    assert torch.equal(model.norm.weight.grad, before.grads["norm.weight"][1])
    assert (model.calls, len(model.history), len(model.nested["k"])) == (1, 1, 1)
    assert not model.cache
    assert_no_fake_tensors(model)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_new_modules_take_the_mode_of_the_old_ones(name: str, training: bool) -> None:
    model = transformed(dense(name).train(training), name)
    assert {m.training for m in model.modules()} == {training}


# -- the random state and the routers --------------------------------------------------------------------------------
def test_routers_depend_on_seed_and_name_alone() -> None:
    """Whatever the global state, the order of calls, the other layers, the device of the draw or the dtype."""
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        numpy.random.seed(global_seed)
        random.seed(global_seed)
        model = transformed(dense("aligned"), "aligned", expert_noise=0.1)
        drawn.append(model.state_dict())
    first, second = drawn
    assert all(torch.equal(first[k], second[k]) for k in first if "router" in k)
    alone = transformed(dense("aligned"), "aligned", include="layers.1.mlp")
    key = "layers.1.mlp.router.weight"
    assert torch.equal(alone.state_dict()[key], first[key])
    assert not torch.equal(first["layers.0.mlp.router.weight"], first[key])
    other = transformed(dense("aligned"), "aligned", seed=1)
    assert not torch.equal(other.state_dict()[key], first[key])
    single = transformed(dense("aligned", torch.float32), "aligned")
    assert torch.equal(single.state_dict()[key], first[key].float())


def test_router_std() -> None:
    model = transformed(dense("aligned"), "aligned", num_experts=64, router_std=0.5)
    weights = torch.cat([r.weight.flatten() for r in routers(model).values()])
    assert float(weights.std()) == pytest.approx(0.5, rel=0.1)
    zero = transformed(dense("aligned"), "aligned", router_std=0.0)
    assert all(not bool(r.weight.any()) for r in routers(zero).values())


# -- selection -------------------------------------------------------------------------------------------------------
def rewritten(model: nn.Module) -> list[str]:
    return [layer.fqn for layer in moefy.report(model).layers if layer.action == "moe"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "layers.1.mlp"}, [1]),
        ({"include": "*"}, [0, 1, 2]),
        ({"include": ["layers.0*", "layers.2*"]}, [0, 2]),
        ({"exclude": "layers.0.*"}, [1, 2]),
        ({"exclude": ["*.1.mlp"]}, [0, 2]),
        ({"include": "layers.[01]*", "exclude": "*.0.*"}, [1]),
        ({"include": lambda match: match.fqn.endswith("2.mlp")}, [2]),
        ({"exclude": lambda match: match.d_model == D and "0" in match.fqn}, [1, 2]),
    ],
    ids=["one", "star", "list", "without", "without list", "both", "predicate", "without predicate"],
)
@pytest.mark.parametrize("function", ["transform", "find", "report"])
def test_include_and_exclude(function: str, options: dict[str, Any], expected: list[int]) -> None:
    torch.manual_seed(1)
    model = Stack(AlignedBlock, layers=3)
    names = [f"layers.{i}.mlp" for i in expected]
    if function == "transform":
        moefy.transform(model, 4, example_args=(X,), **options)
        assert rewritten(model) == names
        experts = {n.rpartition(".")[0] for n, m in model.named_modules() if isinstance(m, ExpertLinear)}
        assert experts == set(names)
        codes = {r.code for r in moefy.report(model).layers if r.action == "skipped"}
        assert codes <= {"excluded"}
    elif function == "find":
        found = moefy.find(model, 4, example_args=(X,), **options)
        assert [m.fqn for m in found if m.accepted] == names
        assert len(found) == 3
    else:
        layers = moefy.report(model, 4, example_args=(X,), **options).layers
        assert [r.fqn for r in layers if r.action == "moe"] == names


def test_predicates_see_refused_candidates_never_as_a_way_in() -> None:
    """``include`` cannot force what the matcher refused."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = InlineBlock()
            self.pooler = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.pooler(self.block(x))

    model = Model()
    moefy.transform(model, 4, example_args=(X,), include=lambda match: True)
    assert rewritten(model) == ["block"]
    assert type(model.pooler[0]) is nn.Linear


def test_a_predicate_that_raises_changes_nothing() -> None:
    model = Stack(AlignedBlock)
    before = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        moefy.transform(model, 4, example_args=(X,), include=lambda match: 1 // 0 == 1)
    before.check(model)
