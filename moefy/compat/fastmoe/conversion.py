"""``fmoefy``: FastMoE's one-call conversion, by ``moefy.transform``.

    model = fmoefy(model, num_experts=8, top_k=2, gate="gshard")

Contract: any model, not only Megatron's. ``fmoe_num_experts`` counts the experts of one worker. The experts start as
copies of the dense FFN, which the original draws afresh: the model goes on from where it is. Every parameter gets the
tag ``dp_comm`` of the original.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import nn

from moefy.compat.fastmoe import gates
from moefy.compat.fastmoe.layers import mark_module_parallel_comm
from moefy.compat.single_process import group_size, refuse_ranks
from moefy.config import Capacity, RouterSpec
from moefy.errors import ConfigError, suggest
from moefy.nn import ExpertLinear, Router
from moefy.verbs import transform

ModelT = TypeVar("ModelT", bound=nn.Module)
GSHARD = Capacity(factor=1.2, eval_factor=2.4, rule="fastmoe_gshard")
SWITCH = dataclasses.replace(GSHARD, rule="fastmoe_switch")
STRATEGIES: dict[str, tuple[RouterSpec, Capacity | None]] = {
    "naive": (RouterSpec("top_k", bias=True), None),
    "noisy": (RouterSpec("noisy_top_k"), None),
    "gshard": (RouterSpec("gshard", bias=True), GSHARD),
    "switch": (RouterSpec("switch", noise="fastmoe", bias=True), SWITCH),
    "dc": (RouterSpec("dc", bias=True), None),
    "swipe": (RouterSpec("swipe", bias=True), None),
}
"""Router and capacity by Megatron's ``--balance-strategy``: those of the gates in ``moefy.compat.fastmoe.gates``."""
_BY_GATE: dict[Any, str] = {
    gates.NaiveGate: "naive",
    gates.NoisyGate: "noisy",
    gates.GShardGate: "gshard",
    gates.SwitchGate: "switch",
    gates.DCGate: "dc",
    gates.SwipeGate: "swipe",
}


def fmoefy(
    model: ModelT,
    fmoe_num_experts: int | None = None,
    distributed_experts: bool = True,
    hidden_hidden_size: int | None = None,
    top_k: int | None = None,
    gate: Any = None,
    megatron_version: str | None = None,
    *,
    num_experts: int | None = None,
    **options: Any,
) -> ModelT:
    """Turn every feed-forward network of ``model`` into a Mixture-of-Experts, in place.

    Args:
        model: any ``nn.Module``.
        fmoe_num_experts: experts of one worker.
        distributed_experts: whether workers hold different experts, tagged "none"; else all hold the same, tagged "dp".
        hidden_hidden_size: ``None``: experts are as wide as the FFN they copy.
        top_k: K; 1 for "switch", else 2 by default.
        gate: a key of ``STRATEGIES``, a gate class of ``moefy.compat.fastmoe.gates``, or what ``router=`` of
            ``moefy.transform`` takes; "naive" by default.
        megatron_version: without effect.
        num_experts: the older name of ``fmoe_num_experts``.
        options: of ``moefy.transform``, say ``example_args`` or ``aux_loss``.

    Raises:
        ConfigError: for no or two numbers of experts, or another hidden width.
        ParallelismNeeded: for ``distributed_experts`` in several processes.
        MoefyError: as ``moefy.transform``.
    """
    given = [n for n in (fmoe_num_experts, num_experts) if n is not None]
    if len(given) != 1:
        raise ConfigError("fmoe_num_experts", got=given, expected="one number of experts per worker")
    if hidden_hidden_size is not None:
        expected = "None: an expert is as wide as the FFN it copies"
        raise ConfigError("hidden_hidden_size", got=hidden_hidden_size, expected=expected)
    refuse_ranks("fmoefy: distributed_experts", group_size() if distributed_experts else 1)
    router, capacity = _strategy(gate)
    top_k = (1 if gate in ("switch", gates.SwitchGate) else min(2, given[0])) if top_k is None else top_k
    chosen: dict[str, Any] = {"router": router, **({} if capacity is None else {"capacity": capacity})}
    transform(model, given[0], top_k=top_k, **{**chosen, **options})
    for module in model.modules():
        if isinstance(module, ExpertLinear):
            for parameter in module.parameters(recurse=False):
                parameter.dp_comm = "none" if distributed_experts else "dp"  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, Router):
            mark_module_parallel_comm(module, "gate")
    return model


def _strategy(gate: Any) -> tuple[Any, Capacity | None]:
    """The router and the capacity of a ``gate`` argument."""
    name = "naive" if gate is None else _BY_GATE.get(gate) if isinstance(gate, type) else gate
    if isinstance(name, str) and name in STRATEGIES:
        return STRATEGIES[name]
    if isinstance(gate, type) and issubclass(gate, gates.BaseGate):
        known = [cls.__name__ for cls in _BY_GATE]
        raise ConfigError(
            "gate", got=gate.__name__, expected=f"one of {known}{suggest(gate.__name__, known)}"
        )
    return gate, None
