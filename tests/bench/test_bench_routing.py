"""``moefy bench routing``: the figures are all there in both modes, the share follows from them, bad input is named."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from moefy.bench.layer.shapes import SMALL_SHAPES, draw_inputs
from moefy.bench.routing_cost import MODES, STEPS, RoutingCost, measure
from moefy.cli import main as cli

TINY = dataclasses.replace(SMALL_SHAPES["B"], tokens=32)


@pytest.mark.usefixtures("fresh_dynamo")
def test_every_step_is_timed_as_it_is_and_in_one_graph():
    graphs = CompileCounter()

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend=graphs)

    inputs = draw_inputs(TINY, torch.device("cpu"))
    for wrap in (MODES["eager"], compiled):
        ms = measure(inputs, 1, wrap)
        assert set(ms) == {"layer", *STEPS} and min(ms.values()) > 0
    assert graphs.frame_count == 1 + len(STEPS)


def test_together_computes_all_of_it():
    functions = []
    inputs = draw_inputs(TINY, torch.device("cpu"))
    STEPS["together"](inputs, lambda function: functions.append(function) or function)
    logits_TE, (tokens, experts, top_k) = inputs.logits_TE, (TINY.tokens, TINY.num_experts, TINY.top_k)
    weights_TK, loss, order_N, offsets_E = functions[0](logits_TE)
    values_TK, index_TK = logits_TE.topk(top_k)
    counts_E = torch.bincount(index_TK.flatten(), minlength=experts)
    balance = experts * (counts_E / (tokens * top_k) * logits_TE.softmax(1).mean(0)).sum()
    torch.testing.assert_close(weights_TK, values_TK.softmax(1))
    torch.testing.assert_close(loss, balance + 0.1 * logits_TE.exp().sum(1).log().square().mean())
    assert order_N.shape == (tokens * top_k,) and offsets_E.tolist() == counts_E.cumsum(0).tolist()


def test_the_share_is_that_of_all_steps_together():
    steps = {**dict.fromkeys(STEPS, 0.3), "together": 0.4}
    modes = {"eager": {"layer": 10.0, **steps}, "compiled": {"layer": 20.0, **steps}}
    cost = RoutingCost(device="none", ms={"B": modes})
    assert cost.share("B", "eager") == pytest.approx(0.04)
    shares = json.loads(json.dumps(cost.to_dict()))["share_of_layer"]["B"]
    assert shares == {"eager": pytest.approx(0.04), "compiled": pytest.approx(0.02)}
    lines = str(cost).splitlines()
    assert [line.split()[1] for line in lines if line.endswith("%")] == ["eager", "compiled"]
    assert "4.0%" in str(cost) and "2.0%" in str(cost) and "goal: 2% on B, on a GPU" in str(cost)


@pytest.mark.parametrize(
    "options",
    [
        ["--shapes", "F"],
        ["--shapes", "Q"],
        ["--rep", "0"],
        ["--device", "abacus"],
        ["--modes", "lazy"],
        ["--modes", ","],
    ],
)
def test_bad_options_are_named(options, capsys):
    assert cli.main(["bench", "routing", *options]) == 2
    assert options[0].removeprefix("--") in capsys.readouterr().err
