"""Hand-written models whose linears are written otherwise: Conv1D, matmul, einsum, raw parameters, 1x1 convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import D, H, Lambda, Residual, stack, stack_of
from zoo.family import Built, family, ffns, raw

MLP = "h.{}.mlp"


class Conv1D(nn.Module):
    """GPT-2's transposed linear on a 2-D view."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__()
        self.nf, self.nx = outer, inner
        self.weight = nn.Parameter(torch.randn(inner, outer) * 0.2)
        self.bias = nn.Parameter(torch.randn(outer) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


@family(
    ffns(MLP, 2, "c_fc:io", "c_proj:io", bodies.gelu_tanh),
    why="GPT-2's own Conv1D: addmm on a view, weight [in, out]; its MLP is aligned",
)
def conv1d_addmm() -> Built:
    class GPT2MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c_fc, self.c_proj = Conv1D(H, D), Conv1D(D, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

    return stack(GPT2MLP)


class RawMLP(nn.Module):
    """Bare parameters w1, b1, w2, b2 and a function."""

    def __init__(self, function: object, *, transposed: bool = False) -> None:
        super().__init__()
        shapes = [(D, H), (H, D)] if transposed else [(H, D), (D, H)]
        self.w1 = nn.Parameter(torch.randn(shapes[0]) * 0.2)
        self.w2 = nn.Parameter(torch.randn(shapes[1]) * 0.2)
        self.b1, self.b2 = nn.Parameter(torch.randn(H) * 0.1), nn.Parameter(torch.randn(D) * 0.1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator]


@family(
    ffns(MLP, 2, raw("w1", "b1"), raw("w2", "b2"), bodies.relu),
    why="x @ W.T + b on bare parameters [out, in], aligned owner",
)
def matmul_transposed() -> Built:
    def run(m: RawMLP, x: Tensor) -> Tensor:
        return F.relu(x @ m.w1.T + m.b1) @ m.w2.T + m.b2

    return stack(lambda: RawMLP(run))


@family(
    ffns(MLP, 2, raw("w1", "b1", "io"), raw("w2", "b2", "io"), bodies.silu),
    why="x @ W + b on bare parameters [in, out], aligned owner",
)
def matmul_plain() -> Built:
    def run(m: RawMLP, x: Tensor) -> Tensor:
        return F.silu(torch.matmul(x, m.w1) + m.b1) @ m.w2 + m.b2

    return stack(lambda: RawMLP(run, transposed=True))


@family(
    ffns(MLP, 2, raw("w1", "b1"), raw("w2", "b2"), bodies.gelu),
    why="F.linear on bare parameters, aligned owner",
)
def functional_linear() -> Built:
    def run(m: RawMLP, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, m.w1, m.b1)), m.w2, m.b2)

    return stack(lambda: RawMLP(run))


class EinsumMLP(nn.Module):
    """einsum on bare parameters, no bias."""

    def __init__(self, up: str, down: str, *, transposed: bool) -> None:
        super().__init__()
        self.up, self.down = up, down
        shapes = [(D, H), (H, D)] if transposed else [(H, D), (D, H)]
        self.w_in = nn.Parameter(torch.randn(shapes[0]) * 0.2)
        self.w_out = nn.Parameter(torch.randn(shapes[1]) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum(self.up, x, self.w_in)
        return torch.einsum(self.down, F.gelu(h), self.w_out)


@family(
    ffns(MLP, 2, raw("w_in"), raw("w_out"), bodies.gelu),
    why="einsum 'bsd,hd->bsh' is a linear with weight [out, in]",
)
def einsum_out_in() -> Built:
    return stack(lambda: EinsumMLP("bsd,hd->bsh", "bsh,dh->bsd", transposed=False))


@family(
    ffns(MLP, 2, raw("w_in", None, "io"), raw("w_out", None, "io"), bodies.gelu),
    why="einsum '...d,dh->...h' is a linear with weight [in, out]",
)
def einsum_in_out() -> Built:
    return stack(lambda: EinsumMLP("...d,dh->...h", "...h,hd->...d", transposed=True))


class FalconLinear(nn.Linear):
    """Falcon: an nn.Linear whose forward is matmul and add."""

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


@family(
    ffns(MLP, 2, "up", "down", bodies.gelu),
    why="a subclass of nn.Linear that computes x @ W.T + b itself",
)
def linear_subclass() -> Built:
    class Sub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = FalconLinear(D, H), FalconLinear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    return stack(Sub)


@family(
    ffns(MLP, 2, "up", "down", bodies.gelu),
    why="the aligned MLP uses F.linear(x, self.up.weight, self.up.bias): its child linears are never called",
)
def child_weights_used_directly() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, m.up.weight, m.up.bias)), m.down.weight, m.down.bias)

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, [raw("wg", None, "io"), raw("wu", None, "io")], raw("wd", None, "io"),
         bodies.glu(bodies.silu)),
    why="SwiGLU on bare [in, out] parameters",
)  # fmt: skip
def raw_swiglu() -> Built:
    class RawGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wg = nn.Parameter(torch.randn(D, H) * 0.2)
            self.wu = nn.Parameter(torch.randn(D, H) * 0.2)
            self.wd = nn.Parameter(torch.randn(H, D) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return (F.silu(x @ self.wg) * (x @ self.wu)) @ self.wd

    return stack(RawGLU)


@family(
    why="the block itself does F.linear on its own bare parameters beside attention: no module to swap",
    refused={"h.0": "raw-parameters", "h.1": "raw-parameters"},
)
def raw_parameters_inline() -> Built:
    class RawBlock(Residual):
        def __init__(self) -> None:
            super().__init__(RawBlock.mlp)
            self.w1 = nn.Parameter(torch.randn(H, D) * 0.2)
            self.w2 = nn.Parameter(torch.randn(D, H) * 0.2)

        def mlp(self, x: Tensor) -> Tensor:
            return F.linear(F.gelu(F.linear(x, self.w1)), self.w2)

    return stack_of(RawBlock)


# --- 1x1 convolutions -------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """x + mlp(norm(x)) on NCHW, after a depthwise convolution with its own residual."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mix = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.norm = nn.GroupNorm(1, D)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.mlp(self.norm(x))


def images(make: object) -> Built:
    """A stem, two blocks and a pooled head on [2, 3, 4, 4] images."""
    stem = nn.Conv2d(3, D, 2, stride=2)
    blocks = nn.Sequential(*(make() for _ in range(2)))  # type: ignore[operator]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, 5))
    model = nn.Sequential()
    model.add_module("stem", stem)
    model.add_module("blocks", blocks)
    model.add_module("head", head)
    return model, (torch.randn(2, 3, 8, 8),), {}


class ConvMLP(nn.Module):
    """fc1, act, fc2 with 1x1 convolutions."""

    def __init__(self, act: nn.Module, dim: int = D, hidden: int = H) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(dim, hidden, 1), act, nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@family(
    ffns("blocks.{}.mlp", 2, "fc1:conv", "fc2:conv", bodies.gelu, feature_dim=1),
    why="PoolFormer's MLP: two 1x1 Conv2d with GELU on NCHW, aligned",
)
def conv1x1_nchw() -> Built:
    return images(lambda: ConvBlock(ConvMLP(nn.GELU())))


@family(
    ffns("blocks.{}.mlp", 2, "fc1:conv", "fc2:conv", bodies.prelu, feature_dim=1,
         body_params={"slope": "act.weight"}),
    why="nn.PReLU(H) on NCHW: a slope per channel on axis 1",
)  # fmt: skip
def conv1x1_prelu_channels() -> Built:
    class Slope(nn.PReLU):
        pass

    return images(lambda: ConvBlock(ConvMLP(Slope(H))))


@family(
    ffns("blocks.{}", 2, "pw1:conv", "pw2:conv", bodies.gelu, form="linears", feature_dim=1),
    why="ConvNeXt in NCHW: depthwise, norm, two 1x1 convs inline, layer scale, residual to the block's input",
)
def conv1x1_inline() -> Built:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dw = nn.Conv2d(D, D, 3, padding=1, groups=D)
            self.norm = nn.GroupNorm(1, D)
            self.pw1, self.pw2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)
            self.gamma = nn.Parameter(torch.rand(D, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.pw2(F.gelu(self.pw1(self.norm(self.dw(x)))))
            return x + self.gamma * y

    return images(Inline)


@family(
    ffns("blocks.{}.mlp", 2, ["g:conv", "u:conv"], "d:conv", bodies.glu(bodies.silu),
         feature_dim=1),
    why="SwiGLU from three 1x1 convolutions",
)  # fmt: skip
def conv1x1_swiglu() -> Built:
    class ConvGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.u, self.d = nn.Conv2d(D, H, 1), nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(F.silu(self.g(x)) * self.u(x))

    return images(lambda: ConvBlock(ConvGLU()))


@family(
    ffns("blocks.{}.mlp", 2, "up:conv", "down:conv", bodies.merged(bodies.gelu),
         feature_dim=1, gated=True),
    why="merged GLU on NCHW, chunk(2, dim=1), first half activated",
)  # fmt: skip
def conv1x1_merged() -> Built:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Conv2d(D, 2 * H, 1), nn.Conv2d(H, D, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.up(x).chunk(2, dim=1)
            return self.down(F.gelu(a) * b)

    return images(lambda: ConvBlock(Merged()))


class TransposedBlock(nn.Module):
    """[B, S, D] in and out; the FFN runs on [B, D, S] with kernel-1 Conv1d inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.w_1, self.w_2 = nn.Conv1d(D, H, 1), nn.Conv1d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(1, 2)
        return x + self.w_2(F.relu(self.w_1(y))).transpose(1, 2)


@family(
    ffns("h.{}", 2, "w_1:conv", "w_2:conv", bodies.relu, form="linears", feature_dim=1),
    why="FastSpeech/Informer: transpose, kernel-1 Conv1d pair, transpose back; the transposes cancel",
)
def conv1d_transposed() -> Built:
    return stack_of(TransposedBlock)


@family(
    ffns("blocks.{}.mlp", 2, "0:conv", "2:conv", bodies.relu, feature_dim=1, bias=False),
    why="1x1x1 Conv3d pair on video NCTHW, no bias",
)
def conv3d_1x1() -> Built:
    class Video(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, D)
            up, down = nn.Conv3d(D, H, 1, bias=False), nn.Conv3d(H, D, 1, bias=False)
            self.mlp = nn.Sequential(up, nn.ReLU(), down)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(Video(), Video()))
    return model, (torch.randn(1, D, 2, 3, 3),), {}
