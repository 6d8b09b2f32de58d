"""Upcycling methods: what copies and noise are, and that a new method is a class and a line in the registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch
from integration.models import batch, call, dense
from torch import Tensor, nn

import moefy
from moefy.errors import ExpertsDiverged
from moefy.rewrite import methods, plan
from moefy.rewrite.methods import METHODS, DenseWeight, Method, Stacked, method_of
from moefy.rewrite.methods.copy import Copy, copies, fingerprint
from moefy.rewrite.methods.noise import add_noise

E = 4


@pytest.mark.parametrize(
    ("stored", "shape"),
    [("out_in", (6, 3)), ("in_out", (3, 6)), ("conv", (6, 3, 1, 1)), ("bias", (6,))],
)
def test_copies_are_linear_and_restore_the_layout(stored: str, shape: tuple[int, ...]) -> None:
    weight = nn.Parameter(torch.randn(shape), requires_grad=stored != "conv")
    dense_weight = DenseWeight("fc.weight", weight, stored)  # type: ignore[arg-type]
    stacked = Copy(moefy.MoEConfig(num_experts=E)).stack([dense_weight])["fc.weight"]
    assert stacked.parameter.shape == ((E, 6) if stored == "bias" else (E, 6, 3))
    assert stacked.parameter.requires_grad == weight.requires_grad
    assert all(torch.equal(expert, stacked.parameter[0]) for expert in stacked.parameter)
    for expert in range(E):
        restored = Copy.restore(stacked.parameter, stacked.origin, expert)
        assert torch.equal(restored, weight) and restored.is_contiguous()
    assert Copy.is_untouched(stacked.parameter, stacked.origin)


def test_a_trained_expert_is_seen() -> None:
    stacked = Copy(moefy.MoEConfig(num_experts=E)).stack(
        [DenseWeight("w", nn.Parameter(torch.randn(6, 3)), "out_in")]
    )["w"]
    with torch.no_grad():
        stacked.parameter[1, 0, 0] += 1
    assert Copy.is_untouched(stacked.parameter, stacked.origin)  # expert 0 is still the dense one
    with torch.no_grad():
        stacked.parameter[0, 0, 0] += 1
    assert not Copy.is_untouched(stacked.parameter, stacked.origin)


def test_a_fingerprint_sees_one_bit() -> None:
    weight = torch.randn(7, 5)
    changed = weight.clone()
    changed.view(torch.int32)[3, 2] ^= 1
    assert fingerprint(weight) != fingerprint(changed)
    assert fingerprint(weight.to("meta")) is None and fingerprint(torch.empty(0)) is None


def test_noise_leaves_expert_0_and_is_the_same_on_every_rank() -> None:
    weight = torch.randn(64, 32)
    first, second = (copies(weight, E, "out_in") for _ in range(2))
    for stacked in (first, second):
        add_noise(stacked, 0.1, 3, "mlp.up.weight")
    assert torch.equal(first, second) and torch.equal(first[0], weight)
    measured = (first[1:] - weight).std(dim=(1, 2)) / weight.std()
    torch.testing.assert_close(measured, torch.full((E - 1,), 0.1), rtol=0.1, atol=0)
    other = copies(weight, E, "out_in")
    add_noise(other, 0.1, 3, "mlp.down.weight")
    assert not torch.equal(other[1], first[1])


def test_the_config_chooses_the_method() -> None:
    assert method_of(moefy.MoEConfig(num_experts=E)).name == "copy"
    assert method_of(moefy.MoEConfig(num_experts=E, expert_noise=0.1)).name == "noise"
    assert set(METHODS) == {method.name for method in METHODS.values()}


class Halved(Copy):
    """Every expert is half the dense FFN: not exact, counts of its own, undone by doubling."""

    name = "halved"
    exactness = "approximate"

    def stack(self, dense: Iterable[DenseWeight]) -> dict[str, Stacked]:
        stacked = super().stack(dense)
        for value in stacked.values():
            value.parameter.data.mul_(0.5)
        return stacked

    def finish(self, stacked: Mapping[str, Tensor]) -> None:
        FINISHED.extend(stacked)

    def params_total(self, match: moefy.FFNMatch) -> int:
        return 7

    def warning(self) -> str:
        return "halved experts"

    @classmethod
    def is_untouched(cls, stacked: Tensor, origin: methods.Origin) -> bool:
        return True

    @classmethod
    def restore(cls, stacked: Tensor, origin: methods.Origin, expert: int) -> Tensor:
        return 2 * super().restore(stacked, origin, expert)


FINISHED: list[str] = []


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_a_method_is_a_class_and_a_line_in_the_registry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FINISHED.clear()
    method: type[Method] = Halved
    monkeypatch.setitem(METHODS, "halved", method)
    monkeypatch.setattr(plan, "method_of", lambda config: method(config))
    model, inputs = dense(name), batch(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = call(model, inputs)
    moefy.transform(model, E, example_args=(inputs[""],), check=False)
    report = moefy.report(model)
    router = report.layers[0].params_total - 7
    assert 0 < router < report.layers[0].params_dense and report.warnings == ("halved experts",)
    assert report.layers[0].exactness == "approximate"
    assert FINISHED and all(model.get_parameter(fqn).shape[0] == E for fqn in FINISHED)
    with torch.no_grad():
        assert not torch.allclose(call(model, inputs), expected)
    moefy.undo(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_undo_asks_the_method_that_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = dense("aligned"), batch("aligned")
    moefy.transform(model, E, example_args=(inputs[""],))
    monkeypatch.setattr(Copy, "is_untouched", classmethod(lambda cls, stacked, origin: False))
    with pytest.raises(ExpertsDiverged):
        moefy.undo(model)
    moefy.undo(model, expert=E - 1)
