"""``moefy bench layer``: moefy's MoE layer beside other implementations and the dense ceiling.

Contract: the layer is given router logits and does the rest: top-k, softmax over the chosen, dispatch, experts,
weighted combine; backward to x, W1, W2 and the logits. All providers get the same inputs, are checked against a
reference on them, and are timed in one run. A missing provider is listed, a failing one gets a row that says why.

    $ moefy bench layer                                       # everything; small shapes without a GPU
    $ moefy bench layer --shapes B,F --providers "moefy compiled,dense" --json
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moefy
from moefy.bench.arguments import device_from, name_list, rep_from
from moefy.bench.base import Benchmark
from moefy.bench.layer.contract import BoundLayer, Provider, Unsupported, reference, relative_errors
from moefy.bench.layer.result import LayerResult, Mode, Row, save_plot
from moefy.bench.layer.shapes import Inputs, Shape, draw_inputs, shapes_for
from moefy.bench.layer.timing import Work, captured, median_ms, peak_mib
from moefy.errors import ConfigError, UsageError
from moefy.reports.environment import package_version

FIGURES = (".pdf", ".png", ".svg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trial:
    """A layer that is ready to be timed in one mode: warmed up and checked."""

    work: Work
    errors: Mapping[str, float]
    peak_mib: float | None


def measure(
    shapes: Mapping[str, Shape], providers: tuple[Provider, ...], device: torch.device, rep: float
) -> LayerResult:
    """Measure every provider on every shape, for about ``rep`` milliseconds per row."""
    found = tuple(p for p in providers if p.package is None or importlib.util.find_spec(p.package))
    rows: list[Row] = []
    busiest: dict[str, float] = {}
    for name, shape in shapes.items():
        _tell(f"{name}: {', '.join(p.name for p in found)}")
        if device.type == "cuda":
            torch._dynamo.reset()  # sizes are constants on a GPU: without a reset Dynamo refuses the ninth graph
        inputs = draw_inputs(shape, device)
        busiest[name] = inputs.busiest
        rows += _shape_rows(name, inputs, found, rep)
        del inputs
        gc.collect()
    return LayerResult(
        environment=_environment(device),
        shapes=shapes,
        busiest=busiest,
        rows=tuple(rows),
        missing=tuple(f"{p.name} ({p.package})" for p in providers if p not in found),
    )


def _shape_rows(name: str, inputs: Inputs, providers: tuple[Provider, ...], rep: float) -> list[Row]:
    truth = reference(inputs)
    built = {provider.name: _attempt(lambda p=provider: p.build(inputs)) for provider in providers}
    modes: tuple[Mode, ...] = ("decode",) if inputs.shape.decode else ("forward", "forward+backward")
    rows = []
    for mode in modes:
        trials = {who: _trial(layer, mode, inputs, truth) for who, layer in built.items()}
        works = {who: trial.work for who, trial in trials.items() if isinstance(trial, _Trial)}
        times = median_ms(works, inputs.x_TD.device, rep)
        rows += [_row(name, inputs.shape, mode, who, trials[who], times.get(who)) for who in built]
        for layer in built.values():
            if isinstance(layer, BoundLayer):
                layer.clear()
    return rows


def _trial(
    layer: BoundLayer | Exception, mode: Mode, inputs: Inputs, truth: Mapping[str, Tensor]
) -> _Trial | Exception:
    if isinstance(layer, Exception):
        return layer
    return _attempt(lambda: _prepare(layer, mode, inputs, truth))


def _prepare(layer: BoundLayer, mode: Mode, inputs: Inputs, truth: Mapping[str, Tensor]) -> _Trial:
    """Warm up and check ``layer``, and return the work that ``mode`` times."""
    device, checked = inputs.x_TD.device, layer.answer is not None
    if mode == "forward+backward":
        errors = relative_errors(layer.answer(), truth) if layer.answer is not None else {}
        peak = peak_mib(layer.step, device)
        layer.clear()
        return _Trial(work=layer.step, errors=errors, peak_mib=peak if checked else None)
    forward = torch.no_grad()(layer.forward)
    errors = relative_errors({"out": forward()}, truth) if checked else {}
    peak = peak_mib(forward, device)
    work: Work = forward
    if mode == "decode" and device.type == "cuda":
        work, out_TD = captured(forward)
        errors = relative_errors({"out": out_TD}, truth) if checked else {}
    return _Trial(work=work, errors=errors, peak_mib=peak if checked else None)


def _row(
    name: str,
    shape: Shape,
    mode: Mode,
    provider: str,
    trial: _Trial | Exception,
    ms: float | Exception | None,
) -> Row:
    if isinstance(trial, Exception):
        return Row(provider=provider, shape=name, mode=mode, failed=_reason(trial))
    if ms is None or isinstance(ms, Exception):
        return Row(provider=provider, shape=name, mode=mode, failed=_reason(ms))
    flops = shape.flops * (3 if mode == "forward+backward" else 1)
    return Row(
        provider=provider,
        shape=name,
        mode=mode,
        ms=ms,
        tflops=flops / ms / 1e9,
        errors=trial.errors,
        peak_mib=trial.peak_mib,
    )


def _attempt(make: Callable[[], Any]) -> Any:
    """What ``make`` returns, or the exception that stopped it: one provider's failure is not the run's."""
    try:
        return make()
    except Exception as error:
        error.__traceback__ = None  # its frames would keep the provider's tensors alive
        return error


def _reason(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, Unsupported) else f"{type(error).__name__}: {lines[0][:200]}"


def _tell(text: str) -> None:
    print(f"moefy bench layer: {text}", file=sys.stderr, flush=True)


def _environment(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "threads": None if on_gpu else torch.get_num_threads(),
        "torch": str(torch.__version__),
        "triton": package_version("triton"),
        "moefy": moefy.__version__,
    }


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = {"type": name_list, "default": (), "metavar": "X,X,..."}
    parser.add_argument("--shapes", **names, help="some of A B Bz C Cz D E F16 F256 (F: both); default all")
    parser.add_argument("--providers", **names, help="by name, as the table shows them; default all")
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default cuda where there is one")
    parser.add_argument(
        "--rep",
        type=float,
        metavar="MS",
        help="time to spend on each figure; default 200 on a GPU, 30 on a CPU",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw bars (needs the extra 'plot')")


def _run(args: argparse.Namespace) -> LayerResult:
    device = device_from(args.device)
    shapes, providers = shapes_for(device, args.shapes), _providers(args.providers)
    rep = rep_from(args.rep, device)
    if args.plot is not None:
        _check_plot(args.plot)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    result = measure(shapes, providers, device, rep)
    if args.plot is not None:
        save_plot(result, args.plot)
    return result


def _providers(names: tuple[str, ...]) -> tuple[Provider, ...]:
    from moefy.bench.layer.peers import PEERS
    from moefy.bench.layer.providers import OWN

    known = {provider.name: provider for provider in (*OWN, *PEERS)}
    for name in names:
        if name not in known:
            raise ConfigError("providers", got=name, expected=f"some of {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names or known))


def _check_plot(path: Path) -> None:
    """Fail before anything is measured if the figure could not be saved.

    Raises:
        UsageError: matplotlib is not installed.
        ConfigError: the path has another suffix than ``FIGURES``, or its folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'moefy[plot]'")
    if path.suffix not in FIGURES or not path.parent.is_dir():
        raise ConfigError("plot", got=str(path), expected=f"a {', '.join(FIGURES)} in a folder that exists")


LAYER = Benchmark(
    name="layer",
    help="time, memory and error of moefy's MoE layer beside other implementations",
    add_arguments=_add_arguments,
    run=_run,
)
