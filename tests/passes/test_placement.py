"""Where an FFN stands, asked in any order and any number of times: a question changes no region."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nets import D, H, node, parts, trace
from torch import Tensor, fx, nn

from moefy.passes.match.facts import Facts
from moefy.passes.match.placement import as_linears, find_owner, place
from moefy.passes.match.regions import Region, find_regions
from moefy.passes.trace import Trace
from moefy.passes.trace.vocabulary import op_name


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(D, H), nn.Linear(H, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.b(F.gelu(self.a(x))))


class Pair(nn.Module):
    """Megatron's MLP: the bias of its last linear is left to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(D, H), nn.Parameter(torch.randn(D, H))
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.gelu(self.a(x)) @ self.w.T, self.bias


def found(forward: Callable[..., object], **given: nn.Module | nn.Parameter) -> tuple[Facts, Region]:
    recorded = trace(forward, **given)
    facts = Facts(recorded)
    (region,) = find_regions(recorded, facts.sites)
    return facts, region


def owned(m: nn.Module, x: Tensor) -> Tensor:
    return x + m.mlp(x)


def pair(m: nn.Module, x: Tensor) -> Tensor:
    out, bias = m.mlp(x)
    return x + (out + bias)


def test_the_module_whose_whole_forward_it_is() -> None:
    facts, region = found(owned, mlp=Mlp())
    placement = place(facts, [region])
    assert (placement.form, placement.fqn, placement.returns_tuple) == ("module", "mlp", False)
    (inner,) = placement.regions
    assert [op_name(n) for n in inner.tail] == ["dropout"] and region.tail == ()


def test_a_bias_that_is_answered_apart() -> None:
    facts, region = found(pair, mlp=Pair())
    owner = find_owner(facts, region)
    assert owner is not None and (owner.fqn, owner.returns_tuple) == ("mlp", True)
    inner = owner.region.exit
    assert (op_name(inner.out), inner.bias, inner.bias_node) == ("matmul", "mlp.bias", None)
    assert op_name(region.exit.out) == "add" and region.exit.bias_node is not None


@pytest.mark.parametrize("forward", [owned, pair])
def test_questions_change_nothing_and_their_order_is_free(forward: Callable[..., Tensor]) -> None:
    facts, region = found(forward, mlp=Mlp() if forward is owned else Pair())
    before = (vars(region).copy(), vars(region.exit).copy(), region.nodes())
    first, linears = place(facts, [region]), as_linears(facts, [region])
    owner, second = find_owner(facts, region), place(facts, [region])
    assert (vars(region), vars(region.exit), region.nodes()) == before
    assert owner is not None
    assert (first.form, first.fqn, first.returns_tuple) == (second.form, second.fqn, second.returns_tuple)
    for a, b in ((first.regions[0], second.regions[0]), (first.regions[0], owner.region)):
        assert (a.tail, vars(a.exit)) == (b.tail, vars(b.exit))
    assert linears.regions == (region,)


NOT_WHOLE: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "its sum too": lambda m, x: x + m.b(F.gelu(m.a(x))),
    "another result": lambda m, x: (m.b(h := F.gelu(m.a(x))), h),
    "more work": lambda m, x: m.b(F.gelu(m.a(x))) * 2,
}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_a_module_that_does_more_owns_nothing(name: str) -> None:
    facts, region = found(NOT_WHOLE[name])
    assert find_owner(facts, region) is None
    placement = place(facts, [region])
    assert (placement.form, placement.fqn) == ("linears", "")


def test_no_form_fits_bare_parameters() -> None:
    raw = {"w1": nn.Parameter(torch.randn(H, D)), "w2": nn.Parameter(torch.randn(D, H))}
    facts, region = found(lambda m, x: x + F.linear(F.relu(F.linear(x, m.w1)), m.w2), **raw)
    assert place(facts, [region]).form is None


def test_two_calls_of_one_owner_are_one_placement() -> None:
    recorded: Trace = trace(lambda m, x: (y := x + m.mlp(x)) + m.mlp(y), mlp=Mlp())
    facts = Facts(recorded)
    placement = place(facts, find_regions(recorded, facts.sites))
    assert (placement.form, placement.fqn, len(placement.regions)) == ("module", "mlp", 2)
    assert all(len(region.tail) == 1 for region in placement.regions)


def test_facts_know_what_ran_where() -> None:
    recorded = trace(lambda m, x: (F.relu(x), x + m.b(F.gelu(m.a(x))))[1], **parts())
    facts = Facts(recorded)
    assert facts.dead == {node(recorded, "relu")}
    (region,) = find_regions(recorded, facts.sites)
    assert [facts.trace.calls[i].fqn for i in facts.calls_around(region)] == [""]
    call = facts.linear_call(region.exit)
    assert call is not None and call.fqn == "b"
    assert [n for n in facts.span(call) if isinstance(n, fx.Node)] == [region.exit.out]
