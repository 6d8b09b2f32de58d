"""Text encoders and encoder-decoders of transformers, from tiny random configs."""

from __future__ import annotations

import torch

from zoo import bodies
from zoo.family import ffns
from zoo.hf import INNER, SEQ2SEQ, WIDTH, hf, ids, seq2seq, text


def split(prefix: str, activation: bodies.Body = bodies.gelu, calls: int = 1) -> list:
    """BERT's shape: ``intermediate.dense`` and ``output.dense`` of one layer."""
    return ffns(prefix, 2, "intermediate.dense", "output.dense", activation, form="linears", calls=calls)


BERT = "{}.encoder.layer.{{}}"
HEAD = {"predictions.transform": "norm-between|width-change"}

hf("bert", "BertForMaskedLM", split(BERT.format("bert")), inputs=text, refused=HEAD,
   why="BertIntermediate/BertOutput are siblings; the MLM head has a norm and another width")  # fmt: skip
hf("bert_chunked", "BertModel", split("encoder.layer.{}", calls=5), inputs=text,
   chunk_size_feed_forward=1,
   why="apply_chunking_to_forward runs the FFN once for each of the 5 positions")  # fmt: skip
hf("bert_classifier", "BertForSequenceClassification", split(BERT.format("bert")), inputs=text,
   refused={"bert.pooler.dense": "width-change|no-residual"},
   why="pooler, dropout, classifier: dense 16->16, tanh, 16->2")  # fmt: skip
hf("roberta", "RobertaForMaskedLM", split(BERT.format("roberta")), inputs=text,
   refused={"lm_head": "norm-between|width-change"}, max_position_embeddings=40, pad_token_id=1,
   why="as BERT; its LM head is dense, gelu, norm, decoder")  # fmt: skip
hf("electra", "ElectraModel", split("encoder.layer.{}"), inputs=text, embedding_size=WIDTH,
   why="ElectraIntermediate/Output are siblings")  # fmt: skip
hf("layoutlm", "LayoutLMModel", split("encoder.layer.{}"), inputs=text,
   max_2d_position_embeddings=16, why="as BERT, with box embeddings")  # fmt: skip
hf("mpnet", "MPNetModel", split("encoder.layer.{}"), inputs=text, why="as BERT, relative positions")
hf("rembert", "RemBertModel", split("encoder.layer.{}"), inputs=text, input_embedding_size=8,
   output_embedding_size=8, why="as BERT, with an embedding projection")  # fmt: skip
hf("roformer", "RoFormerModel", split("encoder.layer.{}"), inputs=text, embedding_size=WIDTH,
   why="as BERT, rotary")  # fmt: skip
hf("esm", "EsmModel", split("encoder.layer.{}"), inputs=text, mask_token_id=4, pad_token_id=1,
   why="ESM: pre-norm layer, intermediate and output siblings, gelu written out with erf")  # fmt: skip
hf("fnet", "FNetModel", split("encoder.layer.{}", bodies.gelu_tanh), inputs=text,
   why="FNet: Fourier mixing; the FFN is BERT's split pair with gelu_new")  # fmt: skip
hf("deberta_v2", "DebertaV2Model", split("encoder.layer.{}"), inputs=text,
   why="DeBERTa v2: split pair, disentangled attention")  # fmt: skip
hf("longformer", "LongformerModel", split("encoder.layer.{}"), attention_window=4,
   inputs=lambda: {"input_ids": ids(2, 8)},
   why="Longformer: split pair; its attention reads values of the mask")  # fmt: skip
hf("convbert", "ConvBertModel", split("encoder.layer.{}"), inputs=text, embedding_size=WIDTH,
   head_ratio=1, conv_kernel_size=3,
   why="ConvBERT with num_groups 1: plain nn.Linear split pair; its span convolution is attention")  # fmt: skip
hf("distilbert", "DistilBertModel",
   ffns("transformer.layer.{}.ffn", 2, "lin1", "lin2", bodies.gelu, form="either"),
   inputs=text, base={"vocab_size": 40, "dim": WIDTH, "hidden_dim": INNER, "n_layers": 2,
                      "n_heads": 2, "max_position_embeddings": 32},
   why="DistilBERT's FFN: lin1, gelu, lin2, dropout through apply_chunking_to_forward")  # fmt: skip
hf("albert", "AlbertModel",
   ffns("encoder.albert_layer_groups.0.albert_layers.0", None, "ffn", "ffn_output",
        bodies.gelu_tanh, form="linears", calls=2),
   inputs=text, embedding_size=8,
   why="ALBERT: one layer called num_hidden_layers times, FFN inline in it")  # fmt: skip
hf("mobilebert", "MobileBertModel",
   ffns("encoder.layer.{}", 2, "intermediate.dense", "output.dense", bodies.relu, form="linears"),
   ffns("encoder.layer.{}.ffn.0", 2, "intermediate.dense", "output.dense", bodies.relu,
        form="linears"),
   inputs=text, intra_bottleneck_size=8, embedding_size=8, num_feedforward_networks=2,
   true_hidden_size=8,
   why="MobileBERT: one stacked FFN and the layer's own; NoNorm is scale and shift behind the adds")  # fmt: skip
hf("xlnet", "XLNetModel",
   ffns("layer.{}.ff", 2, "layer_1", "layer_2", bodies.gelu, form="linears"),
   inputs=text, base={"vocab_size": 40, "d_model": WIDTH, "n_layer": 2, "n_head": 2,
                      "d_inner": INNER},
   why="XLNetFeedForward also adds its input and norms: the owner is more than the FFN")  # fmt: skip
hf("xlm", "XLMModel",
   ffns("ffns.{}", 2, "lin1", "lin2", bodies.gelu, form="either"),
   inputs=text, base={"vocab_size": 40, "emb_dim": WIDTH, "n_layers": 2, "n_heads": 2,
                      "max_position_embeddings": 32},
   why="XLM TransformerFFN in a ModuleList beside the attentions; dropout behind lin2")  # fmt: skip
hf("funnel", "FunnelBaseModel",
   ffns("encoder.blocks.{}.{}.ffn", [(0, 0), (1, 0)], "linear_1", "linear_2", bodies.gelu_tanh,
        form="linears"),
   inputs=lambda: {"input_ids": ids(2, 8)},
   base={"vocab_size": 40, "block_sizes": [1, 1], "d_model": WIDTH, "n_head": 2, "d_head": 8,
         "d_inner": INNER, "num_decoder_layers": 1},
   why="FunnelPositionwiseFFN adds its input and norms inside")  # fmt: skip
hf("modernbert", "ModernBertModel",
   ffns("layers.{}.mlp", 2, "Wi", "Wo", bodies.merged(bodies.gelu), bias=False, gated=True),
   inputs=text, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
   why="ModernBertMLP: Wi chunked, first half activated, dropout between")  # fmt: skip

BART_LAYERS = [
    *ffns("encoder.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
    *ffns("decoder.layers.{}", 2, "fc1", "fc2", bodies.gelu, form="linears"),
]
RELU_LAYERS = [
    *ffns("encoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
    *ffns("decoder.layers.{}", 2, "fc1", "fc2", bodies.relu, form="linears"),
]
EOS = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
for name, model in {
    "bart": "BartModel",
    "mbart": "MBartModel",
    "marian": "MarianModel",
    "pegasus": "PegasusModel",
    "blenderbot": "BlenderbotModel",
    "blenderbot_small": "BlenderbotSmallModel",
    "plbart": "PLBartModel",
}.items():
    hf(name, model, BART_LAYERS, base=SEQ2SEQ, inputs=seq2seq, activation_function="gelu", **EOS,
       why="BART's encoder and decoder layers: fc1, act, dropout, fc2 inline")  # fmt: skip
hf("m2m_100", "M2M100Model", RELU_LAYERS, base=SEQ2SEQ, inputs=seq2seq,
   why="M2M-100: fc1/fc2 inline with relu, pre-norm")  # fmt: skip

T5 = {"vocab_size": 40, "d_model": WIDTH, "d_kv": 8, "d_ff": INNER, "num_layers": 2,
      "num_decoder_layers": 2, "num_heads": 2, "pad_token_id": 0,
      "decoder_start_token_id": 0}  # fmt: skip


def t5(entries: object, body: bodies.Body) -> list:
    """The FFN is layer.1 of an encoder block and layer.2 of a decoder block."""
    return [
        *ffns("encoder.block.{}.layer.1.DenseReluDense", 2, entries, "wo", body, bias=False),
        *ffns("decoder.block.{}.layer.2.DenseReluDense", 2, entries, "wo", body, bias=False),
    ]


hf("t5", "T5Model", t5("wi", bodies.relu), base=T5, inputs=seq2seq,
   why="T5DenseActDense: relu, no bias; it reads self.wo.weight.dtype")  # fmt: skip
hf("t5_gated", "T5Model", t5(["wi_0", "wi_1"], bodies.glu(bodies.gelu_tanh)), base=T5,
   inputs=seq2seq, feed_forward_proj="gated-gelu",
   why="T5DenseGatedActDense (v1.1): gelu_new(wi_0) * wi_1")  # fmt: skip
hf("mt5", "MT5Model", t5(["wi_0", "wi_1"], bodies.glu(bodies.gelu_tanh)), base=T5, inputs=seq2seq,
   why="mT5 is gated-gelu by default")  # fmt: skip
hf("umt5", "UMT5Model", t5(["wi_0", "wi_1"], bodies.glu(bodies.gelu_tanh)), base=T5,
   inputs=seq2seq, feed_forward_proj="gated-gelu", why="UMT5 as mT5")  # fmt: skip
hf("perceiver", "PerceiverModel",
   ffns("encoder.cross_attention.mlp", None, "dense1", "dense2", bodies.gelu),
   ffns("encoder.self_attends.{}.mlp", 2, "dense1", "dense2", bodies.gelu, calls=2),
   inputs=lambda: {"inputs": torch.randn(2, 5, WIDTH)},
   base={"num_latents": 4, "d_latents": WIDTH, "d_model": WIDTH, "num_blocks": 2,
         "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
         "num_cross_attention_heads": 2},
   why="Perceiver: H == D (widening 1); the self-attention stack runs num_blocks times")  # fmt: skip
