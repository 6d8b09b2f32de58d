"""Match: every FFN candidate of a trace, how each can be rewritten, and why the others cannot.

    >>> [(match.record.fqn, match.record.form) for match in match_ffns(trace_module(model, (x,)))]
    [('layers.0.mlp', 'module'), ('layers.1', 'linears')]

The walk finds regions (``regions``), the rules refuse (``refusals``), the modules around say how a region can be
written back (``placement``). The same weights at several places are one FFN that is called several times. Every
candidate yields a ``Match``; a refused one has ``record.code`` and ``record.reason``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from moefy.passes.match.body_graph import OutsideOwner, body_graph, tail_graph
from moefy.passes.match.classify_body import classify_body
from moefy.passes.match.codes import Code, Refusal
from moefy.passes.match.facts import Facts
from moefy.passes.match.placement import Placement, as_linears, place
from moefy.passes.match.refusals import Refusals, is_lora
from moefy.passes.match.regions import Region, find_regions
from moefy.passes.trace import Trace
from moefy.passes.trace.vocabulary import CASTS, DROPOUTS, RESHAPES, SPLITS, op_name, parameter_only
from moefy.records import FFNMatch, KnownBody


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """One candidate with all its call sites; ``record`` is its public face.

    Attributes:
        regions: the call sites; the first describes the candidate.
        record: what users see.
        returns_tuple: whether the owner answers ``(out, bias)`` (Megatron).
        body: what lies between the linears, relative to the owner; for the form "module".
        tail: the dropouts behind the exit, likewise.
        known: the body by name, when the expert op computes it by itself.
    """

    regions: tuple[Region, ...]
    record: FFNMatch
    returns_tuple: bool = False
    body: fx.Graph | None = None
    tail: fx.Graph | None = None
    known: KnownBody | None = None

    @property
    def region(self) -> Region:
        """The first call site."""
        return self.regions[0]

    def refused(self, code: Code, reason: str) -> Match:
        """This match with a refusal, in place of the one it may have."""
        return dataclasses.replace(self, record=dataclasses.replace(self.record, code=code, reason=reason))


def match_ffns(trace: Trace) -> list[Match]:
    """Every candidate of the trace, in execution order of its first call."""
    return Matcher(trace).run()


class Matcher:
    """The candidates of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.facts = trace, Facts(trace)
        self.refusals = Refusals(self.facts)
        self._known: dict[str, KnownBody | None] = {}

    def run(self) -> list[Match]:
        """Group the candidate regions by their weights and judge each group."""
        groups: dict[tuple[tuple[str, ...], str], list[Region]] = {}
        for region in find_regions(self.trace, self.facts.sites):
            if region.same_source or is_lora(region) or not region.issues:
                groups.setdefault(region.key, []).append(region)
        return [self._judge(regions) for regions in groups.values()]

    def _judge(self, regions: Sequence[Region]) -> Match:
        refusal = self.refusals.of(regions)
        placement = place(self.facts, regions)
        body = tail = None
        if refusal is None and placement.form == "module":
            try:
                body = body_graph(self.trace, placement.regions[0], placement.fqn)
                tail = tail_graph(self.trace, placement.regions[0], placement.fqn)
            except OutsideOwner:
                swapped = as_linears(self.facts, regions)
                placement = dataclasses.replace(
                    swapped, fqn=placement.fqn, returns_tuple=placement.returns_tuple
                )
        if refusal is None and placement.form is None:
            refusal = self.refusals.unwritable(regions[0])
        known = self._probe(placement.regions[0])
        record = _record(placement, refusal, known)
        return Match(placement.regions, record, placement.returns_tuple, body, tail, known)

    def _probe(self, region: Region) -> KnownBody | None:
        """What the body computes, found by running it on numbers; ``None`` when it has parameters or is not known."""
        if region.issues:
            return None
        graph = body_graph(self.trace, region, None)
        if any(n.op == "get_attr" for n in graph.nodes):
            return None
        widths = [entry.out_features for entry in region.entries]
        signature = f"{graph} {widths}"
        if signature not in self._known:
            body = fx.GraphModule(torch.nn.Module(), graph)
            self._known[signature] = classify_body(body.forward, widths)  # a call of it would print on errors
        return self._known[signature]


def _record(placement: Placement, refusal: Refusal | None, known: KnownBody | None) -> FFNMatch:
    region = placement.regions[0]
    sites = region.sites
    splits = any(op_name(n) in SPLITS or op_name(n) == "getitem" for n in region.body)
    return FFNMatch(
        fqn=placement.fqn,
        entries=tuple(entry.name for entry in region.entries),
        exit=region.exit.name,
        kind="glu" if len(region.entries) > 1 or splits else "mlp",
        activation=known.activation if known is not None else _op_names(region),
        d_model=region.exit.out_features,
        d_hidden=region.exit.in_features,
        bias=any(site.bias is not None for site in sites),
        form=placement.form or "linears",
        calls=len(placement.regions),
        params=sum(s.in_features * s.out_features + s.out_features * bool(s.bias) for s in sites),
        multiply_adds=sum(s.in_features * s.out_features for s in sites),
        code=refusal[0] if refusal else None,
        reason=refusal[1] if refusal else None,
    )


def _op_names(region: Region) -> str:
    """The names of the body's ops, for a body that is none of the known ones."""
    plain = CASTS | RESHAPES | SPLITS | DROPOUTS | {"getitem", "mul"}
    names = [op_name(n) for n in region.body if not parameter_only(n)]
    return "+".join(dict.fromkeys(n for n in names if n not in plain)) or "product"
