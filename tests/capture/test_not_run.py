"""Modules that a forward did not run: run by themselves when inputs are derived, named in the report otherwise."""

import pytest
import torch
from torch import Tensor, nn

import moefy

D = 16


class TwoTowers(nn.Module):
    """Text alone runs one tower; ``pixels`` the other and the projector too."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True)
        self.embed = nn.Embedding(20, D)
        self.text = nn.TransformerEncoder(layer, 2)
        self.vision = nn.TransformerEncoder(layer, 1)
        self.projector = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
        self.gate = nn.Linear(D, D)  # one matrix: no FFN can hide there

    def forward(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if pixels is not None:
            x = x + self.gate(self.projector(self.vision(pixels)))
        return self.text(x)


@pytest.fixture
def model() -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers().eval()


ids = torch.arange(10).view(2, 5)
pixels = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def rewritten(model: nn.Module) -> list[str]:
    return [layer.fqn for layer in moefy.report(model).rewritten]


def test_given_inputs_name_what_they_do_not_reach(model: TwoTowers) -> None:
    moefy.transform(model, num_experts=2, example_args=(ids,))
    report = moefy.report(model)
    assert rewritten(model) == ["text.layers.0", "text.layers.1"]
    assert report.unseen == ("vision", "projector")
    assert report.to_dict()["unseen"] == ["vision", "projector"]
    assert "not searched (example_args can reach it): vision, projector" in " ".join(str(report).split())


def test_derived_inputs_reach_the_tower_by_itself(model: TwoTowers) -> None:
    dense = model(ids, pixels)
    report = moefy.report(moefy.transform(model, num_experts=2))
    assert rewritten(model) == ["text.layers.0", "text.layers.1", "vision.layers.0"]
    assert "more part" in report.inputs
    torch.testing.assert_close(model(ids, pixels), dense)
    assert [(layer.fqn, layer.code) for layer in report.skipped] == [("projector", "no-residual")]


def test_nothing_unseen(model: TwoTowers) -> None:
    report = moefy.report(model, num_experts=2, example_args=(ids, pixels))
    assert len(report.rewritten) == 3 and report.unseen == ()
    assert "not searched" not in str(report)
