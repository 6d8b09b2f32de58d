"""Replay: experts from a recorded trace, weights from the current logits (SmartMoE's FileGate, Megatron-Core's router
replay).

T tokens, K top-k.

    index = trace[step]     w = softmax over the logits of these experts, or as ``ScoreTopK`` weighs them

Contract: ``record`` writes down what every router of a model chose, one entry per forward; ``Trace.save`` and
``Trace.load`` keep it in a file; a "replay" router given the trace repeats it, with gradients through the weights.
Which entry is played is ``step``, a tensor: it does not move within a forward, so that a checkpoint replays the same
entry. ``play`` moves it at each call of the model.

    >>> with record(model) as trace:
    ...     model(batch)
    >>> trace.save("routing.pt")
    >>> twin = moefy.transform(dense, 8, router=moefy.RouterSpec("replay", trace="routing.pt"))
    >>> with play(twin):
    ...     twin(batch)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moefy.errors import ConfigError, RoutingError, ShapeError
from moefy.nn.routers.base import Call, Router, register_router
from moefy.nn.routers.scored import ScoreTopK, all_scores, renormalized
from moefy.nn.routing.routing import Choice, Routing


class Trace:
    """The choices of routers: ``entries[fqn]`` is a list of ``[T, K]`` int64 tensors on the CPU, one per forward."""

    def __init__(self, entries: Mapping[str, list[Tensor]] | None = None) -> None:
        self.entries: dict[str, list[Tensor]] = {} if entries is None else dict(entries)

    def of(self, fqn: str) -> Tensor:
        """``[steps, T, K]``: the entries of one router, all of one shape.

        Raises:
            ConfigError: for a router that the trace does not have.
            ShapeError: when its forwards had different numbers of tokens.
        """
        if fqn not in self.entries:
            raise ConfigError("trace", got=fqn, expected=f"a router of the trace: {sorted(self.entries)}")
        shapes = {tuple(index.shape) for index in self.entries[fqn]}
        if len(shapes) != 1:
            raise ShapeError(f"{fqn}: the trace has entries of several shapes, {sorted(shapes)}")
        return torch.stack(self.entries[fqn])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the entries to a file that ``load`` reads."""
        torch.save(self.entries, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """The trace of a file that ``save`` wrote; the file holds tensors and names, no code."""
        return cls(torch.load(path, map_location="cpu", weights_only=True))


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Write down what every router of ``model`` chooses, before capacity drops any; recomputation is left out."""
    trace = Trace()

    def note(router: nn.Module, args: Any, routing: Routing) -> None:
        assert isinstance(router, Router)
        if torch._C._current_graph_task_id() == -1:
            index_TK = routing.choice.index.detach().to("cpu", torch.int64)
            trace.entries.setdefault(names[router], []).append(index_TK)

    names = {m: m.fqn or name for name, m in model.named_modules() if isinstance(m, Router)}
    handles = [router.register_forward_hook(note) for router in names]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def play(model: nn.Module, start: int = 0) -> Iterator[None]:
    """Let the replay routers of ``model`` play entry ``start`` at its first call, and the next at each further one."""
    routers = [m for m in model.modules() if isinstance(m, ReplayRouter)]
    for router in routers:
        router.step.fill_(start - 1)

    def advance(module: nn.Module, args: Any) -> None:
        for router in routers:
            router.step.add_(1)

    handle = model.register_forward_pre_hook(advance)
    try:
        yield
    finally:
        handle.remove()


@register_router("replay")
class ReplayRouter(ScoreTopK):
    """A router that repeats a trace.

    Args:
        top_k: K, which must be the trace's.
        trace: the path of a saved ``Trace``, which has this router's ``fqn``; ``None``: call ``set_trace`` later.
        options: of ``ScoreTopK``, for the weights.

    Buffers, not saved:
        ``trace [steps, T, K]`` int64; ``step``, 0-dim int64: the entry that is played, modulo their number.

    Raises:
        ConfigError: for a trace without this router.
        RoutingError: from ``forward``, without a trace.
        ShapeError: from ``forward``, for another number of tokens or K.
    """

    formula: ClassVar[str] = "c from a recorded trace;  w = softmax(l[c])"
    source: ClassVar[str] = "SmartMoE, Megatron-Core"
    trace: Tensor
    step: Tensor
    own_renormalize: ClassVar[bool] = True

    def __init__(
        self, d_model: int, num_experts: int, top_k: int, *, trace: str | None = None, **options: Any
    ) -> None:
        super().__init__(d_model, num_experts, top_k, **options)
        device = options.get("device")
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
        self._complete = True
        empty = torch.empty((0, 0, top_k), dtype=torch.int64, device=device)
        self.register_buffer("trace", empty, persistent=False)
        if trace is not None and not isinstance(trace, str | os.PathLike):
            raise ConfigError("trace", got=trace, expected="the path of a saved Trace")
        if trace is not None and not self.step.is_meta:
            self.set_trace(Trace.load(trace).of(self.fqn))

    def set_trace(self, index: Tensor) -> None:
        """Play ``index [steps, T, K]``, or ``[T, K]`` for a single entry, from its beginning.

        Raises:
            ShapeError: for another K.
        """
        index = index if index.dim() == 3 else index.unsqueeze(0)
        if index.dim() != 3 or index.shape[2] != self.top_k:
            raise ShapeError(f"trace: got {tuple(index.shape)}; expected [steps, T, {self.top_k}]")
        self.trace = index.to(self.step.device, torch.int64)
        self._complete = bool(((index >= 0) & (index < self.num_experts)).all())
        self.step.zero_()

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of ``ScoreTopK`` do, and the trace drops no slot."""
        return super().sums_to_one and self._complete

    @property
    def self_contained(self) -> bool:
        """False: there must be as many tokens as in the trace."""
        return False

    def decide(self, x: Tensor, call: Call) -> Choice:
        """The recorded experts, weighted by the logits of this call."""
        logits_TE = self.logits(x, call.feature_dim)
        index_TK = self._entry(logits_TE.shape[0], call.top_k)
        valid_TK = (index_TK >= 0) & (index_TK < self.num_experts)
        addresses_TK = index_TK.masked_fill(~valid_TK, 0)
        scores_TE = all_scores(logits_TE, self.score)
        if self.renormalize:
            weights_TK = renormalized(logits_TE, addresses_TK, self.score)
        else:
            weights_TK = scores_TE.gather(1, addresses_TK)
        return Choice(
            index=index_TK,
            weights=(weights_TK * self.scale).masked_fill(~valid_TK, 0.0),
            logits=logits_TE,
            scores=scores_TE,
        )

    def _entry(self, tokens: int, top_k: int) -> Tensor:
        steps = self.trace.shape[0]
        if steps == 0:
            raise RoutingError(f"{self.fqn or 'the replay router'}: no trace; call set_trace")
        if (tokens, top_k) != tuple(self.trace.shape[1:]):
            raise ShapeError(
                f"{self.fqn or 'the replay router'}: {tokens} tokens, top-{top_k}; the trace has "
                f"{self.trace.shape[1]}, top-{self.trace.shape[2]}"
            )
        return self.trace.index_select(0, self.step.remainder(steps).reshape(1)).squeeze(0)
