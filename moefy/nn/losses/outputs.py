"""Where a model's output has its loss, and the tensors that a loss can come from.

Contract: an output is a tensor, or a tuple, list, dict, ModelOutput or dataclass of such. Its loss is a tensor without
dimensions, alone or the only one of a tuple, or what "loss" names. ``with_loss`` changes that loss; ``map_tensors``
changes every floating tensor that requires grad. Both keep the kind of the output: dicts in place, the others anew.

    >>> loss = torch.ones((), requires_grad=True)
    >>> with_loss({"loss": loss, "logits": torch.zeros(2)}, lambda value: value + 1)
    ({'loss': tensor(2., grad_fn=<AddBackward0>), 'logits': tensor([0., 0.])}, True)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """``output`` with ``change`` done to its loss, and whether it has one."""
    if is_loss(output):
        return change(output), True
    if isinstance(output, Mapping):
        if not is_loss(output.get("loss"), named=True):
            return output, False
        output["loss"] = change(output["loss"])  # type: ignore[index]
        return output, True
    if isinstance(output, (tuple, list)):
        at = [i for i, item in enumerate(output) if is_loss(item)]
        if len(at) != 1:
            return output, False
        items = list(output)
        items[at[0]] = change(items[at[0]])
        return _same_kind(output, items), True
    if dataclasses.is_dataclass(output) and is_loss(getattr(output, "loss", None), named=True):
        return dataclasses.replace(output, loss=change(output.loss)), True  # type: ignore[type-var, attr-defined]
    return output, False


def is_loss(value: Any, named: bool = False) -> bool:
    """Whether ``value`` is a floating tensor that requires grad and has no dimensions.

    One element is enough where its name says that it is a loss (``named``).
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.requires_grad:
        return False
    return value.dim() == 0 or (named and value.numel() == 1)


def differentiable_tensors(output: Any) -> list[Tensor]:
    """The tensors of ``output`` that a loss can come from, each once, in their order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if not any(tensor is other for other in found):
            found.append(tensor)
        return tensor

    map_tensors(output, collect)
    return found


def replace_tensors(output: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """``output`` with each tensor of ``old``, the same object, replaced by its partner in ``new``."""
    pairs = list(zip(old, new, strict=True))

    def replace(tensor: Tensor) -> Tensor:
        return next((after for before, after in pairs if before is tensor), tensor)

    return map_tensors(output, replace)


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``fn`` done to its floating tensors that require grad."""
    if isinstance(value, Tensor):
        return fn(value) if value.is_floating_point() and value.requires_grad else value
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            new = map_tensors(item, fn)
            if new is not item:
                value[key] = new  # type: ignore[index]
        return value
    if isinstance(value, (tuple, list)):
        return _same_kind(value, [map_tensors(item, fn) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{n: map_tensors(getattr(value, n), fn) for n in fields})
    return value


def _same_kind(value: Any, items: list[Any]) -> Any:
    """``items`` as the list, tuple or named tuple that ``value`` is; ``value`` itself where nothing changed."""
    if all(old is new for old, new in zip(value, items, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
