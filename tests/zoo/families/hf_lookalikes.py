"""Models of transformers whose FFN-like parts must be refused, or that have some of each."""

from __future__ import annotations

import torch

from zoo import bodies
from zoo.family import ffns
from zoo.hf import INNER, WIDTH, hf, ids, image, seq2seq, text

GLU = bodies.glu(bodies.silu)

hf("bitnet", "BitNetForCausalLM", num_key_value_heads=2,
   refused={"model.layers.0.mlp": "norm-between|reduction-between",
            "model.layers.1.mlp": "norm-between|reduction-between"},
   why="BitNetMLP: ffn_sub_norm, an RMS norm written out, between product and down_proj")  # fmt: skip
hf("convnextv2", "ConvNextV2Model",
   base={"num_channels": 3, "hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2,
         "patch_size": 2}, inputs=image(8),
   refused={"encoder.stages.0.layers.0": "norm-between|reduction-between"},
   why="ConvNeXt V2: GRN between takes a norm over height and width")  # fmt: skip
hf("segformer", "SegformerModel",
   base={"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [1, 1], "hidden_sizes": [8, 16],
         "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2],
         "mlp_ratios": [2, 2]},
   inputs=image(8), refused={"mlp": "conv-between"},
   why="SegformerMixMLP: a depthwise 3x3 convolution between fc1 and the activation")  # fmt: skip
hf("squeezebert", "SqueezeBertModel", inputs=text, embedding_size=WIDTH,
   q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1, intermediate_groups=2,
   output_groups=2, refused={"encoder.layers.0": "grouped", "encoder.layers.1": "grouped"},
   why="SqueezeBERT: kernel-1 Conv1d with groups")  # fmt: skip
hf("squeezebert_one_group", "SqueezeBertModel",
   ffns("encoder.layers.{}", 2, "intermediate.conv1d:conv", "output.conv1d:conv", bodies.gelu,
        form="linears", feature_dim=1),
   inputs=text, embedding_size=WIDTH, q_groups=1, k_groups=1, v_groups=1,
   post_attention_groups=1, intermediate_groups=1, output_groups=1,
   why="with one group it is a plain FFN on NCW, split over siblings")  # fmt: skip
hf("convbert_groups", "ConvBertModel", inputs=text, embedding_size=WIDTH, head_ratio=1,
   conv_kernel_size=3, num_groups=2,
   refused={"encoder.layer.0": "grouped", "encoder.layer.1": "grouped"},
   why="ConvBERT with num_groups 2: GroupedLinearLayer multiplies a batch of blocks")  # fmt: skip
hf("rwkv", "RwkvModel", base={"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2,
                              "intermediate_size": INNER, "attention_hidden_size": WIDTH,
                              "rescale_every": 0},
   inputs=lambda: {"input_ids": ids(2, 5), "use_cache": False},
   refused={"blocks.0.feed_forward": "no-residual|different-source",
            "blocks.1.feed_forward": "no-residual|different-source"},
   why="RWKV channel mix: sigmoid(receptance) multiplies the exit's output")  # fmt: skip
hf("mixtral", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=2,
   num_experts_per_tok=1, inputs=lambda: {"input_ids": ids(), "use_cache": False},
   refused={"model.layers.0.mlp.experts": "router-above", "model.layers.1.mlp.experts": "router-above"},
   why="Mixtral is an MoE already: its experts [E, ., .] stand below a router")  # fmt: skip
hf("qwen2_moe", "Qwen2MoeForCausalLM",
   ffns("model.layers.0.mlp", None, ["gate_proj", "up_proj"], "down_proj", GLU, bias=False),
   fp64=False, num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=12,
   shared_expert_intermediate_size=12, mlp_only_layers=[0], decoder_sparse_step=1,
   refused={"model.layers.1.mlp.shared_expert": "router-above"},
   why="Qwen2-MoE: layer 0 is dense (mlp_only_layers), layer 1 has a router beside its shared expert")  # fmt: skip
hf("deepseek_v3", "DeepseekV3ForCausalLM",
   ffns("model.layers.0.mlp", None, ["gate_proj", "up_proj"], "down_proj", GLU, bias=False),
   fp64=False, num_key_value_heads=2, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1,
   num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=12, kv_lora_rank=8,
   q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
   refused={"model.layers.1.mlp.shared_experts": "router-above"},
   why="DeepSeek-V3: the first layer is dense, the shared expert of the second sits beside a router")  # fmt: skip
hf("switch_transformers", "SwitchTransformersModel",
   ffns("encoder.block.0.layer.1.mlp", None, "wi", "wo", bodies.relu, bias=False),
   ffns("decoder.block.0.layer.2.mlp", None, "wi", "wo", bodies.relu, bias=False),
   base={"vocab_size": 40, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2,
         "num_decoder_layers": 2, "num_heads": 2, "num_experts": 2, "expert_capacity": 64,
         "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "pad_token_id": 0,
         "decoder_start_token_id": 0},
   inputs=seq2seq, refused={"encoder.block.1.layer.1.mlp": "router-above|no-residual"},
   why="Switch: every second block is sparse (experts on indexed rows below a router), the others dense")  # fmt: skip
hf("llava_projector", "LlavaForConditionalGeneration",
   ffns("model.language_model.layers.{}.mlp", 2, ["gate_proj", "up_proj"], "down_proj", GLU,
        bias=False),
   ffns("model.vision_tower.encoder.layers.{}.mlp", 2, "fc1", "fc2",
        bodies.quick_gelu),
   base={}, image_token_index=39, image_seq_length=4,
   vision_config={"model_type": "clip_vision_model", "hidden_size": WIDTH,
                  "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2,
                  "image_size": 8, "patch_size": 4},
   text_config={"model_type": "llama", "vocab_size": 40, "hidden_size": WIDTH,
                "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 2,
                "max_position_embeddings": 32, "pad_token_id": 0},
   vision_feature_layer=-1,
   inputs=lambda: {"input_ids": torch.tensor([[1, 39, 39, 39, 39, 5, 6]]), "use_cache": False,
                   "pixel_values": torch.randn(1, 3, 8, 8)},
   refused={"multi_modal_projector": "no-residual"},
   why="LLaVA: both towers have FFNs; the projector (equal widths here) adds nothing to its input")  # fmt: skip
hf("mamba", "MambaModel",
   base={"vocab_size": 40, "hidden_size": WIDTH, "state_size": 4, "num_hidden_layers": 2},
   inputs=lambda: {"input_ids": ids(2, 5), "use_cache": False},
   refused={},
   why="Mamba has no FFN: in_proj, causal convolution, scan, out_proj")  # fmt: skip
