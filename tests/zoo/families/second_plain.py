"""A second set of hand-written models, written without looking at the matcher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Attention, Block, D, H, Lambda, Residual, Stack, stack, stack_of, tokens
from zoo.family import ANY, Built, family, ffns, raw

MLP = "h.{}.mlp"
UP_DOWN = {"up": (D, H), "down": (H, D)}


@family(
    why="three linears deep: no pair of neighbours maps D to D, so there is no two-linear FFN",
    refused={"h.0.mlp": "width-change|no-residual", "h.1.mlp": "width-change|no-residual"},
)
def three_layers_deep() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(F.relu(m.b(F.relu(m.a(x)))))

    return stack(lambda: Lambda(run, a=(D, H), b=(H, H), c=(H, D)))


@family(
    why="highway: t * mlp(x) + (1 - t) * x, the exit is multiplied by another D-wide activation",
    refused={"h.0": "no-residual", "h.1": "no-residual"},
)
def highway() -> Built:
    class Highway(Residual):
        def forward(self, x: Tensor) -> Tensor:
            t = torch.sigmoid(self.gate(x))
            return t * self.down(F.relu(self.up(x))) + (1 - t) * x

    return stack_of(lambda: Highway(lambda m, x: x, gate=(D, D), **UP_DOWN))


@family(
    ffns(MLP, 2, raw("up.weight"), "down", bodies.gelu),
    why="the entry has no bias, the exit has one",
)
def bias_on_the_exit_only() -> Built:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H, bias=False), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    return stack(Mixed)


@family(
    ffns(MLP, 2, "up", raw("down.weight"), bodies.gelu),
    why="the entry has a bias, the exit has none",
)
def bias_on_the_entry_only() -> Built:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    return stack(Mixed)


@family(
    ffns("h.{}", 2, "up", "down", bodies.silu, form="linears"),
    why="ReZero: x + alpha * mlp(x), alpha a scalar parameter, no norm anywhere",
)
def rezero_inline() -> Built:
    class ReZero(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.alpha * m.down(F.silu(m.up(x))), **UP_DOWN)
            self.alpha = nn.Parameter(torch.tensor(0.7))
            self.norm = nn.Identity()

    return stack_of(ReZero)


@family(
    ffns("h.{}", 2, "up", "down", bodies.leaky_relu(0.01), form="linears"),
    why="in-place modules between inline linears: nn.LeakyReLU(inplace=True), nn.Dropout(inplace=True)",
)
def inplace_modules_inline() -> Built:
    class Inplace(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.down(m.drop(m.act(m.up(x)))), **UP_DOWN)
            self.act, self.drop = nn.LeakyReLU(inplace=True), nn.Dropout(0.2, inplace=True)

    return stack_of(Inplace)


@family(
    ffns("h.{}", 2, "up", "down", lambda h: bodies.relu(h + 1), form="linears"),
    why="Tensor methods that overwrite: h.add_(1).relu_()",
)
def inplace_methods_inline() -> Built:
    return stack_of(lambda: Residual(lambda m, x: m.down(m.up(x).add_(1).relu_()), **UP_DOWN))


@family(
    ffns("h.{}", 2, "up", "down", bodies.gelu, form="linears"),
    why="an early return for empty batches and a size check in Python do not change what runs",
)
def python_checks() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        if h.numel() == 0 or h.size(-1) != m.down.in_features:
            raise RuntimeError(f"unexpected {tuple(h.shape)}")
        return m.down(F.gelu(h))

    return stack_of(lambda: Residual(mlp, **UP_DOWN))


@family(
    refused={"h.0": "opaque-between|feature-axis"},
    why="unbind of an unflattened pair of halves is a chunk by another name, which the matcher does not know: refused",
)
def unflatten_halves() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        first, second = m.a(x).unflatten(-1, (2, H)).unbind(-2)
        return m.c(F.relu(first) * torch.sigmoid(second))

    return stack_of(lambda: Residual(mlp, a=(D, 2 * H), c=(H, D)))


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu),
    why="the branch is stacked with the stream and summed over the new axis: an add by another name",
)
def stack_and_sum() -> Built:
    class Summing(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return torch.stack([x, self.mlp(self.ln_2(x))]).sum(0)

    mlp = lambda: Lambda(lambda m, x: m.down(F.gelu(m.up(x))), **UP_DOWN)  # noqa: E731
    return stack_of(lambda: Summing(mlp()))


@family(
    why="two layers tie the weights of separate linears: one parameter under two names",
    refused={"h.0.mlp": "shared-weight", "h.1.mlp": "shared-weight"},
)
def tied_across_layers() -> Built:
    model = Stack(lambda: Block(Lambda(lambda m, x: m.down(F.gelu(m.up(x))), **UP_DOWN)))
    model.h[1].mlp.up.weight = model.h[0].mlp.up.weight
    return model, (tokens(),), {}


@family(
    why="the output embedding is also the FFN's exit weight: it must stay a plain matrix",
    refused={"mlp": "shared-weight"},
)
def exit_tied_to_head() -> Built:
    class TiedHead(Stack):
        def __init__(self) -> None:
            super().__init__(
                lambda: Block(Lambda(lambda m, x: m.down(F.relu(m.up(x))), up=(D, D), down=(D, D))), 1
            )
            self.out = nn.Linear(D, D, bias=False)
            self.out.weight = self.h[0].mlp.down.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.h[0](self.wte(ids)))

    return TiedHead(), (tokens(),), {}


@family(
    ffns("h.{}.ff.fn", 2, "0", "2", bodies.gelu),
    why="Residual(fn) with fn = Sequential: the add sits in a generic wrapper module",
)
def residual_wrapper() -> Built:
    class Add(nn.Module):
        def __init__(self, fn: nn.Module) -> None:
            super().__init__()
            self.fn = fn

        def forward(self, x: Tensor) -> Tensor:
            return self.fn(x) + x

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm = Add(Attention()), nn.LayerNorm(D)
            self.ff = Add(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)))

        def forward(self, x: Tensor) -> Tensor:
            return self.ff(self.norm(self.mix(x)))

    return stack_of(Wrapped)


@family(
    ffns("", None, "up", "down", bodies.relu, form="linears"),
    ffns("", None, "gate", "out", bodies.gelu, form="linears"),
    why="two FFNs inline in one root module, one after the other",
)
def two_in_one_module() -> Built:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
            self.gate, self.out = nn.Linear(D, 7), nn.Linear(7, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(F.relu(self.up(x)))
            return x + self.out(F.gelu(self.gate(x)))

    return Two(), (torch.randn(2, 5, D),), {}


@family(
    ffns("h.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="the layer casts the stream to float32 and back around the FFN",
)
def casts_around() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return m.fc2(F.gelu(m.fc1(x.to(m.fc1.weight.dtype)))).type_as(x)

    return stack_of(lambda: Residual(mlp, fc1=(D, H), fc2=(H, D)))


@family(
    why="a dynamic gate: the exit's output times a D-wide softmax of the source (mixture by features)",
    refused={"h.0": "no-residual", "h.1": "no-residual"},
)
def softmax_post_gate() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(F.relu(m.up(x))) * F.softmax(m.gate(x), dim=-1)

    return stack_of(lambda: Residual(mlp, gate=(D, D), **UP_DOWN))


@family(
    why="cross-token max pooling between the linears (PointNet++)",
    refused={"h.0.mlp": "reduction-between|opaque-between|norm-between"},
)
def max_over_tokens_between() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(m.up(x))
        return m.down(h - h.amax(1, keepdim=True))

    return stack(lambda: Lambda(run, **UP_DOWN))


@family(
    why="random noise of the dense activation's shape is added to the hidden rows",
    refused={"h.0.mlp": ANY, "h.1.mlp": ANY},
)
def fresh_tensor_in_body() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        ramp = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None]  # one value per position
        return m.down(F.relu(h) + ramp)

    return stack(lambda: Lambda(run, **UP_DOWN))


@family(
    ffns(MLP, 2, "up", "down", lambda h, *, scale: bodies.silu(h * scale), body_params={"scale": "scale"}),
    why="a learnable scale [H] inside the body of an aligned owner (per-channel parameter)",
)
def channel_scale() -> Built:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
            self.scale = nn.Parameter(torch.rand(H))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.up(x) * self.scale))

    return stack(Scaled)


@family(
    ffns("h.{}", 2, "up", "down", lambda h, *, scale: bodies.silu(h * scale), form="linears",
         body_params={"scale": "scale"}),
    why="the same inline: the parameter [1, 1, H] broadcasts over rows of rank three",
)  # fmt: skip
def channel_scale_inline() -> Built:
    class Scaled(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.down(F.silu(m.up(x) * m.scale)), **UP_DOWN)
            self.scale = nn.Parameter(torch.rand(1, 1, H))

    return stack_of(Scaled)


@family(
    ffns("h.{}", 2, "up", "down", bodies.gelu, form="linears"),
    why="the whole block runs under reentrant activation checkpointing, FFN inline",
)
def checkpointed_inline() -> Built:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]

    return stack_of(lambda: Checkpointed(lambda m, x: m.down(F.gelu(m.up(x))), **UP_DOWN))


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu, form="either"),
    why="the MLP multiplies its own output by a constant before it returns",
)
def scaled_owner() -> Built:
    return stack(lambda: Lambda(lambda m, x: 1.0 * m.down(F.gelu(m.up(x))), **UP_DOWN))


@family(
    ffns("net.{}.mlp", [0, 2], "up", "down", bodies.gelu),
    why="a U-Net of blocks: stream saved, concatenated later and projected; both MLPs have their residual",
    refused={},
)
def u_shaped() -> Built:
    class UShape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mlp = lambda: Lambda(lambda m, x: m.down(F.gelu(m.up(x))), **UP_DOWN)  # noqa: E731
            self.net = nn.ModuleList([Block(mlp()), nn.Linear(2 * D, D), Block(mlp())])

        def forward(self, x: Tensor) -> Tensor:
            skip = x
            x = self.net[0](x)
            return self.net[2](self.net[1](torch.cat([x, skip], dim=-1)))

    return UShape(), (torch.randn(2, 5, D),), {}
