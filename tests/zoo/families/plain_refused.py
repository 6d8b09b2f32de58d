"""Hand-written look-alikes: linear, something that is not token-wise, linear. Each with its reason code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Block, D, H, Lambda, Stack, stack, stack_of, tokens
from zoo.families.plain_forms import ConvBlock, ConvMLP, images
from zoo.family import ANY, Built, family, ffns

GELU = ffns("h.{}.mlp", 2, "up", "down", bodies.gelu)


def mlp() -> nn.Module:
    return Lambda(lambda m, x: m.down(F.gelu(m.up(x))), up=(D, H), down=(H, D))


class Between(nn.Module):
    """up, gelu, ``middle``, down."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(D, H), middle, nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(F.gelu(self.up(x))))


@family(
    why="sub-LN (EVA-02, BitNet): a LayerNorm over H sits between activation and exit",
    refused={"h.0.mlp": "norm-between", "h.1.mlp": "norm-between"},
)
def layer_norm_between() -> Built:
    return stack(lambda: Between(nn.LayerNorm(H)))


@family(
    why="a hand-written RMS norm between: its mean over the features is a reduction",
    refused={"h.0.mlp": "norm-between|reduction-between"},
)
def handwritten_rms_between() -> Built:
    class RMS(nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    return stack(lambda: Between(RMS()))


@family(
    why="softmax between (external attention memory) normalises over the features",
    refused={"h.0.mlp": "norm-between|reduction-between"},
)
def softmax_between() -> Built:
    return stack(lambda: Between(nn.Softmax(dim=-1)))


class GRN(nn.Module):
    """ConvNeXt-V2's global response norm over the tokens."""

    def __init__(self, channel_axis: int) -> None:
        super().__init__()
        self.axis = channel_axis
        self.gamma = nn.Parameter(torch.rand(H))

    def forward(self, h: Tensor) -> Tensor:
        energy = h.norm(p=2, dim=1, keepdim=True)
        return h + self.gamma * h * (energy / (energy.mean(-1, keepdim=True) + 1e-6))


@family(
    why="GRN: the norm runs over the token axis, so tokens mix between the linears",
    refused={"h.0.mlp": "norm-between|reduction-between"},
)
def grn_between() -> Built:
    return stack(lambda: Between(GRN(-1)))


@family(
    why="BatchNorm between 1x1 convolutions mixes tokens in training",
    refused={"blocks.0.mlp": "norm-between", "blocks.1.mlp": "norm-between"},
)
def batch_norm_between() -> Built:
    return images(
        lambda: ConvBlock(
            nn.Sequential(
                nn.Conv2d(D, H, 1), nn.BatchNorm2d(H), nn.ReLU(), nn.Conv2d(H, D, 1)
            )
        )
    )  # fmt: skip


@family(
    why="a depthwise 3x3 convolution between (PVT-v2, SegFormer, MBConv) mixes tokens",
    refused={"blocks.0.mlp": "conv-between", "blocks.1.mlp": "conv-between"},
)
def depthwise_between() -> Built:
    return images(
        lambda: ConvBlock(
            nn.Sequential(
                nn.Conv2d(D, H, 1),
                nn.Conv2d(H, H, 3, padding=1, groups=H),
                nn.GELU(),
                nn.Conv2d(H, D, 1),
            )
        )
    )


@family(
    why="grouped 1x1 convolutions (SqueezeBERT) are block-diagonal, not one linear",
    refused={"blocks.0.mlp": "grouped", "blocks.1.mlp": "grouped"},
)
def grouped_conv1x1() -> Built:
    return images(
        lambda: ConvBlock(
            nn.Sequential(nn.Conv2d(D, H, 1, groups=4), nn.GELU(), nn.Conv2d(H, D, 1, groups=4))
        )
    )


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu),
    why="MLP-Mixer: the token MLP works on the transposed axis, the channel MLP is an FFN",
    refused={"h.0.token_mlp": "feature-axis", "h.1.token_mlp": "feature-axis"},
)
def mixer() -> Built:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.token_mlp = Lambda(lambda m, x: m.b(F.gelu(m.a(x))), a=(5, 9), b=(9, 5))
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.token_mlp(self.n1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.mlp(self.n2(x))

    return stack_of(Mixer)


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu),
    why="square Mixer: tokens == channels, so only the moved axis tells the two MLPs apart",
    refused={"h.0.token_mlp": "feature-axis", "h.1.token_mlp": "feature-axis"},
)
def mixer_square() -> Built:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.token_mlp, self.mlp = mlp(), mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.token_mlp(self.n1(x).mT).mT
            return x + self.mlp(self.n2(x))

    return Stack(Mixer), (tokens(length=D),), {}


@family(
    ffns("blocks.{}.mlp", 2, "fc1:conv", "fc2:conv", bodies.gelu, feature_dim=1),
    why="squeeze-and-excite: pooled, two 1x1 convs, then multiplied: no residual add; the MLP beside it is an FFN",
    refused={"blocks.0.se": "no-residual", "blocks.1.se": "no-residual"},
)
def squeeze_excite() -> Built:
    class SE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce, self.expand = nn.Conv2d(D, 4, 1), nn.Conv2d(4, D, 1)

        def forward(self, x: Tensor) -> Tensor:
            s = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
            return x * s.sigmoid()

    class SEBlock(ConvBlock):
        def __init__(self) -> None:
            super().__init__(ConvMLP(nn.GELU()))
            self.se = SE()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.se(x))

    return images(SEBlock)


@family(
    why="the hidden activation is concatenated with the source before the exit",
    refused={"h.0.mlp": "concat-between|different-source"},
)
def concat_between() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(torch.cat([F.gelu(m.up(x)), x], dim=-1))

    return stack(lambda: Lambda(run, up=(D, H), down=(H + D, D)))


@family(
    why="Maxout: the maximum over pieces is a reduction of the features",
    refused={"h.0.mlp": "reduction-between"},
)
def maxout() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(m.up(x).unflatten(-1, (H // 2, 2)).amax(-1))

    return stack(lambda: Lambda(run, up=(D, H), down=(H // 2, D)))


@family(
    why="token shift in the hidden layer: torch.roll over the sequence mixes tokens",
    refused={"h.0.mlp": "opaque-between|concat-between"},
)
def roll_between() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(F.gelu(torch.roll(m.up(x), 1, dims=1)))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    why="cumulative sum over the tokens between the linears",
    refused={"h.0.mlp": "opaque-between|reduction-between"},
)
def cumsum_between() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(F.silu(m.up(x).cumsum(1)))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    why="a padding mask [B, S, 1] multiplies the hidden rows: it is indexed by token, the rows are sorted by expert",
    refused={"h.0.mlp": "different-source", "h.1.mlp": "different-source"},
)
def mask_in_body() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        keep = (x.sum(-1, keepdim=True) > -3).to(x.dtype)
        return m.down(F.relu(m.up(x)) * keep)

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    why="a learnable [S, H] term is added per position: a parameter, but one that is indexed by token",
    refused={"h.0.mlp": ANY, "h.1.mlp": ANY},
)
def positional_in_body() -> Built:
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
            self.pos = nn.Parameter(torch.randn(5, H))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x) + self.pos))

    return stack(Positional)


@family(
    why="the exit reads the hidden features in another axis order: the second linear works over the tokens",
    refused={"h.0.mlp": "feature-axis|width-change"},
)
def axis_moved_between() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(F.gelu(m.up(x)).transpose(1, 2)).transpose(1, 2)

    return Stack(lambda: Block(Lambda(run, up=(D, D), down=(D, D)))), (tokens(length=D),), {}


@family(
    why="gMLP: the spatial gating unit norms one half and mixes it over the tokens with a linear",
    refused={"h.0": ANY, "h.1": ANY},
)
def spatial_gating() -> Built:
    class GMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.sgu_norm = nn.LayerNorm(D), nn.LayerNorm(H)
            self.up, self.down, self.mix = nn.Linear(D, 2 * H), nn.Linear(H, D), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
            v = self.mix(self.sgu_norm(v).transpose(1, 2)).transpose(1, 2)
            return x + self.down(u * v)

    return stack_of(GMLP)
