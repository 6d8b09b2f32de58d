"""What forbids a change of a model: wrappers that hold its parameters already, sharded parameters, no module at all.

``bare_module`` and ``refuse_sharded`` guard ``transform`` and raise ``ConfigError``. ``wrapped_modules`` and
``sharded_parameters`` are the facts behind them, which the backend asks too, with more of its own: it swaps modules in
the middle of a call.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from moefy.errors import ConfigError


def bare_module(model: nn.Module) -> nn.Module:
    """The module itself: the one inside for a ``torch.compile`` wrapper.

    Raises:
        ConfigError: no module, a TorchScript module, or one that is wrapped for data parallelism already.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("model", got=type(model).__name__, expected="an nn.Module or fx.GraphModule")
    if isinstance(model, torch.jit.ScriptModule):
        expected = "the nn.Module that it was scripted from"
        raise ConfigError("model", got="a TorchScript module", expected=expected)
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it here would cost seconds
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return cast(nn.Module, model._orig_mod)
    if isinstance(model, _data_parallel()):
        name = type(model).__name__
        raise ConfigError("model", got=name, expected=f"the bare module; transform it before {name}")
    return model


def refuse_sharded(model: nn.Module) -> None:
    """Raise ``ConfigError`` for a model whose parameters are distributed over ranks already."""
    for fqn in sharded_parameters(model):
        got = f"a DTensor as parameter {fqn}"
        raise ConfigError("model", got=got, expected="plain parameters; transform it before fully_shard")


def sharded_parameters(model: nn.Module) -> Iterator[str]:
    """FQNs of the parameters that are ``DTensor``s."""
    for fqn, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "device_mesh"):
            yield fqn


def wrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """FQN and module of everything in ``model`` that is wrapped for data parallelism, FSDP's modules included."""
    wrappers = (*_data_parallel(), *_fully_sharded())
    return ((fqn, module) for fqn, module in model.named_modules() if isinstance(module, wrappers))


def _data_parallel() -> tuple[type, ...]:
    return nn.DataParallel, nn.parallel.DistributedDataParallel


def _fully_sharded() -> tuple[type, ...]:
    """FSDP's classes. They cannot be in use as long as nobody imported their module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    names = ("FullyShardedDataParallel", "FSDPModule")
    return tuple(getattr(fsdp, name) for name in names if hasattr(fsdp, name))
