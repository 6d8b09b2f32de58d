"""Vision, speech and time-series models of transformers, from tiny random configs."""

from __future__ import annotations

import torch

from zoo import bodies
from zoo.family import ffns
from zoo.hf import INNER, VISION, WIDTH, hf, image


def mlps(prefix: str, activation: bodies.Body = bodies.gelu, layers: object = 2) -> list:
    """An aligned MLP with children fc1 and fc2."""
    return ffns(prefix, layers, "fc1", "fc2", activation)


def split(prefix: str) -> list:
    return ffns(prefix, 2, "intermediate.dense", "output.dense", bodies.gelu, form="linears")


hf("vit", "ViTModel", mlps("layers.{}.mlp"), base=VISION, inputs=image(),
   why="ViTMLP: fc1, gelu, fc2; the dropout and the add are the layer's")  # fmt: skip
hf(
    "deit",
    "DeiTModel",
    mlps("layers.{}.mlp"),
    base=VISION,
    inputs=image(),
    why="ViTMLP under another name: fc1, gelu, fc2, the add is the layer's",
)
hf("dinov2", "Dinov2Model", mlps("encoder.layer.{}.mlp"), base=VISION, inputs=image(), mlp_ratio=2,
   why="Dinov2MLP, layer scale between exit and add")  # fmt: skip
hf("dinov2_swiglu", "Dinov2Model",
   ffns("encoder.layer.{}.mlp", 2, ["gate_proj", "up_proj"], "down_proj",
        bodies.glu(bodies.silu)),
   base=VISION, inputs=image(), use_swiglu_ffn=True, mlp_ratio=2,
   why="Dinov2SwiGLUFFN with biases")  # fmt: skip
hf("beit", "BeitModel", mlps("layers.{}.mlp"), base=VISION, inputs=image(),
   why="BeitMLP; lambda_2 scales the branch")  # fmt: skip
hf("clip_vision", "CLIPVisionModel", mlps("encoder.layers.{}.mlp", bodies.quick_gelu),
   base=VISION, inputs=image(), why="CLIPMLP with quick_gelu")  # fmt: skip
hf("siglip_vision", "SiglipVisionModel",
   mlps("encoder.layers.{}.mlp", bodies.gelu_tanh),
   ffns("head.mlp", None, "fc1", "fc2", bodies.gelu_tanh),
   base=VISION, inputs=image(),
   why="SigLIP: the attention-pooling head holds a genuine residual MLP too")  # fmt: skip
hf("videomae", "VideoMAEModel", split("encoder.layer.{}"), base=VISION,
   inputs=lambda: {"pixel_values": torch.randn(1, 4, 3, 8, 8)}, num_frames=4, tubelet_size=2,
   why="VideoMAE: intermediate/output siblings, the add is in the output module")  # fmt: skip
hf("vivit", "VivitModel", mlps("layers.{}.mlp", bodies.gelu_tanh), base=VISION,
   inputs=lambda: {"pixel_values": torch.randn(1, 4, 3, 8, 8)}, num_frames=4,
   tubelet_size=[2, 4, 4], why="VivitMLP with gelu_fast (tanh form)")  # fmt: skip
hf("yolos", "YolosModel", split("encoder.layer.{}"), base=VISION, inputs=image(), image_size=[8, 8],
   num_detection_tokens=3, why="YOLOS: ViT with split intermediate/output")  # fmt: skip
hf("swin", "SwinModel",
   mlps("encoder.layers.{}.blocks.{}.mlp", layers=[(0, 0), (0, 1), (1, 0)]),
   base={"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1],
         "num_heads": [1, 2], "window_size": 2, "mlp_ratio": 2},
   inputs=image(16), why="SwinMLP in each block, shifted windows; widths 8 and 16")  # fmt: skip
hf("convnext", "ConvNextModel",
   ffns("encoder.stages.{}.layers.0", 2, "pwconv1", "pwconv2", bodies.gelu, form="linears"),
   base={"num_channels": 3, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2,
         "patch_size": 2}, inputs=image(8),
   why="ConvNextLayer: linears inline on NHWC; residual from before the depthwise conv, after a permute")  # fmt: skip
hf("poolformer", "PoolFormerModel",
   ffns("encoder.block.{}.0.output", 2, "conv1:conv", "conv2:conv", bodies.gelu, feature_dim=1,
        form="either"),
   base={"hidden_sizes": [8, 12], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3],
         "strides": [2, 2], "padding": [1, 1], "mlp_ratio": 2.0},
   inputs=image(8),
   why="PoolFormerOutput: 1x1 convolutions; drop path (identity at 0) between and behind")  # fmt: skip

CONVOLUTIONS = {
    "vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 2, "conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [4, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}  # fmt: skip


def waves() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 64)}


SPEECH_FF = ffns(
    "encoder.layers.{}.feed_forward", 2, "intermediate_dense", "output_dense", bodies.gelu,
    form="either",
)  # fmt: skip
hf("wav2vec2", "Wav2Vec2Model", SPEECH_FF, base=CONVOLUTIONS, inputs=waves,
   why="Wav2Vec2FeedForward: dropouts between and behind")  # fmt: skip
hf("hubert", "HubertModel", SPEECH_FF, base=CONVOLUTIONS, inputs=waves, why="HubertFeedForward")
hf("wavlm", "WavLMModel", SPEECH_FF, base=CONVOLUTIONS, inputs=waves, why="WavLMFeedForward")
hf("unispeech", "UniSpeechModel", SPEECH_FF, base=CONVOLUTIONS, inputs=waves, why="as Wav2Vec2")
hf("wav2vec2_conformer", "Wav2Vec2ConformerModel",
   ffns("encoder.layers.{}.ffn1", 2, "intermediate_dense", "output_dense", bodies.silu,
        form="either"),
   ffns("encoder.layers.{}.ffn2", 2, "intermediate_dense", "output_dense", bodies.silu,
        form="either"),
   base=CONVOLUTIONS, inputs=waves, hidden_act="swish", conv_depthwise_kernel_size=3,
   why="Conformer: two half-step FFNs; the convolution module has BatchNorm between its 1x1 convs")  # fmt: skip
WHISPER = {"vocab_size": 40, "num_mel_bins": 4, "d_model": WIDTH, "encoder_layers": 2,
           "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
           "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "max_source_positions": 6,
           "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "decoder_start_token_id": 1}  # fmt: skip
TWO_SIDES = [
    *ffns("encoder.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
    *ffns("decoder.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
]
RELU_SIDES = [
    *ffns("encoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
    *ffns("decoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
]


def spectrogram() -> dict[str, object]:
    features = torch.randn(2, 4, 12)
    return {"input_features": features, "decoder_input_ids": torch.randint(3, 40, (2, 4)),
            "use_cache": False}  # fmt: skip


hf("whisper", "WhisperModel", TWO_SIDES, base=WHISPER, inputs=spectrogram,
   why="Whisper encoder and decoder layers: fc1/fc2 inline, fp16 clamp behind the add")  # fmt: skip
hf("speech_to_text", "Speech2TextModel", RELU_SIDES,
   base={**WHISPER, "input_feat_per_channel": 4, "input_channels": 1, "conv_channels": 8,
         "num_conv_layers": 1, "conv_kernel_sizes": [3]},
   inputs=lambda: {"input_features": torch.randn(2, 12, 4), "use_cache": False,
                   "decoder_input_ids": torch.randint(3, 40, (2, 4))},
   why="Speech2Text: fc1/fc2 inline with relu")  # fmt: skip
hf("moonshine", "MoonshineModel",
   mlps("encoder.layers.{}.mlp"),
   ffns("decoder.layers.{}.mlp", 2, "fc1", "fc2", bodies.merged_last(bodies.silu), gated=True),
   base={"vocab_size": 40, "hidden_size": WIDTH, "intermediate_size": INNER,
         "encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2,
         "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
         "max_position_embeddings": 32, "pad_token_id": 0},
   inputs=lambda: {"input_values": torch.randn(1, 1600), "use_cache": False,
                   "decoder_input_ids": torch.randint(3, 40, (1, 4))},
   why="Moonshine: plain gelu MLP in the encoder, merged GLU, second half activated, in the decoder")  # fmt: skip
hf("audio_spectrogram", "ASTModel", mlps("layers.{}.mlp"), base=VISION,
   inputs=lambda: {"input_values": torch.randn(2, 8, 8)}, num_mel_bins=8, max_length=8,
   frequency_stride=4, time_stride=4, why="ASTMLP as ViT's")  # fmt: skip
hf("patchtst", "PatchTSTModel",
   ffns("encoder.layers.{}.ff", 2, "0", "3", bodies.gelu),
   base={"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4,
         "d_model": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": INNER,
         "norm_type": "layernorm"},
   inputs=lambda: {"past_values": torch.randn(2, 16, 2)},
   why="PatchTST: ff is Sequential(Linear, GELU, Dropout, Linear)")  # fmt: skip
hf("patchtsmixer", "PatchTSMixerModel",
   ffns("encoder.mlp_mixer_encoder.mixers.{}.feature_mixer.mlp", 2, "fc1", "fc2", bodies.gelu,
        form="either"),
   base={"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4,
         "d_model": WIDTH, "num_layers": 2, "gated_attn": False, "mode": "common_channel",
         "self_attn": False, "dropout": 0.1},
   inputs=lambda: {"past_values": torch.randn(2, 16, 2)},
   refused={"mixers.0.patch_mixer.mlp": "feature-axis", "mixers.1.patch_mixer.mlp": "feature-axis"},
   why="the patch mixer's MLP runs on the transposed patch axis, the feature mixer's is an FFN")  # fmt: skip
