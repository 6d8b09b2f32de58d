"""Everything about a model and the process that a quiet call must leave alone.

>>> before = Snapshot(model)
>>> moefy.find(model)
>>> before.check(model)        # asserts, naming what changed
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    """Bitwise, NaN included."""
    if a is None or b is None:
        return a is b
    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta and a.shape == b.shape
    if a.is_quantized:
        return torch.equal(a.int_repr(), b.int_repr())
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        if a.dim()
        else (torch.equal(a, b) or bool(a.isnan() & b.isnan()))
    )


def copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


class Snapshot:
    """Modules and parameters by identity, values, gradients, modes, hooks, plain attributes, random states."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = dict(model.named_buffers(remove_duplicate=False))
        self.values = {k: copied(v) for k, v in {**self.parameters, **self.buffers}.items()}
        self.grads = {k: (p.grad, copied(p.grad), p.requires_grad) for k, p in self.parameters.items()}
        self.modes = {k: m.training for k, m in self.modules.items()}
        self.classes = {k: type(m) for k, m in self.modules.items()}
        self.attributes = {k: _plain(m) for k, m in self.modules.items()}
        self.hooks = {k: _hooks(m) for k, m in self.modules.items()}
        self.state_keys = list(model.state_dict())
        self.rng = _random_states()

    def check(self, model: nn.Module, *, rng: bool = True) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        assert list(modules) == list(self.modules), "modules were renamed, added or removed"
        for name, module in self.modules.items():
            assert modules[name] is module, f"{name} is another object"
            assert module.training == self.modes[name], f"{name}: train mode changed"
            assert type(module) is self.classes[name], f"{name}: class changed"
            assert _hooks(module) == self.hooks[name], f"{name}: hooks changed"
            now, then = _plain(module), self.attributes[name]
            assert now == then, (
                f"{name}: changed: {[k for k in {**now, **then} if now.get(k) != then.get(k)]}"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        assert list(parameters) == list(self.parameters)
        assert list(buffers) == list(self.buffers)
        for name, value in {**parameters, **buffers}.items():
            assert value is {**self.parameters, **self.buffers}[name], f"{name} is another object"
            assert same_tensor(value.detach(), self.values[name]), f"{name} changed"
        for name, parameter in parameters.items():
            grad, grad_value, requires_grad = self.grads[name]
            assert parameter.requires_grad == requires_grad, f"{name}: requires_grad changed"
            assert parameter.grad is grad, f"{name}: another gradient object"
            assert same_tensor(parameter.grad, grad_value), f"{name}: gradient changed"
        assert list(model.state_dict()) == self.state_keys
        if rng:
            self.check_random()

    def check_random(self) -> None:
        for name, value in _random_states().items():
            assert value == self.rng[name], f"the random state of {name} changed"


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are no registered tensors or modules; containers by content, the rest by identity."""
    found: dict[str, Any] = {}
    for key, value in module.__dict__.items():
        if key in ("_parameters", "_buffers", "_modules") or key.endswith("_hooks") or "hooks_" in key:
            continue
        found[key] = _frozen(value)
    return found


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, set):
        return frozenset(map(_frozen, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return id(value)


def _hooks(module: nn.Module) -> list[tuple[str, int]]:
    return [
        (key, len(value))
        for key, value in module.__dict__.items()
        if key.endswith("_hooks") and isinstance(value, dict)
    ]


def _random_states() -> dict[str, Any]:
    numpy_state = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]),
        "python": random.getstate(),
    }
