"""``moefy bench layer``: what it holds for right is right, its providers agree with it, its output is as promised."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

from moefy.bench.layer import providers as layer_providers
from moefy.bench.layer import run as layer
from moefy.bench.layer.contract import (
    BoundLayer,
    Provider,
    Unsupported,
    expert_loop,
    from_function,
    reference,
    relative_errors,
)
from moefy.bench.layer.peers import PEERS, build_liger, deinterleave, interleave
from moefy.bench.layer.providers import OWN
from moefy.bench.layer.result import LayerResult, Row, save_plot
from moefy.bench.layer.shapes import SHAPES, SMALL_SHAPES, Inputs, Shape, draw_inputs, shapes_for
from moefy.bench.layer.timing import captured, median_ms
from moefy.cli import main as cli
from moefy.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Shape(tokens=13, d_model=16, d_hidden=24, num_experts=5, top_k=2)
PLAIN = dataclasses.replace(TINY, gated=False)
CHECKED = [provider for provider in OWN if provider.name not in ("moefy CUDA graph", "dense")]
NAMES = {"out", "dx", "dW1", "dW2", "dlogits"}


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A and F16 in a size that takes no time, under the command line."""
    tiny = {"A": TINY, "F16": dataclasses.replace(TINY, tokens=3, decode=True)}
    monkeypatch.setattr(layer, "shapes_for", lambda device, names: {n: tiny[n] for n in names or tiny})


def one_token(x_D: Tensor, logits_E: Tensor, w1_EPD: Tensor, w2_EDH: Tensor, shape: Shape) -> Tensor:
    """One token through its experts, one at a time."""
    chosen = oracles.choose(logits_E, shape.top_k)
    weights_K = torch.softmax(torch.stack([logits_E[e] for e in chosen]), dim=0)
    out_D = torch.zeros_like(x_D)
    for weight, e in zip(weights_K, chosen, strict=True):
        rows_P = oracles.affine(w1_EPD[e], None, x_D)
        if shape.gated:
            gate_H, up_H = rows_P[: shape.d_hidden], rows_P[shape.d_hidden :]
            hidden_H = gate_H * torch.sigmoid(gate_H) * up_H
        else:
            cubic_H = 0.7978845608028654 * (rows_P + 0.044715 * rows_P**3)
            hidden_H = 0.5 * rows_P * (1 + torch.tanh(cubic_H))
        out_D = out_D + weight * oracles.affine(w2_EDH[e], None, hidden_H)
    return out_D


def token_by_token(inputs: Inputs) -> dict[str, Tensor]:
    """The layer and its gradients in float64 by a loop over tokens."""
    of = {"dx": "x_TD", "dlogits": "logits_TE", "dW1": "w1_EPD", "dW2": "w2_EDH"}
    wide = {name: getattr(inputs, field).double().requires_grad_() for name, field in of.items()}
    rows = [
        one_token(x_D, logits_E, wide["dW1"], wide["dW2"], inputs.shape)
        for x_D, logits_E in zip(wide["dx"], wide["dlogits"], strict=True)
    ]
    out_TD = torch.stack(rows)
    grads = torch.autograd.grad(out_TD, list(wide.values()), inputs.grad_TD.double())
    return {"out": out_TD.detach(), **dict(zip(wide, grads, strict=True))}


def answer(provider: Provider, inputs: Inputs) -> dict[str, Tensor]:
    """What one training step of ``provider`` gives."""
    built = provider.build(inputs)
    assert built.answer is not None
    return built.answer()


# ---- inputs


def test_the_shapes_are_those_of_the_baselines():
    sizes = {n: (s.tokens, s.d_model, s.d_hidden, s.num_experts, s.top_k, s.gated) for n, s in SHAPES.items()}
    assert sizes["A"] == (8192, 4096, 14336, 8, 2, True)
    assert sizes["B"] == sizes["Bz"] == (32768, 2048, 1024, 64, 8, True)
    assert sizes["C"] == sizes["Cz"] == (32768, 2048, 768, 128, 8, True)
    assert sizes["D"] == (16384, 2048, 512, 256, 8, True)
    assert sizes["E"] == (16384, 768, 3072, 8, 2, False)
    assert [sizes[n][0] for n in ("F16", "F256")] == [16, 256]
    assert SHAPES["A"].flops == 6 * 8192 * 2 * 4096 * 14336
    assert SHAPES["E"].flops == 4 * 16384 * 2 * 768 * 3072
    assert [SMALL_SHAPES["B"].tokens, SMALL_SHAPES["F256"].tokens] == [2048, 256]


def test_the_choice_is_unambiguous_and_zipf_is_skewed():
    even, skewed = draw_inputs(SMALL_SHAPES["B"], CPU), draw_inputs(SMALL_SHAPES["Bz"], CPU)
    for inputs in (even, skewed):
        best = inputs.logits_TE.sort(dim=1, descending=True).values
        k = inputs.shape.top_k
        assert (best[:, k - 1] - best[:, k]).min() >= 0.25 - 1e-6
    assert even.busiest < 2 < 5 < skewed.busiest


def test_the_same_seed_draws_the_same_inputs():
    first, second = draw_inputs(TINY, CPU), draw_inputs(TINY, CPU)
    assert torch.equal(first.x_TD, second.x_TD) and torch.equal(first.logits_TE, second.logits_TE)


def test_a_group_names_its_shapes():
    assert list(shapes_for(CPU, ("F", "A"))) == ["F16", "F256", "A"]
    assert list(shapes_for(CPU, ())) == list(SHAPES)
    with pytest.raises(ConfigError, match="shapes: got 'Q'; expected some of A, B"):
        shapes_for(CPU, ("A", "Q"))


# ---- numbers


@pytest.mark.parametrize("shape", [TINY, PLAIN], ids=["gated", "plain"])
def test_the_reference_is_the_loop_over_tokens(shape):
    inputs = draw_inputs(shape, CPU)
    got = reference(inputs)
    assert set(got) == NAMES and all(value.dtype is torch.float64 for value in got.values())
    assert max(relative_errors(got, token_by_token(inputs)).values()) < 1e-13


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    """The compiled providers without Inductor, whose C++ would take most of a minute."""
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(layer_providers.torch, "compile", compile_)
    layer_providers._compiled.cache_clear()
    yield
    layer_providers._compiled.cache_clear()


@pytest.mark.parametrize("shape", [TINY, PLAIN], ids=["gated", "plain"])
@pytest.mark.parametrize("provider", CHECKED, ids=[p.name for p in CHECKED])
def test_every_own_provider_agrees(provider, shape, traced):
    inputs = draw_inputs(shape, CPU)
    errors = relative_errors(answer(provider, inputs), reference(inputs))
    assert set(errors) == NAMES and max(errors.values()) < 2e-6, errors


def test_cuda_graphs_need_cuda_and_say_so():
    (graphed,) = [provider for provider in OWN if provider.name == "moefy CUDA graph"]
    result = layer.measure({"A": TINY}, (graphed, OWN[-1]), CPU, rep=1)
    failed = {row.failed for row in result.rows if row.provider == graphed.name}
    assert failed == {"training on CUDA only; decoding is captured for every provider"}


def test_experts_without_tokens_are_fine():
    shape = dataclasses.replace(TINY, tokens=2, num_experts=9)
    inputs = draw_inputs(shape, CPU)
    assert inputs.hit < 9
    for provider in CHECKED:
        if "compiled" not in provider.name:
            errors = relative_errors(answer(provider, inputs), reference(inputs))
            assert max(errors.values()) < 2e-6, provider.name


@pytest.mark.parametrize("shape", [TINY, PLAIN], ids=["gated", "plain"])
def test_transformers_agrees(shape):
    pytest.importorskip("transformers.integrations.moe")
    inputs, (peer,) = draw_inputs(shape, CPU), [p for p in PEERS if p.name == "transformers"]
    assert max(relative_errors(answer(peer, inputs), reference(inputs)).values()) < 2e-6


def test_dense_does_the_same_arithmetic():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = draw_inputs(TINY, CPU)
    dense = OWN[-1].build(inputs)
    assert dense.answer is None
    for work, times in ((dense.forward, 1), (dense.step, 3)):
        with FlopCounterMode(display=False) as counter:
            work()
        assert counter.get_total_flops() == times * TINY.flops
    decode = OWN[-1].build(draw_inputs(dataclasses.replace(TINY, tokens=3, decode=True), CPU))
    assert decode.forward().shape[0] <= TINY.num_experts


def test_sonic_s_layout_has_an_inverse():
    w_EPD = torch.arange(2 * 6 * 2.0).view(2, 6, 2)
    assert interleave(w_EPD)[0, :, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert torch.equal(deinterleave(interleave(w_EPD)), w_EPD)


# ---- failures are rows


def failing(message: str) -> Provider:
    def build(inputs: Inputs) -> BoundLayer:
        raise RuntimeError(message)

    return Provider(name="broken", build=build)


def test_a_provider_that_fails_is_a_row_that_says_why():
    def raises_in_backward(*args: Any) -> Tensor:
        return expert_loop(*args).detach()

    providers = (
        failing("no such kernel\nand more"),
        Provider(name="forward only", build=from_function(raises_in_backward)),
        Provider(name="liger", build=build_liger),
        Provider(name="absent", build=failing("x").build, package="moefy_no_such_package"),
        OWN[-1],
    )
    result = layer.measure({"A": TINY}, providers, CPU, rep=1)
    failed = {(row.provider, row.mode): row.failed for row in result.rows}
    assert failed["broken", "forward"] == "RuntimeError: no such kernel"
    assert failed["forward only", "forward"] is None
    assert str(failed["forward only", "forward+backward"]).startswith("RuntimeError: element 0 of tensors")
    assert failed["liger", "forward"] == "runs on CUDA only"
    assert failed["dense", "forward+backward"] is None
    assert result.missing == ("absent (moefy_no_such_package)",)
    text = str(result)
    assert text.count("broken: RuntimeError: no such kernel") == 1
    assert text.endswith("not installed: absent (moefy_no_such_package)")


def test_work_that_raises_under_the_clock_gets_its_exception():
    def fail() -> None:
        raise ValueError("no")

    times = median_ms({"good": lambda: None, "bad": fail}, CPU, rep=1)
    assert isinstance(times["good"], float) and isinstance(times["bad"], ValueError)


# ---- results


def result_of(*rows: Row) -> LayerResult:
    shapes = {"A": TINY, "F16": dataclasses.replace(TINY, decode=True)}
    return LayerResult(environment={}, shapes=shapes, busiest={"A": 1.0, "F16": 2.0}, rows=rows, missing=())


def test_the_table_is_sorted_by_time_and_relates_to_dense():
    def row(provider: str, ms: float, **more: Any) -> Row:
        return Row(provider=provider, shape="A", mode="forward+backward", ms=ms, tflops=1.5, **more)

    text = str(
        result_of(
            row("slow", 8.0, errors={"out": 1e-3, "dx": 4e-3}, peak_mib=12.0),
            row("fast", 4.0),
            row("dense", 2.0),
            Row(provider="fast", shape="F16", mode="decode", ms=0.25, tflops=0.5),
        )
    )
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("dense", "fast", "slow")] == [
        "dense", "fast", "slow", "fast",
    ]  # fmt: skip
    assert ["slow", "-", "-", "-", "8.000", "1.5", "0.25", "12", "4.0e-03"] in lines
    assert ["fast", "0.250", "0.5", "-", "-", "-"] in lines


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_bars_are_drawn(tmp_path):
    rows = [Row(provider="p", shape="A", mode="forward", ms=1.0, tflops=2.0)]
    save_plot(result_of(*rows), tmp_path / "bars.svg")
    assert (tmp_path / "bars.svg").stat().st_size > 0


# ---- command line


def test_json_is_one_document_and_nothing_else(capfd):
    arguments = ["--shapes", "E,F16", "--providers", "loop,dense", "--rep", "1", "--device", "cpu", "--json"]
    assert cli.main(["bench", "layer", *arguments]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["schema_version"] == 1 and data["benchmark"] == "layer" and data["missing"] == []
    assert {"torch", "triton", "device"} <= set(data["environment"])
    modes = [(row["shape"], row["mode"]) for row in data["rows"] if row["provider"] == "loop"]
    assert modes == [("E", "forward"), ("E", "forward+backward"), ("F16", "decode")]
    loop, dense = (row for row in data["rows"] if row["mode"] == "forward+backward")
    assert set(loop["errors"]) == NAMES and loop["error"] == max(loop["errors"].values()) < 1e-5
    assert dense["error"] is None and dense["peak_mib"] is None and dense["failed"] is None
    assert loop["tflops"] == pytest.approx(3 * SMALL_SHAPES["E"].flops / loop["ms"] / 1e9)


def test_the_command_draws_a_table(tiny_shapes, capsys):
    assert (
        cli.main(["bench", "layer", "--providers", "moefy,loop,dense", "--rep", "1", "--device", "cpu"]) == 0
    )
    text = capsys.readouterr().out
    assert "A: T 13, D 16, H 24, E 5, K 2, SwiGLU" in text and "F16: T 3" in text
    assert sum(line.startswith("moefy ") for line in text.splitlines()) == 3  # the title and two rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "A,Q"], "shapes: got 'Q'; expected some of A, B"),
        (["--providers", "loop,fastmoe"], "providers: got 'fastmoe'; expected some of moefy, moefy compiled"),
        (["--device", "abacus"], "device: got 'abacus'; expected cpu"),
        (["--device", "cuda:99"], "device: got 'cuda:99'; expected cpu"),
        (["--rep", "0"], "rep: got 0.0; expected"),
    ],
)
def test_unknown_values_are_named_errors(arguments, message, capsys):
    assert cli.main(["bench", "layer", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_a_figure_that_cannot_be_drawn_stops_the_run_first(tmp_path, capsys, monkeypatch):
    def plot(path: Path) -> str:
        assert cli.main(["bench", "layer", "--plot", str(path)]) == 2
        return capsys.readouterr().err

    with monkeypatch.context() as without:
        without.setattr(layer.importlib.util, "find_spec", lambda name: None)
        assert "pip install 'moefy[plot]'" in plot(tmp_path / "bars.png")
        without.setattr(layer.importlib.util, "find_spec", lambda name: name)
        assert "plot: got" in plot(tmp_path / "bars.txt")
        assert "plot: got" in plot(tmp_path / "no" / "bars.png")


def test_listing_the_benchmark_imports_neither_triton_nor_a_peer():
    peers = [peer.package for peer in PEERS]
    program = (
        "import sys, moefy.cli.main; moefy.cli.main.build_parser();"
        f"print([name for name in ['triton', *{peers}] if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_forward_that_waits_is_not_captured():
    x = torch.ones(4, device="cuda")
    with pytest.raises(Unsupported, match="waits for the device"):
        captured(lambda: x * x.sum().item())
    replay, out = captured(lambda: x + 1)
    replay()
    assert out.tolist() == [2.0] * 4
