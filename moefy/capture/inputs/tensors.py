"""Example inputs as data, and ``Sampler``, which makes small tensors on a model's device and in its dtype.

Contract: the global random state is never touched and equal calls give equal tensors.

    >>> sampler = Sampler(torch.device("cpu"), torch.float32)
    >>> example((sampler.tokens(1, 8, high=100),), {}, "a guess").description
    'int64 [1, 8] (a guess)'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE = 8  # tokens in a derived text: enough to route, cheap to run


@dataclasses.dataclass(frozen=True)
class ExampleInputs:
    """Arguments that a model may accept. ``description`` says in one line what they are."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    description: str


def example(args: tuple[Any, ...], kwargs: Mapping[str, Any], source: str) -> ExampleInputs:
    """Example inputs whose description lists every tensor and ends with where they come from."""
    parts = [describe(value) for value in args]
    parts += [f"{name} {describe(value)}" for name, value in kwargs.items()]
    return ExampleInputs(args, dict(kwargs), f"{', '.join(parts) or 'no inputs'} ({source})")


def describe(value: Any) -> str:
    """``float32 [1, 8, 64]`` for a tensor, the contents of a list, the text of a scalar, the type of the rest."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        return f"({', '.join(map(describe, value))})"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


class Sampler:
    """Makes tensors on one model's device, floating-point ones in its dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    @classmethod
    def of(cls, model: nn.Module) -> Sampler:
        """The sampler for ``model``: its first tensor's device, its first floating-point tensor's dtype."""
        tensors = [*model.parameters(), *model.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        floating = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
        return cls(device, floating[0] if floating else torch.get_default_dtype())

    def tokens(self, *shape: int, high: int, low: int = 2) -> Tensor:
        """Random ids in ``[low, high)``; ``low`` stays above the usual padding ids where there is room."""
        low = low if high > low else 0
        ids = torch.randint(low, max(high, 1), shape, generator=self._generator, device="cpu")
        return ids.to(self.device)

    def floats(self, *shape: int) -> Tensor:
        """Standard normal values."""
        values = torch.randn(shape, generator=self._generator, device="cpu", dtype=torch.float32)
        return values.to(self.device, self.dtype)

    def full(self, *shape: int, value: float = 1, dtype: torch.dtype | None = None) -> Tensor:
        """A constant tensor, in the model's dtype unless one is given."""
        return torch.full(shape, value, device=self.device, dtype=dtype or self.dtype)

    def integers(self, *shape: int, value: int = 1) -> Tensor:
        """A constant int64 tensor."""
        return self.full(*shape, value=value, dtype=torch.int64)
