"""The ``torch.compile`` backend "moefy": passes over Dynamo's graph, then Inductor.

    >>> model = moefy.transform(model, num_experts=8)
    >>> model = torch.compile(model, backend="moefy")
    >>> model = torch.compile(model, backend="moefy", options={"inner": "aot_eager"})
    >>> model = torch.compile(dense, backend="moefy", options={"num_experts": 8})

The last line makes a dense model an MoE at its first compiled call (``moefy.compiler.dense_model``). Options are
the fields of ``CompileOptions`` and of ``MoEConfig``. What the passes did: ``records()``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from moefy.compiler import dense_model
from moefy.compiler.frame import RestartAnalysis, unwrapped
from moefy.compiler.options import CompileOptions, inductor_patches, parse_options, with_hooks
from moefy.errors import BackendError, MoefyError
from moefy.passes import pipeline
from moefy.records import PassRecord

log = logging.getLogger(__name__)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs.

    Args:
        gm: Dynamo's pre-grad graph; edited in place.
        example_inputs: one (fake) value per placeholder.
        mode: Inductor's mode, from ``torch.compile(mode=...)``.
        options: see ``moefy.compiler.options``.

    Raises:
        UnknownOption, ConfigError: for options that do not exist or are outside their domain.
        BackendError: when ``num_experts`` is given and the model cannot become an MoE here.
    """
    try:
        parsed = parse_options(options, mode)
        if parsed.moe is not None:
            _upcycle(gm, parsed)
    except MoefyError as error:
        raise unwrapped(error) from error.__cause__
    pipeline.run_pipeline(gm, disable=parsed.disable, graph=dense_model.graph_name())
    return _compile(gm, example_inputs, parsed)


def records() -> tuple[PassRecord, ...]:
    """What the passes did to all graphs since ``torch._dynamo.reset()``, oldest first."""
    return tuple(record for run in pipeline.history() for record in run.records)


def reset() -> None:
    """Forget the records; ``torch._dynamo.reset()`` calls this."""
    pipeline.clear_history()
    dense_model.reset()


backend.reset = reset  # type: ignore[attr-defined]  # Dynamo looks for it on the callable


def _upcycle(gm: fx.GraphModule, options: CompileOptions) -> None:
    """Never let an exception of another kind out: Dynamo takes some for a reason to run dense."""
    try:
        dense_model.upcycle_frame(gm, options)
    except (RestartAnalysis, MoefyError):
        raise
    except Exception as error:
        raise BackendError(
            f"the model could not be made an MoE at compile time ({type(error).__name__}: {error}); "
            "call moefy.transform(model, num_experts=...) before torch.compile"
        ) from error


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: CompileOptions
) -> Callable[..., Any]:
    if options.inner == "eager":
        return _run_eagerly(gm)
    if options.inner != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend(options.inner)(gm, list(example_inputs))
    from torch._inductor.compile_fx import compile_fx

    from moefy.compiler.inductor import stage_hooks

    hooks = stage_hooks(options.disable, dense_model.graph_name())
    patches = with_hooks(inductor_patches(options), hooks)
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def _run_eagerly(gm: fx.GraphModule) -> Callable[..., Any]:
    """The graph as it is, without ``__torch_function__``: Dynamo has traced through that already.

    Else rows that enter a graph after a graph break would make all they touch ``RoutedRows``.
    """

    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return gm(*args)

    return run
