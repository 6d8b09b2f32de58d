"""``moefy bench routing``: the figures are all there, the share follows from them, bad input is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moefy import cli
from moefy.bench.layer_shapes import SMALL_SHAPES, draw_inputs
from moefy.bench.routing_cost import STEPS, RoutingCost, measure

TINY = dataclasses.replace(SMALL_SHAPES["B"], tokens=32)


def test_every_step_is_timed():
    ms = measure(draw_inputs(TINY, torch.device("cpu")), rep=1)
    assert set(ms) == {"layer", *STEPS} and min(ms.values()) > 0


def test_the_share_is_that_of_all_steps():
    steps = dict.fromkeys(STEPS, 0.1)
    cost = RoutingCost(device="none", ms={"B": {"layer": 10.0, **steps}})
    assert cost.share("B") == pytest.approx(0.04)
    assert json.loads(json.dumps(cost.to_dict()))["share_of_layer"]["B"] == pytest.approx(0.04)
    assert "4.0%" in str(cost) and "goal: 2% on B, on a GPU" in str(cost)


@pytest.mark.parametrize(
    "options", [["--shapes", "F"], ["--shapes", "Q"], ["--rep", "0"], ["--device", "abacus"]]
)
def test_bad_options_are_named(options, capsys):
    assert cli.main(["bench", "routing", *options]) == 2
    assert options[0].removeprefix("--") in capsys.readouterr().err
