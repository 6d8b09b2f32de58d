"""Vision Transformers from timm and torchvision as Mixture-of-Experts.

Needs both libraries; no weights are downloaded. No example inputs are needed: moefy derives the
image size from what the model tells about itself.

    python examples/vit.py
"""

from __future__ import annotations

import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer

import moefy


def build_models() -> dict[str, nn.Module]:
    """A small model of each library, random weights."""
    timm_vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=64, depth=4, num_classes=10
    )
    torchvision_vit = VisionTransformer(
        image_size=64,
        patch_size=16,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
        num_classes=10,
    )
    # torchvision starts the head at zero, which would make every output zero and the check empty.
    nn.init.normal_(torchvision_vit.heads[-1].weight, std=0.02)
    return {"timm": timm_vit, "torchvision": torchvision_vit}


def upcycle(name: str, model: nn.Module) -> None:
    """Transform one model, compare it with the dense one, take one training step."""
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        dense = model.eval()(images)

    moefy.transform(model, num_experts=4, top_k=2)
    print(moefy.report(model))
    with torch.no_grad():
        error = ((model(images) - dense).norm() / dense.norm()).item()
    print(f"{name}: |MoE - dense| / |dense| = {error:.1e}\n")
    if not error < 1e-5:
        raise SystemExit(f"{name} is not exact")

    model.train()
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise SystemExit(f"{name}: no gradient for {missing}")


def main() -> None:
    """Take each library's model in turn."""
    torch.manual_seed(0)
    for name, model in build_models().items():
        upcycle(name, model)


if __name__ == "__main__":
    main()
