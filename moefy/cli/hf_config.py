"""A Hugging Face model from its config file, without memory and without a download.

Contract: the weights are fake tensors on the CPU, with shape and dtype but no storage. One local JSON file is read:
nothing comes from the network, and no code of the folder runs (no ``trust_remote_code``).

    >>> model = build_from_config(Path("llama-70b/config.json"))    # doctest: +SKIP
    >>> sum(p.numel() for p in model.parameters())                  # 70 B parameters, 0.4 GB of memory
    70553706496
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moefy.errors import UsageError

_AUTO_CLASSES = (  # the first that knows the config; encoders have a causal class too, so masked comes first
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageClassification",
    "AutoModel",
)


def config_file(target: str | Path) -> Path | None:
    """The config file that ``target`` is, or holds as ``config.json``; ``None`` when it is neither."""
    path = Path(target)
    if path.is_dir():
        path = path / "config.json"
    return path if path.is_file() and path.suffix == ".json" else None


def build_from_config(path: Path) -> nn.Module:
    """The model that the config at ``path`` describes, in eval mode, on fake tensors.

    Raises:
        UsageError: the file is no Hugging Face config, transformers is missing or does not know the model.
    """
    transformers = _transformers()
    config = _load(transformers, path)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    build = _constructor(transformers, config, path)
    try:
        with mode:
            return build().eval()
    except DataDependentOutputException:
        # Some constructors read values (a drop-path schedule), which fake tensors lack. Under the meta device tensors
        # that name their device stay real; the meta ones become fake afterwards.
        with torch.device("meta"):
            model = build()
        _to_fake(model, mode)
        return model.eval()


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UsageError(
            "a Hugging Face config needs the transformers package: pip install 'moefy[hf]'"
        ) from error


def _load(transformers: Any, path: Path) -> Any:
    """The config object. A file that is no config raises ``UsageError``."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind is None:
        raise UsageError(f"{path}: no 'model_type'; expected the config.json of a Hugging Face model")
    if kind not in transformers.CONFIG_MAPPING:
        version = transformers.__version__
        raise UsageError(f"{path}: model_type {kind!r} is not part of transformers {version}")
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(data)
    except Exception as error:  # third-party validation raises what it likes
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error


def _constructor(transformers: Any, config: Any, path: Path) -> Any:
    """A function that builds the model, by the class that the config names or the first auto class that knows it."""
    for name in getattr(config, "architectures", None) or ():
        architecture = getattr(transformers, name, None)
        if architecture is not None and hasattr(architecture, "_from_config"):
            return lambda: architecture._from_config(config)
    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            return lambda auto=auto: auto.from_config(config)
    raise UsageError(f"{path}: transformers has no model class for {type(config).__name__}")


def to_meta(model: nn.Module) -> None:
    """Replace every parameter and buffer by a meta tensor. ``torch.compile`` can run these without memory."""
    _replace(model, "meta")


def _to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter and buffer by a fake CPU tensor."""
    with mode:
        _replace(model, "cpu")


def _replace(model: nn.Module, device: str) -> None:
    """New empty tensors of the same kind, shape and dtype in every slot; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    for owner, table, name, tensor in list(_slots(model)):
        if id(tensor) not in made:
            size, stride = tensor.shape, tensor.stride()
            empty = torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty
        getattr(owner, table)[name] = made[id(tensor)]


def _slots(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Every place of a module that holds a tensor."""
    for owner in model.modules():
        for table in ("_parameters", "_buffers"):
            for name, tensor in getattr(owner, table).items():
                if tensor is not None:
                    yield owner, table, name, tensor
