"""``moefy bench routing``: what deciding costs beside computing, forward and backward.

T tokens, E experts, K top-k.

Contract: given router logits, each step is timed by itself and set against the whole layer without losses ("layer" of
``moefy bench layer``, provider "moefy"): top-k with its gradient, the sort with its offsets, and the losses with their
gradients. All in eager mode; the goal is that together they take at most 2 % of the layer on shape B.

    $ moefy bench routing --shapes B
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
from moefy.bench.layer_contract import from_function
from moefy.bench.layer_shapes import Inputs, draw_inputs, shapes_for
from moefy.bench.layer_timing import median_ms
from moefy.errors import ConfigError
from moefy.tables import Column, draw, stream_width

SCHEMA_VERSION = 1
GOAL = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingCost:
    """Milliseconds by shape and step; ``layer`` is the whole layer."""

    device: str
    ms: dict[str, dict[str, float]]

    def share(self, shape: str) -> float:
        """What all steps together take of the layer."""
        times = self.ms[shape]
        return sum(ms for step, ms in times.items() if step != "layer") / times["layer"]

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        shares = {shape: self.share(shape) for shape in self.ms}
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "routing",
            "device": self.device,
            "torch": str(torch.__version__),
            "ms": self.ms,
            "share_of_layer": shares,
        }

    def __str__(self) -> str:
        titles = ["shape", *(f"{step}\nms" for step in ("layer", *STEPS)), "share of\nthe layer"]
        columns = [Column(title=title, align="left" if i == 0 else "right") for i, title in enumerate(titles)]
        rows = [
            [shape, *(f"{times[step]:.3f}" for step in ("layer", *STEPS)), f"{self.share(shape):.1%}"]
            for shape, times in self.ms.items()
        ]
        heading = f"moefy bench routing: device {self.device}, torch {torch.__version__}"
        return "\n".join(
            [heading, "", draw(columns, rows, stream_width()), "", f"goal: {GOAL:.0%} on B, on a GPU"]
        )


def _top_k(inputs: Inputs) -> Callable[[], object]:
    from moefy.ops import top_k_softmax

    logits_TE = inputs.logits_TE.detach().requires_grad_()
    grad_TK = torch.randn(logits_TE.shape[0], inputs.shape.top_k, device=logits_TE.device)

    def step() -> None:
        logits_TE.grad = None
        weights_TK, _ = top_k_softmax(logits_TE, inputs.shape.top_k)
        weights_TK.backward(grad_TK.to(weights_TK.dtype))

    return step


def _sort(inputs: Inputs) -> Callable[[], object]:
    from moefy.ops import sort_by_expert, top_k_softmax

    _, index_TK = top_k_softmax(inputs.logits_TE, inputs.shape.top_k)
    return lambda: sort_by_expert(index_TK, inputs.shape.num_experts)


def _loss(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
    from moefy.ops import top_k_softmax

    logits_TE = inputs.logits_TE.detach().requires_grad_()
    _, index_TK = top_k_softmax(inputs.logits_TE, inputs.shape.top_k)

    def step() -> None:
        logits_TE.grad = None
        loss(logits_TE, index_TK).backward()

    return step


def _balance(inputs: Inputs) -> Callable[[], object]:
    from moefy.nn import losses

    experts = inputs.shape.num_experts
    return _loss(inputs, lambda logits, index: losses.switch(torch.softmax(logits, -1), index, experts))


def _z_loss(inputs: Inputs) -> Callable[[], object]:
    from moefy.nn import losses

    return _loss(inputs, lambda logits, _: losses.z_loss(logits))


STEPS: dict[str, Callable[[Inputs], Callable[[], object]]] = {
    "top-k": _top_k,
    "sort": _sort,
    "balance loss": _balance,
    "z-loss": _z_loss,
}


def measure(inputs: Inputs, rep: float) -> dict[str, float]:
    """Milliseconds of the layer and of each step; ``rep`` is in milliseconds, for each figure."""
    from moefy.bench.layer_providers import moefy_layer

    works: dict[str, Callable[[], object]] = {"layer": from_function(moefy_layer)(inputs).step}
    works |= {name: make(inputs) for name, make in STEPS.items()}
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
    parser.add_argument("--device", help="cuda, cuda:N or cpu; default cuda where there is one")
    parser.add_argument("--rep", type=float, metavar="MS", help="time to spend on each figure")


def _run(args: argparse.Namespace) -> RoutingCost:
    device = device_from(args.device)
    shapes = {name: shape for name, shape in shapes_for(device, args.shapes).items() if not shape.decode}
    if not shapes:
        raise ConfigError("shapes", got=",".join(args.shapes), expected="shapes that train: A B Bz C Cz D E")
    rep = rep_from(args.rep, device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return RoutingCost(device=name, ms={k: measure(draw_inputs(v, device), rep) for k, v in shapes.items()})


ROUTING_COST = Benchmark(
    name="routing",
    help="what top-k, sort and losses cost beside the layer",
    add_arguments=_add_arguments,
    run=_run,
)
