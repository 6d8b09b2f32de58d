"""Example inputs for a module of no known library, guessed from its signature and its first layers.

Contract: yields candidates, most likely first, and runs nothing. The name and the annotation of a required parameter
and the first layer with weights say what the parameter may be. Optional parameters are left out.

    >>> next(guesses(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), sampler)).description
    'float32 [1, 8, 16] (guessed: first layer is Linear)'
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from moefy.capture.inputs.combinations import nearest_first
from moefy.capture.inputs.tensors import SEQUENCE, ExampleInputs, Sampler, example

MAX_GUESSES = 48  # candidates per hint
MAX_LENGTH = 4096  # longest sequence to try
MAX_LENGTHS = 6  # sequence lengths per layer
MAX_HINTS = 12

_MASKS = ("mask", "attn_bias", "attention_bias", "rel_pos", "bias", "cache", "past")
_TIMES = ("t", "time", "times", "timestep", "timesteps", "sigma", "noise", "step", "log_snr")
_LABELS = ("y", "label", "labels", "target", "targets", "class_labels", "classes")
_IDS = ("idx", "ids", "input_ids", "tokens", "token_ids", "token", "src_tokens")
_SIDE = (
    "context",
    "ctx",
    "cond",
    "memory",
    "encoder_hidden_states",
    "encoder_out",
    "kv",
    "c",
    "emb",
)


@dataclasses.dataclass(frozen=True)
class _Hint:
    """Input tensors that one layer would accept, best first, and the words that name the layer."""

    values: tuple[Any, ...]
    source: str


def guesses(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """Candidates for any module, from its signature and its first layers with weights."""
    required = required_parameters(model)
    hints = list(_hints(model, sampler))
    seen: set[str] = set()
    for hint in hints or [_Hint((sampler.floats(1, SEQUENCE, 64),), "no layer with weights")]:
        for value in hint.values:
            choices = [_choices(p, i, value, hints, sampler) for i, p in enumerate(required)]
            for filled in itertools.islice(nearest_first(choices, ranked=20_000), MAX_GUESSES):
                candidate = _call(required, filled, f"guessed: {hint.source}")
                if candidate.description not in seen:
                    seen.add(candidate.description)
                    yield candidate


def required_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters of ``forward`` without a default; one for a bare ``*args``, as containers have it."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p for p in named if p.default is p.empty]
    if required or (named and named[0].default is not None):
        return required
    if named:  # every parameter is optional: the first is the input
        return named[:1]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [inspect.Parameter("input", inspect.Parameter.POSITIONAL_ONLY)]
    return []


def _call(required: Sequence[inspect.Parameter], filled: Sequence[Any], source: str) -> ExampleInputs:
    """Positional where the signature allows it, by name where it is keyword-only."""
    pairs = list(zip(required, filled, strict=True))
    args = tuple(value for p, value in pairs if p.kind is not p.KEYWORD_ONLY)
    kwargs = {p.name: value for p, value in pairs if p.kind is p.KEYWORD_ONLY}
    return example(args, kwargs, source)


def _choices(
    parameter: inspect.Parameter,
    position: int,
    primary: Any,
    hints: Sequence[_Hint],
    sampler: Sampler,
) -> list[Any]:
    """What a required parameter may be, most likely first. ``primary`` is the value of the input itself."""
    name, annotation = parameter.name.lower(), str(parameter.annotation)
    plain = {"int": 0, "bool": False, "float": 1.0, "str": ""}
    kind = getattr(parameter.annotation, "__name__", annotation)
    if kind in plain:
        return [plain[kind]]
    if name == "start_pos":
        return [0]
    if position == 0 and name not in _TIMES:
        return [primary]
    length = primary.shape[1] if isinstance(primary, Tensor) and primary.ndim > 1 else SEQUENCE
    if any(word in name for word in _MASKS):
        square = sampler.full(length, length, value=0)
        return [None, sampler.full(1, length), sampler.full(1, length).bool(), square]
    vectors = [sampler.floats(1, width) for width in _widths(hints)]
    if name in _TIMES:
        return [sampler.full(1), sampler.integers(1), *vectors]
    if name in _LABELS:
        return [sampler.integers(1, value=0), primary, None, *vectors]
    if any(word in name for word in _IDS):
        return [*(v for h in hints for v in h.values if not v.dtype.is_floating_point), primary]
    side = [v for h in hints for v in h.values if v.dtype.is_floating_point]
    if name in _SIDE or "embed" in name or "hidden" in name:
        return [*_unique([primary, *side]), *vectors, sampler.full(1)]
    return [primary, None, *_unique(side)[:3], sampler.integers(1)]


def _widths(hints: Sequence[_Hint]) -> list[int]:
    """The feature widths that the layers name."""
    values = [hint.values[0] for hint in hints]
    return list(dict.fromkeys(v.shape[-1] for v in values if v.ndim == 3 and v.dtype.is_floating_point))


def _unique(values: Sequence[Tensor]) -> list[Tensor]:
    """The values of distinct shape and dtype."""
    return list({(v.shape, v.dtype): v for v in reversed(values)}.values())[::-1]


def _hints(model: nn.Module, sampler: Sampler) -> Iterator[_Hint]:
    """What the layers with weights accept, in order of registration, without repeats."""
    lengths = _lengths(model)
    seen: set[tuple[Any, ...]] = set()
    vocabulary = min((m.num_embeddings for m in _embeddings(model)), default=2)
    # Leaves first: bare parameters of a parent are class tokens and position tables, and read no input.
    for module in sorted(model.modules(), key=lambda m: next(m.children(), None) is not None):
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        values = tuple(_values(module, vocabulary, lengths, sampler))
        key = tuple((v.shape, v.dtype) for v in values)
        if values and key not in seen and len(seen) < MAX_HINTS:
            seen.add(key)
            yield _Hint(values, f"first layer is {type(module).__name__}")


def _embeddings(model: nn.Module) -> list[nn.Embedding]:
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings > 2]


def _lengths(model: nn.Module) -> list[int]:
    """Sequence lengths to try: 8, then those of position tables, then widths of layers that may mix tokens."""
    tables, mixers = [], []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 3 and parameter.shape[0] == 1:
                tables.append(parameter.shape[1])
            elif parameter.ndim == 2 and isinstance(module, nn.LayerNorm):
                tables.append(parameter.shape[0])
            elif parameter.ndim == 2 and not isinstance(module, nn.Linear | nn.Embedding):
                mixers.append(parameter.shape[0])
            elif isinstance(module, nn.Linear | nn.Conv1d) and parameter.ndim > 1:
                mixers.append(parameter.shape[1])
    return [n for n in dict.fromkeys([SEQUENCE, *tables, *mixers]) if 1 < n <= MAX_LENGTH][:MAX_LENGTHS]


def _values(module: nn.Module, vocabulary: int, lengths: Sequence[int], sampler: Sampler) -> Iterator[Tensor]:
    """Inputs that would fit ``module`` if it were the first layer."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        high = min(vocabulary, module.num_embeddings)
        yield from (sampler.tokens(1, length, high=high) for length in lengths)
        return
    spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}.get(type(module))
    if spatial:
        channels = getattr(module, "in_channels")  # noqa: B009 (pyright knows no common base)
        yield from _images(channels, spatial, sampler)
        return
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
        channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
        yield from _images(channels, 2, sampler)
        return
    width = _width(module)
    if width:
        yield from (sampler.floats(1, length, width) for length in lengths)
        yield sampler.floats(SEQUENCE, width)
        yield sampler.floats(1, width, 14, 14)
        yield sampler.floats(1, 7, 7, width)


def _images(channels: int, spatial: int, sampler: Sampler) -> Iterator[Tensor]:
    """Pictures, small ones first. Models with position tables are made for one size, mostly 224 or 32."""
    sizes = {1: (16, 64, 256), 2: (32, 64, 224, 28, 384, 16), 3: (16, 32)}[spatial]
    for side in sizes:
        yield sampler.floats(1, channels, *([side] * spatial))


def _width(module: nn.Module) -> int | None:
    """The feature width that a layer expects: as linears and norms tell it, else the last axis of its first weight."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return module.normalized_shape[-1]
    first = next(module.parameters(recurse=False))
    if type(module).__name__ == "Conv1D":  # GPT-2 keeps [in, out]
        return first.shape[0]
    return first.shape[-1] if first.ndim in (1, 2, 3) and first.numel() > 1 else None
