"""Hand-written models whose residual, sharing or call pattern is unusual; the FFN is an FFN all the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Attention, Block, D, H, Lambda, Stack, stack_of, tokens
from zoo.family import Built, family, ffns


def mlp() -> nn.Module:
    return Lambda(lambda m, x: m.down(F.gelu(m.up(x))), up=(D, H), down=(H, D))


class Flexible(Block):
    """A block whose residual is ``rule(self, x)``."""

    def __init__(self, rule: object, inner: nn.Module | None = None) -> None:
        super().__init__(inner or mlp())
        self.rule = rule
        self.gamma = nn.Parameter(torch.rand(D))
        self.alpha = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)  # type: ignore[operator]


def blocks(rule: object) -> Built:
    return stack_of(lambda: Flexible(rule))


GELU = ffns("h.{}.mlp", 2, "up", "down", bodies.gelu)


@family(GELU, why="parallel attention (GPT-J): x + attn(n) + mlp(n), n = ln(x)")
def parallel_attention() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        n = m.ln_1(x)
        return x + m.attn(n) + m.mlp(n)

    return blocks(rule)


@family(GELU, why="parallel attention with the sum of both branches first: (attn + mlp) + x")
def parallel_sum_first() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        n = m.ln_1(x)
        return (m.attn(n) + m.mlp(n)) + x

    return blocks(rule)


@family(GELU, why="layer scale: x + gamma * mlp(ln(x)), gamma a parameter [D]")
def layer_scale() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        x = x + m.attn(m.ln_1(x))
        return x + m.gamma * m.mlp(m.ln_2(x))

    return blocks(rule)


@family(GELU, why="scalar gates on both terms: alpha * x + tanh(alpha) * mlp(x)")
def scalar_gates() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        return m.alpha * x + torch.tanh(m.alpha) * m.mlp(m.ln_2(x))

    return blocks(rule)


@family(GELU, why="post-LN: ln(x + mlp(x)), the source is the stream itself")
def post_norm() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        x = m.ln_1(x + m.attn(x))
        return m.ln_2(x + m.mlp(x))

    return blocks(rule)


@family(GELU, why="sandwich norm (Gemma 2, Swin v2): x + ln(mlp(ln(x))), token-wise norm behind the exit")
def sandwich_norm() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        x = x + m.attn(x)
        return x + m.ln_2(m.mlp(m.ln_1(x)))

    return blocks(rule)


@family(GELU, why="stochastic depth: the branch is multiplied by a [B, 1, 1] mask in training")
def drop_path() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        y = m.mlp(m.ln_2(x))
        if m.training:
            y = y * torch.empty(y.shape[0], 1, 1).bernoulli_(0.9) / 0.9
        return x + y

    return blocks(rule)


@family(GELU, why="a padding mask [B, S, 1] multiplies the branch: one factor per token, not per feature")
def token_mask_behind() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        keep = (x.sum(-1, keepdim=True) > -3).to(x.dtype)
        return x + m.mlp(m.ln_2(x)) * keep

    return blocks(rule)


@family(GELU, why="in-place residual: y = mlp(ln(x)); y += x")
def inplace_residual() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        x = x + m.attn(m.ln_1(x))
        y = m.mlp(m.ln_2(x))
        y += x
        return y

    return blocks(rule)


@family(GELU, why="torch.add(x, y, alpha=0.5): a half-step residual")
def torch_add_alpha() -> Built:
    return blocks(lambda m, x: torch.add(x, m.mlp(m.ln_2(x)), alpha=0.5))


@family(
    ffns("h.{}.ff1", 2, "up", "down", bodies.gelu),
    ffns("h.{}.ff2", 2, "up", "down", bodies.gelu),
    why="macaron (Conformer): two half-step FFNs around attention",
)
def macaron() -> Built:
    class Macaron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff1, self.ff2, self.attn = mlp(), mlp(), Attention()
            self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.5 * self.ff1(self.n1(x))
            x = x + self.attn(x)
            return x + 0.5 * self.ff2(self.n2(x))

    return stack_of(Macaron)


@family(
    GELU,
    why="DiT adaLN: the branch is scaled by a gate [B, 1, D], one per sample and broadcast over the tokens",
)
def adaptive_norm_gate() -> Built:
    class DiT(Flexible):
        def __init__(self) -> None:
            super().__init__(None)
            self.modulate = nn.Linear(D, 3 * D)

        def forward(self, x: Tensor) -> Tensor:
            shift, scale, gate = self.modulate(F.silu(x.mean(1, keepdim=True))).chunk(3, dim=-1)
            y = self.mlp(self.ln_2(x) * (1 + scale) + shift)
            return x + gate * y

    return stack_of(DiT)


@family(
    ffns("shared.mlp", None, "up", "down", bodies.gelu, calls=3),
    why="ALBERT: one layer applied three times is one MoE with three calls",
)
def shared_layer() -> Built:
    class Albert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.shared = nn.Embedding(31, D), Block(mlp())

        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            for _ in range(3):
                x = self.shared(x)
            return x

    return Albert(), (tokens(),), {}


@family(
    ffns("shared", None, "fc1", "fc2", bodies.relu, form="linears", calls=3),
    why="ALBERT with the FFN inline in the shared layer",
)
def shared_layer_inline() -> Built:
    from zoo.blocks import Residual

    class AlbertInline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte = nn.Embedding(31, D)
            self.shared = Residual(lambda m, x: m.fc2(F.relu(m.fc1(x))), fc1=(D, H), fc2=(H, D))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.wte(ids)
            for _ in range(3):
                x = self.shared(x)
            return x

    return AlbertInline(), (tokens(),), {}


@family(
    ffns("h.0.mlp", None, "up", "down", bodies.gelu, calls=2),
    why="one MLP object is the child of two blocks: one MoE, named by its first FQN, called twice",
)
def shared_module() -> Built:
    one = mlp()
    return Stack(lambda: Block(one)), (tokens(),), {}


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu, calls=2),
    why="chunked feed-forward: the MLP runs on two halves of the sequence, concatenated on the token axis",
)
def chunked() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        n = m.ln_2(x)
        return x + torch.cat([m.mlp(part) for part in n.chunk(2, dim=1)], dim=1)

    return stack_of(lambda: Flexible(rule))


@family(
    GELU,
    why="residual wrapper: Residual(PreNorm(mlp)) spread over two helper modules",
)
def wrapped_residual() -> Built:
    return stack_of(WrappedBlock)


class WrappedBlock(nn.Module):
    """lucidrains' style: the add and the norm are in wrappers that borrow the block's mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.attn = mlp(), Attention()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.attn, lambda y: self.mlp(self.norm(y))):
            x = branch(x) + x
        return x


@family(
    GELU,
    why="every block returns a tuple and takes a mask keyword; the stream is its first item",
)
def tuple_stream() -> Built:
    class TupleBlock(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
            return super().forward(x if mask is None else x * mask), None

    class TupleStack(Stack):
        def forward(self, ids: Tensor, *, mask: Tensor | None = None) -> dict[str, Tensor]:
            x = self.wte(ids)
            for block in self.h:
                x, _ = block(x, mask=mask)
            return {"logits": self.head(self.ln_f(x))}

    return TupleStack(lambda: TupleBlock(mlp())), (tokens(),), {"mask": torch.ones(2, 5, 1)}


@family(
    GELU,
    why="the exit is followed by dropout, a reshape to [B, S, 2, D/2] and back, then the add",
)
def reshaped_behind() -> Built:
    def rule(m: Flexible, x: Tensor) -> Tensor:
        y = F.dropout(m.mlp(m.ln_2(x)), 0.1, m.training)
        b, s, d = y.shape
        return x + y.view(b, s, 2, d // 2).reshape(b, s, d)

    return blocks(rule)


@family(
    ffns("h.0.mlp", None, "up", "down", bodies.gelu),
    why="only layer 0 runs in this forward; layer 1 is dead code, so it is neither found nor refused",
)
def unused_layer() -> Built:
    class Early(Stack):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.h[0](self.wte(ids)))

    return Early(lambda: Block(mlp())), (tokens(),), {}


@family(
    GELU,
    why="activation checkpointing (not reentrant) wraps the block: same ops, same modules",
)
def checkpointed() -> Built:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]

    return stack_of(lambda: Checkpointed(mlp()))


@family(
    ffns("h.{}.mlp", 2, "up", "down", bodies.gelu_tanh),
    why="the activation is an autograd.Function (Bloom): its forward is element-wise, its backward is its own",
)
def custom_function_activation() -> Built:
    class Gelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return x * 0.5 * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            t = torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))
            inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
            return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.down(Gelu.apply(m.up(x)))

    return stack_of(lambda: Block(Lambda(run, up=(D, H), down=(H, D))))
