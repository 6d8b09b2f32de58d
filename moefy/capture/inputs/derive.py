"""Example inputs from what a model tells about itself: its config, its library, its signature.

Contract: ``derive_inputs`` yields candidates, best first. It never runs the model, changes nothing and leaves the
global random state alone. The caller tries the candidates (cheaply, under ``FakeTensorMode``) until the model accepts
one. No third-party library is imported: models of Hugging Face, timm and torchvision are known by their attributes. A
hint about another library is one more generator here.

    >>> next(derive_inputs(nn.TransformerEncoderLayer(64, 4))).description
    'float32 [8, 1, 64] (nn.TransformerEncoderLayer)'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from moefy.capture.inputs.signature import guesses
from moefy.capture.inputs.tensors import SEQUENCE, ExampleInputs, Sampler, example

_SIDES = ("img_size", "image_size", "input_resolution")

__all__ = ["ExampleInputs", "derive_inputs"]


def derive_inputs(model: nn.Module) -> Iterator[ExampleInputs]:
    """Candidates of inputs for ``model``, most likely first. Each candidate is made when it is asked for."""
    sampler = Sampler.of(model)
    if isinstance(model, fx.GraphModule):
        yield from _from_graph(model, sampler)
    yield from _from_transformer(model, sampler)
    if is_hugging_face(model):
        from moefy.capture.inputs.hugging_face import hf_inputs  # on demand: most models are not from there

        yield from hf_inputs(model, sampler)
    yield from _from_timm(model, sampler)
    yield from _from_torchvision(model, sampler)
    yield from _from_image_size(model, sampler)
    yield from guesses(model, sampler)


def is_hugging_face(model: nn.Module) -> bool:
    """Whether ``model`` follows the conventions of a transformers ``PreTrainedModel``."""
    config = getattr(model, "config", None)
    return hasattr(config, "model_type") and hasattr(model, "main_input_name")


def _from_graph(model: fx.GraphModule, sampler: Sampler) -> Iterator[ExampleInputs]:
    """Tensors like those that the graph was traced with, if its placeholders record them."""
    values = []
    for node in model.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val", node.meta.get("example_value", node.meta.get("tensor_meta")))
        if value is None or not hasattr(value, "shape"):
            return
        shape = [int(side) for side in value.shape]
        if value.dtype.is_floating_point:
            values.append(sampler.floats(*shape).to(value.dtype))
        else:
            values.append(sampler.full(*shape, value=1, dtype=value.dtype))
    if values:
        yield example(tuple(values), {}, "the graph's own placeholders")


def _from_transformer(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """``nn.Transformer`` and its parts: their attention modules know the width and the batch axis."""
    kinds = (
        nn.Transformer,
        nn.TransformerEncoder,
        nn.TransformerDecoder,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
    )
    kind = next((k for k in kinds if isinstance(model, k)), None)
    attention = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    if kind is None or attention is None:
        return
    shape = (1, SEQUENCE) if attention.batch_first else (SEQUENCE, 1)
    pair = kind in (nn.Transformer, nn.TransformerDecoder, nn.TransformerDecoderLayer)
    values = tuple(sampler.floats(*shape, attention.embed_dim) for _ in range(2 if pair else 1))
    yield example(values, {}, f"nn.{kind.__name__}")


def _from_timm(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """timm keeps ``pretrained_cfg`` (older: ``default_cfg``); ``patch_embed`` knows the built image size."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = _entry(cfg, "input_size")
    if size is None:
        return
    channels, height, width = size
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None:
        channels = convolution.in_channels * (convolution.groups if channels == 1 else 1)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, tuple | list) and len(built) == 2:
        height, width = built
    yield example((sampler.floats(1, channels, height, width),), {}, "timm config")
    yield example((sampler.floats(1, size[0], *size[1:]),), {}, "timm config")
    yield example((sampler.floats(2, size[0], 224, 224),), {}, "timm model, usual image size")


def _entry(cfg: Any, name: str) -> Any:
    return cfg.get(name) if isinstance(cfg, Mapping) else getattr(cfg, name, None)


def _from_torchvision(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """torchvision's families by module path, each with the shape that its documentation names."""
    path = type(model).__module__
    if not path.startswith("torchvision."):
        return
    source = f"torchvision {path.removeprefix('torchvision.').removeprefix('models.')}"
    if ".detection" in path:
        yield example(([sampler.floats(3, 224, 224).abs()],), {}, source)
    elif ".optical_flow" in path:
        pair = (sampler.floats(1, 3, 128, 128), sampler.floats(1, 3, 128, 128))
        yield example(pair, {}, source)
    elif ".video" in path or _is_3d(model):
        for frames, side in ((16, 224), (8, 112)):
            yield example((sampler.floats(1, 3, frames, side, side),), {}, source)
    else:
        side = getattr(model, "image_size", None) or (299 if "inception" in path else 224)
        yield example((sampler.floats(1, 3, side, side),), {}, source)


def _from_image_size(model: nn.Module, sampler: Sampler) -> Iterator[ExampleInputs]:
    """A picture of the size that a part of the model names, as timm's ``patch_embed.img_size``."""
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is None:
        return
    for module in model.modules():
        side = next((v for name in _SIDES if (v := getattr(module, name, None)) is not None), None)
        sides = (side, side) if isinstance(side, int) else side
        if isinstance(sides, tuple | list) and len(sides) == 2 and all(isinstance(n, int) for n in sides):
            source = f"{type(module).__name__} names this image size"
            yield example((sampler.floats(1, convolution.in_channels, *sides),), {}, source)
            return


def _is_3d(model: nn.Module) -> bool:
    """Whether the first convolution is over space and time."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    first = next((m for m in model.modules() if isinstance(m, kinds)), None)
    return isinstance(first, nn.Conv3d)
