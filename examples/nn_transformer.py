"""``nn.TransformerEncoder`` as a Mixture-of-Experts: padding, training, and ``torch.compile``.

PyTorch's encoder has a fused path for inference that reads the dense weights, and nested tensors
for padded batches. ``moefy.transform`` switches both off on the layers that it rewrites, and
``moefy.undo`` switches them on again.

    python examples/nn_transformer.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moefy


def build_encoder() -> nn.TransformerEncoder:
    """Three gelu layers of width 64."""
    layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 3).eval()


def relative(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|``."""
    return ((got - expected).norm() / expected.norm()).item()


def main() -> None:
    """Compare with the dense encoder under a padding mask, then train the compiled model."""
    torch.manual_seed(0)
    model = build_encoder()
    x = torch.randn(4, 20, 64)
    padding = torch.arange(20) >= torch.tensor([20, 11, 15, 7])[:, None]
    kept = ~padding
    with torch.no_grad():
        dense = model(x, src_key_padding_mask=padding)[kept]

    moefy.transform(model, num_experts=4, top_k=2)
    print(moefy.report(model))
    with torch.no_grad():
        error = relative(model(x, src_key_padding_mask=padding)[kept], dense)
    print(f"on the words that are not padding: |MoE - dense| / |dense| = {error:.1e}")
    if not error < 1e-5:
        raise SystemExit("the encoder is not exact")

    model.train()
    target = torch.roll(x, 1, dims=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="aot_eager")
    losses = []
    for _ in range(15):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"compiled training: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if not losses[-1] < losses[0]:
        raise SystemExit("the loss did not fall")


if __name__ == "__main__":
    main()
