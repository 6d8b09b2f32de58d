"""Benchmarks: the figures follow from what was measured, memory is seen, results are JSON and text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moefy
from moefy.bench import BENCHES
from moefy.bench.memory import in_fresh_process, peak_growth
from moefy.bench.models import GPT, VOCABULARY
from moefy.bench.transform_cost import DepthCost, MemoryCost, TransformCost, measure
from moefy.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1 << 20


def depth(layers: int, **changes: float) -> DepthCost:
    base = {
        "forward_ms": 10.0,
        "forward_moe_ms": 20.0,
        "copies_ms": 5.0,
        "transform_ms": 35.0,
        "transform_checked_ms": 50.0,
    }
    return DepthCost(layers=layers, **{**base, **changes})


def test_the_copies_are_taken_off():
    assert depth(6).forwards == 3.0
    assert depth(6).check_forwards == 0.75
    assert depth(6, transform_ms=4.0).forwards == 0.0


def test_growth_is_cost_per_layer():
    memory = MemoryCost(layers=2, new_weights_bytes=100, one_layer_bytes=50, rise_bytes=130)
    depths = (depth(6), depth(24, transform_ms=280.0))
    cost = TransformCost(d_model=8, num_experts=8, tokens=8, threads=1, depths=depths, memory=memory)
    assert cost.growth == pytest.approx(2.0)
    assert memory.beyond_bytes == 30
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["growth"] == pytest.approx(2.0) and data["memory"]["beyond_bytes"] == 30
    assert [d["forwards"] for d in data["depths"]] == [3.0, 27.5]
    text = str(cost)
    assert "27.50 dense forwards" in text and "is linear" in text and "30 B" in text


def test_a_measurement_is_complete():
    cost = measure((1, 2), d_model=32, num_experts=2, repeats=1, tokens=16)
    assert [d.layers for d in cost.depths] == [1, 2]
    for d in cost.depths:
        assert min(d.forward_ms, d.forward_moe_ms, d.copies_ms, d.transform_ms) > 0
    ffn = 2 * 32 * 128 + 128 + 32
    assert cost.memory.new_weights_bytes == 2 * ffn * 4
    assert cost.memory.one_layer_bytes == cost.memory.new_weights_bytes


def test_the_benchmarks_model_is_one_that_moefy_rewrites():
    model = GPT(layers=3, d_model=16)
    ids = torch.randint(VOCABULARY, (1, 8))
    before = model(ids)
    moefy.transform(model, num_experts=4)
    assert [layer.fqn for layer in moefy.report(model).rewritten] == [f"blocks.{i}.mlp" for i in range(3)]
    assert torch.allclose(model(ids), before, atol=1e-5)


# ---- memory


def allocate(megabytes: int) -> int:
    """Growth seen while a tensor of that size lives for a moment."""

    def work() -> None:
        torch.ones(megabytes * MEGABYTE // 4)  # written, so that the pages exist

    return peak_growth(work)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("megabytes", [16, 96])
def test_a_peak_that_is_gone_again_is_seen(megabytes, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    grown = in_fresh_process("test_bench", "allocate", megabytes)
    assert 0.95 * megabytes * MEGABYTE <= grown <= megabytes * MEGABYTE + 8 * MEGABYTE


def test_an_earlier_peak_does_not_hide_growth():
    program = (
        "import torch; from moefy.bench.memory import peak_growth;"
        "torch.ones(64 << 18); print(peak_growth(lambda: torch.ones(32 << 18)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 0.95 * 32 * MEGABYTE


# ---- command line


def test_bench_prints_json_alone(capsys):
    code = cli.main(
        [
            "bench",
            "transform",
            "--layers",
            "2,1",
            "--d-model",
            "16",
            "--num-experts",
            "2",
            "--repeats",
            "1",
            "--json",
        ]
    )
    data = json.loads(capsys.readouterr().out)
    assert code == 0 and data["benchmark"] == "transform" and data["schema_version"] == 1
    assert [d["layers"] for d in data["depths"]] == [1, 2]


@pytest.mark.parametrize("depths", ["", "x", "0", "3,-1"])
def test_depths_must_be_positive_numbers(capsys, depths):
    assert cli.main(["bench", "transform", "--layers", depths]) == 2
    assert "expected positive depths" in capsys.readouterr().err


def test_every_benchmark_has_help(capsys):
    for bench in BENCHES:
        assert cli.main(["bench", bench.name, "--help"]) == 0
        assert bench.help.split()[0] in capsys.readouterr().out
