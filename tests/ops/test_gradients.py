"""First and second derivatives of every differentiable op in float64, against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.samples import SAMPLES, WITHOUT_GRADIENTS, cases, without_tokens

# gradcheck cannot look at tensors without elements; test_empty_batch below does.
CASES = [
    (name, i)
    for name, i in cases(torch.float64)
    if name not in WITHOUT_GRADIENTS and not without_tokens(SAMPLES[name](torch.float64)[i])
]


def function_of_floats(name, i):
    """The op as a function of its differentiable arguments, and these arguments."""
    args = list(SAMPLES[name](torch.float64)[i])
    places = [p for p, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    op = getattr(torch.ops.moefy, name).default

    def call(*values):
        result = op(*(values[places.index(p)] if p in places else a for p, a in enumerate(args)))
        results = [result] if isinstance(result, Tensor) else result
        return tuple(r for r in results if r.requires_grad and r.numel())

    return call, tuple(args[p] for p in places)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_gradcheck(name, i):
    call, values = function_of_floats(name, i)
    # The backwards of the large op have hundreds of inputs: along random directions there.
    fast = name == "expert_ffn_backward"
    assert torch.autograd.gradcheck(call, values, fast_mode=fast)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_gradgradcheck(name, i):
    call, values = function_of_floats(name, i)
    # relu and relu2 have a kink; the samples keep away from it by more than gradcheck's step.
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("name", ["permute", "grouped_linear", "combine", "expert_ffn"])
def test_each_gradient_alone_equals_all_together(name):
    """The masks of the backward ops: asking for less changes no bit of what is asked for."""
    for i in (i for case, i in CASES if case == name):
        call, values = function_of_floats(name, i)
        out = call(*values)[0]
        together = torch.autograd.grad(out, values, torch.full_like(out, 0.5))
        for j, value in enumerate(values):
            alone = call(*(v if v is value else v.detach() for v in values))[0]
            (grad,) = torch.autograd.grad(alone, value, torch.full_like(out, 0.5))
            assert torch.equal(grad, together[j])


def test_idle_experts_and_dropped_slots_get_exactly_zero(nan_in_fresh_memory):
    args = SAMPLES["expert_ffn"](torch.float64)[0]
    torch.ops.moefy.expert_ffn(*args)[0].sum().backward()
    for stacked in args[6:10]:
        assert not stacked.grad[2].any()
        assert stacked.grad[[0, 1, 3]].any()
    # Token 2's second choice is dropped.
    assert args[1].grad[2, 1] == 0
    assert args[1].grad[2, 0] != 0


def test_no_path_is_counted_twice_in_second_order():
    """Routing weights that depend on x: the Hessian goes through both, each once."""
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
    args = SAMPLES["expert_ffn"](torch.float64)[0]

    def call(x):
        weights = torch.stack([x[:, 0].sin(), x[:, 1] * x[:, 2]], dim=1)
        return torch.ops.moefy.expert_ffn(x, weights, *(a for a in args[2:]))[0]

    assert torch.autograd.gradgradcheck(call, (x,))


@pytest.mark.parametrize("name", ["permute", "grouped_linear", "combine", "expert_ffn"])
def test_empty_batch(name):
    """No token: an output connected to autograd, and exactly zero gradients, to second order."""
    (args,) = (a for a in SAMPLES[name](torch.float64) if without_tokens(a))
    inputs = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    result = getattr(torch.ops.moefy, name)(*args)
    out = result if isinstance(result, Tensor) else result[0]
    assert out.shape[0] == 0 and out.requires_grad
    grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    assert [g.shape for g in grads] == [v.shape for v in inputs]
    assert not any(g.any() for g in grads)
    second = torch.autograd.grad(sum(g.sum() for g in grads), inputs, allow_unused=True)
    assert not any(g.any() for g in second if g is not None)
