"""The residual rule: which sum adds an FFN's output to the stream that it reads, and which look like one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, parts, regions_of, trace
from torch import Tensor, fx, nn

from moefy.passes.match import residual as module
from moefy.passes.match.linears import find_linears
from moefy.passes.match.residual import find_residual
from moefy.passes.trace.vocabulary import op_name


def ffn(m: nn.Module, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))


def residual(
    forward: Callable[..., object], *shape: int, **given: nn.Module | nn.Parameter
) -> fx.Node | None:
    found = trace(forward, *shape, **{**parts(), **given})
    (region,) = regions_of(found)
    return find_residual(region, find_linears(found))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (D,))


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


SUMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda m, x: x + ffn(m, x),
    "post-norm": lambda m, x: norm(x + ffn(m, x)),
    "pre-norm": lambda m, x: x + ffn(m, norm(x)),
    "normed by hand": lambda m, x: x + ffn(m, rms(x)),
    "sandwich": lambda m, x: x + norm(ffn(m, norm(x))),
    "dropped and scaled": lambda m, x: x + m.g * F.dropout(ffn(m, x)),
    "half, as in a conformer": lambda m, x: x + 0.5 * ffn(m, norm(x)),
    "gated": lambda m, x: x + ffn(m, norm(x)) * x[..., :1],
    "flattened": lambda m, x: x + ffn(m, x.reshape(-1, D)).reshape(2, 5, D),
    "transposed and back": lambda m, x: x + ffn(m, x).transpose(1, 2).transpose(1, 2),
    "stacked": lambda m, x: torch.stack([x, ffn(m, x)], 0).sum(0),
    "subtracted": lambda m, x: x - ffn(m, x),
    "parallel": lambda m, x: x + torch.softmax(x, 1) + ffn(m, norm(x)),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_sum_is_found(name: str) -> None:
    found = residual(SUMS[name], g=nn.Parameter(torch.ones(D)))
    assert found is not None and op_name(found) in ("add", "sub", "sum")


NO_SUMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "head": ffn,
    "gate": lambda m, x: x * torch.sigmoid(ffn(m, x)),
    "added to a parameter": lambda m, x: m.g + ffn(m, x),
    "added to another branch": lambda m, x: m.other(x) + ffn(m, norm(x)),
    "behind an activation": lambda m, x: x + torch.tanh(ffn(m, x)),
    "behind a linear": lambda m, x: x + m.other(ffn(m, x)),
    "pooled first": lambda m, x: x + ffn(m, x.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_no_sum(name: str) -> None:
    given = {"g": nn.Parameter(torch.ones(D)), "other": nn.Linear(D, D)}
    assert residual(NO_SUMS[name], **given) is None


def test_a_depthwise_convolution_is_part_of_the_stream_and_a_full_one_is_not() -> None:
    convs = {"a": nn.Conv2d(D, H, 1), "b": nn.Conv2d(H, D, 1)}
    for groups, found in ((D, True), (1, False)):
        stem = nn.Conv2d(D, D, 3, padding=1, groups=groups)
        sum_of = residual(lambda m, x: x + ffn(m, m.stem(x)), 2, D, 4, 4, stem=stem, **convs)
        assert (sum_of is not None) == found


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def far(m: nn.Module, x: Tensor) -> Tensor:
        y = ffn(m, x)
        for _ in range(8):
            y = y * 0.5
        return x + y

    assert residual(far) is not None
    monkeypatch.setattr(module, "_MAX_STEPS", 4)
    assert residual(far) is None
