"""The property test has teeth: each fault planted into the kernels makes it fail, in fp32 and in bf16."""

from __future__ import annotations

import importlib

import pytest
import torch

from moefy.ops import checks
from ops.test_property import Case, layer

GROUPED = "moefy.ops.grouped_linear"
KERNELS = "moefy.ops.cpu.ffn"


def case(dtype: torch.dtype) -> Case:
    return Case(
        tokens=9, d=5, h=4, experts=4, top_k=2, dtype=dtype, pattern="distinct", layouts=("contiguous",) * 4,
        activation="silu", glu="separate", bias=True, seed=1,
    )  # fmt: skip


def swapped_experts(monkeypatch, target):
    """Experts 0 and 1 use each other's weights."""
    module = importlib.import_module(target)
    right = module.rows_times

    def wrong(x, weight, bias, layout, **more):
        swap = torch.tensor([1, 0, 2, 3])
        return right(x, weight[swap], None if bias is None else bias[swap], layout, **more)

    monkeypatch.setattr(module, "rows_times", wrong)


def dropped_weight(monkeypatch, target):
    """The last token's last choice counts nothing."""
    name = "weighted_sum" if target == GROUPED else "sum_places"
    module = importlib.import_module("moefy.ops.combine" if target == GROUPED else target)
    right = getattr(module, name)

    def wrong(y, weights, *where):
        if weights is not None:
            weights = weights.clone()
            weights[-1, -1] = 0
        return right(y, weights, *where)

    monkeypatch.setattr(module, name, wrong)


def shifted_offsets(monkeypatch, target):
    """Every expert but the last ends one row too early."""
    right = checks.bounds

    def wrong(op, offsets, rows):
        ends = [max(end - 1, 0) for _, end in right(op, offsets, rows)[:-1]] + [rows]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    monkeypatch.setattr(checks, "bounds", wrong)


def missing_gradient_of_one_expert(monkeypatch, target):
    """The weight gradient of expert 2 is lost."""
    module = importlib.import_module(target)
    right = module.outer_products

    def wrong(grad, x, layout, **more):
        out = right(grad, x, layout, **more)
        out[2] = 0
        return out

    monkeypatch.setattr(module, "outer_products", wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_fault_it_passes(dtype):
    layer(case(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [GROUPED, KERNELS], ids=["small ops", "fused"])
@pytest.mark.parametrize(
    "plant", [swapped_experts, dropped_weight, shifted_offsets, missing_gradient_of_one_expert]
)
def test_planted_fault_is_caught(plant, target, dtype, monkeypatch):
    plant(monkeypatch, target)
    with pytest.raises(AssertionError, match="of what"):
        layer(case(dtype))
