"""``moefy bench routing``: time of top-k, sort and losses beside that of the layer, forward and backward.

T tokens, E experts, K top-k.

Contract: given router logits, each step is timed by itself and set against the whole layer without losses ("layer" of
``moefy bench layer``, provider "moefy"): top-k with its gradient, the sort with its offsets, and the losses with their
gradients; then all of them as one function, as a layer runs them ("together"). Eager, and compiled with everything in
one graph each. The goal is that together they take at most 2 % of the layer on shape B.

    $ moefy bench routing --shapes B --modes eager
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy.bench.arguments import device_from, name_list, rep_from
from moefy.bench.base import Benchmark
from moefy.bench.layer.contract import from_function
from moefy.bench.layer.shapes import Inputs, draw_inputs, shapes_for
from moefy.bench.layer.timing import Work, median_ms
from moefy.errors import ConfigError
from moefy.reports.text.tables import Column, draw, stream_width

SCHEMA_VERSION = 2
GOAL = 0.02
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingCost:
    """Milliseconds by shape, mode and step; ``layer`` is the whole layer."""

    device: str
    ms: dict[str, dict[str, dict[str, float]]]

    def share(self, shape: str, mode: str) -> float:
        """Time of all steps together over that of the layer."""
        times = self.ms[shape][mode]
        return times["together"] / times["layer"]

    def to_dict(self) -> dict[str, Any]:
        """Milliseconds and shares by shape and mode, as JSON types."""
        shares = {
            shape: {mode: self.share(shape, mode) for mode in modes} for shape, modes in self.ms.items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "routing",
            "device": self.device,
            "torch": str(torch.__version__),
            "ms": self.ms,
            "share_of_layer": shares,
        }

    def __str__(self) -> str:
        names = ("layer", *STEPS)
        titles = ["shape", "mode", *(f"{name}\nms" for name in names), "share of\nthe layer"]
        columns = [Column(title=title, align="left" if i < 2 else "right") for i, title in enumerate(titles)]
        rows = [
            [shape, mode, *(f"{times[name]:.3f}" for name in names), f"{self.share(shape, mode):.1%}"]
            for shape, modes in self.ms.items()
            for mode, times in modes.items()
        ]
        heading = f"moefy bench routing: device {self.device}, torch {torch.__version__}"
        goal = f"goal: {GOAL:.0%} on B, on a GPU"
        return "\n".join([heading, "", draw(columns, rows, stream_width()), "", goal])


def _compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


MODES: dict[str, Wrap] = {"eager": lambda function: function, "compiled": _compiled}


# -- steps: each makes, from inputs, the work to time; ``wrap`` is applied to the function that computes -------------
def _top_k(inputs: Inputs, wrap: Wrap) -> Work:
    from moefy.ops import top_k_softmax

    choose, top_k = wrap(top_k_softmax), inputs.shape.top_k
    return _with_gradient(inputs, lambda logits_TE: choose(logits_TE, top_k)[:1])


def _sort(inputs: Inputs, wrap: Wrap) -> Work:
    from moefy.ops import sort_by_expert

    index_TK, sort = _chosen(inputs), wrap(sort_by_expert)
    return lambda: sort(index_TK, inputs.shape.num_experts)


def _balance(inputs: Inputs, wrap: Wrap) -> Work:
    from moefy.nn import losses
    from moefy.ops import sort_by_expert

    index_TK, experts = _chosen(inputs), inputs.shape.num_experts
    _, offsets_E = sort_by_expert(index_TK, experts)

    def loss(logits_TE: Tensor) -> Tensor:
        return losses.switch(torch.softmax(logits_TE, -1), index_TK, experts, offsets_E=offsets_E)

    wrapped = wrap(loss)
    return _with_gradient(inputs, lambda logits_TE: (wrapped(logits_TE),))


def _z_loss(inputs: Inputs, wrap: Wrap) -> Work:
    from moefy.nn import losses

    wrapped = wrap(losses.z_loss)
    return _with_gradient(inputs, lambda logits_TE: (wrapped(logits_TE),))


def _together(inputs: Inputs, wrap: Wrap) -> Work:
    from moefy.nn import losses
    from moefy.ops import sort_by_expert, top_k_softmax

    top_k, experts = inputs.shape.top_k, inputs.shape.num_experts

    def routing(logits_TE: Tensor) -> tuple[Tensor, ...]:
        weights_TK, index_TK = top_k_softmax(logits_TE, top_k)
        order_N, offsets_E = sort_by_expert(index_TK, experts)
        scores_TE = torch.softmax(logits_TE, -1)
        balance = losses.switch(scores_TE, index_TK, experts, offsets_E=offsets_E)
        z_loss = losses.z_loss(logits_TE, softmax_TE=scores_TE)
        return weights_TK, torch.add(balance, z_loss, alpha=0.1), order_N, offsets_E

    wrapped = wrap(routing)
    return _with_gradient(inputs, lambda logits_TE: wrapped(logits_TE)[:2])


STEPS: dict[str, Callable[[Inputs, Wrap], Work]] = {
    "top-k": _top_k,
    "sort": _sort,
    "balance loss": _balance,
    "z-loss": _z_loss,
    "together": _together,
}


def _chosen(inputs: Inputs) -> Tensor:
    from moefy.ops import top_k_softmax

    return top_k_softmax(inputs.logits_TE, inputs.shape.top_k)[1]


def _with_gradient(inputs: Inputs, forward: Callable[[Tensor], tuple[Tensor, ...]]) -> Work:
    """Work that runs ``forward`` on the logits, then its backward from gradients drawn beforehand."""
    logits_TE = inputs.logits_TE.detach().requires_grad_()
    grads = [torch.randn_like(out) for out in forward(logits_TE)]

    def step() -> None:
        logits_TE.grad = None
        torch.autograd.backward(forward(logits_TE), grads)

    return step


def measure(inputs: Inputs, rep: float, wrap: Wrap = MODES["eager"]) -> dict[str, float]:
    """Milliseconds of the layer and of each step; ``rep`` is in milliseconds, for each figure."""
    from moefy.bench.layer.providers import moefy_layer

    works: dict[str, Work] = {"layer": from_function(wrap(moefy_layer))(inputs).step}
    works |= {name: make(inputs, wrap) for name, make in STEPS.items()}
    for work in works.values():
        work()
    times = median_ms(works, inputs.x_TD.device, rep)
    for name, ms in times.items():
        if isinstance(ms, Exception):
            raise RuntimeError(f"{name} failed") from ms
    return {name: float(ms) for name, ms in times.items()}  # type: ignore[arg-type]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", type=name_list, default=("B",), metavar="X,X,...", help="some of A B Bz C Cz D E"
    )
    parser.add_argument(
        "--modes",
        type=name_list,
        default=tuple(MODES),
        metavar="X,X",
        help="some of eager compiled; default both",
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default cuda where there is one")
    parser.add_argument("--rep", type=float, metavar="MS", help="time to spend on each figure")


def _run(args: argparse.Namespace) -> RoutingCost:
    device = device_from(args.device)
    shapes = {name: shape for name, shape in shapes_for(device, args.shapes).items() if not shape.decode}
    if not shapes:
        raise ConfigError("shapes", got=",".join(args.shapes), expected="shapes that train: A B Bz C Cz D E")
    unknown = [mode for mode in args.modes if mode not in MODES]
    if unknown or not args.modes:
        raise ConfigError("modes", got=",".join(args.modes), expected=f"some of {', '.join(MODES)}")
    rep = rep_from(args.rep, device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    ms: dict[str, dict[str, dict[str, float]]] = {}
    for shape in shapes:
        inputs = draw_inputs(shapes[shape], device)
        ms[shape] = {mode: measure(inputs, rep, MODES[mode]) for mode in args.modes}
    return RoutingCost(device=name, ms=ms)


ROUTING_COST = Benchmark(
    name="routing",
    help="what top-k, sort and losses cost beside the layer",
    add_arguments=_add_arguments,
    run=_run,
)
