"""What a Hugging Face ``forward`` means by a parameter name: tensors of the right kind and size.

Contract: ``Maker.options(name)`` lists what the conventions of the library allow for that name, the most common first.
An unknown name has no options. Sizes come from the config alone. A new hint is a row in ``Maker``.

    >>> [t.shape for t in Maker(ConfigFacts(whisper_config), sampler, length=8).options("input_features")][0]
    torch.Size([1, 80, 3000])

Shapes: B = 1 example, S text tokens, C channels, P patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.capture.inputs.hf_facts import AUDIO, TEXT, VISION, ConfigFacts
from moefy.capture.inputs.tensors import Sampler

GRID = 4  # a picture of 4 x 4 patches for models that take patches
SAMPLES = 4000  # a quarter of a second of sound at 16 kHz
VOCABULARY = 1000  # ids above are often special

TOKENS = ("input_ids", "decoder_input_ids", "qformer_input_ids", "text_ids")
MASKS = ("attention_mask", "qformer_attention_mask", "past_values_padding")
FRAMES = 96  # of a mel spectrogram


class Maker:
    """Makes the tensors for one model and one length of text."""

    def __init__(self, facts: ConfigFacts, sampler: Sampler, length: int) -> None:
        self.facts, self.sampler, self.length = facts, sampler, length
        self._makers: dict[str, Callable[[], list[Tensor]]] = {
            **{name: self._tokens for name in TOKENS},
            "decoder_input_ids": self._decoder_tokens,
            **{name: self._mask for name in MASKS},
            "token_type_ids": lambda: [sampler.integers(1, length, value=0)],
            "bbox": lambda: [sampler.integers(1, length, 4, value=1)],
            "pixel_values": self._pixels,
            "pixel_values_videos": self._video,
            "pixel_mask": lambda: [sampler.integers(1, *facts.image_size())],
            "prompt_pixel_values": self._pixels,
            "prompt_masks": self._pixels,
            "flattened_patches": self._flat_patches,
            "grid_thw": self._grid,
            "image_grid_thw": self._grid,
            "merge_sizes": lambda: [sampler.integers(1, value=2)],
            "spatial_shapes": lambda: [sampler.integers(1, 2, value=GRID)],
            "pixel_attention_mask": lambda: [sampler.integers(1, GRID * GRID)],
            "pixel_position_ids": self._positions,
            "image": self._pixels,
            "input_features_mask": lambda: [sampler.integers(1, FRAMES)],
            "input_values": self._sound,
            "input_features": self._features,
            "spectrogram": self._features,
            "audio_mel": self._features,
            "audio_mel_mask": lambda: [sampler.full(1, FRAMES, value=0).bool()],
            "hidden_states": self._hidden,
            "inputs_embeds": self._embedded,
            "encoder_hidden_states": self._embedded,
            "query_embeds": self._queries,
            "latents": self._latents,
            "inputs": self._perceived,
            "visual_feats": lambda: [self._floats("visual_feat_dim")],
            "visual_pos": lambda: [sampler.floats(1, length, 4)],
            "visual_embeds": lambda: [self._floats("visual_embedding_dim")],
            "states": lambda: [self._floats("state_dim")],
            "actions": lambda: [self._floats("act_dim")],
            "rewards": lambda: [sampler.floats(1, length, 1)],
            "returns_to_go": lambda: [sampler.floats(1, length, 1)],
            "timesteps": lambda: [sampler.integers(1, length)],
            "past_values": self._series,
            "past_observed_mask": lambda: [torch.ones_like(t) for t in self._series()],
            "past_time_features": self._time_features,
            "future_time_features": self._future_features,
            "freq": lambda: [sampler.integers(1, 1, value=0)],
        }

    def options(self, name: str) -> list[Tensor]:
        """The tensors that ``name`` may stand for, likeliest first."""
        maker = self._makers.get(name)
        return maker() if maker is not None else []

    # ---- text

    def token_ids(self, *shape: int, decoder: bool = False) -> Tensor:
        """Ids without a special meaning, then the end-of-text id, which classifiers such as BART's look for."""
        prefer = ("decoder", *TEXT) if decoder else TEXT
        names = ("vocab_size", "n_vocab", "vocab_sizes", "tgt_vocab_size", "src_vocab_size")
        size = self.facts.integer(*names, default=VOCABULARY, prefer=prefer)
        special = self.facts.special_ids()
        usable = [i for i in range(min(size, VOCABULARY)) if i not in special] or [0]
        table = torch.tensor(usable, device=self.sampler.device)
        ids = table[self.sampler.tokens(*shape, high=len(usable))]
        end = self.facts.integer("eos_token_id", default=-1, prefer=prefer)
        if 0 <= end < size:
            ids[..., -1] = end
        return ids

    def _tokens(self) -> list[Tensor]:
        """``[B, S]``; ``[B, choices, S]``; and the layouts of models with several codebooks."""
        books = self.facts.integer("num_codebooks", "n_codebooks", "num_quantizers", default=0)
        many = [(books, self.length), (1, books, self.length), (1, self.length, books)]
        shapes = [(1, self.length), (1, 2, self.length), *(many if books else [])]
        return [self.token_ids(*shape) for shape in shapes]

    def _decoder_tokens(self) -> list[Tensor]:
        return [self.token_ids(1, self.length, decoder=True), *self._tokens()[1:]]

    def _mask(self) -> list[Tensor]:
        return [self.sampler.integers(1, self.length)]

    # ---- pictures

    def _channels(self) -> int:
        names = ("num_channels", "in_channels", "in_chans", "num_input_channels")
        return self.facts.integer(*names, default=3, prefer=VISION)

    def _patch_features(self) -> int:
        height, width = self.facts.patch_size()
        frames = self.facts.integer("temporal_patch_size", default=1, prefer=VISION)
        return self._channels() * frames * height * width

    def _pixels(self) -> list[Tensor]:
        """A picture; several pictures or frames; a bag of patches; patches of one row each."""
        sides, channels = self.facts.image_size(), self._channels()
        picture = self.sampler.floats(1, channels, *sides)
        frames = self.facts.integer("num_frames", "max_num_images", default=2, prefer=VISION)
        clip = self.sampler.floats(1, frames, channels, *sides)
        tiles = self.facts.integer("max_num_tiles", default=1, prefer=VISION)
        tiled = self.sampler.floats(1, 1, tiles, channels, *sides)
        bag = self.sampler.floats(1, GRID * GRID, self._patch_features())
        rows = bag[0]
        if self.facts.has("num_frames") and not self.facts.has("image_token_id"):
            return [clip, picture]
        if self.facts.has("num_patches"):
            return [bag, picture, rows]
        if self.facts.has("spatial_merge_size", "merge_kernel_size"):
            return [rows, bag, picture, clip]
        return [picture, clip, tiled, bag, rows]

    def _video(self) -> list[Tensor]:
        names = ("num_frames", "frames_per_clip")
        frames = self.facts.integer(*names, default=4, prefer=VISION)
        return [self.sampler.floats(1, frames, self._channels(), *self.facts.image_size())]

    def _flat_patches(self) -> list[Tensor]:
        """Pix2Struct's rows: two coordinates, then the pixels of one patch."""
        return [self.sampler.floats(1, self.length, 2 + self._patch_features()).abs()]

    def _grid(self) -> list[Tensor]:
        return [torch.tensor([[1, GRID, GRID]], device=self.sampler.device)]

    def _positions(self) -> list[Tensor]:
        side = torch.arange(GRID, device=self.sampler.device)
        return [torch.cartesian_prod(side, side)[None]]

    # ---- sound

    def _sound(self) -> list[Tensor]:
        """A waveform, with or without a channel axis; AST's spectrogram."""
        bins = self.facts.integer("num_mel_bins", "feature_size", default=80, prefer=AUDIO)
        frames = self.facts.integer("max_length", "max_source_positions", default=128, prefer=AUDIO)
        wave = self.sampler.floats(1, SAMPLES)
        picture = self.sampler.floats(1, frames, bins)
        channels = self.facts.integer("audio_channels", "num_channels", default=1, prefer=AUDIO)
        several = self.sampler.floats(1, channels, SAMPLES)
        first = [picture] if self.facts.has("frequency_stride") else []
        return [*first, wave, several, picture, self.sampler.floats(1, 6 * SAMPLES)]

    def _features(self) -> list[Tensor]:
        """Mel features: ``[B, bins, frames]`` (Whisper), ``[B, frames, bins]``, ``[B, 1, frames, bins]``."""
        names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
        more = ("input_dim", "feature_size", "n_mels", "input_feat_size")
        bins = self.facts.integer(*names, *more, default=80, prefer=AUDIO)
        positions = self.facts.integer("max_source_positions", default=48, prefer=AUDIO)
        side = self.facts.integer("spec_size", default=96, prefer=AUDIO)
        last = [self.sampler.floats(1, FRAMES, bins), self.sampler.floats(1, bins, 2 * positions)]
        if self.facts.has("max_source_positions") and not self.facts.has("input_feat_per_channel"):
            last.reverse()
        return [*last, self.sampler.floats(1, bins, FRAMES), self.sampler.floats(1, 1, 4 * side, bins)]

    # ---- hidden states

    def _width(self, *names: str) -> int:
        usual = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
        return self.facts.integer(*names, *usual, default=64)

    def _floats(self, *names: str) -> Tensor:
        return self.sampler.floats(1, self.length, self._width(*names))

    def _hidden(self) -> list[Tensor]:
        """Patches for vision towers that take them flat, else states of the model's width."""
        patches = self.sampler.floats(GRID * GRID, self._patch_features())
        states = self._floats()
        first = [patches] if self.facts.has("patch_size") else []
        return [*first, states, states[0], states.transpose(1, 2)]

    def _embedded(self) -> list[Tensor]:
        return [self._floats(), self._floats("encoder_hidden_size", "cross_attention_dim")]

    def _queries(self) -> list[Tensor]:
        count = self.facts.integer("num_query_tokens", default=self.length)
        return [self.sampler.floats(1, count, self._width())]

    def _latents(self) -> list[Tensor]:
        width = self._width()
        return [self.sampler.floats(1, width, self.length), self._floats()]

    def _perceived(self) -> list[Tensor]:
        """The Perceiver takes what its preprocessor takes: states, text or pictures."""
        return [self._floats(), *self._tokens()[:1], *self._pixels()[:1]]

    # ---- time series

    def _steps(self) -> int:
        lags = self.facts.find("lags_sequence", default=[0]) or [0]
        context = self.facts.integer("context_length", "prediction_length", default=32)
        return context + max(lags)

    def _series(self) -> list[Tensor]:
        """One series, or several channels."""
        channels = self.facts.integer("num_input_channels", "input_size", default=1)
        many = self.sampler.floats(1, self._steps(), channels)
        one = self.sampler.floats(1, self._steps())
        univariate = channels == 1 and not self.facts.has("num_input_channels")
        return [one, many] if univariate else [many, one]

    def _time_features(self) -> list[Tensor]:
        features = self.facts.integer("num_time_features", default=0)
        return [self.sampler.floats(1, self._steps(), features)]

    def _future_features(self) -> list[Tensor]:
        features = self.facts.integer("num_time_features", default=0)
        steps = self.facts.integer("prediction_length", default=1)
        return [self.sampler.floats(1, steps, features)]
