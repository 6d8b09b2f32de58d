"""The suite must notice broken routing: each planted fault has to make the comparison with the token loop fail.

Identical experts hide all three faults or some, which is why the zoo compares distinct random experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo.families  # noqa: F401  (registers the families)
from moefy import ops
from zoo import harness
from zoo.family import FAMILIES

FORMS = [
    "torch/nanogpt",  # aligned, known body: one expert_ffn op
    "torch/swiglu",  # aligned, known gated body
    "torch/xielu",  # aligned, body with parameters: entry, body, exit
    "torch/bert_like",  # split over siblings
    "torch/sibling_swiglu",  # inline, two entries
    "torch/conv1x1_inline",  # inline, NCHW
]
Fault = Callable[[pytest.MonkeyPatch, list[str]], None]


def swapped_rows(patch: pytest.MonkeyPatch, planted: list[str]) -> None:
    """The first rows of two experts change places after the sort."""
    sort = ops.sort_by_expert

    def faulty(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        order_N, offsets_E = sort(*args, **kwargs)
        starts = [0, *offsets_E.tolist()[:-1]]
        used = [s for s, end in zip(starts, offsets_E.tolist(), strict=True) if end > s]
        order_N = order_N.clone()
        order_N[used[:2]] = order_N[used[:2]].flip(0)
        planted.append("rows")
        return order_N, offsets_E

    patch.setattr(ops, "sort_by_expert", faulty)


def shifted_offsets(patch: pytest.MonkeyPatch, planted: list[str]) -> None:
    """Every inner boundary between experts is one row late."""
    sort = ops.sort_by_expert

    def faulty(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        order_N, offsets_E = sort(*args, **kwargs)
        planted.append("offsets")
        return order_N, (offsets_E + 1).clamp(max=offsets_E[-1])

    patch.setattr(ops, "sort_by_expert", faulty)


def dropped_weight(patch: pytest.MonkeyPatch, planted: list[str]) -> None:
    """One token forgets the weight of its first expert."""
    combine, expert_ffn = ops.combine, ops.expert_ffn

    def drop(weights_TK: Tensor) -> Tensor:
        keep_TK = torch.ones_like(weights_TK)
        keep_TK[len(keep_TK) // 2, 0] = 0
        planted.append("weight")
        return weights_TK * keep_TK

    patch.setattr(ops, "combine", lambda y, w, *a, **k: combine(y, drop(w), *a, **k))
    patch.setattr(ops, "expert_ffn", lambda x, w, *a, **k: expert_ffn(x, drop(w), *a, **k))


def errors_of(name: str) -> tuple[dict[str, float], list[harness.Rewritten]]:
    family = FAMILIES[name]
    model, args, kwargs, rewritten = harness.moe_model(family, num_experts=3, top_k=2)
    harness.randomize(model, rewritten)
    return harness.layer_errors(family, model, args, kwargs, rewritten, top_k=2), rewritten


@pytest.mark.parametrize("fault", [swapped_rows, dropped_weight, shifted_offsets])
@pytest.mark.parametrize("name", FORMS)
def test_a_planted_fault_is_caught(name: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    planted: list[str] = []
    fault(monkeypatch, planted)
    errors, rewritten = errors_of(name)
    assert planted, "the fault was never executed: the test would prove nothing"
    for layer in rewritten:  # in every layer, in its output and in a gradient
        mine = {w: e for w, e in errors.items() if w.startswith(f"{layer.ffn.at} #")}
        assert any(e > 1e-3 for w, e in mine.items() if w.endswith("output")), fault.__name__
        assert any(e > 1e-3 for w, e in mine.items() if "grad" in w), fault.__name__


@pytest.mark.parametrize("name", FORMS)
def test_without_a_fault_nothing_is_reported(name: str) -> None:
    errors, _ = errors_of(name)
    assert max(errors.values()) <= harness.FP64
