"""A dense model becomes an MoE inside ``torch.compile``: modules are swapped, then Dynamo starts over.

Dynamo calls the backend with a graph that it traced from the dense model. When the frame's modules
have not been seen yet, ``moefy.transform`` runs on them, with the arguments of the very call that is
being compiled, and the analysis of the frame restarts. Dynamo then traces an ordinary transformed
model: parameters are inputs, guards are its own, ``load_state_dict(assign=True)``, ``.train()`` and
shape changes behave as for any model. No parameter is ever made behind Dynamo's back.

    call 1   trace the dense graph -> transform(self) -> restart -> trace the MoE graph -> compile
    call 2   cached

Contract: every FFN that ``transform`` accepts is rewritten, or a named error says why not. Layers that
are compiled one by one share one code object, so each swap costs a cache entry of that code; identity
guards keep these entries out of Dynamo's ``recompile_limit``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext, tracing
from torch.utils._python_dispatch import _disable_current_modes

from moefy.capture.inputs.tensors import ExampleInputs
from moefy.compiler.frame import (
    Frame,
    RestartAnalysis,
    current_frame,
    guard_identity,
    on_limit,
    unwrapped,
)
from moefy.compiler.options import WHERE, CompileOptions
from moefy.config import MoEConfig
from moefy.errors import AlreadyTransformed, BackendError, NoFFNFound
from moefy.model.guards import sharded_parameters, wrapped_modules
from moefy.model.paths import join
from moefy.passes.graphs import node_count
from moefy.passes.pipeline import add_run, recording
from moefy.passes.trace import Trace
from moefy.records import PassRecord

log = logging.getLogger(__name__)

NAME = "transform"
OPTIMIZER_WARNING = (
    'torch.compile(backend="moefy") made an MoE of a dense model during its first compiled call: an '
    "optimizer built before that does not hold the new parameters. Build it after the first call, or "
    "call moefy.transform(model) before torch.compile"
)


@dataclasses.dataclass
class _State:
    """What was seen in this process. Modules are held weakly."""

    seen: weakref.WeakSet[nn.Module] = dataclasses.field(default_factory=weakref.WeakSet)
    barren: weakref.WeakSet[nn.Module] = dataclasses.field(default_factory=weakref.WeakSet)
    guarded: weakref.WeakSet[nn.Module] = dataclasses.field(default_factory=weakref.WeakSet)
    swaps: dict[types.CodeType, int] = dataclasses.field(default_factory=dict)
    warned: bool = False


_state = _State()


def reset() -> None:
    """Forget what was seen; ``torch._dynamo.reset()`` does so too."""
    global _state
    _state = _State()


def upcycle_frame(gm: fx.GraphModule, options: CompileOptions) -> None:
    """Transform the modules of the frame that is being compiled, unless that was done before.

    Raises:
        RestartAnalysis: something was swapped; for Dynamo.
        BackendError: the modules are wrapped or in use in a way that forbids swapping.
        MoefyError: whatever ``moefy.transform`` raises, but for ``NoFFNFound``, which is a warning.
    """
    frame = current_frame()
    if frame is None:
        raise BackendError("num_experts needs torch.compile: the backend was called by hand")
    root = frame.root
    if root is not None and root in _state.guarded:
        _state.guarded.discard(root)
        guard_identity(frame)
    if root is not None and root in _state.seen:
        return
    if root is not None and frame.call is not None:
        swapped = _transform_module(gm, frame, frame.call, options)
    else:
        swapped = _transform_graph(gm, frame, options)
    if not swapped:
        return
    if _state.swaps.get(frame.code, 0) and root is not None:
        _state.guarded.add(root)
    _state.swaps[frame.code] = _state.swaps.get(frame.code, 0) + 1
    _watch()
    if not _state.warned:
        _state.warned = True
        warnings.warn(OPTIMIZER_WARNING, stacklevel=3)
    raise RestartAnalysis


@functools.cache
def _watch() -> None:
    """Once per process: a dense layer that Dynamo gives up on is an error, not a dense layer."""
    on_limit(_refuse_dense)


def _refuse_dense(frame: Frame, limit: str) -> None:
    root = frame.root
    if root is None or root in _state.seen or frame.code not in _state.swaps:
        return
    error = BackendError(
        f"{type(root).__name__} stays dense: Dynamo compiled its forward as often as "
        f"torch._dynamo.config.{limit} allows; raise that, or call moefy.transform(model, "
        "num_experts=...) before torch.compile"
    )
    raise unwrapped(error)


def graph_name() -> str:
    """Dynamo's id of this compilation, ``"frame/recompile"``."""
    compile_id = CompileContext.current_compile_id()
    return str(compile_id) if compile_id is not None else ""


def check_swappable(root: nn.Module) -> None:
    """Raise ``BackendError`` where new parameters would break what already holds the old ones."""
    remedy = "call moefy.transform(model, num_experts=...) first, then wrap, then compile"
    for reason in _obstacles(root):
        raise BackendError(f"cannot make {type(root).__name__} an MoE at compile time: {reason}; {remedy}")


def _obstacles(root: nn.Module) -> Iterator[str]:
    if nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None:
        yield "it runs under DistributedDataParallel"
    for fqn, module in wrapped_modules(root):
        yield f"{fqn or 'it'} is wrapped in {type(module).__name__}"
    for fqn in sharded_parameters(root):
        yield f"{fqn} is a DTensor"
    for fqn, module in root.named_modules():
        if getattr(module, "_is_replica", False):
            yield "it is a replica made by DataParallel"
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                yield f"{join(fqn, name)} is not a Parameter (torch.func.functional_call?)"
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    if functorch.peek_interpreter_stack() is not None:
        yield "it runs inside a torch.func transform"


def _transform_module(
    gm: fx.GraphModule, frame: Frame, call: tuple[tuple[Any, ...], dict[str, Any]], options: CompileOptions
) -> bool:
    """Run ``moefy.transform`` on the frame's root; whether anything was swapped."""
    from moefy.verbs import report, transform

    assert frame.root is not None and options.moe is not None
    root, config = frame.root, _own_seed(options.moe, _state.swaps.get(frame.code, 0))
    check_swappable(root)
    _state.seen.update(root.modules())
    with recording(NAME, lambda: node_count(gm)) as run:
        refused = ""
        try:
            with _outside_of_dynamo():
                transform(
                    root,
                    config=config,
                    example_args=call[0],
                    example_kwargs=call[1],
                    include=options.include,
                    exclude=options.exclude,
                    check=False,
                )
            layers = report(root).layers
            run.matched = sum(layer.action == "moe" for layer in layers)
            refused = _refusals([layer for layer in layers if layer.action == "skipped"])
        except AlreadyTransformed as error:
            refused = str(error)
        except NoFFNFound as error:
            refused = _refusals(error.candidates) or "no candidate"
            warnings.warn(f"{WHERE}: {error}", stacklevel=4)
        run.note = _note(root, refused)
    _state.seen.update(root.modules())
    _keep(run.record)
    return run.matched > 0


def _transform_graph(gm: fx.GraphModule, frame: Frame, options: CompileOptions) -> bool:
    """Rewrite the FFNs that Dynamo's graph shows, where there is no forward to run again."""
    from moefy.compiler.frame_trace import roots_of, trace_below

    assert options.moe is not None
    swapped = False
    for root in roots_of(gm):
        if root in _state.seen:
            continue
        config = _own_seed(options.moe, _state.swaps.get(frame.code, 0))
        with recording(NAME, lambda: node_count(gm)) as run:
            with _outside_of_dynamo():
                found = _rewrite_traced(root, trace_below(gm, root), config, options)
            run.matched = sum(m.accepted for m in found)
            refused = _refusals([m for m in found if not m.accepted])
            run.note = _note(root, refused if found else "no candidate")
        if found:
            _keep(run.record)
        elif root is frame.root and root not in _state.barren:
            _state.barren.add(root)
            _keep(run.record)
            warnings.warn(f"{WHERE}: {NoFFNFound(type(root).__name__)}", stacklevel=4)
        swapped |= run.matched > 0
    return swapped


def _rewrite_traced(root: nn.Module, trace: Trace, config: MoEConfig, options: CompileOptions) -> list[Any]:
    """``moefy.transform`` for a trace that is there already; the records of all candidates."""
    from moefy.capture import Part, capture_traced
    from moefy.reports.build import attach_report, attached_report
    from moefy.rewrite import make_plan
    from moefy.verbs import rewrite

    inputs = ExampleInputs((), {}, "the inputs of the call")
    captured = capture_traced(root, [Part(root, inputs, trace)])
    if not any(match.record.accepted for match in captured.matches):
        return [match.record for match in captured.matches]
    check_swappable(root)
    plan = make_plan(captured.matches, config, options.include, options.exclude)
    if not plan.accepted:  # include and exclude left nothing
        return [match.record for match in plan.matches]
    earlier = attached_report(root)
    report = rewrite(root, captured, plan, check=False)
    if earlier is not None:  # an earlier part of the same frame
        layers = (*earlier.layers, *report.layers)
        report = dataclasses.replace(report, layers=layers, params_dense=earlier.params_dense)
        attach_report(root, report)
    return [match.record for match in plan.matches]


def _note(root: nn.Module, refused: str) -> str:
    return type(root).__name__ + (f"; refused: {refused}" if refused else "")


def _keep(record: PassRecord) -> None:
    add_run(graph_name(), (record,))
    log.info("%s: %d layers of %s", record.name, record.matched, record.note)


def _refusals(candidates: Sequence[Any]) -> str:
    return ", ".join(f"{c.fqn or '(root)'} ({c.reason})" for c in candidates)


def _own_seed(config: MoEConfig, ordinal: int) -> MoEConfig:
    """Layers compiled one by one have the same FQNs; their place in the order makes routers differ."""
    if ordinal == 0:
        return config
    digest = hashlib.sha256(f"{config.seed}:{ordinal}".encode()).digest()
    return dataclasses.replace(config, seed=int.from_bytes(digest[:6], "big"))


@contextlib.contextmanager
def _outside_of_dynamo() -> Iterator[None]:
    """As if no compilation were under way: the block runs a model and makes parameters.

    Layers with a ``.compile()`` of their own run eagerly in it.
    """
    eager = torch.compiler.set_stance("force_eager")
    with tracing(None), torch.inference_mode(False), _disable_current_modes(), eager:
        yield
