"""torch.nn's own transformer modules: ``_ff_block`` inline, with a fused path in eval that hides it."""

from __future__ import annotations

import torch
from torch import nn

from zoo import bodies
from zoo.blocks import D, H
from zoo.family import Built, family, ffns


@family(
    ffns("", None, "linear1", "linear2", bodies.relu, form="linears"),
    why="TransformerEncoderLayer: _ff_block is linear2(dropout(activation(linear1(x)))), residual in forward",
)
def nn_encoder_layer() -> Built:
    return nn.TransformerEncoderLayer(D, 2, H, batch_first=True), (torch.randn(2, 5, D),), {}


@family(
    ffns("layers.{}", 2, "linear1", "linear2", bodies.relu, form="linears"),
    why="TransformerEncoder of two layers, batch first: eval takes the fused path unless disabled",
)
def nn_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(D, 2, H, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, D),), {}


@family(
    ffns("layers.{}", 2, "linear1", "linear2", bodies.gelu, form="linears"),
    why="norm_first with gelu, and a key padding mask (nested tensors in the fused path)",
)
def nn_encoder_prenorm_mask() -> Built:
    layer = nn.TransformerEncoderLayer(D, 2, H, activation="gelu", batch_first=True, norm_first=True)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, (torch.randn(2, 5, D),), {"src_key_padding_mask": mask}


@family(
    ffns("layers.{}", 2, "linear1", "linear2", bodies.relu, form="linears"),
    why="sequence first [S, B, D]",
)
def nn_encoder_seq_first() -> Built:
    layer = nn.TransformerEncoderLayer(D, 2, H)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), (torch.randn(5, 2, D),), {}


@family(
    ffns("layers.{}", 2, "linear1", "linear2", bodies.silu, bias=False, form="linears"),
    why="a callable activation (F.silu) and no biases",
)
def nn_encoder_silu_no_bias() -> Built:
    layer = nn.TransformerEncoderLayer(D, 2, H, activation=nn.functional.silu, batch_first=True, bias=False)
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, D),), {}


@family(
    ffns("layers.{}", 2, "linear1", "linear2", bodies.relu, form="linears"),
    why="TransformerDecoder: _ff_block after self and cross attention",
)
def nn_decoder() -> Built:
    layer = nn.TransformerDecoderLayer(D, 2, H, batch_first=True)
    return nn.TransformerDecoder(layer, 2), (torch.randn(2, 4, D), torch.randn(2, 5, D)), {}


@family(
    ffns("encoder.layers.{}", 2, "linear1", "linear2", bodies.relu, form="linears"),
    ffns("decoder.layers.{}", 2, "linear1", "linear2", bodies.relu, form="linears"),
    why="nn.Transformer: two encoder and two decoder layers",
)
def nn_transformer() -> Built:
    model = nn.Transformer(D, 2, 2, 2, H, batch_first=True)
    return model, (torch.randn(2, 5, D), torch.randn(2, 4, D)), {}
