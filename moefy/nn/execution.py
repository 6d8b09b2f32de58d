"""How the code runs at the moment: a real forward, a recomputation, a trace; and side effects that fit each.

Contract: what a training forward counts or keeps must happen once. Checkpoints run a forward again in the backward,
``make_fx`` and ``torch.export`` run it to look at it, and Dynamo forbids side effects inside a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy import ops


def is_forward() -> bool:
    """Whether this run of the code is a forward: no recomputation, no trace, no transform of functorch.

    A compiled graph asks ``ops.first_run`` about recomputations, when it runs.
    """
    if torch.compiler.is_dynamo_compiling():
        return not traced()
    return not in_backward() and not traced() and not torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether this thread runs a backward, which is where activation checkpoints recompute."""
    return torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """Whether ``torch.export`` runs. Dynamo of torch 2.11 takes ``torch.compiler.is_exporting`` as always true."""
    return torch.compiler._is_exporting_flag


def traced() -> bool:
    """Whether a tracer is active: ``make_fx``, ``torch.export``, or a fake mode."""
    if exporting() or torch.compiler.is_dynamo_compiling():
        return exporting()
    kind = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (kind.PROXY, kind.FAKE))


def assign(holder: Any, name: str, value: Any) -> None:
    """``setattr(holder, name, value)`` that Dynamo also takes inside an activation checkpoint, on an outside object.

    Dynamo forbids such side effects there, since a recomputation would not repeat them. So use it for what a
    recomputation must not repeat, or for what is undone before the checkpoint ends. An assigned tensor becomes one more
    output of the graph.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(
            setattr, holder, name, value
        )
    else:
        setattr(holder, name, value)


def accumulate(total: Tensor, value: Tensor) -> None:
    """Add ``value`` to the counter ``total``, where ``is_forward()``; in a replica of DataParallel to the one counter.

    Through ``.data``, which leaves the version alone: Dynamo makes ``total`` an input of a checkpoint, and one that
    runs eagerly saves its inputs for the backward, where a new version would be an error.
    """
    if torch.compiler.is_dynamo_compiling():
        total.data.add_(value * ops.first_run(value))
    else:
        total.data.add_(value.to(total.device))


def static_counter(counter: Tensor) -> Tensor:
    """Mark ``counter`` as ``torch._dynamo.mark_static`` and ``mark_static_address`` do, without importing Dynamo.

    Dynamo then never takes the counter's length for an equal batch size, and CUDA graphs may write to it in place.
    """
    counter._dynamo_static_indices = set(range(counter.dim()))  # type: ignore[attr-defined]
    counter._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    counter._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return counter
