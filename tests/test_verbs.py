"""The verbs share their keywords, and each is a prefix of ``transform``'s stages."""

from __future__ import annotations

import inspect

import pytest
import torch
from integration.models import batch, call, dense
from integration.snapshot import Snapshot
from torch import fx, nn

import moefy
from moefy.errors import CheckFailed, ConfigError, UnknownOption
from moefy.model.compare import Comparison
from moefy.rewrite import verify

VERBS = (moefy.transform, moefy.find, moefy.report)
KEYWORDS = [
    "num_experts",
    "top_k",
    "config",
    "example_args",
    "example_kwargs",
    "include",
    "exclude",
    "check",
    "options",
]


@pytest.mark.parametrize("verb", VERBS)
def test_the_signature_shows_every_keyword(verb) -> None:
    parameters = inspect.signature(verb).parameters
    assert list(parameters)[1:] == KEYWORDS
    kinds = [parameters[name].kind.name for name in ("num_experts", "top_k", "options")]
    assert kinds == ["POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "VAR_KEYWORD"]
    assert "Args:" in verb.__doc__


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_keywords_are_refused_alike(verb) -> None:
    model = dense("aligned")
    with pytest.raises(UnknownOption, match="num_expert"):
        verb(model, num_expert=4)
    with pytest.raises(ConfigError, match="top_k"):
        verb(model, 2, top_k=3)
    with pytest.raises(ConfigError, match="router"):
        verb(model, 4, router="nope")


def test_transform_needs_a_number_of_experts() -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        moefy.transform(dense("aligned"))


@pytest.mark.parametrize("name", ["aligned", "inline", "encoder"])
def test_a_checked_dry_run_measures_and_puts_back(name: str) -> None:
    model, inputs = dense(name), batch(name)
    before = Snapshot(model)
    report = moefy.report(model, 4, example_args=(inputs[""],), check=True)
    before.check(model)
    assert report.dry_run and report.check_error is not None and report.check_error < 1e-12
    assert all(layer.exactness.startswith("exact ") for layer in report.layers)
    unchecked = moefy.report(model, 4, example_args=(inputs[""],))
    assert unchecked.check_error is None
    moefy.transform(model, 4, example_args=(inputs[""],))
    done = moefy.report(model)
    assert not done.dry_run and done.params_total == report.params_total
    assert [(x.fqn, x.action, x.params_active, x.flops_active) for x in done.layers] == [
        (x.fqn, x.action, x.params_active, x.flops_active) for x in report.layers
    ]


def test_a_checked_dry_run_of_a_graph_puts_the_graph_back() -> None:
    x = batch("inline")[""]
    model = fx.symbolic_trace(dense("inline"))
    code, keys = model.code, list(model.state_dict())
    report = moefy.report(model, 4, example_args=(x,), check=True)
    assert report.check_error is not None and report.check_error < 1e-12
    assert model.code == code and list(model.state_dict()) == keys


@pytest.mark.parametrize("verb", [moefy.find, moefy.report])
def test_a_failing_check_of_a_dry_run_is_raised(verb, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = dense("inline"), batch("inline")
    before, expected = Snapshot(model), call(model, inputs)
    monkeypatch.setattr(verify, "compare", lambda *a: Comparison(1.0, 1e-5, "float32", "output 0"))
    verb(model, 4, example_args=(inputs[""],))  # not asked for
    with pytest.raises(CheckFailed):
        verb(model, 4, example_args=(inputs[""],), check=True)
    before.check(model)
    assert torch.equal(call(model, inputs), expected)


@pytest.mark.parametrize("verb", [moefy.find, moefy.report])
def test_a_check_needs_to_know_what_to_check(verb) -> None:
    model, x = dense("aligned"), batch("aligned")[""]
    with pytest.raises(ConfigError, match="num_experts"):
        verb(model, example_args=(x,), check=True)
    verb(model, example_args=(x,), check=False)


def test_verbs_take_a_compiled_wrapper() -> None:
    model = dense("aligned")
    wrapped = torch.compile(model, backend="eager")
    x = batch("aligned")[""]
    assert moefy.find(wrapped, example_args=(x,)) == moefy.find(model, example_args=(x,))
    assert moefy.transform(wrapped, 4, example_args=(x,)) is wrapped
    assert (
        isinstance(model.layers[0].mlp, nn.Module)
        and moefy.report(model).layers == moefy.report(wrapped).layers
    )
