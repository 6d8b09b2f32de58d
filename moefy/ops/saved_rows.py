"""What ``expert_ffn`` saves for its backward: when this backward may write over it, and how a second reader knows.

The saved rows are the largest tensors of a layer, and the gradients of the pre-activations may take their place: with
OLMoE's shapes that is 1 GiB.

Contract: a backward that claims the rows gets them as they were saved, or none, and then computes them again. So no
caller sees that they were overwritten, and the backward stays a function of its arguments: a compiler may reorder its
calls, and may give two backwards the rows of one forward if it has merged two equal forwards. Whether the graph is kept
is asked when the op runs, since a trace does not know it. The version counter of the rows carries the answer: it is the
one mark that autograd and compiled code hand on with a tensor, and copies do not have it.

    >>> rows_NH = torch.ones(2, 1)
    >>> promise_private(rows_NH)
    >>> claim(torch.empty(0), rows_NH).overwrite     # not in a backward
    False
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

# Versions that no tensor reaches by counting its writes.
GIVEN = 1 << 29
OVERWRITTEN = 1 << 30


class SavedRows(NamedTuple):
    """What the backward gets.

    Attributes:
        gate_or_acted: [N, H], a separate gate's pre-activations, or the activations; None where neither was saved.
        up: [N, P], the pre-activations of the other, or of a merged, entry; None where nothing was saved.
        overwrite: whether the caller may write to them.
    """

    gate_or_acted: Tensor | None
    up: Tensor | None
    overwrite: bool


def promise_private(*rows: Tensor) -> None:
    """Mark the results of a forward as private: nothing but its backward will read them."""
    if not any(r.is_inference() for r in rows):  # these have no version, nor a backward
        _set_version(rows, GIVEN)


def claim(second_rows: Tensor, up_rows: Tensor) -> SavedRows:
    """The rows for one backward, which may overwrite them from then on if nothing else needs them.

    Args:
        second_rows: [N, H], or [0] where there are none.
        up_rows: [N, P], or [0] where nothing was saved.
    """
    if up_rows.dim() == 1 or up_rows._version >= OVERWRITTEN:
        return SavedRows(None, None, overwrite=True)
    overwrite = up_rows._version >= GIVEN and _graph_is_freed()
    if overwrite:
        _set_version((second_rows, up_rows), OVERWRITTEN)
    return SavedRows(None if second_rows.dim() == 1 else second_rows, up_rows, overwrite)


def _graph_is_freed() -> bool:
    """Whether this runs in a backward that keeps no graph. False outside of a backward.

    Without donated buffers torch's compiled backwards leave what is saved alone, even replayed from a CUDA graph, whose
    next replay may be that of a kept graph.
    """
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    return functorch_config.donated_buffer and not kept


def _set_version(tensors: tuple[Tensor, ...], version: int) -> None:
    torch._C._autograd._unsafe_set_version_counter(tensors, (version,) * len(tensors))  # type: ignore[attr-defined]
