"""Tokens that skip the layer and come out as given rows (FastMoE's ``mask`` and ``mask_dict``).

>>> y_TD, ids_T = torch.ones(3, 2), torch.tensor([0, 7, 0])
>>> replace_rows(y_TD, ids_T, {7: torch.tensor([5.0, 6.0])})
tensor([[1., 1.], [5., 6.], [1., 1.]])
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.errors import DtypeError, ShapeError


def replace_rows(y: Tensor, ids: Tensor, rows: Mapping[int, Tensor | float]) -> Tensor:
    """``y`` with ``rows[v]`` wherever ``ids`` is ``v``, and zeros where ``rows`` has no such id.

    Args:
        y: ``[*leading, ...]``.
        ids: integers in the leading shape; 0 keeps the layer's output.
        rows: one token's output, or a number, by id.

    Raises:
        ShapeError: for a row that is not one token's output.
    """
    token = y.shape[ids.dim() :]
    ids = ids.view(*ids.shape, *[1] * (y.dim() - ids.dim()))
    y = y.masked_fill(ids != 0, 0.0)
    for value, row in rows.items():
        row = torch.as_tensor(row, dtype=y.dtype, device=y.device)
        if row.dim() > 0 and row.shape != token:
            raise ShapeError(f"replacements[{value}] has the shape {tuple(token)}; got {tuple(row.shape)}")
        y = torch.where(ids == value, row, y)
    return y


def routed_mask(mask: Tensor | None, ids: Tensor | None, leading: tuple[int, ...]) -> Tensor | None:
    """The tokens that are routed: real by ``mask`` and not replaced by ``ids``.

    Raises:
        ShapeError: when one of them has another shape than the tokens.
        DtypeError: for a mask that is no tensor, or neither bool nor integer.
    """
    for name, value in (("mask", mask), ("replace_ids", ids)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise DtypeError(f"{name} is a tensor; got {type(value).__name__}")
        if tuple(value.shape) != leading:
            raise ShapeError(f"{name} has the shape of the tokens, {leading}; got {tuple(value.shape)}")
        if value.is_floating_point() or value.is_complex():
            raise DtypeError(f"{name} is bool or integer; got {value.dtype}")
    real = None if mask is None else mask != 0
    if ids is None:
        return real
    return ids == 0 if real is None else real & (ids == 0)
