"""The body of a region as a graph of its own: the same numbers for any number of rows, and dropout that stays live."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, Net, parts, regions_of, trace
from torch import Tensor, fx, nn

from moefy.passes.match import match_ffns
from moefy.passes.match.body_graph import OutsideOwner, body_graph
from moefy.passes.trace import Trace


def body_of(found: Trace, owner: str | None = None) -> fx.Graph:
    (region,) = regions_of(found)
    return body_graph(found, region, owner)


BODIES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], Callable[..., Tensor], int]] = {
    "gelu": (lambda m, x: m.b(F.gelu(m.a(x))), F.gelu, 1),
    "gated": (lambda m, x: m.b(F.silu(m.a(x)) * m.c(x)), lambda a, c: F.silu(a) * c, 2),
    "gate second": (lambda m, x: m.b(m.c(x) * F.silu(m.a(x))), lambda c, a: c * F.silu(a), 2),
    "in place": (lambda m, x: m.b(F.relu(m.a(x), inplace=True)), F.relu, 1),
    "a tensor's method": (lambda m, x: m.b(m.a(x).relu() ** 2), lambda a: a.relu() ** 2, 1),
    "reshaped between": (lambda m, x: m.b(F.gelu(m.a(x).view(-1, H)).view(2, 5, H)), F.gelu, 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_body_computes_what_ran(name: str) -> None:
    forward, reference, inputs = BODIES[name]
    graph = body_of(trace(forward))
    graph.lint()
    body = fx.GraphModule(nn.Module(), graph)
    for rows in (1, 7):  # not the number of rows that was traced
        values = [torch.randn(1, rows, H) for _ in range(inputs)]
        given = [v.clone() for v in values]
        torch.testing.assert_close(body(*given), reference(*values))
        assert all(map(torch.equal, given, values)), "the body writes to no input"


class Mlp(nn.Module):
    """An owner with a learnable activation, functional dropout and a dropout behind the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(D, H), nn.PReLU(), nn.Linear(H, D)
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.act(self.a(x)) * self.scale, 0.5, self.training)
        return F.dropout(self.b(h), 0.5, self.training)


def test_an_owners_children_and_parameters_are_its_own() -> None:
    (match,) = match_ffns(trace(lambda m, x: x + m.mlp(x), mlp=Mlp()))
    assert match.record.form == "module" and match.body is not None and match.tail is not None
    nodes = {(n.op, str(n.target)) for n in match.body.nodes}
    assert {("call_module", "act"), ("get_attr", "scale"), ("get_attr", "training")} <= nodes
    assert not any(n.op == "call_module" for n in match.tail.nodes)


def test_dropout_follows_the_owners_mode() -> None:
    mlp = Mlp()
    (match,) = match_ffns(trace(lambda m, x: x + m.mlp(x), mlp=mlp))
    body, h = fx.GraphModule(mlp, match.body or fx.Graph()), torch.ones(1, 50, H)
    body.training = False
    assert torch.equal(body(h), body(h)) and bool((body(h) != 0).all())
    body.training = True
    assert bool((body(h) == 0).any())


def test_for_probing_no_child_is_called() -> None:
    found = trace(lambda m, x: x + m.mlp(x), mlp=Mlp())
    probed = body_of(found)
    assert not any(n.op == "call_module" for n in probed.nodes)
    assert tuple(sorted({str(n.target) for n in probed.nodes if n.op == "get_attr"}, reverse=True)) == (
        "mlp.scale",
        "mlp.act.weight",
    )


def test_a_parameter_from_outside_the_owner() -> None:
    model = Net(lambda m, x: x + m.b(F.relu(m.a(x)) * m.g), g=nn.Parameter(torch.ones(H)), **parts())
    found = trace(lambda m, x: m.inner(x), inner=model)
    with pytest.raises(OutsideOwner):
        body_of(found, "inner.a")
    assert [n.target for n in body_of(found, "inner").nodes if n.op == "get_attr"] == ["g"]
