"""Run a model without a trace of it: eval mode, no gradients, and everything left as it was.

Restored afterwards: train/eval of each module, buffers, plain attributes and containers of modules (caches that a
forward fills), and the random states of torch, numpy and Python.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def quiet(model: nn.Module, *, values: bool = True) -> Iterator[None]:
    """Within the block ``model`` is in eval mode under ``no_grad``; afterwards it is as it was.

    With ``values=False`` the contents of larger buffers are not saved: for runs on fake tensors, which cannot
    write them.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    states = [_Attributes(module, values) for module in modules]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.callback(random.setstate, random.getstate())
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.no_grad())
        try:
            for module in modules:
                module.training = False  # not .eval(): exported modules refuse it, and users override it
            yield
        finally:
            for module, mode, state in zip(modules, modes, states, strict=True):
                state.restore(module)
                module.training = mode


class _Attributes:
    """The attributes of one module, the containers in them, and copies of its buffers' values."""

    def __init__(self, module: nn.Module, values: bool) -> None:
        self.attributes = dict(module.__dict__)
        self.containers = [(c, c.copy()) for c in _containers(module.__dict__)]
        held = [b for b in module._buffers.values() if b is not None and not b.is_meta]
        if not values:  # a fake mode computes on constants of one element, counters say, for real
            held = [b for b in held if b.numel() == 1 and type(b) is torch.Tensor]
        self.buffers = [(b, b.detach().clone()) for b in held]

    def restore(self, module: nn.Module) -> None:
        current = module.__dict__
        for key in [k for k in current if k not in self.attributes]:
            del current[key]
        current.update(self.attributes)
        for container, saved in self.containers:
            _refill(container, saved)
        for buffer, saved in self.buffers:
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)  # hooks are kept in an OrderedDict


def _containers(attributes: dict[str, Any]) -> list[Any]:
    """The containers among ``attributes``, and those inside them; each once."""
    found: dict[int, Any] = {}
    waiting = list(attributes.values())
    while waiting:
        value = waiting.pop()
        kind = type(value)
        if kind in _CONTAINERS and id(value) not in found:
            found[id(value)] = value
        elif kind is not tuple:
            continue
        waiting.extend(value.values() if isinstance(value, dict) else value)
    return list(found.values())


def _refill(container: Any, saved: Any) -> None:
    if isinstance(container, list):
        container[:] = saved
    elif isinstance(container, deque):
        container.clear()
        container.extend(saved)
    else:
        container.clear()
        container.update(saved)


def _cuda_devices(model: nn.Module) -> list[int]:
    indices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return sorted(i for i in indices if i is not None)
