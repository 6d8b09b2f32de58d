"""One name for every spelling of an operation, which operations are element-wise, and where an axis is moved."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import D, trace
from torch import Tensor, fx, nn

from moefy.passes.trace.vocabulary import (
    is_pointwise,
    moved_axis,
    namespace,
    op_name,
    parameter_only,
    qualified_op_name,
    shape_of,
)


def call(forward: Callable[[nn.Module, Tensor], Any], *shape: int) -> fx.Node:
    """The last call of a traced forward."""
    found = trace(forward, *shape, w=nn.Parameter(torch.ones(D)), s=nn.Parameter(torch.ones(())))
    return [n for n in found.graph.nodes if n.op == "call_function"][-1]


ADDS = [torch.add, operator.add, operator.iadd, Tensor.add_, Tensor.__radd__, torch.ops.aten.add.Tensor]
SPELLINGS = [
    *[(target, "add") for target in ADDS],
    (operator.truediv, "div"),
    (torch.multiply, "mul"),
    (torch.mm, "matmul"),
    (F.relu_, "relu"),
    (torch.ops.aten.view.default, "view"),
]


@pytest.mark.parametrize(
    ("target", "name"), SPELLINGS, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_one_name_for_every_spelling(target: Any, name: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert op_name(graph.call_function(target, (x, x))) == name
    assert op_name(x) == "placeholder"


def test_the_two_argument_maximum_is_no_reduction() -> None:
    assert op_name(call(lambda m, x: torch.max(x, x))) == "maximum"
    assert op_name(call(lambda m, x: x.max())) == "max"


def test_names_for_people_and_libraries() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [
        graph.call_function(torch.ops.aten.relu.default, (x,)),
        graph.call_function(F.linear, (x, x)),
        graph.call_method("view", (x, -1)),
    ]
    assert [qualified_op_name(n) for n in nodes] == ["aten.relu", "linear", "view"]
    assert [namespace(n) for n in nodes] == ["aten", "", ""]


POINTWISE: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "tagged": (lambda m, x: torch.tanh(x), True),
    "untagged": (lambda m, x: F.hardswish(x), True),
    "a composite": (lambda m, x: F.softsign(x), True),
    "product with a parameter": (lambda m, x: x * m.w, True),
    "softmax": (lambda m, x: x.softmax(-1), False),
    "cumulative": (lambda m, x: x.cumsum(-1), False),
    "sorted": (lambda m, x: x.sort().values, False),
    "layer norm": (lambda m, x: F.layer_norm(x, (D,)), False),
    "matmul": (lambda m, x: x @ x.mT, False),
    "reshape": (lambda m, x: x.reshape(-1), False),
    "flipped": (lambda m, x: x.flip(-1), False),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_element_wise(name: str) -> None:
    forward, expected = POINTWISE[name]
    assert is_pointwise(call(forward)) == expected


def test_a_function_of_the_user_is_run_to_see_what_it_is() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(shape=(2, 3), dtype=torch.float32)
    functions = (
        (lambda v: v * 2 + 1, True),
        (lambda v: v - v.mean(), False),
        (lambda v: v.bernoulli(), False),
    )
    for target, expected in functions:
        node = graph.call_function(target, (x,))
        node.meta.update(shape=(2, 3), dtype=torch.float32)
        state = torch.get_rng_state()
        assert is_pointwise(node) == expected
        assert torch.equal(torch.get_rng_state(), state)


PARAMETERS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "of a parameter": (lambda m, x: F.softplus(m.w) * 2, True),
    "of the input": (lambda m, x: x * m.w, False),
    "a constant": (lambda m, x: torch.tensor(0.5), True),
    "random": (lambda m, x: torch.rand(()), False),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_only(name: str) -> None:
    forward, expected = PARAMETERS[name]
    assert parameter_only(call(forward)) == expected


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, -1),
    "transpose by keyword": lambda x: torch.transpose(x, dim0=0, dim1=2),
    "permute": lambda x: x.permute(2, 0, 1),
    "permute of a list": lambda x: torch.permute(x, [1, -1, 0]),
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "movedim": lambda x: x.movedim(0, 2),
    "movedim by keyword": lambda x: torch.movedim(x, source=2, destination=0),
}


@pytest.mark.parametrize("name", MOVES)
def test_moved_axes_are_where_the_sizes_are(name: str) -> None:
    node = call(lambda m, x: MOVES[name](x), 2, 3, 5)  # sizes that differ name their axes
    for axis, size in enumerate((2, 3, 5)):
        moved = moved_axis(node, axis)
        assert moved is not None and shape_of(node)[moved] == size


def test_an_unclear_move() -> None:
    assert moved_axis(call(lambda m, x: x.movedim((0, 1), (1, 0)), 2, 3, 5), 0) is None
