"""Every family, by import: one file for each kind of source."""

from __future__ import annotations

from zoo.families import (
    hf_decoders,
    hf_encoders,
    hf_lookalikes,
    hf_vision_speech,
    other_libraries,
    plain_aligned,
    plain_forms,
    plain_inline,
    plain_lookalikes,
    plain_refused,
    plain_residual,
    second_hf,
    second_plain,
    second_timm,
    timm_models,
    torch_transformer,
)

__all__ = [
    "hf_decoders",
    "hf_encoders",
    "hf_lookalikes",
    "hf_vision_speech",
    "other_libraries",
    "plain_aligned",
    "plain_forms",
    "plain_inline",
    "plain_lookalikes",
    "plain_refused",
    "plain_residual",
    "second_hf",
    "second_plain",
    "second_timm",
    "timm_models",
    "torch_transformer",
]
