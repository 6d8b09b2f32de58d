"""Checked mode: named errors for faults that only the data shows. Reading the data waits for the device.

Contract: inside the mode, in eager mode, a router raises ``NonFiniteScores`` before its layer computes anything.
Outside of it, in compiled graphs and in traces, no data is read. There, NaN scores give valid ids and NaN weights, for
their own tokens alone.

    with moefy.checked_mode():
        model(x)        # moefy.errors.NonFiniteScores: layers.3.mlp: 2 of 128 tokens have NaN or infinite ...
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from moefy.errors import NonFiniteScores
from moefy.nn.execution import traced

_depth = 0  # of nested blocks; of the process, since DataParallel and autograd run threads of their own


class checked_mode(contextlib.ContextDecorator):
    """Check the routers' scores while the block runs: one wait for the device per layer."""

    def __enter__(self) -> checked_mode:
        global _depth
        _depth += 1
        return self

    def __exit__(self, *error: Any) -> None:
        global _depth
        _depth -= 1


def check_scores(router: Any, logits_TE: Tensor, mask_T: Tensor | None) -> None:
    """Raise ``NonFiniteScores`` in checked mode when a token that counts has a NaN or +inf score.

    -inf is allowed, since a router forbids an expert by it. Only an error reads the router's name: else a graph that
    several layers share would be compiled for each name.
    """
    if not _depth or torch.compiler.is_compiling() or traced():
        return
    bad_T = (logits_TE.isnan() | logits_TE.isposinf()).any(-1)
    if mask_T is not None:
        bad_T = bad_T & mask_T.to(bad_T)
    if bad_T.any():
        name = router.fqn or type(router).__name__
        raise NonFiniteScores(name, tokens=bad_T.nonzero().flatten().tolist(), total=len(bad_T))
