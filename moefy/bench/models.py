"""A plain pre-norm GPT of any size, for benchmarks.

>>> sum(p.numel() for p in GPT(layers=2, d_model=64).parameters()) > 0
True
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 512


class FeedForward(nn.Module):
    """The FFN ``down(gelu(up(x)))``, of the width that ``d_hidden`` says."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_hidden)
        self.down = nn.Linear(d_hidden, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to the same."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = FeedForward(d_model, 4 * d_model)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to the same."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Token ids ``[B, S]`` to logits ``[B, S, V]``."""

    def __init__(self, *, layers: int, d_model: int, heads: int = 4, positions: int = 256) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, d_model)
        self.position = nn.Embedding(positions, d_model)
        self.blocks = nn.ModuleList(Block(d_model, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of every position."""
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
