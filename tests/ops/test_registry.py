"""Every op in the dispatcher: samples exist, opcheck passes, bits repeat, nothing uninitialised comes out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ops.samples import SAMPLES, WITHOUT_GRADIENTS, cases, registered

CASES = cases(torch.float32)
KEYS = ("CPU", "CUDA", "Meta", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched")


def test_every_registered_op_has_samples():
    assert registered() == sorted(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_op_has_its_kernels(name):
    missing = [
        key for key in KEYS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"moefy::{name}", key)
    ]
    assert not missing


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - WITHOUT_GRADIENTS))
def test_every_op_of_floats_has_its_own_autograd_formula(name):
    for args in SAMPLES[name](torch.float64):
        for result in tensors(getattr(torch.ops.moefy, name)(*args))[:1]:
            assert type(result.grad_fn).__name__ == f"moefy_{name}Backward"


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - WITHOUT_GRADIENTS))
def test_forward_mode_is_an_error(name):
    """Also where no argument requires a gradient: else tangents would be lost without a word."""
    first, *others = SAMPLES[name](torch.float64)[0]
    constants = [a.detach() if isinstance(a, Tensor) else a for a in others]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        getattr(torch.ops.moefy, name)(
            forward_ad.make_dual(first.detach(), torch.ones_like(first)), *constants
        )


@pytest.mark.parametrize(("name", "i"), CASES)
def test_opcheck(name, i):
    torch.library.opcheck(getattr(torch.ops.moefy, name).default, SAMPLES[name](torch.float32)[i])


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_in_bf16(name):
    torch.library.opcheck(getattr(torch.ops.moefy, name).default, SAMPLES[name](torch.bfloat16)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_bits_repeat_and_fresh_memory_does_not_show(name, i, dtype, nan_in_fresh_memory):
    op = getattr(torch.ops.moefy, name).default
    first = tensors(op(*SAMPLES[name](dtype)[i]))
    for _ in range(5):
        for a, b in zip(first, tensors(op(*SAMPLES[name](dtype)[i])), strict=True):
            assert torch.equal(a, b)
            assert not a.isnan().any()


def test_fresh_memory_is_nan_in_that_test(nan_in_fresh_memory):
    assert torch.empty(3).isnan().all()


def tensors(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def test_first_run_is_zero_inside_a_backward_alone():
    seen = []

    def note(grad: Tensor) -> None:
        seen.append(torch.ops.moefy.first_run(grad).item())

    x = torch.ones(2, requires_grad=True)
    x.register_hook(note)
    (2 * x).sum().backward()
    assert (torch.ops.moefy.first_run(x.detach()).item(), seen) == (1, [0])
