"""Sparse upcycling: train a small GPT-2, make it a Mixture-of-Experts, train on until it is better.

The model is plain PyTorch in GPT-2's shape (pre-norm, learned positions, gelu MLP of four times the
width), over the bytes of the text beside this file. Copied experts start exactly at the dense
model's loss. Here ``expert_noise=0.02`` adds a little noise to experts 1 to 3, so that the router
has a gradient from the first step on.

    python examples/upcycle_gpt.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefy

TEXT = torch.tensor(list(Path(__file__).with_name("sonnets.txt").read_bytes()))
CUT = len(TEXT) * 9 // 10
TRAIN, HELD_OUT = TEXT[:CUT], TEXT[CUT:]
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 96, 4, 3, 64, 16
DENSE_STEPS, MOE_STEPS, MARGIN = 120, 300, 0.05


class Attention(nn.Module):
    """Causal self-attention, ``[B, S, D] -> [B, S, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.c_attn(x).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, WIDTH))


class MLP(nn.Module):
    """GPT-2's feed-forward network: what moefy rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Byte ids ``[B, S]`` to logits ``[B, S, 256]``."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """``[len(starts), CONTEXT + 1]`` byte ids."""
    return text[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    """The loss over the text that training does not see."""
    return loss_of(model, windows(HELD_OUT, torch.arange(0, len(HELD_OUT) - CONTEXT, 8))).item()


def train(model: nn.Module, steps: int, stop_below: float = 0.0) -> int:
    """Train with AdamW until the held-out loss, read every 20 steps, is low enough. Returns the steps taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, steps + 1):
        loss = loss_of(model, windows(TRAIN, torch.randint(len(TRAIN) - CONTEXT, (BATCH,))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            now = held_out_loss(model)
            print(f"  step {step:3d}  train {loss.item():.3f}  held out {now:.3f}")
            if now < stop_below:
                return step
    return steps


def main() -> None:
    """Train the dense model, upcycle it, train the MoE."""
    torch.manual_seed(0)
    model = GPT()
    print("dense")
    train(model, DENSE_STEPS)
    start = held_out_loss(model)

    config = moefy.MoEConfig(num_experts=4, top_k=2, expert_noise=0.02)
    moefy.transform(model, config=config, example_args=(TRAIN[None, :CONTEXT],))
    print(moefy.report(model))
    print(f"held out: dense {start:.4f}, MoE before training {held_out_loss(model):.4f}")

    steps = train(model, MOE_STEPS, stop_below=start - MARGIN)
    end = held_out_loss(model)
    if not end < start - MARGIN:
        raise SystemExit(f"the MoE stayed at {end:.3f}; the dense model had {start:.3f}")
    print(f"after {steps} steps the MoE is at {end:.3f}; the dense model was at {start:.3f}")


if __name__ == "__main__":
    main()
