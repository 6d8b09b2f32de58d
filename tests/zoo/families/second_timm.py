"""A second set of timm models, written from their code without looking at the matcher."""

from __future__ import annotations

from zoo import bodies
from zoo.families.timm_models import STAGES, VIT, image, mlps, timm_family
from zoo.family import Built, ffns


@timm_family(
    mlps("blocks.{}.ffns.{}.mlp", [(0, 0), (0, 1), (1, 0), (1, 1)]),
    why="ParallelThingsBlock: two FFNs of one stream, stacked, summed over the new axis and added",
)
def vit_parallel() -> Built:
    from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, block_fn=ParallelThingsBlock))


@timm_family(
    refused={"blocks.0": "*", "blocks.1": "*"},
    why="ViT-22B's block: one in_proj makes q, k, v and the hidden layer, so the entry's output leaves the FFN",
)
def vit_parallel_scaling() -> Built:
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, block_fn=ParallelScalingBlock))


@timm_family(mlps("blocks.{}.mlp", 2), why="ResPostBlock: the norm is behind the MLP")
def vit_res_post_norm() -> Built:
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    return image(VisionTransformer(**VIT, mlp_ratio=2, block_fn=ResPostBlock))


@timm_family(
    refused={
        "stages.0.blocks.0": "conv-between|concat-between",
        "stages.3.blocks.0": "conv-between|concat-between",
    },
    why="MambaOut: fc1 is split in three, one part goes through a depthwise convolution",
)
def mambaout() -> Built:
    from timm.models.mambaout import MambaOut

    return image(MambaOut(**STAGES), 32)


@timm_family(
    mlps("blocks.{}.mlp", 2),
    mlps("cls_attn_blocks.{}.mlp", 1),
    why="XCiT: gamma2 * mlp(norm2(x)); in class attention the class token is put back by cat before the add",
)
def xcit() -> Built:
    from timm.models.xcit import Xcit

    model = Xcit(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5, cls_attn_layers=1
    )
    return image(model, 16, batch=5)


@timm_family(
    ffns("stages.{}.blocks.0.mlp", [1, 2, 3], "fc1", "fc2", bodies.gelu, form="linears"),
    refused={"stages.0.blocks.0": "norm-between|conv-between"},
    why="TinyViT: NormMlp holds its pre-norm, so the owner is more than the FFN; stage 0 is MBConv with BatchNorm",
)
def tiny_vit() -> Built:
    from timm.models.tiny_vit import TinyVit

    model = TinyVit(
        embed_dims=(8, 8, 12, 12),
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_sizes=(4, 4, 2, 1),
        num_classes=5,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
    )
    return image(model, 32)


@timm_family(
    mlps("levels.{}.transformer_encoder.0.mlp", 2),
    why="NesT: blocks [B, T, N, C], mlp(norm2(x)) added",
)
def nest() -> Built:
    from timm.models.nest import Nest

    model = Nest(
        img_size=16,
        patch_size=2,
        num_levels=2,
        embed_dims=(8, 12),
        num_heads=(1, 2),
        depths=(1, 1),
        num_classes=5,
        mlp_ratio=2.0,
        drop_path_rate=0.0,
    )
    return image(model, 16)


@timm_family(
    mlps("blocks.{}.mlp_in", 2),
    mlps("blocks.{}.mlp", 2),
    why="TNT: an inner MLP on pixels and an outer one on patches, widths 8 and 16",
)
def tnt() -> Built:
    from timm.models.tnt import TNT

    model = TNT(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        inner_dim=8,
        depth=2,
        num_heads_inner=2,
        num_heads_outer=2,
        mlp_ratio=2,
        num_classes=5,
    )
    return image(model, 16)


@timm_family(
    mlps("blocks.{}.0.mlp", 4),
    why="Twins: MLPs in four stages of one block, a positional convolution between blocks",
)
def twins() -> Built:
    from timm.models.twins import Twins

    model = Twins(
        img_size=32,
        embed_dims=(8, 8, 12, 12),
        num_heads=(1, 1, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
        sr_ratios=(2, 2, 1, 1),
        num_classes=5,
    )
    return image(model, 32)


@timm_family(
    mlps("stages.{}.blocks.0.{}.mlp", [(0, 0), (0, 1), (1, 0), (1, 1)]),
    why="DaViT: a spatial and a channel block per stage; the stream returns to NCHW between, the MLP is on NLC",
)
def davit() -> Built:
    from timm.models.davit import DaVit

    model = DaVit(
        depths=(1, 1),
        embed_dims=(8, 12),
        num_heads=(1, 2),
        window_size=2,
        mlp_ratio=2,
        num_classes=5,
    )
    return image(model, 16)


@timm_family(
    mlps("blocks.{}.mlp", 3),
    why="Hiera: x + mlp(norm2(x)); the middle block doubles the width in attention",
)
def hiera() -> Built:
    from timm.models.hiera import Hiera

    model = Hiera(
        img_size=(16, 16),
        embed_dim=8,
        num_heads=1,
        num_classes=5,
        stages=(1, 2),
        q_pool=1,
        mask_unit_size=(2, 2),
        mask_unit_attn=(True, False),
        patch_kernel=(3, 3),
        patch_stride=(2, 2),
        patch_padding=(1, 1),
        mlp_ratio=2.0,
    )
    return image(model, 16)


@timm_family(
    refused={"stages.0.blocks.0": "norm-between", "stages.1.blocks.0": "norm-between"},
    why="LeViT: LinearNorm is a linear with BatchNorm, so a norm stands between the MLP's linears",
)
def levit() -> Built:
    from timm.models.levit import Levit

    model = Levit(
        img_size=32,
        embed_dim=(16, 24),
        key_dim=4,
        depth=(1, 1),
        num_heads=(2, 2),
        mlp_ratio=2.0,
        num_classes=5,
    )
    return image(model, 32)


@timm_family(
    mlps("blocks.{}.mlp", 2),
    why="ConViT: gated positional self-attention, an ordinary MLP",
)
def convit() -> Built:
    from timm.models.convit import ConVit

    return image(ConVit(**VIT, mlp_ratio=2.0, local_up_to_layer=1))


@timm_family(
    ffns("stages.{}.blocks.0.mlp", 4, "fc1", "fc2", bodies.gelu, form="either"),
    why="EdgeNeXt without attention blocks: ConvNeXt's block on NHWC; activations of stage widths 8 and 12",
)
def edgenext() -> Built:
    from timm.models.edgenext import EdgeNeXt

    model = EdgeNeXt(
        dims=(8, 8, 12, 12),
        depths=(1, 1, 1, 1),
        global_block_counts=(0, 0, 0, 0),
        kernel_sizes=(3, 3, 3, 3),
        expand_ratio=2,
        ls_init_value=0.5,
        num_classes=5,
    )
    return image(model, 32)
