"""``loss_scale``: what the training loop multiplies the loss by, asked when the op runs.

Contract: where a gradient is injected, nobody tells the model how the loss was scaled, so the loop does.
``set_loss_scale`` takes numbers, tensors, and objects with ``.scale(tensor)`` such as a live ``GradScaler``; their
product is the scale. It is read at backward time, on the device and without a sync, eager or compiled.

    >>> previous = set_loss_scale(0.25)
    >>> loss_scale(grad, torch.zeros(3))
    tensor(0.2500)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.ops.library import register

_factors: tuple[Any, ...] = ()  # of the process: autograd runs a backward in threads of its own


def set_loss_scale(*factors: Any) -> tuple[Any, ...]:
    """Make ``factors`` those whose product is the scale; returns the ones before."""
    global _factors
    before, _factors = _factors, factors
    return before


def _kernel(grad: Tensor, like: Tensor) -> Tensor:
    scale = torch.ones((), dtype=like.dtype, device=like.device)
    for factor in _factors:
        if isinstance(factor, Tensor):
            scale = scale * factor.detach().to(device=like.device, dtype=like.dtype, non_blocking=True)
        elif isinstance(factor, int | float):
            scale = scale * factor
        else:
            scale = factor.scale(scale)
    return scale.to(like.dtype)


def _fake(grad: Tensor, like: Tensor) -> Tensor:
    return torch.empty((), dtype=like.dtype, device=like.device)


_op = register("loss_scale(Tensor grad, Tensor like) -> Tensor", kernel=_kernel, fake=_fake)


def loss_scale(grad: Tensor, like: Tensor) -> Tensor:
    """The scale as a 0-dim tensor of the device and dtype of ``like``.

    ``grad`` is not read. It keeps a compiler from asking in the forward already, where its other argument comes from.
    """
    return _op(grad.detach(), like.detach())
