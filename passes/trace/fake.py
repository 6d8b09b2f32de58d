"""Run a forward on fake tensors, which have shapes and neither memory nor values.

>>> with fake_inputs(model, (torch.ones(2, 4),)) as (x,):
...     type(x).__name__, tuple(x.shape)
('FakeTensor', (2, 4))
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from moefy.passes.trace.trees import map_tensors


@contextmanager
def fake_inputs(model: nn.Module, tree: Any) -> Iterator[Any]:
    """Enter the fake mode of the model (a new one for a real model) and yield ``tree`` with fake tensors.

    Real parameters may meet fake inputs in it. torch's warnings about what it cannot fake are kept back: a model that
    cannot run so is expected, and the caller falls back to a real run.
    """
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    states = [*model.parameters(), *model.buffers()]
    mode = detect_fake_mode([t for t in states if isinstance(t, FakeTensor)])
    if mode is None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
    else:
        mode.allow_non_fake_inputs = True

    def convert(value: Tensor) -> Tensor:
        return value if isinstance(value, FakeTensor) else mode.from_tensor(value, static_shapes=True)

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with mode:
            yield map_tensors(tree, convert)
    finally:
        log.setLevel(level)
