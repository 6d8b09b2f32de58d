"""Modules and parameters by dotted path: find, put, drop; and how paths lie to each other.

Contract: ``put_*`` and ``drop_module`` write to the registries (``_modules``, ``_parameters``) without hooks or checks,
so that undoing a swap leaves no trace, not even in the order of names. The root's own path is ``""``.

    >>> put_module(model, "layers.0.mlp", moe)
    >>> below("layers.0.mlp.fc1", "layers.0.mlp"), relative("layers.0.mlp.fc1", "layers.0.mlp")
    (True, 'fc1')
"""

from __future__ import annotations

from torch import nn


def split(path: str) -> tuple[str, str]:
    """``("a.b", "c")`` for ``"a.b.c"``; ``("", "c")`` for ``"c"``."""
    parent, _, name = path.rpartition(".")
    return parent, name


def join(prefix: str, path: str) -> str:
    """``"prefix.path"``, without the dot where one of them is the root."""
    return f"{prefix}.{path}" if prefix and path else prefix or path


def below(path: str, prefix: str) -> bool:
    """Whether ``path`` is ``prefix`` or lies inside it; everything lies inside the root."""
    return prefix == "" or path == prefix or path.startswith(f"{prefix}.")


def relative(path: str, prefix: str) -> str:
    """``path``, which is below ``prefix``, as seen from there."""
    return path[len(prefix) + 1 :] if prefix else path


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``, or ``None``."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def find_parameter(root: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter at ``path``, or ``None``."""
    try:
        return root.get_parameter(path)
    except AttributeError:
        return None


def put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register ``module`` at ``path``, in the place of the one that is there."""
    parent, name = split(path)
    root.get_submodule(parent)._modules[name] = module


def drop_module(root: nn.Module, path: str) -> None:
    """Take the module at ``path`` away."""
    parent, name = split(path)
    del root.get_submodule(parent)._modules[name]


def put_parameter(root: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register ``parameter`` at ``path``, in the place of the one that is there."""
    parent, name = split(path)
    root.get_submodule(parent)._parameters[name] = parameter


def count_parameters(model: nn.Module) -> int:
    """The number of parameter elements. Shared parameters count once."""
    return sum(p.numel() for p in model.parameters())
