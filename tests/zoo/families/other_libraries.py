"""torchvision, x-transformers, megatron-core and peft, built small."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from zoo import bodies
from zoo.family import Built, family, ffns

# --- torchvision ------------------------------------------------------------------------------


@family(
    ffns("encoder.layers.encoder_layer_{}.mlp", 2, "0", "3", bodies.gelu, form="either"),
    library="torchvision",
    why="EncoderBlock: x + MLPBlock(ln_2(x)); MLPBlock is Sequential(Linear, GELU, Dropout, Linear, Dropout)",
)
def tv_vit() -> Built:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=5)
    return model, (torch.randn(2, 3, 8, 8),), {}


TV_SWIN: dict[str, Any] = {
    "patch_size": [2, 2],
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2],
    "num_classes": 5,
    "stochastic_depth_prob": 0.0,
}
SWIN_MLPS = ffns("features.{}.{}.mlp", [(1, 0), (1, 1), (3, 0)], "0", "3", bodies.gelu, form="either")


@family(SWIN_MLPS, library="torchvision", why="SwinTransformerBlock: x + stochastic_depth(mlp(norm2(x)))")
def tv_swin() -> Built:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(**TV_SWIN), (torch.randn(1, 3, 16, 16),), {}


@family(SWIN_MLPS, library="torchvision", why="SwinTransformerBlockV2: the norm is behind the MLP")
def tv_swin_v2() -> Built:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    model = SwinTransformer(**TV_SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    return model, (torch.randn(1, 3, 16, 16),), {}


@family(
    ffns("features.{}.0.block", [1, 3], "3", "5", bodies.gelu, form="linears"),
    library="torchvision",
    why="CNBlock: one Sequential of depthwise conv, permute, norm, Linear, GELU, Linear, permute; in-place add",
)
def tv_convnext() -> Built:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    settings = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)]
    model = ConvNeXt(settings, layer_scale=0.5, num_classes=5)
    return model, (torch.randn(2, 3, 16, 16),), {}


@family(
    ffns(
        "blocks.0.layers.0.layers.{}_attention.mlp_layer",
        ["window", "grid"],
        "1",
        "3",
        bodies.gelu,
        form="linears",
    ),
    library="torchvision",
    refused={"squeeze_excitation": "no-residual", "conv_a.0": "norm-between|conv-between|escape"},
    why="MaxViT: mlp_layer is Sequential(LayerNorm, Linear, GELU, Linear, Dropout); SE multiplies; MBConv mixes",
)
def tv_maxvit() -> Built:
    from torchvision.models.maxvit import MaxVit

    model = MaxVit(
        input_size=(16, 16),
        stem_channels=8,
        partition_size=2,
        block_channels=[8],
        block_layers=[1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return model, (torch.randn(1, 3, 16, 16),), {}


@family(
    library="torchvision",
    refused={"classifier": "no-residual|width-change"},
    why="VGG: 4096 -> 4096 -> 4096 in the classifier, no residual (features cut short)",
)
def tv_vgg_head() -> Built:
    from torchvision.models.vgg import VGG

    features = nn.Sequential(nn.Conv2d(3, 512, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(7))
    model = VGG(features, num_classes=5, init_weights=False)
    widths = [(512 * 49, 16), (16, 16), (16, 5)]
    for i, (inner, outer) in zip((0, 3, 6), widths, strict=True):
        model.classifier[i] = nn.Linear(inner, outer)
    return model, (torch.randn(1, 3, 8, 8),), {}


# --- x-transformers ---------------------------------------------------------------------------


def encoder(**options: Any) -> Built:
    from x_transformers import Encoder

    return Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, **options), (torch.randn(2, 5, 16),), {}


XT = "layers.{}.1.ff"
FF_LAYERS = (1, 3)  # attention and feed-forward alternate


@family(
    ffns(XT, FF_LAYERS, "0.0", "2", bodies.gelu),
    library="x_transformers",
    why="FeedForward: Sequential(Sequential(Linear, GELU), Dropout, Linear)",
)
def xt_encoder() -> Built:
    return encoder()


@family(
    ffns(XT, FF_LAYERS, "0.proj", "2", bodies.merged_last(bodies.gelu), gated=True),
    library="x_transformers",
    why="ff_glu: GLU.proj chunked, x * act(gate), the second half activated",
)
def xt_glu() -> Built:
    return encoder(ff_glu=True)


@family(
    ffns(XT, FF_LAYERS, "0.proj", "2", bodies.merged_last(bodies.silu), gated=True),
    library="x_transformers",
    why="ff_glu with ff_swish",
)
def xt_swiglu() -> Built:
    return encoder(ff_glu=True, ff_swish=True)


@family(
    ffns(XT, FF_LAYERS, "0.0", "2", bodies.relu2),
    library="x_transformers",
    why="ff_relu_squared",
)
def xt_relu_squared() -> Built:
    return encoder(ff_relu_squared=True)


@family(
    library="x_transformers",
    refused={"layers.1.1": "norm-between", "layers.3.1": "norm-between"},
    why="ff_post_act_ln: a LayerNorm behind the activation",
)
def xt_post_act_norm() -> Built:
    return encoder(ff_post_act_ln=True)


@family(
    ffns("attn_layers." + XT, FF_LAYERS, "0.0", "2", bodies.gelu),
    library="x_transformers",
    why="TransformerWrapper with a Decoder: as the Encoder, on token ids",
)
def xt_decoder() -> Built:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
    model = TransformerWrapper(num_tokens=31, max_seq_len=8, attn_layers=layers)
    return model, (torch.randint(0, 31, (2, 5)),), {}


# --- megatron-core ----------------------------------------------------------------------------


def one_rank() -> None:
    """A gloo group of one CPU rank and Megatron's parallel state, once per process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()


def megatron(**options: Any) -> Built:
    """Two pre-LN residual blocks around Megatron's MLP, [S, B, D]."""
    warnings.simplefilter("ignore")
    one_rank()
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = TransformerConfig(
                num_layers=2,
                hidden_size=16,
                num_attention_heads=2,
                ffn_hidden_size=24,
                use_cpu_initialization=True,
                **options,
            )
            parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
            self.norm = nn.LayerNorm(16)
            self.mlp = MLP(config, parts, ffn_hidden_size=24)

        def forward(self, x: Tensor) -> Tensor:
            y, bias = self.mlp(self.norm(x))
            return x + (y if bias is None else y + bias)

    return nn.Sequential(Block(), Block()), (torch.randn(5, 2, 16),), {}


MEGATRON = "{}.mlp"


@family(
    ffns(MEGATRON, 2, "linear_fc1", "linear_fc2", bodies.gelu),
    library="megatron",
    why="megatron.core MLP: Column/RowParallelLinear with skip_bias_add, returns (output, bias)",
)
def megatron_mlp() -> Built:
    return megatron()


@family(
    ffns(
        MEGATRON,
        2,
        "linear_fc1",
        "linear_fc2",
        bodies.merged(bodies.silu),
        bias=False,
        gated=True,
    ),
    library="megatron",
    why="gated_linear_unit with silu: merged fc1 chunked, first half activated",
)
def megatron_swiglu() -> Built:
    return megatron(
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )


# --- peft -------------------------------------------------------------------------------------


def lora(targets: list[str]) -> Built:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.hf import TEXT, causal

    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets)), (), causal()


LLAMA = "base_model.model.model.layers.{}.mlp"


@family(
    library="peft",
    refused={LLAMA.format(0): "lora", LLAMA.format(1): "lora"},
    why="LoRA on gate, up and down: each linear is a base and a low-rank path",
)
def lora_mlp() -> Built:
    return lora(["gate_proj", "up_proj", "down_proj"])


@family(
    ffns(LLAMA, 2, ["gate_proj", "up_proj"], "down_proj", bodies.glu(bodies.silu), bias=False),
    library="peft",
    why="LoRA on attention only: the MLPs are plain (and frozen)",
)
def lora_attention() -> Built:
    return lora(["q_proj", "v_proj"])
