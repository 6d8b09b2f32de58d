"""The feature axis of a value, operation by operation; ``None`` where it is not certain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, trace
from torch import Tensor, nn

from moefy.passes.match.facts import Facts
from moefy.passes.trace import Trace


def last_axis(found: Trace) -> int | None:
    """The feature axis of the traced output."""
    (output,) = found.graph.find_nodes(op="output")
    return Facts(found).axes.of(output.args[0][0])


def linear(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x)


AXES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], int | None]] = {
    "input": (lambda m, x: x + 1, None),
    "linear": (linear, 2),
    "layer norm": (lambda m, x: F.layer_norm(x, (D,)), 2),
    "element-wise": (lambda m, x: torch.tanh(m.a(x)) * 2, 2),
    "sum with an unknown": (lambda m, x: m.b(m.a(x)) + x, 2),
    "transposed": (lambda m, x: m.a(x).transpose(1, 2), 1),
    "transposed and back": (lambda m, x: m.a(x).transpose(1, 2).mT, 2),
    "permuted": (lambda m, x: m.a(x).permute(2, 0, 1), 0),
    "moved": (lambda m, x: m.a(x).movedim(2, 1), 1),
    "flattened rows": (lambda m, x: m.a(x).reshape(-1, H), 1),
    "an inner axis": (lambda m, x: m.a(x).transpose(1, 2).reshape(2, H, 5, 1), 1),
    "an inner axis, split": (lambda m, x: m.a(x).transpose(1, 2).reshape(2, 3, H // 3, 5), None),
    "split into heads": (lambda m, x: m.a(x).reshape(2, 5, 3, H // 3), None),
    "a slice of the features": (lambda m, x: m.a(x)[..., :4], 2),
    "a part of a split": (lambda m, x: m.a(x).chunk(2, -1)[0], None),
    "one row": (lambda m, x: m.a(x)[:, 0], 1),
    "mean of rows": (lambda m, x: m.a(x).mean(1), None),
    "cast": (lambda m, x: m.a(x).double(), 2),
    "cat of rows": (lambda m, x: torch.cat([m.a(x), m.a(x)], 1), 2),
}


@pytest.mark.parametrize("name", AXES)
def test_axis(name: str) -> None:
    forward, expected = AXES[name]
    assert last_axis(trace(forward)) == expected


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d, (2, D, 6)), (nn.Conv2d, (2, D, 4, 4))])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_puts_features_on_axis_1(conv: type, shape: tuple[int, ...], kernel: int) -> None:
    layer = conv(D, H, kernel, padding=kernel // 2)
    assert last_axis(trace(lambda m, x: F.relu(m.c(x)), *shape, c=layer)) == 1
    flat = trace(lambda m, x: m.c(x).flatten(2).transpose(1, 2), *shape, c=layer)
    assert last_axis(flat) == 2


def test_an_embedding_puts_features_last() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed((x > 0).long())

    assert last_axis(trace(lambda m, x: m.tokens(x), 2, 3, tokens=Tokens())) == 2


def test_depth_does_not_recurse() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x)
        for _ in range(3000):
            y = y + 1
        return y

    assert last_axis(trace(forward)) == 2
