"""timm models, built small from their constructors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo import bodies
from zoo.family import Built, family, ffns

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
MLP = "blocks.{}.mlp"
FC = ("fc1", "fc2")
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12), "num_classes": 5}


def timm_family(*groups: list, **options: Any) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    return family(*groups, library="timm", **options)


def mlps(at: str, layers: object, body: bodies.Body = bodies.gelu, **options: Any) -> list:
    """timm's Mlp: a dropout stands behind fc2, so either form is right."""
    return ffns(at, layers, *FC, body, form="either", **options)


def image(model: nn.Module, size: int = 8, batch: int = 2) -> Built:
    return model, (torch.randn(batch, 3, size, size),), {}


@timm_family(
    mlps(MLP, 2), why="VisionTransformer Block: x + drop_path(ls(mlp(norm2(x)))), Mlp fc1/act/drop/fc2/drop"
)
def vit() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, init_values=0.5))


@timm_family(
    ffns(MLP, 2, *FC, bodies.merged(bodies.gelu), form="either", gated=True),
    why="mlp_layer=SwiGLUPacked is GluMlp with gate_last=False; the block passes its own act_layer (GELU) over SiLU",
)
def vit_swiglu_packed() -> Built:
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, mlp_layer=SwiGLUPacked))


@timm_family(
    ffns(MLP, 2, *FC, bodies.merged_last(bodies.sigmoid), form="either", gated=True),
    why="mlp_layer=GluMlp with act_layer=nn.Sigmoid: gate_last, second half activated",
)
def vit_glu_mlp() -> Built:
    from timm.layers import GluMlp
    from timm.models.vision_transformer import VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, mlp_layer=GluMlp, act_layer=nn.Sigmoid))


@timm_family(
    ffns(MLP, 2, ["fc1_g", "fc1_x"], "fc2", bodies.glu(bodies.gelu), form="either"),
    why="mlp_layer=SwiGLU: fc1_g and fc1_x apart; the block passes its own act_layer (GELU)",
)
def vit_swiglu() -> Built:
    from timm.layers import SwiGLU
    from timm.models.vision_transformer import VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, mlp_layer=SwiGLU))


@timm_family(
    refused={"blocks.0.mlp": "norm-between", "blocks.1.mlp": "norm-between"},
    why="scale_mlp_norm=True puts a LayerNorm between drop1 and fc2",
)
def vit_mlp_norm() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, scale_mlp_norm=True))


@timm_family(mlps(MLP, 2), why="BEiT: gamma_2 * mlp(norm2(x))")
def beit() -> Built:
    from timm.models.beit import Beit

    return image(Beit(**VIT, mlp_ratio=2, init_values=0.5))


@timm_family(
    ffns(MLP, 2, *FC, bodies.merged(bodies.silu), form="either", gated=True),
    why="EVA-02 tiny: swiglu_mlp without scale_mlp is GluMlp(gate_last=False)",
)
def eva02_tiny() -> Built:
    from timm.models.eva import Eva

    return image(Eva(**VIT, mlp_ratio=2, swiglu_mlp=True, use_rot_pos_emb=True))


@timm_family(
    refused={"blocks.0.mlp": "norm-between", "blocks.1.mlp": "norm-between"},
    why="EVA-02 base: scale_mlp puts a LayerNorm between the product and fc2",
)
def eva02_base() -> Built:
    from timm.models.eva import Eva

    return image(Eva(**VIT, mlp_ratio=2, swiglu_mlp=True, scale_mlp=True))


@timm_family(
    mlps(MLP, 2),
    mlps("blocks_token_only.{}.mlp", 1),
    why="CaiT: gamma_2 * mlp; the class-attention block has one MLP on the class token",
)
def cait() -> Built:
    from timm.models.cait import Cait

    return image(Cait(**VIT, mlp_ratio=2, init_values=0.5, depth_token_only=1), batch=5)


SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 1),
    "num_heads": (1, 2),
    "window_size": 2,
    "num_classes": 5,
    "drop_path_rate": 0.0,
}
SWIN_MLPS = mlps("layers.{}.blocks.{}.mlp", [(0, 0), (0, 1), (1, 0)])


@timm_family(SWIN_MLPS, why="Swin: x.reshape(B, -1, C) + mlp(norm2(x)), then a reshape back")
def swin() -> Built:
    from timm.models.swin_transformer import SwinTransformer

    return image(SwinTransformer(**SWIN), 16, batch=1)


@timm_family(SWIN_MLPS, why="Swin v2: the norm is behind the MLP")
def swin_v2() -> Built:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return image(SwinTransformerV2(**SWIN), 16, batch=1)


MIXER = {"img_size": 8, "patch_size": 4, "num_blocks": 2, "embed_dim": 16, "num_classes": 5}


@timm_family(
    mlps("blocks.{}.mlp_channels", 2),
    refused={"blocks.0.mlp_tokens": "feature-axis", "blocks.1.mlp_tokens": "feature-axis"},
    why="MixerBlock: mlp_tokens on the transposed axis, mlp_channels an FFN",
)
def mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    return image(MlpMixer(**MIXER))


@timm_family(
    mlps("blocks.{}.mlp_channels", 2), why="ResMLP: one linear over tokens, ls2 * mlp_channels is an FFN"
)
def resmlp() -> Built:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    return image(MlpMixer(**MIXER, mlp_ratio=2, block_layer=ResBlock, norm_layer=Affine))


@timm_family(
    refused={"blocks.0.mlp_channels": "*", "blocks.1.mlp_channels": "*"},
    why="gMLP: the spatial gating unit norms one half and mixes it over the tokens",
)
def gmlp() -> Built:
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

    return image(MlpMixer(**MIXER, mlp_ratio=2, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp))


@timm_family(
    mlps("stages.{}.blocks.0.mlp", 4),
    why="ConvNeXt: permute to NHWC, norm, linear Mlp, permute, gamma; residual from before the depthwise conv",
)
def convnext() -> Built:
    from timm.models.convnext import ConvNeXt

    return image(ConvNeXt(**STAGES, ls_init_value=0.5), 32)


@timm_family(
    ffns("stages.{}.blocks.0.mlp", 4, "fc1:conv", "fc2:conv", bodies.gelu, form="either", feature_dim=1),
    why="ConvNeXt with conv_mlp=True: the same on NCHW with 1x1 convolutions",
)
def convnext_conv_mlp() -> Built:
    from timm.models.convnext import ConvNeXt

    return image(ConvNeXt(**STAGES, conv_mlp=True, ls_init_value=0.5), 32)


@timm_family(
    refused={"stages.0.blocks.0.mlp": "norm-between|reduction-between"},
    why="ConvNeXt V2: GlobalResponseNormMlp takes a norm over height and width between",
)
def convnext_v2() -> Built:
    from timm.models.convnext import ConvNeXt

    return image(ConvNeXt(**STAGES, use_grn=True, ls_init_value=None), 32)


@timm_family(
    ffns(
        "stages.{}.blocks.0.mlp",
        4,
        "fc1:conv",
        "fc2:conv",
        bodies.gelu,
        form="either",
        feature_dim=1,
        bias=True,
    ),
    why="PoolFormer v1 in timm's MetaFormer: 1x1-conv Mlp, Scale behind",
)
def poolformer() -> Built:
    from timm.layers import GroupNorm1
    from timm.models.metaformer import MetaFormer

    return image(
        MetaFormer(
            **STAGES,
            norm_layers=GroupNorm1,
            mlp_act=nn.GELU,
            mlp_bias=True,
            layer_scale_init_values=0.5,
            use_mlp_head=False,
        ),
        32,
    )


@timm_family(
    ffns(
        "stages.{}.blocks.0.mlp",
        2,
        "fc1:conv",
        "fc2:conv",
        bodies.star_relu,
        form="either",
        feature_dim=1,
        bias=False,
        body_params={"scale": "act.scale", "bias": "act.bias"},
    ),
    ffns(
        "stages.{}.blocks.0.mlp",
        [2, 3],
        *FC,
        bodies.star_relu,
        form="either",
        bias=False,
        body_params={"scale": "act.scale", "bias": "act.bias"},
    ),
    refused={
        "stages.0.blocks.0.token_mixer": "conv-between",
        "stages.1.blocks.0.token_mixer": "conv-between",
    },
    why="CAFormer: StarReLU MLPs on NCHW then NLC; SepConv is a token mixer that looks like an FFN",
)
def caformer() -> Built:
    from timm.models.metaformer import (
        Attention,
        LayerNorm2dNoBias,
        LayerNormNoBias,
        MetaFormer,
        SepConv,
    )

    return image(
        MetaFormer(
            **STAGES,
            token_mixers=[SepConv, SepConv, Attention, Attention],
            norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
            head_dim=4,
        ),
        32,
    )


@timm_family(
    refused={"stages.0.blocks.0.mlp": "conv-between", "stages.3.blocks.0.mlp": "conv-between"},
    why="PVT v2: a depthwise convolution between fc1 and the activation",
)
def pvt_v2() -> Built:
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    return image(
        PyramidVisionTransformerV2(
            depths=(1, 1, 1, 1),
            embed_dims=(8, 8, 12, 12),
            num_heads=(1, 1, 2, 2),
            mlp_ratios=(2, 2, 2, 2),
            num_classes=5,
        ),
        32,
    )


@timm_family(
    ffns("stages.{}.blocks.0.mlp", 4, "fc1:conv", "fc2:conv", bodies.gelu, feature_dim=1),
    why="InceptionNeXt: the branch is mlp(norm(split depthwise convs, concatenated)), added to the block's input",
)
def inception_next() -> Built:
    from timm.models.inception_next import MetaNeXt

    return image(
        MetaNeXt(**{**STAGES, "dims": (16, 16, 24, 24)}, mlp_ratios=(2, 2, 2, 2), ls_init_value=0.5), 32
    )


@timm_family(
    ffns("layers.{}.blocks.0.mlp", 4, "fc1:conv", "fc2:conv", bodies.gelu, form="either", feature_dim=1),
    why="FocalNet: 1x1-conv Mlp on NCHW; the focal modulation beside it is not an FFN",
)
def focalnet() -> Built:
    from timm.models.focalnet import FocalNet

    return image(
        FocalNet(embed_dim=8, depths=(1, 1, 1, 1), mlp_ratio=2, num_classes=5, drop_path_rate=0.0), 32
    )


@timm_family(
    refused={"stages.0.1.f1": "no-residual", "stages.3.1.f1": "no-residual"},
    why="StarNet: act(f1(x)) * f2(x) -> g, but BatchNorm and a depthwise conv stand between g and the add",
)
def starnet() -> Built:
    from timm.models.starnet import StarNet

    return image(StarNet(base_dim=8, depths=(1, 1, 1, 1), mlp_ratio=2, num_classes=5), 64, batch=1)
