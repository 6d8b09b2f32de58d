"""Hand-written models whose FFN is the whole forward of one module: activations and gated forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Block, D, H, Lambda, Stack, stack, tokens
from zoo.family import Built, family, ffns

MLP = "h.{}.mlp"


class NanoMLP(nn.Module):
    """nanoGPT's MLP, with its trailing dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(D, 4 * D)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


@family(
    ffns(MLP, 2, "c_fc", "c_proj", bodies.gelu, form="either"),
    why="nanoGPT: MLP called as x + mlp(ln_2(x)); the dropout behind the exit leaves the form open",
)
def nanogpt() -> Built:
    return stack(NanoMLP)


@family(
    ffns(MLP, 2, "0", "2", bodies.relu),
    why="nn.Sequential(Linear, ReLU, Linear) is the block's whole mlp",
)
def sequential_relu() -> Built:
    return stack(lambda: nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)))


@family(
    ffns(MLP, 2, "0", "3", bodies.gelu, form="either"),
    why="ViT style Sequential with dropout between and behind",
)
def sequential_dropouts() -> Built:
    return stack(
        lambda: nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.2), nn.Linear(H, D), nn.Dropout(0.2))
    )


@family(
    ffns(MLP, 2, ["gate_proj", "up_proj"], "down_proj", bodies.glu(bodies.silu), bias=False),
    why="Llama's SwiGLU: down(silu(gate(x)) * up(x)), no bias",
)
def swiglu() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))

    wide = {"gate_proj": (D, H), "up_proj": (D, H), "down_proj": (H, D)}
    return stack(lambda: Lambda(run, bias=False, **wide))


@family(
    ffns(MLP, 2, ["wi_1", "wi_0"], "wo", bodies.glu_last(bodies.gelu_tanh)),
    why="the linear half runs first, the activated half second: entries in call order, with bias",
)
def geglu_linear_first() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        up = m.wi_1(x)
        return m.wo(up * F.gelu(m.wi_0(x), approximate="tanh"))

    return stack(lambda: Lambda(run, wi_0=(D, H), wi_1=(D, H), wo=(H, D)))


@family(
    ffns(MLP, 2, "w12", "w3", bodies.merged(bodies.silu), gated=True),
    why="one merged entry, chunk(2, -1), first half activated (Phi-3, SwiGLUPacked)",
)
def merged_gate_first() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.w12(x).chunk(2, dim=-1)
        return m.w3(F.silu(a) * b)

    return stack(lambda: Lambda(run, w12=(D, 2 * H), w3=(H, D)))


@family(
    ffns(MLP, 2, "proj", "out", bodies.merged_last(bodies.gelu), gated=True),
    why="one merged entry, split in sizes, second half activated (x-transformers, GEGLU)",
)
def merged_gate_last() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.proj(x)
        a, b = torch.split(h, h.shape[-1] // 2, dim=-1)
        return m.out(a * F.gelu(b))

    return stack(lambda: Lambda(run, proj=(D, 2 * H), out=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.merged_last(bodies.sigmoid), gated=True),
    why="F.glu(h) is a * sigmoid(b): the second half is the gate",
)
def functional_glu() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(F.glu(m.up(x)))

    return stack(lambda: Lambda(run, up=(D, 2 * H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.merged(bodies.silu), gated=True),
    why="the halves are taken by slicing h[..., :H] and h[..., H:]",
)
def merged_by_slices() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(F.silu(h[..., :H]) * h[..., H:])

    return stack(lambda: Lambda(run, up=(D, 2 * H), down=(H, D)))


@family(
    ffns(MLP, 2, ["a", "b"], "c", bodies.glu(bodies.identity)),
    why="bilinear GLU: no activation, the product of two entries is the non-linearity",
)
def bilinear() -> Built:
    return stack(lambda: Lambda(lambda m, x: m.c(m.a(x) * m.b(x)), a=(D, H), b=(D, H), c=(H, D)))


@family(
    ffns(MLP, 2, ["a", "b", "c"], "d", lambda a, b, c: bodies.relu(a) * b + c, gated=True),
    why="three entries of one source feed one exit",
)
def three_entries() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.d(F.relu(m.a(x)) * m.b(x) + m.c(x))

    return stack(lambda: Lambda(run, a=(D, H), b=(D, H), c=(D, H), d=(H, D)))


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))


@family(
    ffns(MLP, 2, "up", "down", bodies.gelu_tanh),
    why="hand-written tanh GELU: mul, pow, add, tanh between the linears",
)
def handwritten_gelu_tanh() -> Built:
    return stack(lambda: Lambda(lambda m, x: m.down(new_gelu(m.up(x))), up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.gelu),
    why="hand-written erf GELU with divisions",
)
def handwritten_gelu_erf() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.quick_gelu),
    why="CLIP's quick GELU: x * sigmoid(1.702 x)",
)
def quick_gelu() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(h * torch.sigmoid(1.702 * h))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(ffns(MLP, 2, "up", "down", bodies.relu2, bias=False), why="Primer's relu(x)**2, no bias")
def relu_squared() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(torch.square(F.relu(m.up(x))))

    return stack(lambda: Lambda(run, bias=False, up=(D, H), down=(H, D)))


class StarReLU(nn.Module):
    """MetaFormer's activation with learnable scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.8944]))
        self.bias = nn.Parameter(torch.tensor([-0.4472]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) ** 2 + self.bias


@family(
    ffns(
        MLP,
        2,
        "fc1",
        "fc2",
        bodies.star_relu,
        body_params={"scale": "act.scale", "bias": "act.bias"},
    ),
    why="StarReLU holds learnable scalars: they are the body's, shared by the experts",
)
def star_relu() -> Built:
    class StarMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(D, H), StarReLU(), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    return stack(StarMLP)


@family(
    ffns(MLP, 2, "0", "2", bodies.prelu, body_params={"slope": "1.weight"}),
    why="nn.PReLU() with one learnable slope between two linears of a Sequential",
)
def prelu_scalar() -> Built:
    return stack(lambda: nn.Sequential(nn.Linear(D, H), nn.PReLU(), nn.Linear(H, D)))


@family(
    ffns(MLP, 2, "fc1", "fc2", bodies.prelu, body_params={"slope": "slope"}),
    why="a slope per hidden channel, a raw parameter [H] of the MLP used in torch.where",
)
def per_channel_slope() -> Built:
    class Slopes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)
            self.slope = nn.Parameter(torch.rand(H))

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x)
            return self.fc2(torch.where(h > 0, h, self.slope * h))

    return stack(Slopes)


@family(
    ffns(
        MLP,
        2,
        "up",
        "down",
        bodies.xielu,
        body_params={"alpha_p": "act.alpha_p", "alpha_n": "act.alpha_n"},
    ),
    why="xIELU: where/expm1/min with slopes behind a softplus of scalars",
)
def xielu() -> Built:
    class XIELU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha_p = nn.Parameter(torch.tensor([0.4]))
            self.alpha_n = nn.Parameter(torch.tensor([0.2]))
            self.register_buffer("beta", torch.tensor(0.5))
            self.register_buffer("eps", torch.tensor(-1e-6))

        def forward(self, x: Tensor) -> Tensor:
            p, n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
            negative = (torch.expm1(torch.min(x, self.eps)) - x) * n + self.beta * x
            return torch.where(x > 0, p * x * x + self.beta * x, negative)

    class XMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, H), XIELU(), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    return stack(XMLP)


@family(
    ffns(MLP, 2, "up", "down", bodies.silu),
    why="the activation runs in float32 and is cast back: casts are token-wise",
    fp64=False,
)
def casts_in_body() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(F.silu(h.float()).to(h.dtype))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.relu),
    why="functional dropout with self.training, and a clamp, between the linears",
)
def functional_dropout_clamp() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = F.dropout(m.up(x).clamp(min=0.0), 0.3, training=m.training)
        return m.down(h)

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.mish),
    why="an activation no library names here: x * tanh(softplus(x))",
)
def mish() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(h * torch.tanh(F.softplus(h)))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.hardswish),
    why="nn.Hardswish as a child, one layer with another width than the other",
)
def hardswish_two_widths() -> Built:
    widths = iter([8, 28])

    class Hard(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, width), nn.Hardswish(), nn.Linear(width, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    return stack(lambda: Hard(next(widths)))


@family(
    ffns(MLP, 2, "fc1", "fc2", bodies.leaky_relu(0.2)),
    why="H < D: a narrow FFN is an FFN, and in-place leaky ReLU works on the rows",
)
def narrow_inplace() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.fc2(F.leaky_relu(m.fc1(x), 0.2, inplace=True))

    return stack(lambda: Lambda(run, fc1=(D, 4), fc2=(4, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.squared),
    why="the body is h * h: one entry read twice",
)
def square_activation() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(h * h)

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))


@family(
    ffns(MLP, 2, "up", "down", bodies.relu),
    why="the block calls mlp(hidden_states=x) by keyword",
)
def keyword_call() -> Built:
    class KeywordMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.down(F.relu(self.up(hidden_states)))

    class KeywordBlock(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(self.ln_1(x))
            return self.mlp(hidden_states=self.ln_2(x)) + x

    return Stack(lambda: KeywordBlock(KeywordMLP())), (tokens(),), {}


@family(
    ffns(MLP, 2, "up", "down", lambda h: bodies.gelu(h) * 0.5 + bodies.relu(h)),
    why="the entry's output feeds two branches that meet before the exit",
)
def two_branch_body() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.up(x)
        return m.down(F.gelu(h) * 0.5 + F.relu(h))

    return stack(lambda: Lambda(run, up=(D, H), down=(H, D)))
