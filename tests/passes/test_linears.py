"""Every spelling of a linear map is one site with the right weight, layout, widths and bias, or names its problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, sites_of, trace
from torch import Tensor, nn

from moefy.passes.trace.vocabulary import op_name

LOOSE = torch.randn(1, 1)  # no module holds it


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


SPELLINGS: dict[str, tuple[Callable, dict[str, nn.Module | nn.Parameter], str, str | None]] = {
    "F.linear": (lambda m, x: F.linear(x, m.w, m.b), {"w": w(H, D), "b": w(H)}, "out_in", "b"),
    "nn.Linear": (lambda m, x: m.fc(x), {"fc": nn.Linear(D, H)}, "out_in", "fc.bias"),
    "addmm": (
        lambda m, x: torch.addmm(m.b, x.view(-1, D), m.w).view(2, 5, H),
        {"w": w(D, H), "b": w(H)},
        "in_out",
        "b",
    ),
    "x @ W": (lambda m, x: x @ m.w, {"w": w(D, H)}, "in_out", None),
    "x @ W.T": (lambda m, x: x @ m.w.T, {"w": w(H, D)}, "out_in", None),
    "x @ W + b": (lambda m, x: x @ m.w + m.b, {"w": w(D, H), "b": w(H)}, "in_out", "b"),
    "b + reshaped": (
        lambda m, x: m.b + (x.view(-1, D) @ m.w).view(2, 5, H),
        {"w": w(D, H), "b": w(H)},
        "in_out",
        "b",
    ),
    "einsum": (lambda m, x: torch.einsum("bsd,dh->bsh", x, m.w), {"w": w(D, H)}, "in_out", None),
    "einsum, [out, in]": (lambda m, x: torch.einsum("...d,hd->...h", x, m.w), {"w": w(H, D)}, "out_in", None),
    "cast weight": (lambda m, x: F.linear(x.double(), m.w.double()), {"w": w(H, D)}, "out_in", None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    forward, given, layout, bias = SPELLINGS[name]
    (site,) = sites_of(trace(forward, **given))
    assert (site.layout, site.bias, site.axis, site.problem) == (layout, bias, -1, None)
    assert (site.in_features, site.out_features) == (D, H)
    assert site.weight in ("w", "fc.weight") and site.out in site.nodes


def test_a_1x1_convolution() -> None:
    (site,) = sites_of(trace(lambda m, x: m.fc(x), 2, D, 4, 4, fc=nn.Conv2d(D, H, 1)))
    assert (site.layout, site.axis, site.bias) == ("conv", 1, "fc.bias")
    assert (site.in_features, site.out_features) == (D, H)


NO_LINEAR: dict[str, tuple[Callable, dict[str, nn.Module | nn.Parameter]]] = {
    "two activations": (lambda m, x: x @ x.transpose(1, 2), {}),
    "scaled addmm": (lambda m, x: torch.addmm(m.b, x[0], m.w, beta=2), {"w": w(D, H), "b": w(H)}),
    "einsum with a kept axis": (lambda m, x: torch.einsum("bsd,sd->bs", x, m.w), {"w": w(5, D)}),
}


@pytest.mark.parametrize("name", NO_LINEAR)
def test_no_linear_map(name: str) -> None:
    forward, given = NO_LINEAR[name]
    assert sites_of(trace(forward, **(given or {"unused": w(1)}))) == []


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}])
def test_a_convolution_over_positions_is_no_linear_map(options: dict[str, int]) -> None:
    assert sites_of(trace(lambda m, x: m.fc(x), 2, D, 4, 4, fc=nn.Conv2d(D, H, **options))) == []


PROBLEMS: dict[str, tuple[Callable, tuple[int, ...], dict[str, nn.Module | nn.Parameter], str]] = {
    "stack": (lambda m, x: torch.bmm(x, m.w), (4, 5, D), {"w": w(4, D, H)}, "grouped"),
    "grouped convolution": (
        lambda m, x: m.fc(x),
        (2, D, 4, 4),
        {"fc": nn.Conv2d(D, 2 * D, 1, groups=2)},
        "grouped",
    ),
    "computed weight": (lambda m, x: F.linear(x, m.w * 2), (2, D), {"w": w(H, D)}, "computed-weight"),
    "computed bias": (
        lambda m, x: F.linear(x, m.w, m.b * 2),
        (2, D),
        {"w": w(H, D), "b": w(H)},
        "computed-weight",
    ),
    "loose 1x1 weight": (
        lambda m, x: F.linear(x, LOOSE),
        (2, 1),
        {"unused": w(1)},
        "unregistered-weight",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems(name: str) -> None:
    forward, shape, given, code = PROBLEMS[name]
    (site,) = sites_of(trace(forward, *shape, **given))
    assert site.problem is not None and site.problem[0] == code and site.problem[1]


NOT_A_BIAS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "an activation": lambda m, x: x @ m.w + x[..., :1],
    "per position": lambda m, x: x @ m.w + m.p,
    "scaled": lambda m, x: torch.add(x @ m.w, m.b, alpha=2),
    "read twice": lambda m, x: (y := x @ m.w) + m.b + y,
}


@pytest.mark.parametrize("name", NOT_A_BIAS)
def test_what_is_added_is_not_always_a_bias(name: str) -> None:
    (site,) = sites_of(trace(NOT_A_BIAS[name], w=w(D, H), b=w(H), p=w(5, H)))
    assert site.bias is None and op_name(site.out) == "matmul"


def test_a_bias_added_apart_can_be_left_outside() -> None:
    (site,) = sites_of(trace(lambda m, x: x @ m.w + m.b, w=w(D, H), b=w(H)))
    assert site.bare is not None and (op_name(site.out), op_name(site.bare)) == ("add", "matmul")
    before = dataclasses.replace(site)
    bare = site.without_added_bias()
    assert bare.out is site.bare and site.out not in bare.nodes
    assert (bare.bias, bare.bias_node) == ("b", None), "the owner still answers it, but not in this graph"
    assert vars(site) == vars(before), "a question changes nothing"
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.bias = None  # type: ignore[misc]
