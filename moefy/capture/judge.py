"""Judge matches by what a trace cannot show: hooks, overridden forwards, parameters that other modules own too.

Contract: an accepted match stays, or is refused with the code "unsupported-hook" or "shared-weight". What a rewrite
would lose or break is refused here, since nobody would notice it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from moefy.model.paths import find_module, find_parameter, join
from moefy.passes.match import Match

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def judge(model: nn.Module, matches: Iterable[Match]) -> Iterator[Match]:
    """The matches, those that the live modules speak against as refused."""
    tied = _tied_parameters(model)
    return (_judge(model, match, tied) for match in matches)


def _judge(model: nn.Module, match: Match, tied: set[int]) -> Match:
    # "raw-parameters" asks the user to move the FFN into a module of its own. A hook would be the next refusal.
    if not match.record.accepted and match.record.code != "raw-parameters":
        return match
    hooked = _hooked(model, match)
    if hooked is not None:
        reason = f"a hook or an overridden forward on {hooked or '(root)'} would be lost"
        return match.refused("unsupported-hook", reason)
    if not match.record.accepted or match.record.form == "graph":
        return match
    for site in (*match.region.entries, match.region.exit):
        for fqn in (site.weight, site.bias):
            if fqn is not None and id(find_parameter(model, fqn)) in tied:
                return match.refused("shared-weight", f"{fqn} is tied to a parameter of another module")
    return match


def _hooked(model: nn.Module, match: Match) -> str | None:
    """The first module of the FFN with a hook, or with a forward of its own that the rewrite would drop.

    The trace has seen the forwards of an owner's other children (activations). It cannot have seen a hook.
    """
    linears = [site.name for site in (*match.region.entries, match.region.exit)]
    owner = match.record.fqn if match.record.form == "module" else None
    for path in dict.fromkeys(linears if owner is None else [*linears, owner]):
        module = find_module(model, path)
        if module is not None and (_has_hook(module) or "forward" in module.__dict__):
            return path
    inside = find_module(model, owner) if owner is not None else None
    for name, module in inside.named_modules() if inside is not None else ():
        if _has_hook(module):
            return join(owner or "", name)
    return None


def _has_hook(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _tied_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that two modules own."""
    owners: dict[int, int] = {}
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.setdefault(id(parameter), id(module)) != id(module):
                tied.add(id(parameter))
    return tied
