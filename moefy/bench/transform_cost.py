"""``moefy bench transform``: what ``moefy.transform`` costs in time and memory, and how it grows with depth.

Contract: times are the best of several runs, since other work on the machine only adds. Costs in forwards are multiples
of one eager forward of the same dense model on the same inputs. The copies that upcycling cannot avoid (E times every
FFN weight) are timed alone and subtracted. Memory is the rise of the resident set in a fresh process, less the bytes of
the new weights.

    $ moefy bench transform --layers 6,12,24
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moefy.bench.base import Benchmark
from moefy.bench.memory import in_fresh_process, peak_growth
from moefy.bench.models import GPT, VOCABULARY
from moefy.reports.text.tables import Column, draw, size, stream_width

SCHEMA_VERSION = 1
MAX_FORWARDS = 5.0  # what transform(check=False) may cost beside the weight copies
MAX_CHECK_FORWARDS = 1.0  # what check=True may add, in forwards of the rewritten model


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthCost:
    """Milliseconds for one depth. ``*_forwards`` are multiples of one forward."""

    layers: int
    forward_ms: float
    forward_moe_ms: float
    copies_ms: float
    transform_ms: float
    transform_checked_ms: float

    @property
    def forwards(self) -> float:
        """Cost of ``transform(check=False)`` beside the copies, in dense forwards."""
        return max(0.0, self.transform_ms - self.copies_ms) / self.forward_ms

    @property
    def check_forwards(self) -> float:
        """What ``check=True`` adds, in forwards of the rewritten model."""
        return max(0.0, self.transform_checked_ms - self.transform_ms) / self.forward_moe_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes, for one depth. ``beyond_bytes`` is the rise of the resident set less the new weights."""

    layers: int
    new_weights_bytes: int
    one_layer_bytes: int
    rise_bytes: int

    @property
    def beyond_bytes(self) -> int:
        """Peak memory beyond the new weights."""
        return self.rise_bytes - self.new_weights_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformCost:
    """What was measured, over all depths."""

    d_model: int
    num_experts: int
    tokens: int
    threads: int
    depths: tuple[DepthCost, ...]
    memory: MemoryCost

    @property
    def growth(self) -> float:
        """Cost per layer of the deepest model over that of the shallowest; 1 is linear."""
        first, last = self.depths[0], self.depths[-1]
        return (last.transform_ms / last.layers) / (first.transform_ms / first.layers)

    def to_dict(self) -> dict[str, Any]:
        """Costs by depth, and memory, as JSON types."""
        depths = [
            {**dataclasses.asdict(d), "forwards": d.forwards, "check_forwards": d.check_forwards}
            for d in self.depths
        ]
        memory = {**dataclasses.asdict(self.memory), "beyond_bytes": self.memory.beyond_bytes}
        plain = ("d_model", "num_experts", "tokens", "threads", "growth")
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": "transform",
            **{name: getattr(self, name) for name in plain},
            "depths": depths,
            "memory": memory,
            "torch": str(torch.__version__),
        }

    def __str__(self) -> str:
        titles = ("layers", "forward", "copies", "transform", "beside copies", "check adds")
        units = ("", "ms", "ms", "ms", "dense forwards", "MoE forwards")
        columns = [
            Column(title=f"{title}\n{unit}", align="right") for title, unit in zip(titles, units, strict=True)
        ]
        rows = [
            [
                str(d.layers),
                f"{d.forward_ms:.1f}",
                f"{d.copies_ms:.1f}",
                f"{d.transform_ms:.1f}",
                f"{d.forwards:.2f}",
                f"{d.check_forwards:.2f}",
            ]
            for d in self.depths
        ]
        return "\n".join([self._heading(), "", draw(columns, rows, stream_width()), "", *self._verdicts()])

    def _heading(self) -> str:
        return (
            f"moefy bench transform: D {self.d_model}, {self.num_experts} experts, {self.tokens} tokens, "
            f"{self.threads} threads, torch {torch.__version__}"
        )

    def _verdicts(self) -> list[str]:
        worst, memory = max(d.forwards for d in self.depths), self.memory
        checks = max(d.check_forwards for d in self.depths)
        first, last = self.depths[0].layers, self.depths[-1].layers
        return [
            f"transform(check=False): at most {worst:.2f} dense forwards beside the copies "
            f"(bound {MAX_FORWARDS:.0f})",
            f"check=True adds at most {checks:.2f} forwards of the rewritten model "
            f"(bound {MAX_CHECK_FORWARDS:.0f})",
            f"cost per layer at {last} layers over that at {first}: {self.growth:.2f} (1 is linear)",
            f"peak memory beyond the new weights ({size(memory.new_weights_bytes)}): "
            f"{size(memory.beyond_bytes)} (bound: one layer, {size(memory.one_layer_bytes)})",
        ]


def measure(
    depths: Sequence[int], *, d_model: int, num_experts: int, repeats: int, tokens: int = 512
) -> TransformCost:
    """Time every depth in this process; measure memory at the shallowest depth in a fresh one."""
    torch.manual_seed(0)
    _transformed(GPT(layers=1, d_model=d_model), _ids(tokens), num_experts, check=True)  # warm up
    costs = tuple(_time_depth(layers, d_model, num_experts, repeats, tokens) for layers in depths)
    memory = in_fresh_process(__name__, "memory_figures", min(depths), d_model, num_experts)
    return TransformCost(
        d_model=d_model,
        num_experts=num_experts,
        tokens=tokens,
        threads=torch.get_num_threads(),
        depths=costs,
        memory=MemoryCost(**memory),
    )


def _time_depth(layers: int, d_model: int, experts: int, repeats: int, tokens: int) -> DepthCost:
    dense, ids = GPT(layers=layers, d_model=d_model).eval(), _ids(tokens)

    def fresh() -> nn.Module:
        return copy.deepcopy(dense)

    def unchecked(model: nn.Module) -> nn.Module:
        return _transformed(model, ids, experts, check=False)

    def checked(model: nn.Module) -> nn.Module:
        return _transformed(model, ids, experts, check=True)

    with torch.no_grad():
        forward = _best_ms(lambda model: model(ids), repeats, lambda: dense)
        forward_moe = _best_ms(lambda model: model(ids), repeats, lambda: unchecked(fresh()))
    return DepthCost(
        layers=layers,
        forward_ms=forward,
        forward_moe_ms=forward_moe,
        copies_ms=_best_ms(lambda model: _copies(model, experts), repeats, lambda: dense),
        transform_ms=_best_ms(unchecked, repeats, fresh),
        transform_checked_ms=_best_ms(checked, repeats, fresh),
    )


def _transformed(model: nn.Module, ids: Tensor, experts: int, *, check: bool) -> nn.Module:
    import moefy

    return moefy.transform(model, num_experts=experts, example_args=(ids,), check=check)


def _copies(dense: nn.Module, experts: int) -> list[Tensor]:
    """The new weights alone: every FFN parameter, ``experts`` times."""
    return [
        parameter.detach().expand(experts, *parameter.shape).clone()
        for name, parameter in dense.named_parameters()
        if ".mlp." in name
    ]


def _best_ms(work: Callable[[nn.Module], object], repeats: int, setup: Callable[[], nn.Module]) -> float:
    """Fewest milliseconds of ``work(setup())``; neither ``setup`` nor freeing the result is timed."""
    times = []
    for _ in range(repeats):
        subject = setup()
        start = time.perf_counter()
        result = work(subject)
        times.append((time.perf_counter() - start) * 1e3)
        del result
    return min(times)


def _ids(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = min(tokens, 128)
    return torch.randint(VOCABULARY, (max(1, tokens // length), length), generator=generator)


def memory_figures(layers: int, d_model: int, num_experts: int) -> dict[str, int]:
    """The fields of ``MemoryCost``, measured in this process; few tokens keep activations small."""
    warm = GPT(layers=1, d_model=64).eval()
    _transformed(warm, _ids(8), num_experts, check=False)
    model = GPT(layers=layers, d_model=d_model).eval()
    ffn = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".mlp." in n)
    rise = peak_growth(lambda: _transformed(model, _ids(8), num_experts, check=False))
    new = ffn * num_experts
    cost = MemoryCost(layers=layers, new_weights_bytes=new, one_layer_bytes=new // layers, rise_bytes=rise)
    return dataclasses.asdict(cost)


def _depth_list(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        depths = ()
    if not depths or depths[0] < 1:
        raise argparse.ArgumentTypeError(f"expected positive depths such as 6,12,24; got {text!r}")
    return depths


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    depths = {"type": _depth_list, "default": (6, 12, 24), "metavar": "N,N,..."}
    parser.add_argument("--layers", **depths, help="depths to measure; default 6,12,24")
    parser.add_argument("--d-model", type=int, default=256, help="model width; default 256")
    parser.add_argument("--num-experts", type=int, default=8, help="default 8")
    parser.add_argument("--repeats", type=int, default=5, help="runs per figure; default 5")


def _run(args: argparse.Namespace) -> TransformCost:
    return measure(args.layers, d_model=args.d_model, num_experts=args.num_experts, repeats=args.repeats)


TRANSFORM_COST = Benchmark(
    name="transform",
    help="time and memory of moefy.transform, relative to one forward of the model",
    add_arguments=_add_arguments,
    run=_run,
)
