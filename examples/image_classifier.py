"""An image classifier becomes a Mixture-of-Experts: a small ViT over generated pictures of ten shapes.

Each 24x24 colour picture has one of ten shapes, at a random place, size and colour, before a random background with
noise, so that a linear model stays near chance. A dense ViT is trained, and a copy of it is upcycled with a balance
loss and a little noise on the experts. Both then train equally long in the same loop. 200 steps show that the MoE
learns as the dense model does; which of the two is ahead by then depends on the seed.

    python examples/image_classifier.py
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefy

SIZE, WIDTH, LAYERS, CLASSES, BATCH = 24, 48, 3, 10, 64


def shapes(u: Tensor, v: Tensor) -> Tensor:
    """``[N, 10, S, S]`` bool: the inside of all ten shapes. ``u`` and ``v`` are coordinates in units of their size."""
    a, b = u.abs(), v.abs()
    longer, shorter, radius = torch.maximum(a, b), torch.minimum(a, b), (u * u + v * v).sqrt()
    return torch.stack(
        [
            radius < 1,  # disc
            (radius < 1) & (radius > 0.6),  # ring
            longer < 0.85,  # square
            (longer < 0.9) & (longer > 0.5),  # frame
            a + b < 1.1,  # diamond
            (shorter < 0.25) & (longer < 1),  # plus
            ((u - v).abs().minimum((u + v).abs()) < 0.35) & (longer < 1),  # cross
            (a < (v + 1) / 2) & (b < 1),  # triangle
            (a < (1 - v) / 2) & (b < 1),  # triangle on its tip
            (torch.sin(8 * v) > 0) & (longer < 0.95),  # bars
        ],
        dim=1,
    )


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``count`` pictures ``[count, 3, S, S]``, with values of about -1 to 1, and their classes ``[count]``."""
    label = torch.randint(CLASSES, (count,), generator=generator)
    left, top, size = torch.rand(3, count, 1, 1, generator=generator)
    axis = torch.linspace(-1, 1, SIZE)
    scale = 0.4 + 0.25 * size
    u = (axis - 0.6 * (left - 0.5)) / scale
    v = (axis[:, None] - 0.6 * (top - 0.5)) / scale
    inside = shapes(*torch.broadcast_tensors(u, v))[torch.arange(count), label].unsqueeze(1)
    ground, change = torch.rand(2, count, 3, 1, 1, generator=generator)
    colour = (ground + 0.3 + 0.4 * change) % 1
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return 2 * torch.where(inside, colour, ground) - 1 + 0.1 * noise, label


class ViT(nn.Module):
    """Pictures ``[N, 3, S, S]`` to logits ``[N, 10]``: two convolutions, PyTorch's encoder, the mean of tokens."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv2d(3, WIDTH // 2, 3, stride=2, padding=1)
        self.stem = nn.Sequential(first, nn.GELU(), nn.Conv2d(WIDTH // 2, WIDTH, 3, stride=2, padding=1))
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // 4) ** 2, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.encoder(tokens).mean(1))


def train(model: nn.Module, steps: int, seed: int) -> None:
    """AdamW on fresh pictures: an ordinary loop that knows nothing of experts."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        x, label = pictures(BATCH, generator)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The share of 2000 unseen pictures that the model classifies right."""
    x, label = pictures(2000, torch.Generator().manual_seed(1 << 20))
    return (model.eval()(x).argmax(1) == label).float().mean().item()


def main() -> None:
    """Train and compare a linear model, the dense ViT and the MoE."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args().quick
    before, after = (6, 6) if quick else (450, 200)

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
    train(linear, before, seed=0)
    print(f"a linear model               {accuracy(linear):6.1%}")
    dense = ViT()
    train(dense, before, seed=0)
    start = accuracy(dense)
    print(f"dense ViT, {before:3d} steps         {start:6.1%}")

    moe = copy.deepcopy(dense)
    example = pictures(2, torch.Generator())[0]
    options = {"num_experts": 8, "top_k": 2, "aux_loss": 0.02, "expert_noise": 0.02}
    moefy.transform(moe, **options, example_args=(example,))
    print(f"the same as an MoE           {accuracy(moe):6.1%}")
    train(dense, after, seed=1)
    train(moe, after, seed=1)
    print(f"dense, {after:3d} steps more       {accuracy(dense):6.1%}")
    print(f"MoE, {after:3d} steps more         {accuracy(moe):6.1%}")
    print(moefy.expert_load(moe))
    if not quick and not accuracy(moe) > start + 0.05:
        raise SystemExit("the MoE did not learn")


if __name__ == "__main__":
    main()
