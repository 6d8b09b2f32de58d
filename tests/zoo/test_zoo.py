"""Every family: found and refused, exact with copied experts, distinct experts against the token loop, undone.

Expectations live in ``zoo.families`` and were written from the models' code.
"""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error
from torch import nn

import moefy
import zoo.families  # noqa: F401  (registers the families)
from moefy.errors import NoFFNFound
from zoo import harness
from zoo.family import FAMILIES, FFN, Family, tensors

ZOO_LEG = {"timm", "torchvision", "x_transformers", "megatron", "peft"}


def cases(*, rewritten: bool | None = None) -> list[object]:
    """The families as parameters, those of the zoo leg marked so."""
    return [
        pytest.param(f, id=f.name, marks=[pytest.mark.zoo] if f.library in ZOO_LEG else [])
        for f in FAMILIES.values()
        if rewritten is None or bool(f.ffns) == rewritten
    ]


def run(model: nn.Module, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return list(tensors(model(*args, **kwargs)))


def worst(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert len(got) == len(expected) > 0
    return max(relative_error(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("family", cases())
def test_finds_these_ffns_and_refuses_the_others(family: Family) -> None:
    matches = harness.find(family)
    found = harness.accepted(matches)
    assert set(found) == {harness.expected_key(f) for f in family.ffns}, family.why
    for ffn in family.ffns:
        check_match(found[harness.expected_key(ffn)], ffn)
    wrong = [harness.refusal(matches, part, codes) for part, codes in family.refused.items()]
    assert not any(wrong), [w for w in wrong if w]
    for match in matches:
        assert bool(match.reason) == bool(match.code), "a reason and its code come together"


def check_match(match: moefy.records.FFNMatch, ffn: FFN) -> None:
    assert match.fqn == ffn.at
    assert ffn.form in ("either", match.form)
    assert match.calls == ffn.calls
    assert match.kind == ("glu" if ffn.gated else "mlp")
    biases = {lin.bias is not None for lin in (*ffn.entries, ffn.exit)}
    assert len(biases) > 1 or match.bias in biases


@pytest.mark.parametrize("family", cases(rewritten=False))
def test_nothing_to_rewrite_is_a_named_error_and_changes_nothing(family: Family) -> None:
    model, args, kwargs = family.make()
    before = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(NoFFNFound) as caught:
        moefy.transform(model, 4, example_args=args, example_kwargs=kwargs)
    candidates = caught.value.candidates
    assert all(harness.refusal(candidates, p, codes) is None for p, codes in family.refused.items())
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


@pytest.mark.parametrize("family", cases(rewritten=True))
def test_copied_experts_are_exact_and_undo_is_bitwise(family: Family) -> None:
    dense, args, kwargs = family.make()
    expected = run(dense, args, kwargs)
    model, args, kwargs, rewritten = harness.moe_model(family, num_experts=4, top_k=2)
    assert worst(run(model, args, kwargs), expected) <= harness.EXACT
    check_parameters(model, dense, rewritten, num_experts=4)
    assert moefy.undo(model) is model
    check_undone(model, dense)
    assert all(map(torch.equal, run(model, args, kwargs), expected))


def check_parameters(
    model: nn.Module, dense: nn.Module, rewritten: list[harness.Rewritten], num_experts: int
) -> None:
    """Original names, [E, out, in], every expert a copy; one router each; the rest as it was."""
    now, old = harness.named(model), harness.named(dense)
    touched: set[str] = set()
    for layer in rewritten:
        for lin in (*layer.ffn.entries, layer.ffn.exit):
            weight = lin.dense_as_oi(old[lin.weight])
            assert torch.equal(now[lin.weight], weight.expand(num_experts, *weight.shape)), lin
            if lin.bias is not None:
                bias = old[lin.bias]
                assert torch.equal(now[lin.bias], bias.expand(num_experts, *bias.shape)), lin
            touched |= {n for n in (lin.weight, lin.bias) if n}
        d_model = now[layer.ffn.entries[0].weight].shape[-1]
        assert now[layer.router].shape == (num_experts, d_model)
    shared = {n for n in old if any(old[n] is old[t] for t in touched)}
    kept = set(old) - shared
    assert all(torch.equal(now[n], old[n]) for n in kept)
    routers = {id(now[layer.router]) for layer in rewritten}
    added = {id(p) for n, p in now.items() if n not in old}
    assert added == routers, sorted(set(now) - set(old))


def check_undone(model: nn.Module, dense: nn.Module) -> None:
    names = [(n, type(m).__qualname__) for n, m in model.named_modules()]
    assert names == [(n, type(m).__qualname__) for n, m in dense.named_modules()]
    now, old = model.state_dict(), dense.state_dict()
    assert list(now) == list(old)
    for name, value in old.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(now[name], value), name
        if isinstance(value, torch.Tensor):
            assert now[name].stride() == value.stride() and now[name].dtype == value.dtype, name


@pytest.mark.parametrize("family", cases(rewritten=True))
def test_distinct_experts_equal_the_token_loop(family: Family) -> None:
    model, args, kwargs, rewritten = harness.moe_model(family, num_experts=3, top_k=2)
    harness.randomize(model, rewritten)
    errors = harness.layer_errors(family, model, args, kwargs, rewritten, top_k=2)
    tolerance = harness.FP64 if family.fp64 else harness.FP32
    assert not {what: e for what, e in errors.items() if not e <= tolerance}


COUNTS = [(1, 1), (2, 1), (3, 3), (8, 5), (64, 2)]
SMALL = ["torch/nanogpt", "torch/sibling_swiglu", "torch/bert_like", "torch/conv1x1_inline"]


@pytest.mark.parametrize(("num_experts", "top_k"), COUNTS)
@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_experts(name: str, num_experts: int, top_k: int) -> None:
    family = FAMILIES[name]
    dense, args, kwargs = family.make()
    expected = run(dense, args, kwargs)
    model, args, kwargs, rewritten = harness.moe_model(family, num_experts, top_k)
    assert worst(run(model, args, kwargs), expected) <= harness.EXACT
    if num_experts > 1:
        harness.randomize(model, rewritten)
        errors = harness.layer_errors(family, model, args, kwargs, rewritten, top_k)
        assert not {what: e for what, e in errors.items() if not e <= harness.FP64}


def test_the_zoo_is_as_wide_as_promised() -> None:
    families = list(FAMILIES.values())
    assert len(families) >= 60
    assert sum(f.inline for f in families) >= 20
    assert sum(f.gated for f in families) >= 10
    assert sum(f.sibling_inline for f in families) >= 3
    assert sum(f.conv1x1 for f in families) >= 5
    assert sum(bool(f.refused) for f in families) >= 10
    assert all(len(f.why) > 10 for f in families)
