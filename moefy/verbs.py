"""``transform``, ``find`` and ``report``: the dense model in, the Mixture-of-Experts and its report out.

``transform`` looks (``survey``), builds every new module beside the old ones (``surgery``), swaps them in, checks the
output against the dense one, and only then lets go of the dense weights. Whatever fails before leaves the model as it
was.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from moefy.capture.capture import Survey, select, survey
from moefy.config import MoEConfig, router_name
from moefy.errors import AlreadyTransformed, CheckFailed, ConfigError, NoFFNFound, UnknownOption
from moefy.model.compare import Comparison, compare, even_routing
from moefy.model.run_quietly import quiet
from moefy.nn import Router
from moefy.nn.losses.delivery import deliver_aux_loss
from moefy.nn.routers import check_router, configured_router
from moefy.passes.match.rules import Match
from moefy.records import FFNMatch, LayerRecord, PassRecord, Selection
from moefy.reports.rewrite import NOT_EXACT, RewriteReport
from moefy.reports.text.progress import progress
from moefy.rewrite.graph import GraphLayer, build_graph_layer
from moefy.rewrite.methods.copy import add_noise
from moefy.rewrite.modules import Layer, ModelIndex, Shell, build_layer

ModelT = TypeVar("ModelT", bound=nn.Module)


def transform(
    model: ModelT,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    config: MoEConfig | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
    include: Selection = None,
    exclude: Selection = None,
    check: bool = True,
    **options: Any,
) -> ModelT:
    """Turn every feed-forward network of ``model`` into a Mixture-of-Experts, in place.

    Experts are copies of the dense FFN and each token's weights sum to 1, so the output does not change: Sparse
    Upcycling (Komatsuzaki et al. 2022). With a router whose weights do not, it does change, and the report says so. Do
    this before the optimizer, DDP, FSDP or ``torch.compile``.

    Args:
        model: any ``nn.Module`` or ``fx.GraphModule``.
        num_experts: experts per layer, E.
        top_k: experts per token; 2 by default, 1 when there is but one expert.
        config: all options in one object; keywords lie over it.
        example_args: positional inputs of one forward. By default they are derived from the model.
        example_kwargs: keyword inputs of one forward.
        include: FQN globs, or a predicate over ``FFNMatch``: rewrite these only.
        exclude: FQN globs, or a predicate: leave these dense.
        check: compare the new output with the dense one; costs a forward of each. A router whose weights do not sum to
            1 is set aside for it.
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
    config = MoEConfig.resolve(config, num_experts=num_experts, top_k=top_k, **options)
    check_router(config)
    root = bare_module(model)
    refuse_transformed(root)
    refuse_sharded(root)
    found = survey(root, example_args, example_kwargs, outputs=check)
    rewrite_survey(root, found, config, include, exclude, check=check)
    return model


def rewrite_survey(
    root: nn.Module,
    found: Survey,
    config: MoEConfig,
    include: Selection = None,
    exclude: Selection = None,
    *,
    check: bool = True,
) -> RewriteReport:
    """The second half of ``transform``: rewrite what a survey found and leave the report on ``root``."""
    matches = select(found.matches, include, exclude)
    if not any(m.record.accepted for m in matches):
        raise NoFFNFound(type(root).__name__, [m.record for m in matches])
    dense_params, planned = count_parameters(root), planned_routers(matches, config)
    verdict, records = _rewrite(root, found, matches, config, check)
    report_ = make_report(
        root, found, matches, config, planned, dense_params, verdict, records, dry_run=False
    )
    deliver_aux_loss(root)
    root.__dict__["_moefy_report"] = report_
    return report_


def find(
    model: nn.Module,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    config: MoEConfig | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
    include: Selection = None,
    exclude: Selection = None,
    check: bool = True,
    **options: Any,
) -> list[FFNMatch]:
    """Every feed-forward candidate of ``model``, the refused ones with ``reason`` and ``code``. Changes nothing.

    Takes ``transform``'s keywords and refuses the same wrong ones; what a match becomes does not depend on the others.
    A large model's forward runs on fake tensors: neither memory nor arithmetic is needed.
    """
    _optional_config(config, num_experts, top_k, options)
    found = survey(bare_module(model), example_args, example_kwargs)
    return [m.record for m in select(found.matches, include, exclude)]


def report(
    model: nn.Module,
    num_experts: int | None = None,
    *,
    top_k: int | None = None,
    config: MoEConfig | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: dict[str, Any] | None = None,
    include: Selection = None,
    exclude: Selection = None,
    check: bool = True,
    **options: Any,
) -> RewriteReport:
    """What ``transform`` did to ``model``, or on a dense model what it would do (a dry run; nothing changes).

    Takes ``transform``'s keywords. A dry run has nothing to ``check``; without ``num_experts`` it only lists the FFNs.
    """
    root = bare_module(model)
    done = root.__dict__.get("_moefy_report")
    if done is not None and first_transformed(root) is not None:
        return done
    resolved = _optional_config(config, num_experts, top_k, options)
    found = survey(root, example_args, example_kwargs)
    matches = select(found.matches, include, exclude)
    planned = planned_routers(matches, resolved)
    return make_report(
        root, found, matches, resolved, planned, count_parameters(root), None, (), dry_run=True
    )


def make_report(
    model: nn.Module,
    found: Survey,
    matches: list[Match],
    config: MoEConfig | None,
    planned: dict[str, Router],
    params_dense: int,
    verdict: Comparison | None,
    passes: tuple[PassRecord, ...],
    *,
    dry_run: bool,
) -> RewriteReport:
    """The report of a survey and what followed it."""
    layers = tuple(layer_record(m.record, config, planned.get(m.record.exit), verdict) for m in matches)
    if config is not None and callable(config.router):  # a name has a JSON form, and pickles
        config = dataclasses.replace(config, router=router_name(config.router))
    rewritten = [layer for layer in layers if layer.action == "moe"]
    added = sum(layer.params_total - layer.params_dense for layer in rewritten)
    active = sum(layer.params_active - layer.params_dense for layer in rewritten)
    weight = next(model.parameters(), torch.empty(0))
    return RewriteReport(
        model_class=type(model).__name__,
        layers=layers,
        config=config,
        dry_run=dry_run,
        params_dense=params_dense,
        params_total=params_dense + added,
        params_active=params_dense + active,
        dtype=str(weight.dtype).removeprefix("torch."),
        device=str(weight.device),
        trace_source=found.source,
        inputs=found.inputs,
        check_error=verdict.error if verdict is not None else None,
        check_tolerance=verdict.tolerance if verdict is not None else None,
        passes=passes,
        unseen=tuple(found.unseen),
        warnings=_warnings(config, layers, planned),
    )


def planned_routers(matches: list[Match], config: MoEConfig | None) -> dict[str, Router]:
    """The routers of the accepted FFNs, by the FFN's exit; without memory, to be looked at."""
    if config is None:
        return {}
    like, planned = torch.empty(0, device="meta"), {}
    for record in (m.record for m in matches if m.record.accepted):
        place = record.fqn if record.form == "module" else record.entries[0]
        planned[record.exit] = configured_router(config, record.d_model, place, like)
    return planned


def layer_record(
    match: FFNMatch, config: MoEConfig | None, planned: Router | None, verdict: Comparison | None = None
) -> LayerRecord:
    """The numbers of one candidate. FLOPs are per token and forward: 2 per multiply-add, the router included."""
    experts, top_k = (config.num_experts, config.top_k) if config is not None else (1, 1)
    moe = match.accepted and config is not None
    router = count_parameters(planned) if planned is not None else 0
    flops = 2 * match.multiply_adds * match.calls
    exactness = "-"
    if planned is not None and planned.departure() is not None:
        exactness = NOT_EXACT
    elif moe:
        exactness = "exact" if verdict is None else f"exact {verdict.error:.0e}"
    return LayerRecord(
        fqn=match.fqn,
        action="moe" if match.accepted else "skipped",
        reason=match.reason,
        code=match.code,
        kind=match.kind,
        activation=match.activation,
        form=match.form,
        d_model=match.d_model,
        d_hidden=match.d_hidden,
        num_experts=experts if moe else 0,
        top_k=top_k if moe else 0,
        calls=match.calls,
        params_dense=match.params,
        params_total=match.params * experts + router if moe else match.params,
        params_active=match.params * top_k + router if moe else match.params,
        flops_dense=flops,
        flops_active=flops * top_k + 2 * router * match.calls if moe else flops,
        exactness=exactness,
    )


# -- the rewrite -----------------------------------------------------------------------------------------------------
def _rewrite(
    model: nn.Module, found: Survey, matches: list[Match], config: MoEConfig, check: bool
) -> tuple[Comparison | None, tuple[PassRecord, ...]]:
    accepted = [m for m in matches if m.record.accepted]
    work = config.num_experts * sum(m.record.params for m in accepted)
    layers: list[Layer | GraphLayer] = []
    records: tuple[PassRecord, ...] = ()
    modules = [m for m in accepted if m.record.form != "graph"]
    index = ModelIndex(model)
    layers += [build_layer(index, m, config) for m in progress(modules, "layers", work=work)]
    graphs = [m for m in accepted if m.record.form == "graph"]
    if graphs and isinstance(model, fx.GraphModule):
        graph_layer, record = build_graph_layer(model, graphs, found.parts[0].trace, config)
        layers.append(graph_layer)
        records = (record,)
    installed: list[Layer | GraphLayer] = []
    try:
        for layer in layers:
            installed.append(layer)
            layer.install(model)
        verdict = _verify(found, accepted) if check else None
    except BaseException:
        for layer in reversed(installed):
            layer.remove(model)
        raise
    for layer in layers:
        layer.seal()
    _break_symmetry(model, layers, config)
    return verdict, records


def _verify(found: Survey, accepted: list[Match]) -> Comparison | None:
    """Run every part again and compare with its dense outputs; None when there are no real outputs."""
    dtype = min(
        (m.region.entries[0].weight_node.meta["dtype"] for m in accepted),  # type: ignore[union-attr]
        key=lambda d: torch.finfo(d).bits,
    )
    worst: Comparison | None = None
    for part in found.parts:
        if part.trace.outputs is None:
            continue
        routers = [m for m in part.module.modules() if isinstance(m, Router)]
        aside = [r for r in routers if r.departure() is not None or not r.self_contained]
        with quiet(part.module), even_routing(aside):
            verdict = compare(part.outputs, part.module(*part.inputs.args, **part.inputs.kwargs), dtype)
        if not verdict.passed:
            raise CheckFailed(verdict.error, verdict.tolerance, verdict.dtype, verdict.where)
        if worst is None or verdict.error > worst.error:
            worst = verdict
    return worst


def _break_symmetry(model: nn.Module, layers: list[Layer | GraphLayer], config: MoEConfig) -> None:
    if config.expert_noise == 0:
        return
    for layer in layers:
        for fqn in layer.origins:
            add_noise(model.get_parameter(fqn), config.expert_noise, config.seed, fqn)


# -- what may be transformed -----------------------------------------------------------------------------------------
def bare_module(model: nn.Module) -> nn.Module:
    """The module itself: the one inside for a ``torch.compile`` wrapper.

    Raises:
        ConfigError: no module, or one that is wrapped for data parallelism already.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("model", got=type(model).__name__, expected="an nn.Module or fx.GraphModule")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "model", got="a TorchScript module", expected="the nn.Module that it was scripted from"
        )
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # importing it here would cost seconds
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        return cast(nn.Module, model._orig_mod)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers):
        name = type(model).__name__
        raise ConfigError("model", got=name, expected=f"the bare module; transform it before {name}")
    return model


def refuse_sharded(model: nn.Module) -> None:
    """Raise ``ConfigError`` for a model whose parameters are distributed over ranks already."""
    for fqn, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            got = f"a DTensor as parameter {fqn}"
            raise ConfigError("model", got=got, expected="plain parameters; transform it before fully_shard")


def refuse_transformed(model: nn.Module) -> None:
    """Raise ``AlreadyTransformed`` when ``transform`` was here before."""
    fqn = first_transformed(model)
    if fqn is not None:
        raise AlreadyTransformed(fqn)


def first_transformed(model: nn.Module) -> str | None:
    """FQN of the first module that ``transform`` put there. ``undo`` of a part may have left none."""
    for fqn, module in model.named_modules():
        if isinstance(module.__dict__.get("_dense"), Shell) or "_dense_graph" in module.__dict__:
            return fqn
    return None


def count_parameters(model: nn.Module) -> int:
    """Number of parameter elements, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def _optional_config(
    config: MoEConfig | None, num_experts: int | None, top_k: int | None, options: dict[str, Any]
) -> MoEConfig | None:
    """The config that the keywords ask for; None when they name no number of experts."""
    for name in options:
        if name not in MoEConfig.field_names():
            raise UnknownOption(name, MoEConfig.field_names(), where="MoEConfig")
    if config is None and num_experts is None:
        return None
    resolved = MoEConfig.resolve(config, num_experts=num_experts, top_k=top_k, **options)
    check_router(resolved)
    return resolved


def _warnings(
    config: MoEConfig | None, layers: tuple[LayerRecord, ...], planned: dict[str, Router]
) -> tuple[str, ...]:
    reasons = dict.fromkeys(router.departure() for router in planned.values())
    departures = [reason for reason in reasons if reason is not None]
    if config is not None and departures:
        name, why = router_name(config.router), "; ".join(departures)
        return (f"router {name!r}: {why}, so the output differs from the dense model's from the start",)
    if config is None or config.num_experts == 1 or config.expert_noise > 0:
        return ()
    if not any(layer.action == "moe" for layer in layers):
        return ()
    return (
        "identical experts give the router no gradient until they diverge; expert_noise=0.01 breaks the symmetry",
    )
