"""The matcher's rules, one small model each: what is found, in which form, and why the others are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, Net, parts
from torch import Tensor, nn

from moefy.passes.match import Match, match_ffns
from moefy.passes.trace import trace_module


def matches(model: nn.Module, *shape: int) -> list[Match]:
    with torch.no_grad():
        return match_ffns(trace_module(model.eval(), (torch.randn(*(shape or (2, 5, D))),)))


def only(model: nn.Module, *shape: int) -> Match:
    found = matches(model, *shape)
    assert len(found) == 1, [m.record for m in found]
    return found[0]


def raw() -> dict[str, nn.Parameter]:
    return {"w1": nn.Parameter(torch.randn(D, H)), "w2": nn.Parameter(torch.randn(H, D))}


class Mlp(nn.Module):
    def __init__(self, **extra: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.drop, self.b = nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.b(self.drop(self.act(self.a(x)))))


ACCEPTED: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "inline": (lambda: Net(lambda m, x: x + m.b(F.gelu(m.a(x))), **parts()), "linears", "mlp", "gelu"),
    "owner": (lambda: Net(lambda m, x: x + m.mlp(x), mlp=Mlp()), "module", "mlp", "gelu"),
    "glu": (lambda: Net(lambda m, x: x + m.b(F.silu(m.a(x)) * m.c(x)), **parts()), "linears", "glu", "silu"),
    "tanh gelu by hand": (
        lambda: Net(
            lambda m, x: (
                x
                + m.b(
                    0.5
                    * (h := m.a(x))
                    * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * torch.pow(h, 3))))
                )
            ),
            **parts(),
        ),
        "linears",
        "mlp",
        "gelu_tanh",
    ),
    "squared relu": (
        lambda: Net(lambda m, x: x + m.b(F.relu(m.a(x)) ** 2), **parts()),
        "linears",
        "mlp",
        "relu2",
    ),
    "post-norm": (
        lambda: Net(lambda m, x: F.layer_norm(x + m.b(F.relu(m.a(x))), (D,)), **parts()),
        "linears",
        "mlp",
        "relu",
    ),
    "layer scale": (
        lambda: Net(lambda m, x: x + m.g * m.b(F.relu(m.a(x))), g=nn.Parameter(torch.ones(D)), **parts()),
        "linears",
        "mlp",
        "relu",
    ),
    "hand-written rms norm": (
        lambda: Net(
            lambda m, x: (
                x + m.b(F.relu(m.a(m.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))))
            ),
            g=nn.Parameter(torch.ones(D)),
            **parts(),
        ),
        "linears",
        "mlp",
        "relu",
    ),
    "parallel attention": (
        lambda: Net(
            lambda m, x: (
                x + m.o(x.mean(1, keepdim=True).expand_as(x)) + m.b(F.relu(m.a(F.layer_norm(x, (D,)))))
            ),
            o=nn.Linear(D, D),
            **parts(),
        ),
        "linears",
        "mlp",
        "relu",
    ),
    "masked output": (
        lambda: Net(lambda m, x: x + m.b(F.relu(m.a(x))) * (x[..., :1] > 0), **parts()),
        "linears",
        "mlp",
        "relu",
    ),
    "learnable": (
        lambda: Net(lambda m, x: x + m.b(m.act(m.a(x))), act=nn.PReLU(), **parts()),
        "linears",
        "mlp",
        "_prelu_kernel",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_found(name: str) -> None:
    build, form, kind, activation = ACCEPTED[name]
    model = build()
    found = [m for m in matches(model) if m.record.accepted]
    assert len(found) == 1, [m.record for m in matches(model)]
    record = found[0].record
    assert (record.form, record.kind) == (form, kind)
    assert record.activation == activation or name == "learnable"
    assert (record.d_model, record.d_hidden, record.calls) == (D, H, 1)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "head": (lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), **parts()), "no-residual"),
    "gate": (lambda: Net(lambda m, x: x * torch.sigmoid(m.b(F.relu(m.a(x)))), **parts()), "no-residual"),
    "projector": (
        lambda: Net(lambda m, x: m.e(F.relu(m.a(x))), e=nn.Linear(H, D + 1), **parts()),
        "width-change",
    ),
    "norm": (
        lambda: Net(lambda m, x: x + m.b(F.layer_norm(F.relu(m.a(x)), (H,))), **parts()),
        "norm-between",
    ),
    "hand norm": (
        lambda: Net(
            lambda m, x: x + m.b((h := F.gelu(m.a(x))) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),
            **parts(),
        ),
        "norm-between",
    ),
    "mean": (
        lambda: Net(lambda m, x: x + m.b((h := F.relu(m.a(x))) - h.mean(1, keepdim=True)), **parts()),
        "reduction-between",
    ),
    "cat": (
        lambda: Net(
            lambda m, x: x + m.e(torch.cat([h := F.relu(m.a(x)), h], -1)), e=nn.Linear(2 * H, D), **parts()
        ),
        "concat-between",
    ),
    "escape": (lambda: Net(lambda m, x: (x + m.b(h := F.relu(m.a(x)))) * h.sum(), **parts()), "escape"),
    "two sources": (
        lambda: Net(lambda m, x: x + m.b(F.silu(m.a(x)) * m.c(x * 2)), **parts()),
        "different-source",
    ),
    "token mixing": (
        lambda: Net(
            lambda m, x: (y := F.layer_norm(x, (D,))) + m.b(F.relu(m.a(y.transpose(1, 2)))).transpose(1, 2),
            **parts(),
        ),
        "feature-axis",
    ),
    "tied": (
        lambda: Net(lambda m, x: x + F.relu(x @ m.w1) @ m.w1.T, w1=nn.Parameter(torch.randn(D, H))),
        "shared-weight",
    ),
    "raw, not alone": (lambda: Net(lambda m, x: x + F.relu(x @ m.w1) @ m.w2, **raw()), "raw-parameters"),
    "weight norm": (
        lambda: Net(
            lambda m, x: x + m.b(F.relu(m.a(x))),
            a=nn.utils.parametrizations.weight_norm(nn.Linear(D, H)),
            b=nn.Linear(H, D),
        ),
        "computed-weight",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, code = REFUSED[name]
    shape = (2, D, D) if name == "token mixing" else (2, 5, D)
    found = matches(build(), *shape)
    assert [m.record.code for m in found] == [code], [m.record for m in found]
    assert found[0].record.reason


def test_conv_layout_and_depthwise_stem() -> None:
    model = Net(
        lambda m, x: x + m.b(F.gelu(m.a(m.dw(x)))),
        dw=nn.Conv2d(D, D, 3, padding=1, groups=D),
        a=nn.Conv2d(D, H, 1),
        b=nn.Conv2d(H, D, 1),
    )
    match = only(model, 2, D, 4, 5)
    assert match.record.accepted and match.region.exit.axis == 1


def test_squeeze_excite_is_refused_at_any_resolution() -> None:
    for size in (1, 4):
        model = Net(
            lambda m, x: x + x * torch.sigmoid(m.b(F.relu(m.a(x.mean((2, 3), keepdim=True))))),
            a=nn.Conv2d(D, H, 1),
            b=nn.Conv2d(H, D, 1),
        )
        assert not only(model, 2, D, size, size).record.accepted


def test_the_same_weights_twice_are_one_ffn() -> None:
    mlp = Mlp()
    model = Net(lambda m, x: (y := x + m.mlp(x)) + m.mlp(y), mlp=mlp)
    match = only(model)
    assert match.record.calls == 2 and match.record.form == "module"


def test_trailing_dropout_belongs_to_the_owner() -> None:
    match = only(Net(lambda m, x: x + m.mlp(x), mlp=Mlp()))
    assert match.tail is not None
    assert [n.target for n in match.tail.nodes if n.op == "call_module"] == ["drop"]


def test_raw_parameters_in_their_own_module() -> None:
    inner = Net(lambda m, x: F.relu(x @ m.w1 + m.b1) @ m.w2, b1=nn.Parameter(torch.zeros(H)), **raw())
    match = only(Net(lambda m, x: x + m.inner(x), inner=inner))
    assert match.record.accepted and match.record.form == "module"
    assert (match.region.entries[0].bias, match.region.entries[0].layout) == ("inner.b1", "in_out")


def test_depth_does_not_recurse() -> None:
    block = lambda: Net(lambda m, x: x + m.b(F.relu(m.a(x))), **parts())  # noqa: E731
    found = matches(nn.Sequential(*[block() for _ in range(150)]))
    assert sum(m.record.accepted for m in found) == 150


PICKED = {
    "w[e]": (lambda w: w[2], "grouped"),
    "unbind": (lambda w: w.unbind(0)[2], "grouped"),
    "select": (lambda w: w.select(0, 2), "grouped"),
    "index_select": (lambda w: w.index_select(0, torch.tensor([2]))[0], "grouped"),
    "conv's w[:, :, 0]": (lambda w: w.movedim(0, -1)[:, :, 2], "computed-weight"),
}


@pytest.mark.parametrize("how", PICKED)
def test_a_matrix_out_of_a_stack(how: str) -> None:
    """One expert of a stack is told from a 1x1 convolution's weight without its last axis."""
    pick, code = PICKED[how]
    stacks = {"w1": nn.Parameter(torch.randn(4, H, D)), "w2": nn.Parameter(torch.randn(4, D, H))}
    match = only(Net(lambda m, x: x + F.linear(F.gelu(F.linear(x, pick(m.w1))), pick(m.w2)), **stacks))
    assert match.record.code == code


def test_rows_times_a_stack_is_grouped() -> None:
    w1, w2 = nn.Parameter(torch.randn(4, D, H)), nn.Parameter(torch.randn(4, H, D))
    match = only(Net(lambda m, x: x + torch.bmm(F.gelu(torch.bmm(x, m.w1)), m.w2), w1=w1, w2=w2), 4, 5, D)
    assert match.record.code == "grouped"
