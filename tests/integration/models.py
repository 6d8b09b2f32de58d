"""Small models for the integration tests, each with its inputs; what is compared, and how near it must be.

Contract: a ``Case`` builds a dense fp32 model without active dropout and inputs for it. ``moe`` transforms it and
makes its experts distinct, so that a token sent to the wrong expert shows.

    >>> model, inputs = moe("aligned")            # fp64, 4 experts, top 2, random experts, decisive router
    >>> value = scalar(model(*inputs))
    >>> value.backward(); gradients(model)

``aligned`` and ``llama`` have FFN modules, the others have the FFN's linears inside a larger forward: ``inline``,
``glu`` (sibling entries), ``encoder`` (nn.TransformerEncoder), ``bert`` and ``bart`` (linears split over modules).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import oracles
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import moefy
from moefy.nn import ExpertLinear, Router

D, H, VOCAB = 16, 24, 40
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative norm against the dense model when the experts are copies."""
SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative norm between two ways to compute one thing: the order of sums may differ."""


class MLP(nn.Module):
    """An FFN module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.act = nn.GELU()
        self.down = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class AlignedBlock(nn.Module):
    """Pre-norm residual around an FFN module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = MLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class InlineBlock(nn.Module):
    """The FFN's linears are the block's own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.fc1 = nn.Linear(D, H)
        self.fc2 = nn.Linear(H, D)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.gelu(self.fc1(self.norm(x))))
        return x + self.fc2(h)


class InlineGLUBlock(nn.Module):
    """Two sibling entries read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.w1 = nn.Linear(D, H, bias=False)
        self.w3 = nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class BrokenBlock(InlineBlock):
    """Dynamo cannot trace through the line between entry and exit."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(self.norm(x)))
        torch._dynamo.graph_break()
        return x + self.fc2(h)


class Stack(nn.Module):
    """Embedding of floats, ``layers.i``, head."""

    def __init__(self, block: Callable[[], nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.proj = nn.Linear(D, D)
        self.layers = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A dense model and how to make inputs for a batch of the given size."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor] | tuple[Tensor, ...]]
    block: str = "layers.*"


def floats(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 6, D),)


def ids(batch: int) -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCAB, (batch, 6))}


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


def hugging_face(name: str, **changes: Any) -> nn.Module:
    """A tiny random model of class ``name`` without dropout; transformers is imported here."""
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**{**TEXT, **changes}))


def llama() -> nn.Module:
    return hugging_face("LlamaForCausalLM", num_key_value_heads=1)


def bert() -> nn.Module:
    return hugging_face("BertForMaskedLM", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bart() -> nn.Module:
    """Width and depth have their own names here; the embeddings are drawn wide, or every logit would be alike."""
    sides = {
        f"{side}_{what}": n
        for side in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", H))
    }
    model = hugging_face(
        "BartForConditionalGeneration",
        d_model=D,
        dropout=0.0,
        init_std=0.3,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **sides,
    )
    return model


CASES: Mapping[str, Case] = {
    "aligned": Case(functools.partial(Stack, AlignedBlock), floats),
    "inline": Case(functools.partial(Stack, InlineBlock), floats),
    "glu": Case(functools.partial(Stack, InlineGLUBlock), floats),
    "encoder": Case(encoder, floats),
    "llama": Case(llama, ids),
    "bert": Case(bert, ids),
    "bart": Case(bart, ids),
}
TORCH_CASES = ("aligned", "inline", "glu", "encoder")
HF_CASES = ("llama", "bert", "bart")
ALL_CASES = (*TORCH_CASES, *HF_CASES)


def dense(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The dense model in train mode (it has no dropout), always the same weights."""
    torch.manual_seed(1)
    return CASES[name].build().to(dtype)


def batch(name: str, size: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Inputs by name of ``forward``'s parameter; ``call`` passes them."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(100 + seed)
    made = CASES[name].inputs(size)
    torch.set_rng_state(generator_state)
    if isinstance(made, tuple):
        made = {"": made[0].to(dtype)}
    return made


def positional(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """The inputs without a name."""
    return tuple(value for key, value in inputs.items() if key == "")


def named(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a name."""
    return {key: value for key, value in inputs.items() if key != ""}


def call(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The model's first floating output: the logits where there are some."""
    out = model(*positional(inputs), **named(inputs))
    if hasattr(out, "logits"):
        return out.logits
    return next(t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.is_floating_point())


def transformed(
    model: nn.Module, name: str, num_experts: int = 4, top_k: int = 2, **options: Any
) -> nn.Module:
    """``model`` (a dense ``name``) with copied experts."""
    dtype = next(model.parameters()).dtype
    inputs = batch(name, dtype=dtype)
    return moefy.transform(
        model,
        num_experts,
        top_k=top_k,
        example_args=positional(inputs),
        example_kwargs=named(inputs),
        **options,
    )


def moe(name: str, dtype: torch.dtype = torch.float64, num_experts: int = 4, top_k: int = 2) -> nn.Module:
    """The transformed model with distinct random experts."""
    model = transformed(dense(name, dtype), name, num_experts, top_k, check=False)
    randomize(model)
    return model


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Distinct random experts of the usual scale and a decisive router."""
    generator = torch.Generator().manual_seed(seed)

    def draw(p: Tensor, scale: float) -> None:
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)

    found = 0
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ExpertLinear):
                draw(module.weight, 1.5 / module.in_features**0.5)
                if module.bias is not None:
                    draw(module.bias, 0.5)
            elif isinstance(module, Router):
                draw(module.weight, 1.0)
                found += 1
    assert found, "nothing was transformed"


def scalar(output: Tensor) -> Tensor:
    """A loss that weighs every element of ``output`` differently, a mean over the batch."""
    flat = output.flatten(1)
    steps = torch.arange(flat.shape[1], device=output.device, dtype=torch.float32).to(output.dtype)
    return (flat * torch.cos(steps)).sum(1).mean() + 0.1 * flat.square().sum(1).mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """All gradients by name; a missing one is an error where the parameter is trained."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one eager step, from no gradients."""
    model.zero_grad(set_to_none=True)
    output = call(model, inputs)
    scalar(output).backward()
    return output.detach(), gradients(model)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str = "output") -> None:
    error = oracles.relative_error(got, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_same(
    got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, floor: float = 0.0
) -> None:
    """Tensors by name, each within ``tolerance``; with ``floor``, of at least that norm's worth of rounding."""
    assert set(got) == set(expected), set(got) ^ set(expected)
    assert got, "nothing to compare"
    for name, value in expected.items():
        a, b = got[name].detach().double(), value.detach().double()
        difference, limit = float((a - b).norm()), max(tolerance * float(b.norm()), floor)
        assert difference <= limit, f"{name}: |difference| {difference:.2e} > {limit:.2e}"


def stacked_parameters(model: nn.Module) -> list[str]:
    """Names of all expert parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    experts = [m for m in model.modules() if isinstance(m, ExpertLinear)]
    return [names[id(p)] for m in experts for p in m.parameters(recurse=False)]


def routers(model: nn.Module) -> dict[str, Router]:
    """All routers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Router)}
