"""A second set of transformers models, written from their code without looking at the matcher."""

from __future__ import annotations

import torch

from zoo import bodies
from zoo.family import ffns
from zoo.hf import GPT, INNER, SEQ2SEQ, VISION, WIDTH, hf, ids, image, seq2seq, text

SWIGLU = bodies.glu(bodies.silu)
GATED = (["gate_proj", "up_proj"], "down_proj")


def fcs(at: str, activation: bodies.Body = bodies.gelu, calls: int = 1) -> list:
    """fc1 and fc2 inline in two layers."""
    return ffns(at, 2, "fc1", "fc2", activation, form="linears", calls=calls)


def split(at: str, layers: object = 2, prefix: str = "", activation: bodies.Body = bodies.gelu) -> list:
    names = (f"{prefix}intermediate.dense", f"{prefix}output.dense")
    return ffns(at, layers, *names, activation, form="linears")


hf("pegasus_x", "PegasusXModel",
   fcs("encoder.layers.{}", calls=2), fcs("decoder.layers.{}"),
   base=SEQ2SEQ, inputs=lambda: {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 4), "use_cache": False},
   block_size=4, num_global_tokens=2, activation_function="gelu", decoder_start_token_id=0,
   why="Pegasus-X: the encoder layer runs fc1/fc2 on local and on global tokens")  # fmt: skip
hf("led", "LEDModel", fcs("encoder.layers.{}"), fcs("decoder.layers.{}"),
   base={**SEQ2SEQ, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32},
   inputs=lambda: {"input_ids": ids(2, 8), "decoder_input_ids": ids(2, 4), "use_cache": False},
   attention_window=4, why="LED: BART's layers with windowed attention")  # fmt: skip
hf("lfm2", "Lfm2ForCausalLM",
   ffns("model.layers.{}.feed_forward", 2, ["w1", "w3"], "w2", SWIGLU, bias=False),
   num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
   why="Lfm2MLP: w2(silu(w1(x)) * w3(x)); the short convolution's gates are no FFN")  # fmt: skip
hf("sam_vision", "SamVisionModel",
   ffns("vision_encoder.layers.{}.mlp", 2, "lin1", "lin2", bodies.gelu),
   base=VISION, inputs=image(16), image_size=16, window_size=2, global_attn_indexes=[1], mlp_dim=INNER,
   output_channels=8, num_pos_feats=8, why="SamMLPBlock on [B, H, W, D]; the neck is convolutional")  # fmt: skip
hf("gpt_bigcode", "GPTBigCodeForCausalLM",
   ffns("transformer.h.{}.mlp", 2, "c_fc", "c_proj", bodies.gelu_tanh, form="either"),
   base=GPT, why="GPTBigCodeMLP: nn.Linear, tanh gelu, dropout behind")  # fmt: skip
hf("recurrent_gemma", "RecurrentGemmaForCausalLM",
   ffns("model.layers.{}.mlp_block", 2, *GATED, bodies.glu(bodies.gelu_tanh)),
   num_key_value_heads=1, head_dim=8, lru_width=WIDTH, block_types=["recurrent", "attention"],
   attention_window_size=8,
   why="RecurrentGemmaMlp with biases; linear_y * lru in the recurrent block is no GLU FFN")  # fmt: skip
hf("nanochat", "NanoChatForCausalLM", ffns("model.layers.{}.mlp", 2, "fc1", "fc2", bodies.relu2, bias=False),
   num_key_value_heads=2, why="NanoChatMLP: relu2; norms without weights")  # fmt: skip
hf("arcee", "ArceeForCausalLM", ffns("model.layers.{}.mlp", 2, "up_proj", "down_proj", bodies.relu2, bias=False),
   num_key_value_heads=2, why="ArceeMLP: relu2, no gate")  # fmt: skip
hf("helium", "HeliumForCausalLM", ffns("model.layers.{}.mlp", 2, *GATED, SWIGLU, bias=False),
   num_key_value_heads=2, head_dim=8, why="HeliumMLP is Llama's")  # fmt: skip
hf("exaone4", "Exaone4ForCausalLM", ffns("model.layers.{}.mlp", 2, *GATED, SWIGLU, bias=False),
   num_key_value_heads=2, sliding_window=4, why="EXAONE 4: norms behind attention and MLP")  # fmt: skip
hf("seed_oss", "SeedOssForCausalLM", ffns("model.layers.{}.mlp", 2, *GATED, SWIGLU, bias=False),
   num_key_value_heads=2, head_dim=8, why="SeedOssMLP, dropout behind down_proj in the MLP")  # fmt: skip
hf("olmoe", "OlmoeForCausalLM", num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
   refused={"model.layers.0.mlp.experts": "router-above", "model.layers.1.mlp.experts": "router-above"},
   why="OLMoE: every layer is an MoE already, with stacked expert parameters")  # fmt: skip
hf("lilt", "LiltModel", split("encoder.layer.{}"), split("encoder.layer.{}", prefix="layout_"),
   inputs=lambda: {"input_ids": ids(), "bbox": torch.randint(0, 10, (2, 5, 4)).sort().values},
   hidden_size=24, channel_shrink_ratio=2, max_2d_position_embeddings=16, max_position_embeddings=40, pad_token_id=1,
   why="LiLT: a text and a layout stream, each with intermediate/output siblings, widths 24 and 12")  # fmt: skip
hf("swinv2", "Swinv2Model", split("encoder.layers.{}.blocks.{}", [(0, 0), (0, 1), (1, 0)]),
   base={"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
         "window_size": 2, "mlp_ratio": 2.0},
   inputs=image(16), why="Swinv2: siblings, layernorm_after between exit and add")  # fmt: skip
hf("lxmert", "LxmertModel",
   split("encoder.layer.{}", 1), split("encoder.r_layers.{}", 1),
   ffns("encoder.x_layers.{}", 1, "lang_inter.dense", "lang_output.dense", bodies.gelu, form="linears"),
   ffns("encoder.x_layers.{}", 1, "visn_inter.dense", "visn_output.dense", bodies.gelu, form="linears"),
   inputs=lambda: {"input_ids": ids(), "visual_feats": torch.randn(2, 3, 6), "visual_pos": torch.rand(2, 3, 4)},
   l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=6,
   why="LXMERT: language, vision and cross layers, the last with a pair of siblings for each side")  # fmt: skip
hf("prophetnet", "ProphetNetModel",
   ffns("encoder.layers.{}.feed_forward", 2, "intermediate", "output", bodies.gelu, form="either"),
   ffns("decoder.layers.{}.feed_forward", 2, "intermediate", "output", bodies.gelu, form="either"),
   base={"vocab_size": 40, "hidden_size": WIDTH, "encoder_ffn_dim": INNER, "num_encoder_layers": 2,
         "num_encoder_attention_heads": 2, "decoder_ffn_dim": INNER, "num_decoder_layers": 2,
         "num_decoder_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0},
   inputs=seq2seq, why="ProphetNetFeedForward: dropouts between and behind")  # fmt: skip
hf("flaubert", "FlaubertModel", ffns("ffns.{}", 2, "lin1", "lin2", bodies.gelu, form="either"),
   base={"vocab_size": 40, "emb_dim": WIDTH, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
   inputs=text, why="Flaubert: XLM's FFN in a ModuleList")  # fmt: skip
hf("hiera", "HieraModel",
   ffns("encoder.stages.{}.layers.0.mlp", 2, "fc1", "fc2", bodies.gelu),
   base={"embed_dim": 8, "image_size": [16, 16], "patch_size": [3, 3], "patch_stride": [2, 2],
         "patch_padding": [1, 1], "mlp_ratio": 2.0, "depths": [1, 1], "num_heads": [1, 2],
         "embed_dim_multiplier": 2.0, "num_query_pool": 1, "query_stride": [2, 2],
         "masked_unit_size": [4, 4], "masked_unit_attention": [True, False]},
   inputs=image(16), why="HieraMlp; widths 8 and 16, tokens pooled by max in attention")  # fmt: skip
hf("dinov3_gated", "DINOv3ViTModel", ffns("model.layer.{}.mlp", 2, *GATED, SWIGLU),
   base=VISION, inputs=image(), use_gated_mlp=True, mlp_bias=True, hidden_act="silu", num_register_tokens=1,
   why="DINOv3ViTGatedMLP with biases, layer scale behind")  # fmt: skip
hf("mgp_str", "MgpstrModel", ffns("encoder.blocks.{}.mlp", 2, "fc1", "fc2", bodies.gelu, form="either"),
   base={"image_size": [8, 8], "patch_size": 4, "num_channels": 3, "max_token_length": 4,
         "num_character_labels": 5, "num_bpe_labels": 5, "num_wordpiece_labels": 5, "hidden_size": WIDTH,
         "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0},
   inputs=image(), why="MgpstrMlp: timm's Mlp, dropout behind")  # fmt: skip
hf("trocr_decoder", "TrOCRForCausalLM", fcs("model.decoder.layers.{}"),
   base={"vocab_size": 40, "d_model": WIDTH, "decoder_layers": 2, "decoder_attention_heads": 2,
         "decoder_ffn_dim": INNER, "max_position_embeddings": 32, "cross_attention_hidden_size": WIDTH},
   why="TrOCR's decoder alone: fc1/fc2 inline")  # fmt: skip
hf("time_series_transformer", "TimeSeriesTransformerModel",
   fcs("encoder.layers.{}"), fcs("decoder.layers.{}"),
   base={"prediction_length": 2, "context_length": 4, "lags_sequence": [1, 2], "num_time_features": 1,
         "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER},
   inputs=lambda: {"past_values": torch.randn(2, 6), "past_time_features": torch.randn(2, 6, 1),
                   "past_observed_mask": torch.ones(2, 6), "future_values": torch.randn(2, 2),
                   "future_time_features": torch.randn(2, 2, 1)},
   why="BART's layers on time features")  # fmt: skip
hf("decision_transformer", "DecisionTransformerModel",
   ffns("encoder.h.{}.mlp", 2, "c_fc:io", "c_proj:io", bodies.relu, form="either"),
   base={"state_dim": 3, "act_dim": 2, "hidden_size": WIDTH, "max_ep_len": 16, "n_layer": 2, "n_head": 2,
         "n_positions": 32, "n_inner": INNER},
   inputs=lambda: {"states": torch.randn(1, 3, 3), "actions": torch.randn(1, 3, 2), "rewards": torch.randn(1, 3, 1),
                   "returns_to_go": torch.randn(1, 3, 1), "timesteps": torch.tensor([[0, 1, 2]]),
                   "attention_mask": torch.ones(1, 3)},
   why="Decision Transformer holds a GPT-2 with relu: Conv1D MLPs")  # fmt: skip
hf("imagegpt", "ImageGPTModel",
   ffns("h.{}.mlp", 2, "c_fc:io", "c_proj:io", bodies.quick_gelu, form="either"),
   base=GPT, inputs=lambda: {"input_ids": torch.randint(0, 39, (2, 5)), "use_cache": False},
   why="ImageGPT: Conv1D MLP with quick_gelu")  # fmt: skip
hf("big_bird", "BigBirdModel", split("encoder.layer.{}", activation=bodies.gelu_tanh),
   inputs=text, attention_type="original_full", why="BigBird with full attention: split pair, gelu_new")  # fmt: skip
hf("xmod", "XmodModel", split("encoder.layer.{}"),
   inputs=lambda: {"input_ids": ids(), "lang_ids": torch.zeros(2, dtype=torch.long)},
   languages=["en_XX"], default_language="en_XX", max_position_embeddings=40, pad_token_id=1,
   refused={"adapter_modules": "no-residual"},
   why="X-MOD: split pair; the language adapter runs on masked rows and is written into a zero tensor")  # fmt: skip
