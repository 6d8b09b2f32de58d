"""Example inputs for a Hugging Face model, from its config and its signature. transformers is not imported.

Contract: no model is known by its name. A parameter's name says what kind of tensor it takes, the config says how large
the tensor is. Where conventions differ (an axis more, the other order), the alternatives follow in turn.

    >>> next(hf_inputs(gpt2, sampler)).description
    'input_ids int64 [1, 8] (Hugging Face config)'
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moefy.capture.inputs.combinations import nearest_first
from moefy.capture.inputs.hf_facts import VISION, ConfigFacts
from moefy.capture.inputs.hf_tensors import GRID, Maker
from moefy.capture.inputs.tensors import SEQUENCE, ExampleInputs, Sampler, example

MAX_CANDIDATES = 64
COMBINATIONS = 12  # per selection of inputs
LENGTHS = (SEQUENCE, 16, 64)  # some models cut the text into blocks of their own
SOURCE = "Hugging Face config"

# Inputs beside the main one without which a model may refuse to run, although they have a default.
_MODALITIES = (
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "input_features",
    "visual_feats",
    "visual_pos",
    "bbox",
    "image",
    "states",
    "actions",
    "rewards",
    "returns_to_go",
    "timesteps",
    "past_time_features",
    "future_time_features",
    "past_observed_mask",
)

# Inputs that few models require.
_SOMETIMES = (
    "attention_mask",
    "input_features_mask",
    "pixel_attention_mask",
    "spatial_shapes",
    "encoder_hidden_states",
)


def hf_inputs(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """Candidates for ``model``: all modalities first, so that every tower runs, then fewer inputs."""
    facts = ConfigFacts(getattr(model, "config", None))
    distinct: set[str] = set()
    for kwargs in itertools.islice(_kwargs(model, facts, sampler), MAX_CANDIDATES):
        candidate = example((), kwargs, SOURCE)
        if candidate.description not in distinct:
            distinct.add(candidate.description)
            yield candidate
    yield from _dummy(model)


def _kwargs(model: nn.Module, facts: ConfigFacts, sampler: Sampler) -> Iterator[dict[str, Any]]:
    """Selections of inputs, and for each the likeliest tensors first."""
    parameters = inspect.signature(model.forward).parameters
    selections = _selections(model, parameters, facts)
    for length in LENGTHS:
        maker = Maker(facts, sampler, length)
        yield from _with_placeholders(parameters, facts, maker)
        options = [_options(names, maker) for names in selections]
        for rounds in (slice(0, 1), slice(1, COMBINATIONS)):
            for choices in options:
                yield from itertools.islice(_combinations(choices), rounds.start, rounds.stop)


def _options(names: Sequence[str], maker: Maker) -> dict[str, list[Tensor]]:
    """The tensors for each name that ``maker`` knows."""
    made = {name: maker.options(name) for name in names}
    return {name: tensors for name, tensors in made.items() if tensors}


def _selections(
    model: nn.Module, parameters: Mapping[str, inspect.Parameter], facts: ConfigFacts
) -> list[tuple[str, ...]]:
    """Which parameters to fill: with all modalities, without, and with one at a time."""
    required = [name for name, p in parameters.items() if _is_required(p)]
    main = str(getattr(model, "main_input_name", "input_ids"))
    known = [name for name in (main, "input_ids", "inputs_embeds") if name in parameters]
    base = [*known[:1], *required]
    if "decoder_input_ids" in parameters and facts.find("is_encoder_decoder"):
        base.append("decoder_input_ids")
    extra = [name for name in _MODALITIES if name in parameters]
    text = ["input_ids"] if "input_ids" in parameters else []
    wanted = [[*base, *text, *extra], base, [*base, *text], [*base, *extra]]
    late = [name for name in _SOMETIMES if name in parameters]
    wanted += [[*base, *text, name] for name in [*extra, *late]]
    wanted.append([*base, *text, *extra, *late])
    return list(dict.fromkeys(tuple(dict.fromkeys(names)) for names in wanted))


def _is_required(parameter: inspect.Parameter) -> bool:
    variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not variable


def _combinations(options: Mapping[str, Sequence[Tensor]]) -> Iterator[dict[str, Any]]:
    """One tensor per name, the likeliest combinations first."""
    if options:
        for chosen in nearest_first([*options.values()], ranked=5000):
            yield dict(zip(options, chosen, strict=True))


def _with_placeholders(
    parameters: Mapping[str, inspect.Parameter], facts: ConfigFacts, maker: Maker
) -> Iterator[dict[str, Any]]:
    """A text with as many image placeholders as the picture has features, for vision-language models."""
    token = facts.find("image_token_id", "image_token_index")
    if not isinstance(token, int) or not {"input_ids", "pixel_values"} <= set(parameters):
        return
    grid = {name: maker.options(name)[0] for name in ("image_grid_thw",) if name in parameters}
    for pixels in maker.options("pixel_values")[:3]:
        for count in _placeholder_counts(facts):
            ids = maker.token_ids(1, count + 4)
            ids[:, 2 : 2 + count] = token
            yield {"input_ids": ids, "pixel_values": pixels, **grid}


def _placeholder_counts(facts: ConfigFacts) -> list[int]:
    """How many placeholders a picture may take: the config's number, else one per patch or merged patch."""
    names = ("mm_tokens_per_image", "image_seq_length", "num_image_tokens", "image_seq_len")
    stated = facts.integer(*names, default=0)
    merge = facts.integer("spatial_merge_size", default=1, prefer=VISION)
    (height, width), (rows, columns) = facts.image_size(), facts.patch_size()
    patches = (height // rows) * (width // columns)
    scale = facts.integer("scale_factor", "pixel_shuffle_ratio", default=1)
    if facts.has("spatial_merge_size"):
        patches = GRID * GRID
    counts = [stated, patches // merge**2, patches // max(scale, 1) ** 2, patches + 1]
    return list(dict.fromkeys(count for count in counts if count > 0))[:2]


def _dummy(model: nn.Module) -> Iterator[ExampleInputs]:
    """The model's own ``dummy_inputs``."""
    try:
        inputs = dict(getattr(model, "dummy_inputs", None) or {})
    except (
        Exception
    ):  # a property of the user's model may raise anything; such a model has no inputs to offer
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if moved:
        yield example((), moved, "the model's own dummy_inputs")
