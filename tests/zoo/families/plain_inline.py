"""Hand-written models whose FFN is inline in a bigger module or split over siblings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import bodies
from zoo.blocks import Attention, D, H, Residual, stack_of
from zoo.family import Built, family, ffns

BLOCK = "h.{}"


class BartLayer(nn.Module):
    """Post-LN layer with fc1, activation, dropout, fc2, dropout written in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ln1, self.ln2 = Attention(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln1(x + self.attn(x))
        residual = x
        x = F.gelu(self.fc1(x))
        x = F.dropout(x, p=0.1, training=self.training)
        x = self.fc2(x)
        x = F.dropout(x, p=0.1, training=self.training)
        return self.ln2(residual + x)


@family(
    ffns(BLOCK, 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="BART: fc1 and fc2 are children of the layer that also holds attention",
)
def bart_like() -> Built:
    return stack_of(BartLayer)


class BertIntermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(H, D), nn.LayerNorm(D), nn.Dropout(0.1)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(h)) + x)


@family(
    ffns(BLOCK, 2, "intermediate.dense", "output.dense", bodies.gelu, form="linears"),
    why="BERT: entry and exit live in two sibling modules, the residual add is in the second",
)
def bert_like() -> Built:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm = Attention(), nn.LayerNorm(D)
            self.intermediate, self.output = BertIntermediate(), BertOutput()

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x + self.attn(x))
            return self.output(self.intermediate(x), x)

    return stack_of(Layer)


@family(
    ffns(BLOCK, 2, ["w1", "w3"], "w2", bodies.glu(bodies.silu), bias=False, form="linears"),
    why="SwiGLU inline: w2(silu(w1(x)) * w3(x)) in a block with attention",
)
def sibling_swiglu() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return m.w2(F.silu(m.w1(x)) * m.w3(x))

    return stack_of(lambda: Residual(mlp, bias=False, w1=(D, H), w2=(H, D), w3=(D, H)))


@family(
    ffns(BLOCK, 2, ["lin", "gate"], "out", bodies.glu_last(bodies.gelu), form="linears"),
    why="GEGLU inline, linear branch first, biases",
)
def sibling_geglu_gate_last() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return m.out(m.lin(x) * F.gelu(m.gate(x)))

    return stack_of(lambda: Residual(mlp, lin=(D, H), gate=(D, H), out=(H, D)))


@family(
    ffns(BLOCK, 2, ["a", "b"], "c", bodies.glu(bodies.identity), form="linears"),
    why="bilinear GLU inline: no activation",
)
def sibling_bilinear() -> Built:
    return stack_of(lambda: Residual(lambda m, x: m.c(m.a(x) * m.b(x)), a=(D, H), b=(D, H), c=(H, D)))


@family(
    ffns(BLOCK, 2, ["a", "b", "c"], "d",
         lambda a, b, c: bodies.sigmoid(a) * b + bodies.tanh(c), form="linears"),
    why="three sibling entries inline",
)  # fmt: skip
def sibling_three_entries() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return m.d(torch.sigmoid(m.a(x)) * m.b(x) + torch.tanh(m.c(x)))

    return stack_of(lambda: Residual(mlp, a=(D, H), b=(D, H), c=(D, H), d=(H, D)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.lin(x))


@family(
    ffns(BLOCK, 2, ["gate.lin", "up"], "down", bodies.glu(bodies.relu), bias=False, form="linears"),
    why="ReGLU split: the activated entry sits in a submodule, the others in the block",
)
def split_reglu() -> Built:
    class Split(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.down(m.gate(x) * m.up(x)), bias=False)
            self.gate = Gate()
            self.up, self.down = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)

    return stack_of(Split)


@family(
    ffns(BLOCK, 2, "w12", "w3", bodies.merged(bodies.silu), form="linears", gated=True),
    why="merged GLU inline with chunk(2, dim=2): the rows must keep three axes",
)
def merged_chunk_dim2() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.w12(x).chunk(2, dim=2)
        return m.w3(F.silu(a) * b)

    return stack_of(lambda: Residual(mlp, w12=(D, 2 * H), w3=(H, D)))


@family(
    ffns(BLOCK, 2, "w12", "w3", bodies.merged_last(bodies.gelu), form="linears", gated=True),
    why="merged GLU inline, second half gated, taken with narrow()",
)
def merged_narrow() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        h = m.w12(x)
        return m.w3(h.narrow(-1, 0, H) * F.gelu(h.narrow(-1, H, H)))

    return stack_of(lambda: Residual(mlp, w12=(D, 2 * H), w3=(H, D)))


@family(
    ffns(BLOCK, 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="the body unpacks b, t, c = h.shape, flattens to 2-D and back",
)
def shape_unpacking_body() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        h = m.fc1(x)
        b, t, c = h.shape
        h = F.gelu(h.reshape(b * t, c)).view(b, t, c)
        return m.fc2(h)

    return stack_of(lambda: Residual(mlp, fc1=(D, H), fc2=(H, D)))


@family(
    ffns(BLOCK, 2, "fc1", "fc2", bodies.prelu, form="linears", body_params={"slope": "act.weight"}),
    why="transpose(1, 2) around a per-channel PReLU: the axes return before the exit",
)
def transposed_prelu_body() -> Built:
    class Transposing(Residual):
        def __init__(self) -> None:
            super().__init__(Transposing.mlp, fc1=(D, H), fc2=(H, D))
            self.act = nn.PReLU(H)

        def mlp(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x).transpose(1, 2)).transpose(1, 2))

    return stack_of(Transposing)


@family(
    ffns(BLOCK, 2, "fc1", "fc2", bodies.relu, form="linears"),
    why="OPT: the residual stream is flattened to 2-D before fc1 and restored after the add",
)
def opt_like_2d() -> Built:
    class OPTLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm = Attention(), nn.LayerNorm(D)
            self.fc1, self.fc2 = nn.Linear(D, H), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x)
            shape = x.shape
            x = x.reshape(-1, x.size(-1))
            residual = x
            x = self.fc2(F.relu(self.fc1(self.norm(x))))
            return (residual + x).view(shape)

    return stack_of(OPTLayer)


@family(
    ffns("h.{}.net", 2, "1", "4", bodies.gelu, form="linears"),
    why="lucidrains' FeedForward: Sequential(LayerNorm, Linear, GELU, Dropout, Linear, Dropout); the norm is not FFN",
)
def sequential_with_norm() -> Built:
    class FeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()
            parts = [nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1)]
            self.net = nn.Sequential(*parts, nn.Linear(H, D), nn.Dropout(0.1))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x)
            return self.net(x) + x

    return stack_of(FeedForward)


@family(
    ffns(BLOCK, 2, "wi", "wo", bodies.relu, bias=False, form="linears"),
    why="T5: the block reads self.wo.weight.dtype to decide about a cast before the exit",
)
def t5_dtype_probe() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        h = F.relu(m.wi(x))
        if isinstance(m.wo.weight, Tensor) and h.dtype != m.wo.weight.dtype:
            h = h.to(m.wo.weight.dtype)
        return m.wo(h)

    return stack_of(lambda: Residual(mlp, bias=False, wi=(D, H), wo=(H, D)))


@family(
    ffns("h.{}.parts", 2, "up", "down", bodies.silu, form="linears"),
    why="linears in an nn.ModuleDict of the block; out_features is read in the forward",
)
def module_dict() -> Built:
    class Dictionary(Residual):
        def __init__(self) -> None:
            super().__init__(Dictionary.mlp)
            self.parts = nn.ModuleDict({"up": nn.Linear(D, H), "down": nn.Linear(H, D)})

        def mlp(self, x: Tensor) -> Tensor:
            h = F.silu(self.parts["up"](x))
            assert h.shape[-1] == self.parts["up"].out_features
            return self.parts["down"](h)

    return stack_of(Dictionary)


@family(
    ffns("h.{}.linears", 2, "0", "1", bodies.gelu, form="linears"),
    why="linears in an nn.ModuleList, called by index",
)
def module_list() -> Built:
    class Listed(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.linears[1](F.gelu(m.linears[0](x))))
            self.linears = nn.ModuleList([nn.Linear(D, H), nn.Linear(H, D)])

    return stack_of(Listed)


@family(
    why="F.linear(x, self.fc1.weight, self.fc1.bias) inline: fc1 and fc2 are never called, so nothing to swap",
    refused={"h.0": "raw-parameters", "h.1": "raw-parameters"},
)
def inline_child_weights() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, m.fc1.weight, m.fc1.bias)), m.fc2.weight, m.fc2.bias)

    return stack_of(lambda: Residual(mlp, fc1=(D, H), fc2=(H, D)))


class Spatial(nn.Module):
    """A block on [B, H, W, D], channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


@family(
    ffns("{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="four-dimensional channels-last input (Swin): only the last axis is the feature axis",
)
def channels_last_4d() -> Built:
    return nn.Sequential(Spatial(), Spatial()), (torch.randn(2, 3, 4, D),), {}


@family(
    ffns("{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="two-dimensional [T, D] input, no batch axis",
)
def two_dimensional() -> Built:
    return nn.Sequential(Spatial(), Spatial()), (torch.randn(7, D),), {}


@family(
    ffns("", None, "up", "down", bodies.relu, form="linears"),
    why="the root module itself holds the inline FFN: at is the empty FQN",
)
def root_inline() -> Built:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(D, H), nn.LayerNorm(D), nn.Linear(H, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + self.down(F.relu(self.up(x))))

    return Root(), (torch.randn(2, 4, D),), {}


@family(
    ffns(BLOCK, 2, "fc1", "fc2", bodies.gelu, form="linears"),
    why="a Python branch on a tensor's value in the block: only tracing by execution sees the FFN",
)
def data_dependent_branch() -> Built:
    def mlp(m: nn.Module, x: Tensor) -> Tensor:
        if bool(x.abs().mean() > 0):
            return m.fc2(F.gelu(m.fc1(x)))
        return x

    return stack_of(lambda: Residual(mlp, fc1=(D, H), fc2=(H, D)))


@family(
    ffns(BLOCK, 2, "conv1:io", "conv2:io", bodies.gelu, form="linears"),
    why="OpenAI-GPT's Conv1D (addmm on a 2-D view) inline in a block",
)
def conv1d_inline() -> Built:
    from zoo.families.plain_forms import Conv1D

    class Inline(Residual):
        def __init__(self) -> None:
            super().__init__(lambda m, x: m.conv2(F.gelu(m.conv1(x))))
            self.conv1, self.conv2 = Conv1D(H, D), Conv1D(D, H)

    return stack_of(Inline)
