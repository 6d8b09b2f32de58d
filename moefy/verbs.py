"""``transform``, ``find``, ``report`` and ``undo``: the stages in order, each one call into one room.

    request     the keywords                                config/
    capture     run the model, match its FFNs, judge        capture/
    plan        which FFNs, by which method                 rewrite/    find, report on a dense model
    rewrite     build, install, verify, seal                rewrite/    transform
    report      what was done                               reports/

Nothing of the model changes before ``rewrite``; whatever fails in it leaves the model as it was.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from moefy.capture import Captured, capture
from moefy.config import MoEConfig
from moefy.errors import NoFFNFound, UnknownOption
from moefy.model.compare import Comparison
from moefy.model.guards import bare_module, refuse_sharded
from moefy.model.paths import count_parameters
from moefy.model.shells import is_transformed, refuse_transformed
from moefy.nn.losses.delivery import deliver_aux_loss, withdraw
from moefy.nn.routers import check_router
from moefy.records import FFNMatch, PassRecord, Selection
from moefy.reports.build import attach_report, attached_report, drop_reports, make_report
from moefy.reports.rewrite import RewriteReport
from moefy.reports.text.progress import progress
from moefy.rewrite import (
    Plan,
    build_edits,
    installed,
    make_plan,
    pass_records,
    restore_dense,
    verify_outputs,
)

P = ParamSpec("P")
ModelT = TypeVar("ModelT", bound=nn.Module)
ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What the caller asks for: the keywords that ``transform``, ``find`` and ``report`` share, checked."""

    config: MoEConfig | None
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any] | None
    include: Selection
    exclude: Selection
    check: bool | None

    @classmethod
    def of(
        cls,
        num_experts: int | None = None,
        *,
        top_k: int | None = None,
        config: MoEConfig | None = None,
        example_args: tuple[Any, ...] = (),
        example_kwargs: dict[str, Any] | None = None,
        include: Selection = None,
        exclude: Selection = None,
        check: bool | None = None,
        **options: Any,
    ) -> Request:
        """The one place where the keywords are written; see ``transform`` for their meaning."""
        return cls(
            config=_config(config, num_experts, top_k, options),
            example_args=example_args,
            example_kwargs=example_kwargs,
            include=include,
            exclude=exclude,
            check=check,
        )


def _config(
    config: MoEConfig | None, num_experts: int | None, top_k: int | None, options: dict[str, Any]
) -> MoEConfig | None:
    """The config that the keywords ask for; ``None`` when they name no number of experts."""
    for name in options:
        if name not in MoEConfig.field_names():
            raise UnknownOption(name, MoEConfig.field_names(), where="MoEConfig")
    if config is None and num_experts is None:
        return None
    resolved = MoEConfig.resolve(config, num_experts=num_experts, top_k=top_k, **options)
    check_router(resolved)
    return resolved


def _takes(
    request: Callable[P, Request],
) -> Callable[[Callable[[ModelT, Request], ResultT]], Callable[Concatenate[ModelT, P], ResultT]]:
    """Give a verb of ``(model, Request)`` the keywords of ``request`` in its place."""

    def decorate(
        verb: Callable[[ModelT, Request], ResultT],
    ) -> Callable[Concatenate[ModelT, P], ResultT]:
        @functools.wraps(verb)
        def called(model: ModelT, *args: P.args, **kwargs: P.kwargs) -> ResultT:
            return verb(model, request(*args, **kwargs))

        model, _ = inspect.signature(verb).parameters.values()
        shared = inspect.signature(request).parameters.values()
        signature = inspect.signature(verb).replace(parameters=[model, *shared])
        called.__signature__ = signature  # type: ignore[attr-defined]
        return called

    return decorate


@_takes(Request.of)
def transform(model: ModelT, request: Request) -> ModelT:
    """Turn every feed-forward network of ``model`` into a Mixture-of-Experts, in place.

    Experts are copies of the dense FFN and each token's weights sum to 1, so the output does not change: Sparse
    Upcycling (Komatsuzaki et al. 2022). With a router whose weights do not, it does change, and the report says so. Do
    this before the optimizer, DDP, FSDP or ``torch.compile``.

    Args:
        model: any ``nn.Module`` or ``fx.GraphModule``.
        num_experts: experts per layer, E.
        top_k: experts per token; by default the router's own, 2 for most, 1 when there is but one expert.
        config: all options in one object; keywords lie over it.
        example_args: positional inputs of one forward. By default they are derived from the model.
        example_kwargs: keyword inputs of one forward.
        include: FQN globs, or a predicate over ``FFNMatch``: rewrite these only.
        exclude: FQN globs, or a predicate: leave these dense.
        check: compare the new output with the dense one, which costs a forward of each. A router whose weights do not
            sum to 1 is set aside for it. By default ``transform`` checks; ``find`` and ``report`` do not.
        **options: further fields of ``MoEConfig``: ``router``, ``capacity``, ``aux_loss``, ``seed``, ``router_std``,
            ``expert_noise``.

    Returns:
        ``model``.

    Raises:
        NoFFNFound: nothing to rewrite; its ``candidates`` say why.
        AlreadyTransformed: called twice.
        CheckFailed: the output changed. As after every error the model is as it was.
        ConfigError, UnknownOption, PatternError, NameClash, ExampleInputsNeeded, ModelForwardError: see each.
    """
    check = request.check is not False
    config = request.config or MoEConfig.resolve(None)
    root = bare_module(model)
    refuse_transformed(root)
    refuse_sharded(root)
    captured = capture(root, request.example_args, request.example_kwargs, outputs=check)
    plan = make_plan(captured.matches, config, request.include, request.exclude)
    rewrite(root, captured, plan, check=check)
    return model


def rewrite(root: nn.Module, captured: Captured, plan: Plan, *, check: bool) -> RewriteReport:
    """The last stages of ``transform``: rewrite what was planned, and leave the report on ``root``.

    Raises:
        NoFFNFound: the plan accepts no match.
        CheckFailed, NameClash: as ``transform``.
    """
    if not plan.accepted:
        raise NoFFNFound(type(root).__name__, [match.record for match in plan.matches])
    params_dense = count_parameters(root)
    edits = build_edits(root, plan, captured.parts[0].trace, watch=progress)
    with installed(root, edits):
        verdict = verify_outputs(captured.parts, plan.accepted) if check else None
        for edit in edits:
            plan.finish(edit.weights)
    for edit in edits:
        edit.seal()
    report_ = _report(root, captured, plan, params_dense, verdict, pass_records(edits), dry_run=False)
    deliver_aux_loss(root)
    attach_report(root, report_)
    return report_


@_takes(Request.of)
def find(model: nn.Module, request: Request) -> list[FFNMatch]:
    """Every feed-forward candidate of ``model``, the refused ones with ``reason`` and ``code``. Changes nothing.

    Takes ``transform``'s keywords and refuses the same wrong ones. A large model's forward runs on fake tensors, which
    need neither memory nor arithmetic.

    Args:
        model: any ``nn.Module`` or ``fx.GraphModule``.
        check: with True, rewrite the model, compare it with the dense one, and put it back; needs ``num_experts``.

    Returns:
        One record per candidate, in the order of the forward.

    Raises:
        CheckFailed: with ``check=True``, as ``transform``.
        ConfigError, UnknownOption, PatternError, ExampleInputsNeeded, ModelForwardError: see each.
    """
    _, plan, _ = _dry_run(bare_module(model), request)
    return [match.record for match in plan.matches]


@_takes(Request.of)
def report(model: nn.Module, request: Request) -> RewriteReport:
    """What ``transform`` did to ``model``, or on a dense model what it would do (a dry run; nothing changes).

    Takes ``transform``'s keywords. Without ``num_experts`` a dry run only lists the FFNs.

    Args:
        model: any ``nn.Module`` or ``fx.GraphModule``.
        check: with True, a dry run rewrites the model, measures the error and puts the dense model back; it needs
            ``num_experts``. Of a transformed model the report says what its own check measured.

    Returns:
        The report. ``str`` draws its tables, ``to_dict`` has JSON types.

    Raises:
        CheckFailed: with ``check=True``, as ``transform``.
        ConfigError, UnknownOption, PatternError, ExampleInputsNeeded, ModelForwardError: see each.
    """
    root = bare_module(model)
    done = attached_report(root)
    if done is not None and is_transformed(root):
        return done
    captured, plan, verdict = _dry_run(root, request)
    return _report(root, captured, plan, count_parameters(root), verdict, (), dry_run=True)


def _dry_run(root: nn.Module, request: Request) -> tuple[Captured, Plan, Comparison | None]:
    """Capture and plan; on request also rewrite, verify and put back."""
    check = bool(request.check)
    config = (request.config or MoEConfig.resolve(None)) if check else request.config
    captured = capture(root, request.example_args, request.example_kwargs, outputs=check)
    plan = make_plan(captured.matches, config, request.include, request.exclude)
    if not check or not plan.accepted:
        return captured, plan, None
    edits = build_edits(root, plan, captured.parts[0].trace, watch=progress)
    with installed(root, edits, keep=False):
        return captured, plan, verify_outputs(captured.parts, plan.accepted)


def _report(
    root: nn.Module,
    captured: Captured,
    plan: Plan,
    params_dense: int,
    verdict: Comparison | None,
    passes: tuple[PassRecord, ...],
    *,
    dry_run: bool,
) -> RewriteReport:
    return make_report(
        root,
        plan.records,
        plan.config,
        params_dense=params_dense,
        trace_source=captured.source,
        inputs=captured.inputs,
        not_run=captured.not_run,
        warnings=plan.warnings,
        dry_run=dry_run,
        verdict=verdict,
        passes=passes,
    )


def undo(model: ModelT, *, expert: int | None = None) -> ModelT:
    """Give ``model`` its dense FFNs back, in place.

    Experts start as copies and symmetry breaking leaves expert 0 alone, so until training this is bitwise.

    Args:
        model: what ``transform`` returned, or a copy of it, or what was pickled of it.
        expert: which expert to keep. By default expert 0, which must be as ``transform`` left it.

    Returns:
        ``model``. For a ``GraphModule`` the graph is the caller's own again.

    Raises:
        NotTransformed: there is nothing to undo.
        ExpertsDiverged: experts were trained and none was named.
        ConfigError: no such expert.
    """
    root = bare_module(model)
    restore_dense(root, expert)
    withdraw(root)
    drop_reports(root)
    return model
