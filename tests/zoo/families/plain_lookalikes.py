"""Hand-written look-alikes that fail outside the body: no residual, escapes, heads, LoRA, quantised, MoE, hooks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Attention, Block, D, H, Lambda, Residual, Stack, stack, stack_of, tokens
from zoo.family import ANY, Built, family, ffns

GELU = ffns("h.{}.mlp", 2, "up", "down", bodies.gelu)


def mlp() -> nn.Module:
    return Lambda(lambda m, x: m.down(F.gelu(m.up(x))), up=(D, H), down=(H, D))


@family(
    GELU,
    why="BERT pooler and classifier: dense D->D, tanh, D->3 on the first token",
    refused={"pooler": "width-change|no-residual"},
)
def pooler_and_classifier() -> Built:
    class Classifier(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Block(mlp()))
            self.pooler, self.classifier = nn.Linear(D, D), nn.Linear(D, 3)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            for block in self.h:
                x = block(x)
            return self.classifier(torch.tanh(self.pooler(x[:, 0])))

    return Classifier(), (tokens(),), {}


@family(
    GELU,
    why="a multimodal projector D->H->D feeds the stack without any residual",
    refused={"projector": "no-residual"},
)
def projector() -> Built:
    class Projected(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Block(mlp()))
            self.projector = mlp()

        def forward(self, features: Tensor) -> Tensor:
            x = self.projector(features)
            for block in self.h:
                x = block(x)
            return self.head(self.ln_f(x))

    return Projected(), (torch.randn(2, 5, D),), {}


@family(
    why="a plain D->H->D->H->D perceptron with no residual anywhere",
    refused={"0": "no-residual"},
)
def perceptron() -> Built:
    layers = [nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)), (torch.randn(4, D),), {}


@family(
    GELU,
    why="the time embedding's MLP is added to x, but its source is not the stream",
    refused={"time_mlp": "no-residual"},
)
def time_embedding() -> Built:
    class Timed(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Block(mlp()))
            self.time_mlp = nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D))

        def forward(self, ids: Tensor, t: Tensor) -> Tensor:
            x = self.wte(ids) + self.time_mlp(t)[:, None]
            for block in self.h:
                x = block(x)
            return self.head(x)

    return Timed(), (tokens(), torch.randn(2, D)), {}


@family(
    why="RWKV channel mix: sigmoid(r(x)) * v(relu(k(x))**2), gated behind the exit by another activation",
    refused={"h.0": "no-residual", "h.1": "no-residual"},
)
def rwkv_post_gate() -> Built:
    def mix(m: nn.Module, x: Tensor) -> Tensor:
        return torch.sigmoid(m.r(x)) * m.v(F.relu(m.k(x)) ** 2)

    return stack_of(lambda: Residual(mix, bias=False, k=(D, H), v=(H, D), r=(D, D)))


@family(
    why="hand-written LoRA on both linears: each is a sum of a base and a low-rank path",
    refused={"h.0.mlp": "lora|different-source", "h.1.mlp": "lora|different-source"},
)
def handwritten_lora() -> Built:
    class LoRALinear(nn.Module):
        def __init__(self, inner: int, outer: int) -> None:
            super().__init__()
            self.base = nn.Linear(inner, outer)
            self.lora_A = nn.Linear(inner, 2, bias=False)
            self.lora_B = nn.Linear(2, outer, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.lora_B(self.lora_A(x))

    class LoRAMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = LoRALinear(D, H), LoRALinear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    return stack(LoRAMLP)


@family(
    why="dynamically quantised linears hold packed weights that cannot be stacked",
    refused={"h.0.mlp": "quantized", "h.1.mlp": "quantized"},
    fp64=False,
)
def dynamic_quantized() -> Built:
    model, args, kwargs = stack(mlp)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}), args, kwargs


class MoEBlock(nn.Module):
    """A hand-written MoE: router, expert modules on indexed rows."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 3, bias=False)
        self.experts = nn.ModuleList(mlp() for _ in range(3))
        self.shared_expert = mlp() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            row, slot = torch.where(index == e)
            out.index_add_(0, row, expert(flat[row]) * weights[row, slot, None])
        if self.shared_expert is not None:
            out = out + self.shared_expert(flat)
        return out.view_as(x)


@family(
    why="Mixtral written by hand: the experts sit under a module that routes",
    refused={"h.0.mlp.experts": "router-above|no-residual"},
)
def existing_moe() -> Built:
    return stack(MoEBlock)


@family(
    why="the dense shared expert of an MoE is added to the stream, but a router sits beside it",
    refused={"h.0.mlp.shared_expert": "router-above", "h.1.mlp.shared_expert": "router-above"},
)
def shared_expert() -> Built:
    return stack(lambda: MoEBlock(shared=True))


@family(
    why="the hidden activation is also returned (probing head): it escapes the region",
    refused={"h.0": "escape", "h.1": "escape"},
)
def escaping_hidden() -> Built:
    class Leaky(Stack):
        def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
            x, seen = self.wte(ids), []
            for block in self.h:
                h = F.gelu(block.up(block.norm(x)))
                seen.append(h)
                x = x + block.down(h)
            return self.head(x), seen

    return Leaky(lambda: Residual(lambda m, x: x, up=(D, H), down=(H, D))), (tokens(),), {}


@family(
    why="two exits read the same hidden activation",
    refused={"h.0.mlp": "escape", "h.1.mlp": "escape"},
)
def two_exits() -> Built:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = F.gelu(m.up(x))
        return m.a(h) + torch.tanh(m.b(h))

    return stack(lambda: Lambda(run, up=(D, H), a=(H, D), b=(H, D)))


@family(
    why="the gate of the GLU reads another tensor than the up branch (previous stream)",
    refused={"h.0": "different-source", "h.1": "different-source"},
)
def foreign_gate() -> Built:
    class Foreign(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = x + self.attn(x)
            return y + self.down(F.silu(self.gate(x)) * self.up(self.norm(y)))

    wide = {"gate": (D, H), "up": (D, H), "down": (H, D)}
    return stack_of(lambda: Foreign(lambda m, x: x, **wide))


@family(
    why="the exit uses the entry's weight transposed: one parameter in two roles",
    refused={"h.0.mlp": "shared-weight", "h.1.mlp": "shared-weight"},
)
def tied_exit() -> Built:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(D, H)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.gelu(self.up(x)), self.up.weight.t())

    return stack(Tied)


@family(
    why="a forward hook on the entry linear (a probe) would be lost by the rewrite",
    refused={"h.0.mlp": "unsupported-hook", "h.1.mlp": "unsupported-hook"},
)
def forward_hook() -> Built:
    def hooked() -> nn.Module:
        module = mlp()
        module.up.register_forward_hook(lambda m, args, out: out * 1.5)
        return module

    return stack(hooked)


@family(
    why="legacy weight_norm recomputes .weight in a pre-forward hook from weight_g and weight_v",
    refused={"h.0.mlp": ANY, "h.1.mlp": ANY},
)
def weight_norm_hook() -> Built:
    def normed() -> nn.Module:
        module = mlp()
        torch.nn.utils.weight_norm(module.up)
        return module

    return stack(normed)


@family(
    why="a parametrized weight (spectral/weight norm) is computed from other parameters at each call",
    refused={"h.0.mlp": ANY, "h.1.mlp": ANY},
)
def parametrized_weight() -> Built:
    def normed() -> nn.Module:
        module = mlp()
        torch.nn.utils.parametrizations.weight_norm(module.up)
        return module

    return stack(normed)


@family(
    GELU,
    why="tied LM head and a head transform (dense, gelu, norm, decoder): width changes, norm between",
    refused={"transform": "norm-between|width-change"},
)
def lm_head_transform() -> Built:
    class Masked(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Block(mlp()))
            self.transform, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
            self.head.weight = self.wte.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            for block in self.h:
                x = block(x)
            return self.head(self.norm(F.gelu(self.transform(x))))

    return Masked(), (tokens(),), {}


@family(
    why="an encoder-decoder bottleneck: D -> 4 -> D reconstructs, nothing is added",
    refused={"": "no-residual"},
)
def autoencoder() -> Built:
    return (
        Lambda(lambda m, x: m.decode(F.relu(m.encode(x))), encode=(D, 4), decode=(4, D)),
        (torch.randn(6, D),),
        {},
    )


@family(
    why="the residual is a concatenation (DenseNet), not an add",
    refused={"0": "no-residual|width-change"},
)
def dense_concat() -> Built:
    class Dense(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(width, H), nn.Linear(H, width)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.down(F.relu(self.up(x)))], dim=-1)

    return nn.Sequential(Dense(D), Dense(2 * D)), (torch.randn(3, D),), {}


@family(
    GELU,
    why="only the attention block's gated output (o(sigmoid(g(x)) * attention)) looks like a GLU; the MLP is one",
)
def gated_attention() -> Built:
    class Gated(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.g, self.o = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.sigmoid(self.g(x)) * super().forward(x))

    class GatedBlock(Block):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.attn = Gated()

    return stack_of(GatedBlock)
