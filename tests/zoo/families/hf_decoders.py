"""Decoder-only language models of transformers, from tiny random configs."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo import bodies
from zoo.family import ffns
from zoo.hf import GPT, INNER, WIDTH, hf

LAYERS = "model.layers.{}.mlp"
SWIGLU = ffns(LAYERS, 2, ["gate_proj", "up_proj"], "down_proj", bodies.glu(bodies.silu), bias=False)
GEGLU = ffns(LAYERS, 2, ["gate_proj", "up_proj"], "down_proj", bodies.glu(bodies.gelu_tanh), bias=False)
PACKED = ffns(LAYERS, 2, "gate_up_proj", "down_proj", bodies.merged(bodies.silu), bias=False, gated=True)

hf("llama", "LlamaForCausalLM", SWIGLU, why="LlamaMLP: down(silu(gate(x)) * up(x)), pre-norm residual")
hf("mistral", "MistralForCausalLM", SWIGLU, num_key_value_heads=1, why="MistralMLP is Llama's; GQA")
hf("qwen2", "Qwen2ForCausalLM", SWIGLU, num_key_value_heads=1, why="Qwen2MLP is Llama's")
hf("qwen3", "Qwen3ForCausalLM", SWIGLU, num_key_value_heads=1, head_dim=8,
   why="Qwen3MLP is Llama's; q and k are normed in attention")  # fmt: skip
hf("gemma", "GemmaForCausalLM", GEGLU, num_key_value_heads=1, head_dim=8,
   why="GemmaMLP: GeGLU with tanh gelu (hidden_act gelu_pytorch_tanh)")  # fmt: skip
hf("gemma2", "Gemma2ForCausalLM", GEGLU, num_key_value_heads=1, head_dim=8,
   why="Gemma 2: a norm stands between the exit and the residual add")  # fmt: skip
hf("gemma3", "Gemma3ForCausalLM", GEGLU, config="Gemma3TextConfig", num_key_value_heads=1,
   head_dim=8, why="Gemma 3 text: as Gemma 2")  # fmt: skip
hf("cohere", "CohereForCausalLM", SWIGLU, num_key_value_heads=2,
   why="Cohere: parallel, residual + attention + mlp of one norm")  # fmt: skip
hf("olmo2", "Olmo2ForCausalLM", SWIGLU, why="OLMo 2: no pre-norm, the norm is behind the MLP")
hf("stablelm", "StableLmForCausalLM", SWIGLU, num_key_value_heads=2, why="StableLmMLP, sequential residual")
hf("stablelm_parallel", "StableLmForCausalLM", SWIGLU, num_key_value_heads=2,
   use_parallel_residual=True, why="StableLM with use_parallel_residual")  # fmt: skip
hf("granite", "GraniteForCausalLM", SWIGLU, num_key_value_heads=2, residual_multiplier=0.5,
   why="Granite: residual + mlp * residual_multiplier, a scalar")  # fmt: skip
hf("smollm3", "SmolLM3ForCausalLM", SWIGLU, num_key_value_heads=2, why="SmolLM3MLP is Llama's")
hf("phi3", "Phi3ForCausalLM", PACKED, num_key_value_heads=2,
   why="Phi3MLP: gate_up_proj chunked, gate first")  # fmt: skip
hf("glm", "GlmForCausalLM", PACKED, num_key_value_heads=2, head_dim=8,
   why="GlmMLP: packed, gate first, partial rotary")  # fmt: skip
hf("glm4", "Glm4ForCausalLM", PACKED, num_key_value_heads=2, head_dim=8,
   why="GLM-4: packed, with a norm behind the MLP")  # fmt: skip
hf("llama_mlp_bias", "LlamaForCausalLM",
   ffns(LAYERS, 2, ["gate_proj", "up_proj"], "down_proj", bodies.glu(bodies.silu)),
   mlp_bias=True, why="Llama with mlp_bias=True: every linear has a bias")  # fmt: skip

hf("nemotron", "NemotronForCausalLM",
   ffns(LAYERS, 2, "up_proj", "down_proj", bodies.relu2, bias=False),
   num_key_value_heads=2, why="NemotronMLP: relu squared, no gate")  # fmt: skip
hf("persimmon", "PersimmonForCausalLM",
   ffns(LAYERS, 2, "dense_h_to_4h", "dense_4h_to_h", bodies.relu2),
   why="PersimmonMLP: relu2 with biases")  # fmt: skip
hf("phi", "PhiForCausalLM", ffns(LAYERS, 2, "fc1", "fc2", bodies.gelu_tanh),
   num_key_value_heads=2, why="PhiMLP: gelu_new; parallel attention")  # fmt: skip
hf("starcoder2", "Starcoder2ForCausalLM",
   ffns(LAYERS, 2, "c_fc", "c_proj", bodies.gelu_tanh, form="either"),
   num_key_value_heads=2, why="Starcoder2MLP: functional dropout behind the exit")  # fmt: skip


def xielu(x: Tensor, *, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """transformers keeps beta and eps as bfloat16 buffers: 0.5 and -1e-6 rounded."""
    eps = float(torch.tensor(-1e-6, dtype=torch.bfloat16))
    return bodies.xielu(x, alpha_p=alpha_p, alpha_n=alpha_n, eps=eps)


hf("apertus", "ApertusForCausalLM",
   ffns(LAYERS, 2, "up_proj", "down_proj", xielu, bias=False,
        body_params={"alpha_p": "act_fn.alpha_p", "alpha_n": "act_fn.alpha_n"}),
   num_key_value_heads=2, dtype=torch.float32,
   why="ApertusMLP: XIELU with learnable alpha_p and alpha_n, buffers beta and eps")  # fmt: skip

GPT_MLP = "transformer.h.{}.mlp"
hf("gpt2", "GPT2LMHeadModel",
   ffns(GPT_MLP, 2, "c_fc:io", "c_proj:io", bodies.gelu_tanh, form="either"),
   base=GPT, why="GPT2MLP: Conv1D (addmm on a view), gelu_new, dropout behind the exit")  # fmt: skip
hf("gptj", "GPTJForCausalLM", ffns(GPT_MLP, 2, "fc_in", "fc_out", bodies.gelu_tanh, form="either"),
   base=GPT, rotary_dim=4, why="GPTJMLP; attention + mlp + residual of one norm")  # fmt: skip
hf("codegen", "CodeGenForCausalLM",
   ffns(GPT_MLP, 2, "fc_in", "fc_out", bodies.gelu_tanh, form="either"),
   base=GPT, n_head=4, rotary_dim=4, why="CodeGenMLP as GPT-J's")  # fmt: skip
hf("gpt_neo", "GPTNeoForCausalLM",
   ffns(GPT_MLP, 2, "c_fc", "c_proj", bodies.gelu_tanh, form="either"),
   base={"vocab_size": 40, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 2,
         "intermediate_size": INNER, "max_position_embeddings": 32, "window_size": 4,
         "attention_types": [[["global", "local"], 1]]},
   why="GPTNeoMLP: nn.Linear, gelu_new; one global and one local layer")  # fmt: skip
hf("gpt_neox", "GPTNeoXForCausalLM",
   ffns("gpt_neox.layers.{}.mlp", 2, "dense_h_to_4h", "dense_4h_to_h", bodies.gelu),
   why="GPTNeoXMLP; parallel residual with two norms of the stream")  # fmt: skip
hf("falcon", "FalconForCausalLM",
   ffns(GPT_MLP, 2, "dense_h_to_4h", "dense_4h_to_h", bodies.gelu, bias=False),
   ffn_hidden_size=INNER,
   why="FalconMLP: FalconLinear is x @ W.T; attention is added in place to the MLP's output")  # fmt: skip


class BloomGelu(torch.autograd.Function):
    """Bloom's tanh gelu and its hand-written derivative, constants as in modeling_bloom."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        t = torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))
        slope = 0.5 * x * ((1 - t * t) * (0.79788456 + 0.1070322243 * x * x)) + 0.5 * (1 + t)
        return slope * grad


hf("bloom", "BloomForCausalLM",
   ffns(GPT_MLP, 2, "dense_h_to_4h", "dense_4h_to_h", BloomGelu.apply, form="linears"),
   base={"vocab_size": 40, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2},
   why="BloomMLP.forward(hidden, residual) also adds the residual, so the owner is more than the FFN")  # fmt: skip
hf("mpt", "MptForCausalLM",
   ffns("transformer.blocks.{}.ffn", 2, "up_proj", "down_proj", bodies.gelu, bias=False,
        form="linears"),
   base={"vocab_size": 40, "d_model": WIDTH, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
   why="MptMLP.forward(hidden, residual) adds the residual itself")  # fmt: skip
hf("opt", "OPTForCausalLM",
   ffns("model.decoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
   ffn_dim=INNER, word_embed_proj_dim=WIDTH,
   why="OPT: fc1 and fc2 inline on a 2-D view of the stream")  # fmt: skip
hf("opt_post_norm", "OPTForCausalLM",
   ffns("model.decoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
   ffn_dim=INNER, word_embed_proj_dim=WIDTH, do_layer_norm_before=False,
   why="OPT-350m: norms behind the residual adds")  # fmt: skip
SEQ = {"vocab_size": 40, "d_model": WIDTH, "num_layers": 2, "attention_heads": 2,
       "ffn_dim": INNER, "max_position_embeddings": 32}  # fmt: skip
hf("xglm", "XGLMForCausalLM",
   ffns("model.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
   base=SEQ, fp64=False, why="XGLM decoder layer: fc1/fc2 inline, pre-norm")  # fmt: skip
hf("biogpt", "BioGptForCausalLM",
   ffns("biogpt.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
   why="BioGPT: fc1/fc2 inline")  # fmt: skip
hf("openai_gpt", "OpenAIGPTLMHeadModel",
   ffns(GPT_MLP, 2, "c_fc:io", "c_proj:io", bodies.gelu_tanh, form="either"),
   base=GPT, inputs=lambda: {"input_ids": torch.randint(0, 40, (2, 5))},
   why="OpenAI GPT: Conv1D MLP, post-norm ln_2(n + mlp(n)); 'gelu' there is gelu_new")  # fmt: skip
hf("ctrl", "CTRLLMHeadModel", ffns("transformer.h.{}.ffn", 2, "0", "2", bodies.relu),
   base=GPT, dff=INNER, why="CTRL: Sequential(Linear, ReLU, Linear)")  # fmt: skip
hf("modernbert_decoder", "ModernBertDecoderForCausalLM",
   ffns(LAYERS, 2, "Wi", "Wo", bodies.merged(bodies.gelu), bias=False, gated=True),
   inputs=lambda: {"input_ids": torch.randint(3, 40, (2, 5)), "use_cache": False},
   bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
   why="ModernBertMLP: Wi chunked, first half activated")  # fmt: skip
