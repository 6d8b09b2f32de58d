"""Tiny random transformers models from their configs; transformers is imported when a family is built.

>>> hf("llama", "LlamaForCausalLM", ffns(...), why="...")     # registers the family transformers/llama
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from zoo.family import FFN, Built, family

WIDTH, INNER = 16, 24
TEXT = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 40, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
Inputs = Callable[[], dict[str, Any]]


def ids(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(3, 40, (batch, length))


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def causal() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def seq2seq() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 4), "use_cache": False}


def image(size: int = 8, channels: int = 3) -> Inputs:
    return lambda: {"pixel_values": torch.randn(2, channels, size, size)}


def hf(
    name: str,
    model: str,
    *groups: Sequence[FFN],
    why: str,
    config: str | None = None,
    inputs: Inputs = causal,
    base: Mapping[str, Any] = TEXT,
    refused: Mapping[str, str] | None = None,
    fp64: bool = True,
    **overrides: Any,
) -> None:
    """Register ``transformers/name``; ``config`` defaults to the model's own config class."""

    def build() -> Built:
        import transformers

        cls = getattr(transformers, model)
        settings = {**base, **overrides}
        made = cls.config_class if config is None else getattr(transformers, config)
        return cls(made(**settings)), (), inputs()

    build.__name__ = name
    family(*groups, why=why, refused=refused, library="transformers", fp64=fp64)(build)
