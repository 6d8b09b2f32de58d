"""The parts of the hand-written families that are not the FFN: attention, pre-LN blocks, a stack with a head.

>>> stack(lambda: MLP())       # 2 pre-LN blocks ``h.0``, ``h.1`` with ``MLP()`` as ``h.i.mlp``
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, H, VOCAB, LAYERS = 12, 20, 31, 2


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length))


class Attention(nn.Module):
    """Plain multi-head self-attention."""

    def __init__(self, dim: int = D, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, s, d))


class Block(nn.Module):
    """Pre-LN block around ``mlp``."""

    def __init__(self, mlp: nn.Module, dim: int = D) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    """Embedding, blocks ``h.i``, final norm, head."""

    def __init__(self, make_block: Callable[[], nn.Module], layers: int = LAYERS) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, D)
        self.h = nn.ModuleList(make_block() for _ in range(layers))
        self.ln_f = nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def stack(make_mlp: Callable[[], nn.Module]) -> tuple[nn.Module, tuple[Tensor], dict[str, object]]:
    """A pre-LN language model with ``make_mlp()`` in each block, and its inputs."""
    return Stack(lambda: Block(make_mlp())), (tokens(),), {}


def stack_of(
    make_block: Callable[[], nn.Module],
) -> tuple[nn.Module, tuple[Tensor], dict[str, object]]:
    """A language model with ``make_block()`` as each layer, and its inputs."""
    return Stack(make_block), (tokens(),), {}


class Lambda(nn.Module):
    """An MLP from named linears and a function: ``Lambda(f, up=(D, H), down=(H, D))`` runs ``f(self, x)``."""

    def __init__(
        self, function: Callable[..., Tensor], bias: bool = True, **linears: tuple[int, int]
    ) -> None:
        super().__init__()
        self.function = function
        for name, (inner, outer) in linears.items():
            self.add_module(name, nn.Linear(inner, outer, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Residual(nn.Module):
    """``x + fn(norm(x))`` where ``fn`` is a function of the block: the FFN's linears are the block's own children."""

    def __init__(
        self, function: Callable[..., Tensor], bias: bool = True, **linears: tuple[int, int]
    ) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(D)
        self.attn = Attention()
        for name, (inner, outer) in linears.items():
            self.add_module(name, nn.Linear(inner, outer, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.function(self, self.norm(x))
