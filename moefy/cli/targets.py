"""What the command line calls TARGET: a factory in Python code, or a Hugging Face config on disk.

Contract: ``load_target`` returns a module in eval mode. A text that names no target raises ``UsageError``. User code
that raises becomes ``TargetFailed``, with the user's exception as its cause.

    >>> load_target("torchvision.models:resnet18").model        # doctest: +SKIP
    >>> load_target("llama/config.json").model                  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

from moefy.errors import MoefyError, UsageError, suggest

FORM = "MODULE:FACTORY or a Hugging Face config file or folder"


class TargetFailed(MoefyError, RuntimeError):
    """The user's module or factory raised ``__cause__``."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model to report on, and the example inputs that the factory returned with it."""

    model: nn.Module
    example_args: tuple[Any, ...] = ()
    example_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


def load_target(text: str) -> Target:
    """The model that ``text`` names.

    ``package.module:factory`` imports the module (this runs its code) and calls the factory without
    arguments. The factory returns a module, or ``(module, example_args)``, or
    ``(module, example_args, example_kwargs)``. A config file or a folder with ``config.json`` is built by
    transformers without memory.

    Raises:
        UsageError: ``text`` has neither form, or names something that does not exist or is no model.
        TargetFailed: the user's code raised.
    """
    path = Path(text)
    if path.is_dir() or path.suffix == ".json":
        return Target(_from_config(path))
    module, separator, attribute = text.partition(":")
    if not separator or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise UsageError(f"expected {FORM}; got {text!r}")
    return _as_target(_call(_lookup(_import(module), attribute, text), text), text)


def _from_config(path: Path) -> nn.Module:
    from moefy.cli.hf_config import build_from_config, config_file  # on demand: needs transformers

    file = config_file(path)
    if file is None:
        raise UsageError(f"{path}: no config.json there" if path.is_dir() else f"{path}: no such file")
    return build_from_config(file)


def _import(name: str) -> Any:
    """Import the user's module, also from the working directory (as ``python -m`` would)."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"expected {FORM}; there is no module {error.name!r}") from error
        raise TargetFailed(f"importing {name!r} failed") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TargetFailed(f"importing {name!r} failed") from error


def _lookup(module: Any, attribute: str, text: str) -> Any:
    found = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            owner = getattr(found, "__name__", type(found).__name__)
            raise UsageError(f"{text}: {owner!r} has no {name!r}{suggest(name, public)}")
        found = getattr(found, name)
    return found


def _call(factory: Any, text: str) -> Any:
    """What the factory returns. A module instance counts as its own factory."""
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{text}: expected a function that returns a model; got {factory!r}")
    try:
        return factory()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TargetFailed(f"factory {text!r} failed") from error


def _as_target(made: Any, text: str) -> Target:
    parts = list(made) if isinstance(made, tuple) else [made]
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > 3:
        kind = type(made).__name__
        raise UsageError(
            f"factory {text!r} returned {kind}; expected an nn.Module, optionally with example_args "
            "and example_kwargs"
        )
    args = parts[1] if len(parts) > 1 else ()
    kwargs = parts[2] if len(parts) > 2 else {}
    return Target(parts[0].eval(), tuple(args), dict(kwargs))
