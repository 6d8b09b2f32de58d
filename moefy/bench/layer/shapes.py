"""The shapes of ``moefy bench layer`` and the random inputs it draws for them.

T tokens, D model width, H expert hidden width, E experts, K top-k; P = 2H with a gate, else H.

Contract: A is Mixtral's layer, B OLMoE's, C Qwen3-30B-A3B's, D has many small experts, E is an upcycled GPT-2 (gelu,
no gate), Bz and Cz send most tokens to few experts, F16 and F256 decode that many tokens with B's weights. Without a
GPU, T (but not that of F), D and H are a sixteenth. The chosen logits lead the others by at least 0.25, so that every
implementation chooses the same experts, whatever it computes in.

    >>> SHAPES["A"].flops, SMALL_SHAPES["A"].d_model
    (5772436045824, 256)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.errors import ConfigError

SHRINK = 16
MARGIN = 0.25  # between the chosen and the other logits; bf16 errors are far smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One MoE layer and its number of tokens. ``zipf``: expert loads fall as 1/rank."""

    tokens: int
    d_model: int
    d_hidden: int
    num_experts: int
    top_k: int
    gated: bool = True
    zipf: bool = False
    decode: bool = False

    @property
    def rows(self) -> int:
        """T * K, the rows that all experts together compute."""
        return self.tokens * self.top_k

    @property
    def entry_width(self) -> int:
        """P, what an expert's first product puts out."""
        return self.d_hidden * (2 if self.gated else 1)

    @property
    def flops(self) -> int:
        """Of one forward; the backward has twice as many."""
        return 2 * self.rows * self.d_model * (self.entry_width + self.d_hidden)

    def shrunk(self) -> Shape:
        """The same proportions for a CPU."""
        return dataclasses.replace(
            self,
            tokens=self.tokens if self.decode else self.tokens // SHRINK,
            d_model=self.d_model // SHRINK,
            d_hidden=self.d_hidden // SHRINK,
        )


_B = Shape(tokens=32768, d_model=2048, d_hidden=1024, num_experts=64, top_k=8)
_C = Shape(tokens=32768, d_model=2048, d_hidden=768, num_experts=128, top_k=8)

SHAPES: Mapping[str, Shape] = {
    "A": Shape(tokens=8192, d_model=4096, d_hidden=14336, num_experts=8, top_k=2),
    "B": _B,
    "Bz": dataclasses.replace(_B, zipf=True),
    "C": _C,
    "Cz": dataclasses.replace(_C, zipf=True),
    "D": Shape(tokens=16384, d_model=2048, d_hidden=512, num_experts=256, top_k=8),
    "E": Shape(tokens=16384, d_model=768, d_hidden=3072, num_experts=8, top_k=2, gated=False),
    "F16": dataclasses.replace(_B, tokens=16, decode=True),
    "F256": dataclasses.replace(_B, tokens=256, decode=True),
}
SMALL_SHAPES: Mapping[str, Shape] = {name: shape.shrunk() for name, shape in SHAPES.items()}
GROUPS: Mapping[str, tuple[str, ...]] = {"F": ("F16", "F256")}


def shapes_for(device: torch.device, names: tuple[str, ...]) -> dict[str, Shape]:
    """The named shapes in the size for ``device``; all of them when none is named.

    Raises:
        ConfigError: for a name that is neither a shape nor a group of shapes.
    """
    table = SHAPES if device.type == "cuda" else SMALL_SHAPES
    chosen = [one for name in names or tuple(table) for one in GROUPS.get(name, (name,))]
    for name in chosen:
        if name not in table:
            known = ", ".join([*table, *GROUPS])
            raise ConfigError("shapes", got=name, expected=f"some of {known}")
    return {name: table[name] for name in chosen}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """A layer's inputs: tokens, router logits, weights, and the gradient of its output."""

    shape: Shape
    x_TD: Tensor
    logits_TE: Tensor
    w1_EPD: Tensor
    w2_EDH: Tensor
    grad_TD: Tensor

    @property
    def busiest(self) -> float:
        """Rows of the busiest expert over the mean."""
        counts_E = torch.bincount(self._chosen(), minlength=self.shape.num_experts)
        return counts_E.max().item() * self.shape.num_experts / self.shape.rows

    @property
    def hit(self) -> int:
        """Number of experts that get any token."""
        return self._chosen().unique().numel()

    def _chosen(self) -> Tensor:
        return self.logits_TE.topk(self.shape.top_k, dim=1).indices.flatten()


def draw_inputs(shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Random normal inputs: bf16 on a GPU, fp32 on a CPU; logits in fp32; weights scaled by 1/sqrt(fan-in)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    return Inputs(
        shape=shape,
        x_TD=normal(shape.tokens, shape.d_model),
        logits_TE=_logits(shape, device, generator),
        w1_EPD=normal(shape.num_experts, shape.entry_width, shape.d_model).mul_(shape.d_model**-0.5),
        w2_EDH=normal(shape.num_experts, shape.d_model, shape.d_hidden).mul_(shape.d_hidden**-0.5),
        grad_TD=normal(shape.tokens, shape.d_model),
    )


def _logits(shape: Shape, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random normal; with ``zipf`` plus log(1/rank) over a random order of the experts."""
    logits_TE = torch.randn(shape.tokens, shape.num_experts, device=device, generator=generator)
    if shape.zipf:
        rank_E = 1 + torch.randperm(shape.num_experts, device=device, generator=generator)
        logits_TE -= rank_E.log()
    chosen_TK = logits_TE.topk(shape.top_k, dim=1).indices
    lowered_TE = torch.full_like(logits_TE, MARGIN).scatter_(1, chosen_TK, 0.0)
    return logits_TE - lowered_TE
