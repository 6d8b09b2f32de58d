"""A dense Hugging Face Llama becomes a Mixture-of-Experts, exactly, and trains on.

The model is built from its config with random weights: nothing is downloaded. Needs transformers.

    python examples/quickstart.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moefy

TEXT = Path(__file__).with_name("sonnets.txt").read_bytes()


def build_llama() -> LlamaForCausalLM:
    """A byte-level Llama with random weights, small enough for a laptop."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config)


def batch(size: int = 8, length: int = 64) -> torch.Tensor:
    """Random windows of the text, ``[size, length]`` byte ids."""
    starts = torch.randint(len(TEXT) - length, (size,)).tolist()
    return torch.stack([torch.tensor(list(TEXT[s : s + length])) for s in starts])


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """``[B, S, vocabulary]`` in eval mode."""
    return model.eval()(input_ids=ids).logits


def main() -> None:
    """Transform, report, verify, train."""
    torch.manual_seed(0)
    model = build_llama()
    probe = batch()
    dense = logits(model, probe)

    moefy.transform(model, num_experts=8, top_k=2)
    print(moefy.report(model))

    error = (logits(model, probe) - dense).norm() / dense.norm()
    print(f"\non other inputs than the check's: |MoE - dense| / |dense| = {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("the rewritten model is not exact")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    losses = []
    for step in range(20):
        ids = batch()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 5 == 0 or step == 19:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    if not losses[-1] < losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
